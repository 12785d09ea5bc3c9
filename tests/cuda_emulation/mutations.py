#!/usr/bin/env python3
"""Breaks the CUDA kernels on purpose, one defect at a time, and wants an emulated test to fail for each.

Every row of MUTATIONS replaces a text that stands exactly once in its file. The tree is copied; only the emulated tests
are built there, incrementally from one defect to the next, so a row costs the build of the files that include it and
one run of the tests: seconds to a minute, after a first build of everything (quick where ccache knows the core).

Usage: mutations.py [--only PATTERN] [--jobs N]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("CMakeLists.txt", "cpp", "cuda", "tests")
TARGET = "cuda_emulation_tests"


class Mutation(NamedTuple):
    """A defect: `old` in cuda/<file> becomes `new`."""

    file: str
    old: str
    new: str
    why: str


MUTATIONS = (
    # ---- reduce.cuh ----
    Mutation(
        "reduce.cuh",
        "scratch[threadIdx.x / 32] = value;\n  sync_block();\n",
        "scratch[threadIdx.x / 32] = value;\n",
        "sums of other warps are read without a barrier",
    ),
    Mutation(
        "reduce.cuh",
        "sum += scratch[warp];\n  sync_block();\n",
        "sum += scratch[warp];\n",
        "the next sum overwrites what a slow warp still reads",
    ),
    Mutation("reduce.cuh", "if (lane_id() == 0) scratch", "scratch", "all lanes write one place"),
    Mutation("reduce.cuh", "warp < kThreads / 32", "warp < kThreads / 32 - 1", "the last warp's sum is left out"),
    Mutation("reduce.cuh", "i < cols; i += kThreads", "i < cols - 1; i += kThreads", "the last column is left out"),
    Mutation(
        "reduce.cuh", "static_cast<float>(cols) + eps)", "static_cast<float>(cols) + 0.0f * eps)", "eps is left out"
    ),
    # ---- elementwise.cu ----
    Mutation("elementwise.cu", "if (col < a.table.cols) a.out", "if (col + 1 < a.table.cols) a.out", "embedding: tail"),
    Mutation(
        "elementwise.cu",
        "weight_at<Number>(a.table, a.ids[row], col)",
        "weight_at<Number>(a.table, row, col)",
        "embedding: row",
    ),
    Mutation(
        "elementwise.cu", "out[i] = x[i] * scale * a.weight[i]", "out[i] = x[i] * scale * a.weight[0]", "norm: gain"
    ),
    Mutation(
        "elementwise.cu", "if (col >= a.out.cols) return;", "if (col >= a.cols) return;", "padding keeps what was there"
    ),
    Mutation(
        "elementwise.cu", "x[half] = fmaf(second, angle[0], first", "x[half] = fmaf(first, angle[0], first", "rotation"
    ),
    Mutation(
        "elementwise.cu",
        "if (pair >= a.num_heads * half) return;",
        "if (pair >= half) return;",
        "only the first head is rotated",
    ),
    Mutation(
        "elementwise.cu",
        "token = a.slots[row] % kBlockTokens",
        "token = (a.slots[row] + 1) % kBlockTokens",
        "the next token's place in a block",
    ),
    Mutation(
        "elementwise.cu", "keys + a.kv.num_kv_heads * a.kv.cell_bytes", "keys + a.kv.cell_bytes", "values over keys"
    ),
    Mutation("elementwise.cu", "gate / (1.0f + expf(-gate))", "gate / (1.0f + expf(gate))", "SiLU: sign"),
    Mutation(
        "elementwise.cu", "value == best && other < id", "value == best && other > id", "argmax: the higher of equals"
    ),
    Mutation("elementwise.cu", "id < a.cols ? id : 0", "id", "argmax: a row of NaN has no maximum"),
    Mutation(
        "elementwise.cu", "take(value, shuffle_xor(id, step));", "take(value, id);", "argmax: the wrong lane's id"
    ),
    Mutation(
        "elementwise.cu",
        "  sync_block();\n  if (threadIdx.x != 0) return;",
        "  if (threadIdx.x != 0) return;",
        "argmax: what other warps found is read without a barrier",
    ),
    Mutation(
        "elementwise.cu",
        "warp < kArgmaxThreads / 32; ++warp) take",
        "warp < kArgmaxThreads / 32 - 1; ++warp) take",
        "argmax: last warp",
    ),
    # ---- device.cuh ----
    Mutation(
        "device.cuh",
        "step > 0; step /= 2) value += shuffle_xor(value, step)",
        "step > 1; step /= 2) value += shuffle_xor(value, step)",
        "half of a warp's sum",
    ),
    # ---- number.cuh ----
    Mutation(
        "number.cuh",
        "(bits + 0x7fffu + (bits >> 16 & 1u)) >> 16",
        "(bits + 0x8000u) >> 16",
        "ties go up instead of to even",
    ),
)


def check_texts() -> list[str]:
    """Rows whose text does not stand exactly once in its file."""
    wrong = []
    for row in MUTATIONS:
        count = (ROOT / "cuda" / row.file).read_text(encoding="utf-8").count(row.old)
        if count != 1:
            wrong.append(f"{row.file}: {count} times, expected once: {row.old!r}")
    return wrong


def build(folder: Path, jobs: int) -> str | None:
    """Builds the tests; returns what the compiler said if it failed."""
    command = ["cmake", "--build", folder / "build", "--target", TARGET, "-j", str(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def failed_test(folder: Path) -> str | None:
    """The first test that fails, or None. A crash or a hang counts as a failure."""
    command = [folder / "build" / TARGET, "--gtest_brief=1", "--gtest_fail_fast"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    except subprocess.TimeoutExpired:
        return "timeout"
    if done.returncode == 0:
        return None
    found = re.search(r"^\[  FAILED  \] (\S+)", done.stdout, re.MULTILINE)
    return found.group(1).rstrip(",") if found else f"exit status {done.returncode}"


def prepare(folder: Path, jobs: int) -> None:
    """Copies the tree, builds the tests and sees them pass."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    # The flags of tests/run.sh, so that the compiler cache has the core.
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DNANOBRAID_PYTHON=OFF", "-DNANOBRAID_DEMOS=OFF", "-DNANOBRAID_CUDA=OFF"]
    if shutil.which("ninja"):
        options += ["-G", "Ninja"]
    if shutil.which("ccache"):
        options.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
        os.environ.update(CCACHE_BASEDIR=str(folder), CCACHE_NOHASHDIR="1")
    subprocess.run(["cmake", "-S", folder, "-B", folder / "build", *options], stdout=subprocess.DEVNULL, check=True)
    errors = build(folder, jobs)
    if errors is not None:
        sys.exit(f"the tests do not build:\n{errors}")
    failed = failed_test(folder)
    if failed is not None:
        sys.exit(f"the tests fail without a defect: {failed}")


def try_mutation(row: Mutation, folder: Path, jobs: int) -> bool:
    """Whether a test fails with this defect; prints the outcome."""
    path = folder / "cuda" / row.file
    whole = path.read_text(encoding="utf-8")
    begin = time.monotonic()
    path.write_text(whole.replace(row.old, row.new), encoding="utf-8")
    try:
        errors = build(folder, jobs)
        failed = None if errors is not None else failed_test(folder)
    finally:
        path.write_text(whole, encoding="utf-8")
    outcome = f"killed by {failed}" if failed else "SURVIVES"
    if errors is not None:
        outcome = f"DOES NOT BUILD\n{errors}"
    print(f"{time.monotonic() - begin:4.0f} s  {row.file}: {row.why}: {outcome}", flush=True)
    return failed is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression for file or reason")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    wrong = check_texts()
    if wrong:
        print("\n".join(wrong))
        return 1
    rows = [row for row in MUTATIONS if re.search(options.only, f"{row.file}: {row.why}")]
    if not rows:
        sys.exit(f"no row matches {options.only!r}")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        folder = Path(name)
        prepare(folder, options.jobs)
        print(f"{time.monotonic() - begin:4.0f} s  built and passed without a defect", flush=True)
        killed = sum(try_mutation(row, folder, options.jobs) for row in rows)
    print(f"{killed} of {len(rows)} defects found in {time.monotonic() - begin:.0f} s")
    return 0 if killed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
