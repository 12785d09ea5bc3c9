#!/usr/bin/env python3
"""Tells which CUDA kernels the emulated tests have never run; exit 1 if there are any.

Kernels are the `__global__` functions of the sources of the library: cuda/*.cu and what they include. Which ran is what
the tests have written into RUNS (ctest has them do so; tests/cuda_emulation/coverage.cpp); tests that have written
nothing since the program was built are run here.

Usage: kernel_coverage.py PROGRAM RUNS, such as build/cuda_emulation_tests build/cuda_emulation/runs
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

CUDA = Path(__file__).resolve().parent.parent / "cuda"


def library_sources(folder: Path = CUDA) -> dict[str, str]:
    """The sources of the library without comments, by name."""
    sources: dict[str, str] = {}
    names = sorted(path.name for path in folder.glob("*.cu"))
    if not names:
        raise FileNotFoundError(f"no sources in {folder}")
    while names:
        name = names.pop()
        if name not in sources:
            text = (folder / name).read_text(encoding="utf-8")
            sources[name] = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
            names += re.findall(r'#include "cuda/(\w+\.\w+)"', text)
    return sources


def global_functions(source: str) -> list[str]:
    """Names of the kernels in a source."""
    bounds = r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?"
    return re.findall(rf"__global__\s+void\s+{bounds}(\w+)\s*\(", source)


def tests_of(program: Path) -> list[str]:
    listed = subprocess.run([program, "--gtest_list_tests"], capture_output=True, text=True, check=True).stdout
    tests, suite = [], ""
    for line in listed.splitlines():
        name = line.split("#")[0].rstrip()
        if name.startswith("  "):
            tests.append(suite + name.strip())
        elif name.endswith("."):
            suite = name
    return tests


def run_kernels(program: Path, runs: Path) -> set[str]:
    """What the tests have run, after running those that have not written it since the program was built."""
    built = program.stat().st_mtime_ns
    files = {test: runs / f"{test.replace('/', '-')}.txt" for test in tests_of(program)}
    stale = [test for test, file in files.items() if not file.is_file() or file.stat().st_mtime_ns < built]
    if stale:
        runs.mkdir(parents=True, exist_ok=True)
        print(f"running {len(stale)} of {len(files)} tests")
        environment = {**os.environ, "NANOBRAID_EMULATED_KERNELS": str(runs)}
        command = [program, f"--gtest_filter={':'.join(stale)}", "--gtest_brief=1"]
        subprocess.run(command, env=environment, check=True)
    return {name for file in files.values() for name in file.read_text(encoding="utf-8").split()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("runs", type=Path)
    options = parser.parse_args()
    kernels = set(global_functions("".join(library_sources().values())))
    never = sorted(kernels - run_kernels(options.program.resolve(), options.runs.resolve()))
    print(f"{len(kernels) - len(never)} of {len(kernels)} kernels have run")
    for name in never:
        print(f"never run: {name}")
    return 1 if never or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
