#!/usr/bin/env python3
"""Checks that every header under cpp/ compiles alone. Prints the compiler's first error for each that does not; exit 1.

Exempt, because they are no headers of their own: the fragments under cpp/ops/cpu/isa/ that are compiled as part of
kernels_<isa>.cpp, inside its unnamed namespace. Their leading comment says so, and some kernels_*.cpp reaches them.

Not compiled again: a header that a source file under cpp/ includes before all else, which the build compiles without
precompiled headers. --all compiles these, too.

Usage: check_headers.py [--root DIR] [--jobs N] [--all]    The compiler is $CXX, or g++; through ccache where that is.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ISA = Path("cpp/ops/cpu/isa")
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def fragments(root: Path) -> set[Path]:
    """Headers that the kernel files reach and that say they are part of them."""
    reached: set[Path] = set()
    waiting = list((root / ISA).glob("kernels_*.cpp"))
    while waiting:
        path = waiting.pop()
        for target in INCLUDE.findall(path.read_text(encoding="utf-8")):
            for header in (path.parent / target, root / "cpp" / target):
                if header.is_file() and header not in reached and header.parent == root / ISA:
                    reached.add(header)
                    waiting.append(header)
    return {header for header in reached if "kernels_<isa>.cpp" in leading_comment(header)}


def compiled_by_the_build(root: Path) -> set[Path]:
    """Headers that stand before all else in a source file of the core."""
    first = []
    for path in (root / "cpp").rglob("*.cpp"):
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        code = next((line for line in lines if line and not line.startswith("//")), "")
        first += [root / "cpp" / target for target in INCLUDE.findall(code)]
    return set(first)


def leading_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("//")), len(lines))
    return "\n".join(lines[:end])


def compile_alone(header: Path, root: Path) -> str | None:
    """The first error, or None. The header is included into an empty file, as a real includer would see it.

    All paths are relative and the same each time, so that the compiler cache knows what it has compiled before.
    """
    name = header.relative_to(root / "cpp").as_posix()
    source = Path("build", "headers", name.replace("/", "-") + ".cpp")
    (root / source).write_text(f'#include "{name}"\n', encoding="utf-8")
    launcher = [found] if (found := shutil.which("ccache")) else []
    command = [*launcher, os.environ.get("CXX", "g++"), *FLAGS, "-I", "cpp", "-c", str(source), "-o", f"{source}.o"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if result.returncode == 0:
        return None
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    return (errors or result.stderr.splitlines() or ["compiler failed"])[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="also what the build compiles")
    args = parser.parse_args()
    root = args.root.resolve()
    headers = sorted(set((root / "cpp").rglob("*.h")) - fragments(root))
    if not headers:
        print(f"{root}: no headers under cpp/")
        return 1
    known = set() if args.all else compiled_by_the_build(root)
    headers = [header for header in headers if header not in known]
    (root / "build" / "headers").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        errors = list(pool.map(lambda header: compile_alone(header, root), headers))
    bad = [f"{header.relative_to(root)}: {error}" for header, error in zip(headers, errors, strict=True) if error]
    print("\n".join(bad) if bad else f"headers: ok ({len(headers)} compiled alone)")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
