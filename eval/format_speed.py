"""Speed of files in several weight formats, or with several activations, in turn and in one run.

    python eval/format_speed.py smollm2-Q4_0.gguf smollm2-w4.braid smollm2-Q4_0.gguf@bf16 [--rounds 7] [--json out.json]

FILE@DTYPE names the type of the activations (else the default). Every round runs `nanobraid bench` once for each; a
line gives the medians and their ratios to the first one's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import cpu_name, load_average, read_bandwidth

METRICS = {"prefill": "pp_tok_s", "decode": "tg_tok_s"}
FACTS = ("backend", "dtype", "kv_dtype", "weight_bytes")


def split_name(name: str) -> tuple[str, str]:
    """File and type of activations of ``FILE@DTYPE``."""
    file, _, dtype = name.partition("@")
    return file, dtype or "auto"


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    file, dtype = split_name(name)
    command = [sys.executable, "-m", "nanobraid", "bench", "--model", file, "--dtype", dtype, "--json"]
    command += ["--pp", str(args.pp), "--tg", str(args.tg), "--threads", str(args.threads), "--repeat", "1"]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {key: measured[key] for key in (*METRICS.values(), *FACTS)}


def summarize(rounds: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row per name: medians of every metric, and their ratios to those of the first name."""
    names = list(rounds[0])
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"name": name}
        for metric, key in METRICS.items():
            row[metric] = statistics.median(each[name][key] for each in rounds)
            row[f"{metric}_ratio"] = row[metric] / (rows[0][metric] if rows else row[metric])
        row.update({key: rounds[0][name][key] for key in FACTS})
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="FILE[@DTYPE]")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pp", type=int, default=512)
    parser.add_argument("--tg", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    for name in args.names:
        if not Path(split_name(name)[0]).is_file():
            parser.error(f"{split_name(name)[0]} is not a file")
    if len({Path(name).name for name in args.names}) < len(args.names):
        parser.error("a name stands twice")
    before = {"load": load_average(), "read_gb_s": read_bandwidth(args.threads)}
    rounds = [{Path(name).name: measure(name, args) for name in args.names} for _ in range(args.rounds)]
    rows = summarize(rounds)
    for row in rows:
        print(
            f"{row['name']:28} {row['backend']} {row['dtype']:5} {row['weight_bytes'] / 1e6:8.1f} MB"
            f"  prefill {row['prefill']:8.1f} tok/s ({row['prefill_ratio']:.2f})"
            f"  decode {row['decode']:7.1f} tok/s ({row['decode_ratio']:.2f})"
        )
    if args.json is not None:
        after = {"load": load_average(), "read_gb_s": read_bandwidth(args.threads)}
        report = {"date": datetime.now(UTC).date().isoformat(), "cpu": cpu_name(), "threads": args.threads}
        report |= {"pp": args.pp, "tg": args.tg, "rounds": args.rounds, "before": before, "after": after}
        args.json.write_text(json.dumps(report | {"rows": rows, "every_round": rounds}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
