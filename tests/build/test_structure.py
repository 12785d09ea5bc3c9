"""The source tree obeys its rules: layers, exported symbols, lengths, mirrored tests, headers that compile alone.

Each check is a program under tools/ that can be run by hand; test_checks.py shows that they find what they look for.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_check(name: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, f"{name} says:\n{result.stdout}{result.stderr}"


def test_includes_go_down_the_layers() -> None:
    run_check("check_layers.py")


def test_the_tree_is_in_shape() -> None:
    run_check("check_tree.py")


def test_every_header_compiles_alone() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no compiler {compiler}")
    run_check("check_headers.py", *(["--all"] if os.environ.get("NANOBRAID_TEST_FULL") == "1" else []))


def kernel_objects(pattern: str) -> list[str]:
    """Those of the build folder; skips the test where none is named."""
    build = os.environ.get("NANOBRAID_BUILD_DIR")
    if not build:
        pytest.skip("NANOBRAID_BUILD_DIR does not name a build folder with kernel objects")
    objects = sorted(str(path) for path in Path(build).glob(pattern))
    assert objects, f"NANOBRAID_BUILD_DIR={build} holds no kernels_*.o"
    return objects


def test_kernel_objects_export_only_their_table() -> None:
    run_check("check_isa_symbols.py", *kernel_objects("**/kernels_*.o"))


def test_kernel_objects_hold_the_instructions_of_their_name() -> None:
    if platform.machine() != "x86_64":
        pytest.skip(f"the rules are for x86-64, this is {platform.machine()}")
    run_check("check_isa_instructions.py", *kernel_objects("CMakeFiles/nb_kernels_*.dir/**/kernels_*.o"))
