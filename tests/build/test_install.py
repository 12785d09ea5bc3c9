"""`cmake --install` gives what a program outside the tree needs: find_package(nanobraid), headers, library, demos."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nanobraid import models

ROOT = Path(__file__).resolve().parents[2]
BUILD = os.environ.get("NANOBRAID_BUILD_DIR")

PROJECT = """\
cmake_minimum_required(VERSION 3.24)
project(outside LANGUAGES CXX)
find_package(nanobraid {version} REQUIRED)
add_executable(generate generate.cpp)
target_link_libraries(generate PRIVATE nanobraid::nanobraid)
target_compile_options(generate PRIVATE -Wall -Wextra -Werror)
"""


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


def checked(*arguments: str | Path) -> str:
    done = command(*arguments)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not BUILD:
        pytest.skip("NANOBRAID_BUILD_DIR does not name a build folder to install from")
    prefix = tmp_path_factory.mktemp("install") / "prefix"
    checked("cmake", "--install", BUILD, "--prefix", prefix)
    return prefix


def outside_project(folder: Path, version: str) -> Path:
    """The sources of the demo in a folder of their own, which knows nothing of this tree."""
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(PROJECT.format(version=version))
    for name in ("generate.cpp", "demo_options.h"):
        shutil.copy(ROOT / "demo" / name, folder)
    return folder


def test_a_program_outside_the_tree_is_built_and_gives_the_same(prefix: Path, tmp_path: Path) -> None:
    source = outside_project(tmp_path / "source", "0.1")
    build = tmp_path / "build"
    checked("cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Release")
    checked("cmake", "--build", build)
    arguments = ("--model", models.pull(models.DEFAULT_MODEL), "--max-tokens", "16", "The capital of France is")
    text = checked(build / "generate", *arguments)
    assert "Paris" in text
    assert BUILD
    assert text == checked(Path(BUILD) / "demo" / "generate", *arguments)
    assert text == checked(prefix / "bin" / "generate", *arguments)


def test_another_version_is_refused(prefix: Path, tmp_path: Path) -> None:
    source = outside_project(tmp_path / "source", "99.0")
    done = command("cmake", "-S", source, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    assert done.returncode != 0
    assert "99.0" in done.stderr


def test_what_is_installed(prefix: Path) -> None:
    names = {path.relative_to(prefix).as_posix() for path in prefix.rglob("*") if path.is_file()}
    headers = {name.removeprefix("include/nanobraid/") for name in names if name.startswith("include/")}
    in_tree = {path.relative_to(ROOT / "cpp").as_posix() for path in (ROOT / "cpp").rglob("*.h")}
    assert headers == {name for name in in_tree if not name.startswith("ops/cpu/")}
    demos = {path.stem for path in (ROOT / "demo").glob("*.cpp")}
    assert {name.removeprefix("bin/") for name in names if name.startswith("bin/")} == demos
    assert len([name for name in names if name.endswith("libnanobraid.a")]) == 1
    assert not [name for name in names if "gtest" in name or "gmock" in name]
    for path in prefix.rglob("*.cmake"):
        assert str(ROOT) not in path.read_text(), f"{path} names the source tree"


def test_installed_headers_include_only_installed_headers(prefix: Path, tmp_path: Path) -> None:
    include = prefix / "include" / "nanobraid"
    source = tmp_path / "all.cpp"
    headers = sorted(path.relative_to(include).as_posix() for path in include.rglob("*.h"))
    source.write_text("".join(f'#include "{name}"\n' for name in headers))
    checked(os.environ.get("CXX", "g++"), "-std=c++20", "-fsyntax-only", "-I", include, source)


def test_the_python_package_has_no_headers() -> None:
    files = importlib.metadata.files("nanobraid") or []
    assert any(path.name.startswith("_core") for path in files)
    assert [str(path) for path in files if path.suffix in {".h", ".a", ".cmake"} or "bin/generate" in str(path)] == []
