#!/usr/bin/env python3
"""Checks the shape of the source tree. Prints FILE:LINE for each violation; exit 1.

- length: 500 lines a file; 800 in cpp/ops/cpu and cuda; 1200 in tests; CMakeLists.txt 250; Unicode tables are exempt;
- tests mirror sources: cpp/<module>/**/<file>.cpp has tests/cpp/<module>/<file>_test.cpp, or stands in COVERED_BY;
- every header of cpp/ begins with a comment of 3 lines or more, then #pragma once;
- no words that mark unfinished work, and no paths of one machine;
- no compiler flag that gives up IEEE arithmetic; getenv only in cpp/base/env.cpp.

Usage: check_tree.py [--root DIR]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("cpp", "cuda", "python", "tools", "tests", "demo", "eval")
CODE = {".h", ".cpp", ".cu", ".cuh", ".inc", ".py", ".pyi", ".sh", ".cmake"}
SKIPPED = {"__pycache__", "results", "node_modules"}

LIMITS = (("tests/", 1200), ("cpp/ops/cpu/", 800), ("cuda/", 800), ("", 500))  # the first prefix that fits
CMAKE_LIMIT = 250
UNLIMITED = re.compile(r"(unicode|nfc)_tables\.(h|cpp)$")

# Sources whose tests stand in a file of another name.
COVERED_BY = {
    "cpp/base/dtype.cpp": "tests/cpp/base/base_test.cpp",
    "cpp/base/env.cpp": "tests/cpp/base/base_test.cpp",
    "cpp/base/error.cpp": "tests/cpp/base/base_test.cpp",
    "cpp/base/log.cpp": "tests/cpp/base/base_test.cpp",
    "cpp/model/config.cpp": "tests/cpp/model/loader_test.cpp",
    "cpp/model/families/llama.cpp": "tests/cpp/model/family_test.cpp",
    "cpp/model/families/mistral.cpp": "tests/cpp/model/family_test.cpp",
    "cpp/model/families/qwen2.cpp": "tests/cpp/model/family_test.cpp",
    "cpp/model/families/qwen3.cpp": "tests/cpp/model/family_test.cpp",
    "cpp/model/model.cpp": "tests/cpp/model/decoder_test.cpp",
    "cpp/ops/backends.cpp": "tests/cpp/ops/ops_test.cpp",
    "cpp/ops/check_plan.cpp": "tests/cpp/ops/attention_test.cpp",
    "cpp/ops/cpu/isa/kernels_avx2.cpp": "tests/cpp/ops/ops_test.cpp",
    "cpp/ops/cpu/isa/kernels_avx512.cpp": "tests/cpp/ops/ops_test.cpp",
    "cpp/ops/cpu/isa/kernels_avx512bf16.cpp": "tests/cpp/ops/ops_test.cpp",
    "cpp/ops/cpu/isa/kernels_avxvnni.cpp": "tests/cpp/ops/ops_test.cpp",
    "cpp/ops/cpu/isa/kernels_neon.cpp": "tests/cpp/ops/ops_test.cpp",
    "cpp/ops/cpu/isa/kernels_neon_dotprod.cpp": "tests/cpp/ops/ops_test.cpp",
    "cpp/ops/cpu/isa/kernels_neon_i8mm.cpp": "tests/cpp/ops/ops_test.cpp",
    "cpp/ops/cpu/isa/kernels_scalar.cpp": "tests/cpp/ops/ops_test.cpp",
    "cpp/ops/cpu/reference/reference.cpp": "tests/cpp/ops/ops_test.cpp",
    "cpp/ops/linear_weight.cpp": "tests/cpp/ops/linear_test.cpp",
    "cpp/quant/kv_format.cpp": "tests/cpp/quant/format_test.cpp",
    "cpp/text/unicode_tables.cpp": "tests/cpp/text/unicode_test.cpp",
    "cpp/text/nfc_tables.cpp": "tests/cpp/text/nfc_test.cpp",
}

# Written in pieces, so that this file does not find itself.
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
MACHINE_PATH = re.compile(r"(?<![\w.}])/(?:ro" + r"ot|ho" + r"me|wo" + r"rk|Us" + r"ers|mn" + r"t)/[\w.]")
FORBIDDEN_FLAG = re.compile(r"-f(?:fast|unsafe|associative)-math|-Of" + r"ast|use_fast" + r"_math")
GETENV = re.compile(r"\b(?:secure_)?getenv\s*\(")
MIN_COMMENT_LINES = 3


def code_files(root: Path) -> list[Path]:
    files = [root / "CMakeLists.txt"] if (root / "CMakeLists.txt").is_file() else []
    for folder in FOLDERS:
        for path in (root / folder).rglob("*"):
            is_code = path.suffix in CODE or path.name == "CMakeLists.txt"
            if is_code and path.is_file() and not SKIPPED.intersection(path.relative_to(root).parts):
                files.append(path)
    return sorted(files)


def check_length(name: str, lines: list[str]) -> Iterator[str]:
    if UNLIMITED.search(name):
        return
    is_cmake = name.endswith("CMakeLists.txt")
    limit = CMAKE_LIMIT if is_cmake else next(limit for prefix, limit in LIMITS if name.startswith(prefix))
    if len(lines) > limit:
        yield f"{name}:{limit + 1}: {len(lines)} lines, the limit is {limit}"


def check_words(name: str, lines: list[str]) -> Iterator[str]:
    is_cmake = name.endswith(("CMakeLists.txt", ".cmake"))
    is_native = name.startswith(("cpp/", "cuda/", "python/bindings/")) and name != "cpp/base/env.cpp"
    for number, line in enumerate(lines, 1):
        if UNFINISHED.search(line):
            yield f"{name}:{number}: marks unfinished work: {line.strip()}"
        if MACHINE_PATH.search(line):
            yield f"{name}:{number}: a path of one machine: {line.strip()}"
        if is_cmake and FORBIDDEN_FLAG.search(line):
            yield f"{name}:{number}: a flag that gives up IEEE arithmetic: {line.strip()}"
        if is_native and GETENV.search(line):
            yield f"{name}:{number}: only cpp/base/env.cpp reads the environment"


def check_header(name: str, lines: list[str]) -> Iterator[str]:
    if not (name.startswith("cpp/") and name.endswith(".h")):
        return
    comment = next((i for i, line in enumerate(lines) if not line.startswith("//")), len(lines))
    if comment < MIN_COMMENT_LINES:
        yield f"{name}:1: begins with {comment} lines of comment, expected at least {MIN_COMMENT_LINES}"
    if comment >= len(lines) or lines[comment] != "#pragma once":
        yield f"{name}:{comment + 1}: expected #pragma once after the comment"


def check_mirror(root: Path) -> Iterator[str]:
    for path in sorted((root / "cpp").rglob("*.cpp")):
        name = path.relative_to(root).as_posix()
        mirror = f"tests/cpp/{path.relative_to(root).parts[1]}/{path.stem}_test.cpp"
        test = COVERED_BY.get(name, mirror)
        if not (root / test).is_file():
            yield f"{name}:1: has no test: {test} does not exist"
        elif name in COVERED_BY and test != mirror and (root / mirror).is_file():
            yield f"{name}:1: {mirror} exists, so COVERED_BY in check_tree.py need not name this file"
    if (root / "cpp" / "base").is_dir():  # the real tree, not a piece of one
        for name in COVERED_BY:
            if not (root / name).is_file() and (root / name).parent.is_dir():
                yield f"{name}:1: in COVERED_BY of check_tree.py, but does not exist"


def violations(root: Path) -> Iterator[str]:
    files = code_files(root)
    if not files:
        yield f"{root}: no sources"
    for path in files:
        name = path.relative_to(root).as_posix()
        lines = path.read_text(encoding="utf-8").splitlines()
        for check in (check_length, check_words, check_header):
            yield from check(name, lines)
    yield from check_mirror(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    found = list(violations(parser.parse_args().root))
    print("\n".join(found) if found else "tree: ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
