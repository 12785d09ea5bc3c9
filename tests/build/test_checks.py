"""The checks under tools/ can fail: each violation, planted in a tiny tree, is found; without it the tree passes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
HEADER = "// What it is for.\n//\n// Not for anything else. Safe from any thread.\n#pragma once\n"

# Written in pieces, so that check_tree.py does not find them in this file.
UNFINISHED = ["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]
MACHINE_PATHS = ["/ro" + "ot/model.gguf", "/ho" + "me/someone/x", "/wo" + "rk/main"]
FLAGS = ["-ffast" + "-math", "-Of" + "ast", "--use_fast" + "_math"]
GETENV = "get" + "env"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return root


def run(tool: str, *arguments: object) -> tuple[int, str]:
    command = [sys.executable, str(TOOLS / tool), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stdout + result.stderr


def expect_found(tool: str, root: Path, *pieces: str) -> None:
    code, output = run(tool, "--root", root)
    assert code == 1, output
    for piece in pieces:
        assert piece in output, output


def expect_clean(tool: str, root: Path) -> None:
    code, output = run(tool, "--root", root)
    assert code == 0, output


# ---- check_layers.py ----

LAYER_TREE = {
    "cpp/base/a.h": "",
    "cpp/base/b.h": '#include "base/a.h"\n',
    "cpp/ops/o.cpp": '#include <vector>\n#include "base/a.h"\n#include "quant/q.h"\n',
    "cpp/quant/q.h": '#include "base/b.h"\n',
    "cpp/ops/cpu/isa/k.cpp": '#include "x.h"\n',
    "cpp/ops/cpu/isa/x.h": '#include "ops/o.h"\n',
    "cpp/engine/e.cpp": '#include "model/m.h"\n#include "kv/k.h"\n',
    "cuda/c.cu": '#include "ops/o.h"\n#include "local.cuh"\n',
    "cuda/local.cuh": "",
    "python/bindings/p.cpp": '#include "engine/e.h"\n#include "io/i.h"\n',
}


def test_layers_accepts_includes_that_go_down(tmp_path: Path) -> None:
    expect_clean("check_layers.py", write(tmp_path, LAYER_TREE))


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("cpp/base/n.cpp", "quant/q.h", "base is layer 0, quant is layer 1"),
        ("cpp/tensor/n.cpp", "quant/q.h", "tensor is layer 1, quant is layer 1"),
        ("cpp/quant/n.cpp", "text/t.h", "quant is layer 1, text is layer 1"),
        ("cpp/ops/n.cpp", "kv/k.h", "ops is layer 2"),
        ("cpp/kv/n.cpp", "io/i.h", "kv is layer 3, io is layer 3"),
        ("cpp/kv/n.cpp", "model/m.h", "kv is layer 3, model is layer 4"),
        ("cpp/io/n.cpp", "kv/k.h", "io is layer 3, kv is layer 3"),
        ("cpp/model/n.cpp", "sampling/s.h", "model is layer 4, sampling is layer 4"),
        ("cpp/model/families/n.cpp", "engine/e.h", "model is layer 4, engine is layer 5"),
        ("cpp/engine/n.cpp", "text/t.h", "engine does not include text"),
        ("cpp/engine/n.cpp", "io/i.h", "engine does not include io"),
        ("cpp/engine/n.cpp", "python/bindings/p.h", "layer 6"),
        ("cpp/ops/n.cpp", "cuda/c.cuh", "nobody includes cuda"),
        ("cpp/ops/n.cpp", "../../cuda/local.cuh", "nobody includes cuda"),
        ("python/bindings/n.cpp", "cuda/c.cuh", "nobody includes cuda"),
        ("cuda/n.cu", "kv/k.h", "cuda includes only base, ops, quant, tensor"),
        ("cuda/n.cu", "text/t.h", "cuda includes only"),
        ("cpp/base/n.cpp", "gtest/gtest.h", "belongs to no module"),
        ("cpp/base/n.cpp", "../ops/o.cpp", "base is layer 0, ops is layer 2"),
        ("cpp/novel/n.cpp", "base/a.h", "module novel has no layer"),
    ],
)
def test_layers_finds(tmp_path: Path, source: str, target: str, reason: str) -> None:
    write(tmp_path, LAYER_TREE)
    write(tmp_path, {source: f'// first line\n  #  include "{target}"\n'})
    line = 1 if "no layer" in reason else 2
    expect_found("check_layers.py", tmp_path, f"{source}:{line}: ", reason)


def test_layers_finds_an_empty_tree(tmp_path: Path) -> None:
    expect_found("check_layers.py", tmp_path, "no sources")


# ---- check_tree.py ----

TREE = {
    "CMakeLists.txt": "project(x)\nadd_compile_options(-ffp-contract=off)\n",
    "cpp/quant/a.h": HEADER,
    "cpp/quant/a.cpp": "int a;\n" * 500,
    "cpp/ops/cpu/k.cpp": "int k;\n" * 800,
    "cpp/text/unicode_tables.cpp": "int t;\n" * 3000,
    "tests/cpp/quant/a_test.cpp": "int t;\n" * 1200,
    "tests/cpp/ops/k_test.cpp": "",
    "tests/cpp/text/unicode_test.cpp": "",
    "tools/t.py": "# A HACKSAW, a path like https://host/wo" + "rk/x and mkstemp('aXXXXXX')\n",
}


def test_tree_accepts_good_files(tmp_path: Path) -> None:
    expect_clean("check_tree.py", write(tmp_path, TREE))


def tree_violations() -> list[tuple[str, str, str, str]]:
    cases = [
        ("a file of 501 lines", "cpp/quant/a.cpp", "int a;\n" * 501, "a.cpp:501: 501 lines, the limit is 500"),
        ("a kernel of 801 lines", "cpp/ops/cpu/k.cpp", "int k;\n" * 801, "the limit is 800"),
        ("a CUDA file of 801 lines", "cuda/k.cu", "int k;\n" * 801, "the limit is 800"),
        ("a test of 1201 lines", "tests/cpp/quant/a_test.cpp", "int t;\n" * 1201, "the limit is 1200"),
        ("a program of 501 lines", "tools/t.py", "x = 1\n" * 501, "the limit is 500"),
        ("a long CMakeLists.txt", "CMakeLists.txt", "set(x)\n" * 251, "CMakeLists.txt:251: 251 lines"),
        ("a source without a test", "cpp/quant/b.cpp", "", "b.cpp:1: has no test: tests/cpp/quant/b_test.cpp"),
        ("a nested one", "cpp/ops/cpu/isa/n.cpp", "", "has no test: tests/cpp/ops/n_test.cpp"),
        ("a header without comment", "cpp/quant/a.h", "#pragma once\n", "a.h:1: begins with 0 lines"),
        ("a short comment", "cpp/quant/a.h", "// One.\n// Two.\n#pragma once\n", "begins with 2 lines"),
        ("a header without guard", "cpp/quant/a.h", "// 1\n// 2\n// 3\nint x;\n", "a.h:4: expected #pragma once"),
        ("a header that is all comment", "cpp/quant/a.h", "// 1\n// 2\n// 3\n", "expected #pragma once"),
        ("the environment", "cpp/quant/a.cpp", f"auto x = std::{GETENV}(n);\n", "a.cpp:1: only cpp/base/env.cpp"),
        ("the environment, safely", "cuda/k.cu", f"\nsecure_{GETENV} (n);\n", "k.cu:2: only cpp/base/env.cpp"),
    ]
    cases += [(word, "demo/d.cpp", f"\n// {word}: later\n", "d.cpp:2: marks unfinished work") for word in UNFINISHED]
    cases += [(path, "eval/e.py", f'open("{path}")\n', "e.py:1: a path of one machine") for path in MACHINE_PATHS]
    cases += [(flag, "CMakeLists.txt", f"add({flag})\n", "CMakeLists.txt:1: a flag that gives up") for flag in FLAGS]
    return cases


@pytest.mark.parametrize(("what", "name", "content", "message"), tree_violations(), ids=lambda value: str(value)[:30])
def test_tree_finds(tmp_path: Path, what: str, name: str, content: str, message: str) -> None:
    write(tmp_path, TREE)
    write(tmp_path, {name: content})
    expect_found("check_tree.py", tmp_path, message)


def test_tree_finds_a_stale_table_of_covered_files(tmp_path: Path) -> None:
    write(tmp_path, TREE)
    (tmp_path / "cpp/text/unicode_tables.cpp").unlink()
    write(tmp_path, {"cpp/base/env.h": HEADER})
    expect_found("check_tree.py", tmp_path, "cpp/text/unicode_tables.cpp:1: in COVERED_BY", "does not exist")


def test_tree_finds_an_empty_tree(tmp_path: Path) -> None:
    expect_found("check_tree.py", tmp_path, "no sources")


# ---- check_headers.py ----

NEEDS_GXX = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@NEEDS_GXX
def test_headers_accepts_headers_and_fragments(tmp_path: Path) -> None:
    fragment = "// Included inside the unnamed namespace of kernels_<isa>.cpp.\n#pragma once\ninline Undefined f();\n"
    write(
        tmp_path,
        {
            "cpp/base/a.h": HEADER + "#include <string>\nstd::string a();\n",
            "cpp/quant/b.h": HEADER + '#include "base/a.h"\ninline std::string b() { return a(); }\n',
            "cpp/ops/cpu/isa/body.h": "// Part of every kernels_<isa>.cpp.\n" + '#include "ops/cpu/isa/part.h"\n',
            "cpp/ops/cpu/isa/part.h": fragment,
            "cpp/ops/cpu/isa/kernels_x.cpp": '#include "ops/cpu/isa/body.h"\n',
        },
    )
    expect_clean("check_headers.py", tmp_path)


@NEEDS_GXX
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cpp/quant/n.h", HEADER + "std::string n();\n"),  # lacks <string>
        ("cpp/quant/n.h", HEADER + '#include "base/absent.h"\n'),
        ("cpp/quant/n.h", HEADER + "inline int n(int unused) { return 0; }\n"),  # warnings are errors
        ("cpp/ops/cpu/isa/n.h", "// Included by kernels_<isa>.cpp, it says.\nUndefined f();\n"),  # nobody reaches it
    ],
)
def test_headers_finds(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path, {"cpp/base/a.h": HEADER, name: content})
    expect_found("check_headers.py", tmp_path, f"{name}: ", "error")


@NEEDS_GXX
def test_headers_leaves_out_what_the_build_compiles(tmp_path: Path) -> None:
    bad = HEADER + "std::string n();\n"
    write(tmp_path, {"cpp/base/a.h": bad, "cpp/base/a.cpp": '// Says it.\n\n#include "base/a.h"\n'})
    expect_clean("check_headers.py", tmp_path)
    assert run("check_headers.py", "--root", tmp_path, "--all")[0] == 1
    write(tmp_path, {"cpp/base/a.cpp": '#include <string>\n#include "base/a.h"\n'})  # not before all else
    expect_found("check_headers.py", tmp_path, "cpp/base/a.h: ", "error")


def test_headers_finds_an_empty_tree(tmp_path: Path) -> None:
    expect_found("check_headers.py", tmp_path, "no headers")


# ---- check_isa_symbols.py ----

KERNEL = 'namespace { int work(int x) { return x * 3; } }\nextern "C" int nb_kernels_x(int x) { return work(x); }\n'
SYMBOLS = {
    "an inline function": ("inline int leak() { return 1; }\nint (*volatile p)() = leak;\n", "weak function leak()"),
    "a template": ("template <class T> T leak(T x) { return x; }\ntemplate int leak(int);\n", "weak function int leak"),
    "an inline variable": ("inline int leak = 1;\nint* volatile p = &leak;\n", "unique global leak"),
    "a function": ("int leak(int x) { return x; }\n", "global function leak(int)"),
    "a variable": ("int leak = 5;\n", "global data leak"),
    "a constant": ("extern const int leak;\nconst int leak = 5;\n", "global constant leak"),
}


def compile_object(folder: Path, source: str) -> Path:
    (folder / "kernels_x.cpp").write_text(source, encoding="utf-8")
    output = folder / "kernels_x.o"
    subprocess.run(["g++", "-std=c++20", "-O0", "-c", str(folder / "kernels_x.cpp"), "-o", str(output)], check=True)
    return output


@NEEDS_GXX
def test_symbols_accepts_one_table(tmp_path: Path) -> None:
    code, output = run("check_isa_symbols.py", compile_object(tmp_path, KERNEL))
    assert code == 0, output


@NEEDS_GXX
@pytest.mark.parametrize("what", SYMBOLS)
def test_symbols_finds(tmp_path: Path, what: str) -> None:
    source, message = SYMBOLS[what]
    code, output = run("check_isa_symbols.py", compile_object(tmp_path, source + KERNEL))
    assert code == 1, output
    assert f"kernels_x.o: {message}" in output


@NEEDS_GXX
def test_symbols_wants_a_table_that_matches(tmp_path: Path) -> None:
    code, output = run("check_isa_symbols.py", "--allow", "other", compile_object(tmp_path, KERNEL))
    assert code == 1
    assert "global function nb_kernels_x" in output
    assert "no symbol matches other" in output


def test_symbols_refuses_what_is_no_object(tmp_path: Path) -> None:
    write(tmp_path, {"kernels_x.o": "text"})
    code, output = run("check_isa_symbols.py", tmp_path / "kernels_x.o")
    assert code == 1
    assert "nm:" in output


# ---- check_isa_instructions.py ----

LISTING = """
kernels_x.o:     file format elf64-x86-64

0000000000000000 <work>:
   0:\tc5 f5 fd c2          \tvpaddw %ymm2,%ymm1,%ymm0
   4:\tc4 e2 75 50 c2       \t{vex} vpdpbusd %ymm2,%ymm1,%ymm0
   9:\tc4 e2 75 04 c2       \tvpmaddubsw %ymm2,%ymm1,%ymm0
   e:\t62 f2 75 48 50 c2    \tvpdpbusd %zmm2,%zmm1,%zmm0
  14:\t64 62 f1 7c 28 58 c1 \tvaddps %fs:(%rcx),%ymm16,%ymm0
  1b:\tf3 0f 59 c1          \tmulss  %xmm1,%xmm0
  1f:\t48 b8 62 62 62 62 62 \tmovabs $0x6262626262626262,%rax
  26:\t62 62 62\x20
  29:\tc3                   \tret
"""
KEPT = {  # lines of the listing that stay, and what is found then
    ("avxvnni", (0, 1, 6, 7, 8)): [],
    ("avxvnni", (0, 1, 2, 8)): ["vpmaddubsw %ymm2,%ymm1,%ymm0 is not for avxvnni"],
    ("avxvnni", (0, 1, 3, 4, 8)): ["vpdpbusd %zmm2,%zmm1,%zmm0 is EVEX-", "vaddps %fs:(%rcx),%ymm16,%ymm0 is EVEX-"],
    ("avxvnni", (0, 6, 7, 8)): ["none of 3 instructions matches"],
    ("avx2", (0, 2, 8)): [],
    ("avx2", (0, 1, 2, 8)): ["{vex} vpdpbusd %ymm2,%ymm1,%ymm0 is not for avx2"],
    ("avx512", (0, 3, 4, 8)): [],
    ("avx512", (0, 1, 8)): ["none of 3 instructions matches"],
    ("avx512bf16", (0, 3, 8)): ["none of 3 instructions matches"],
    ("scalar", (5, 8)): [],
    ("scalar", (0, 5, 8)): ["vpaddw %ymm2,%ymm1,%ymm0 is not for scalar"],
    ("sse9", (5, 8)): ["there is no rule for sse9"],
}


@pytest.mark.parametrize(("isa", "lines"), KEPT)
def test_instructions_finds(isa: str, lines: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, rows = LISTING.splitlines()[:4], LISTING.splitlines()[4:]
    (tmp_path / "listing").write_text("\n".join([*head, *(rows[line] for line in lines)]) + "\n", encoding="utf-8")
    (tmp_path / "objdump").write_text(f'#!/bin/sh\ncat "{tmp_path}/listing"\n', encoding="utf-8")
    (tmp_path / "objdump").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code, output = run("check_isa_instructions.py", tmp_path / f"kernels_{isa}.cpp.o")
    wanted = KEPT[isa, lines]
    assert code == (1 if wanted else 0), output
    assert len(output.splitlines()) == max(1, len(wanted)), output
    for line, piece in zip(output.splitlines(), wanted, strict=False):
        assert f"kernels_{isa}.cpp.o: {piece}" in line


STRIP = "_ZN2nb3ops12_GLOBAL__N_110strip_int8ILNS_5quant6FormatE13ELi1ELi1EEEvPKhll"
FETCH = "   9:\t0f 18 0f             \tprefetcht0 (%rdi)\n"


@pytest.mark.parametrize("kept", [True, False])
def test_instructions_misses_what_is_not_fetched(kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of another function does not count."""
    other = f"\n0000000000000010 <other>:\n{FETCH}"
    code = f"   4:\tc4 e2 75 04 c2       \tvpmaddubsw %ymm2,%ymm1,%ymm0\n{FETCH if kept else ''}"
    (tmp_path / "listing").write_text(f"{other}\n0000000000000000 <{STRIP}>:\n{code}{other}", encoding="utf-8")
    (tmp_path / "objdump").write_text(f'#!/bin/sh\ncat "{tmp_path}/listing"\n', encoding="utf-8")
    (tmp_path / "objdump").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    status, output = run("check_isa_instructions.py", tmp_path / "kernels_avx2.cpp.o")
    assert status == (0 if kept else 1), output
    assert kept or f"{STRIP} does not fetch ahead" in output


def test_instructions_refuses_what_is_no_object(tmp_path: Path) -> None:
    write(tmp_path, {"kernels_avx2.o": "text"})
    code, output = run("check_isa_instructions.py", tmp_path / "kernels_avx2.o")
    assert code == 1
    assert "objdump:" in output
