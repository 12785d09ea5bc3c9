"""Speed of nanobraid and llama.cpp on the same files, alternating in one run.

    python eval/compare_llama_cpp.py --peer BUILD/bin/llama-bench --files a.gguf b.gguf [--json out.json]

For every file and round: `llama-bench` (pp and tg) and `nanobraid bench`, in turn, both with the same number of
threads. Reports the median of each side, the ratio of medians, and the read bandwidth of the machine, measured before
and after by summing a large array. Build llama.cpp natively (GGML_NATIVE=ON); it runs with 2 MB pages
(GLIBC_TUNABLES=glibc.malloc.hugetlb=1), its f16 KV and its default flash attention, best of what it offers by default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np


def read_bandwidth(threads: int) -> float:
    """GB/s of summing 256 MB per thread; the median of five runs."""
    arrays = [np.ones(1 << 25, dtype=np.int64) for _ in range(threads)]
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(np.sum, arrays))
            rates.append(sum(a.nbytes for a in arrays) / (time.perf_counter() - begin) / 1e9)
    return statistics.median(rates)


def run_peer(peer: Path, file: Path, args: argparse.Namespace) -> dict[str, float]:
    command = [str(peer), "-m", str(file), "-t", str(args.threads), "-p", str(args.pp), "-n", str(args.tg), "-r", "1"]
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    output = subprocess.run([*command, "-o", "json"], check=True, capture_output=True, text=True, env=environment)
    rows = json.loads(output.stdout)
    return {
        "pp_tok_s": next(row["avg_ts"] for row in rows if row["n_prompt"] > 0),
        "tg_tok_s": next(row["avg_ts"] for row in rows if row["n_gen"] > 0),
    }


def run_ours(file: Path, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "nanobraid", "bench", "--model", str(file), "--threads", str(args.threads)]
    command += ["--pp", str(args.pp), "--tg", str(args.tg), "--repeat", "1", "--json"]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(output.stdout))


def compare(file: Path, args: argparse.Namespace) -> dict[str, Any]:
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, float]] = []
    for _ in range(args.rounds):
        theirs.append(run_peer(args.peer, file, args))
        ours.append(run_ours(file, args))
    row: dict[str, Any] = {"file": file.name}
    row.update({key: ours[0][key] for key in ("backend", "dtype", "kv_dtype")})
    for key in ("pp_tok_s", "tg_tok_s"):
        mine = statistics.median(run[key] for run in ours)
        peer = statistics.median(run[key] for run in theirs)
        row[key] = {"nanobraid": mine, "llama.cpp": peer, "ratio": mine / peer}
        row[key]["all"] = {"nanobraid": [run[key] for run in ours], "llama.cpp": [run[key] for run in theirs]}
    return row


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="path of llama-bench")
    parser.add_argument("--files", type=Path, nargs="+", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pp", type=int, default=512)
    parser.add_argument("--tg", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()

    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "threads": args.threads,
        "pp": args.pp,
        "tg": args.tg,
        "rounds": args.rounds,
        "read_gb_s_before": read_bandwidth(args.threads),
        "rows": [compare(file, args) for file in args.files],
    }
    report["read_gb_s_after"] = read_bandwidth(args.threads)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"{report['cpu']}, {args.threads} threads, read {report['read_gb_s_before']:.1f} / "
        f"{report['read_gb_s_after']:.1f} GB/s before / after; medians of {args.rounds} alternating rounds"
    )
    for row in report["rows"]:
        for key, name in (("pp_tok_s", f"pp{args.pp}"), ("tg_tok_s", f"tg{args.tg}")):
            value = row[key]
            print(
                f"{row['file']:<24} {name:<6} {value['nanobraid']:8.1f} tok/s   llama.cpp {value['llama.cpp']:8.1f}   "
                f"ratio {value['ratio']:.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
