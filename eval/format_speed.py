"""Speed of files in several weight formats, or with several activations, in turn and in one run.

    python eval/format_speed.py smollm2-Q4_0.gguf smollm2-w4.braid smollm2-Q4_0.gguf@bf16 [--rounds 25] [--json FILE]

FILE@DTYPE names the type of the activations (else the default). All are loaded at once and run in turns, each run some
tenths of a second, every second round in the opposite order: what else the machine does hits all of them. A line gives
the medians, and the medians of the ratios to the first one in the same round, with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import load_average, read_bandwidth
from nanobraid import LLM, SamplingParams
from nanobraid.bench_kv.machine import cpu_name

METRICS = ("prefill", "decode")
FACTS = ("backend", "dtype", "kv_dtype", "weight_bytes")


def split_name(name: str) -> tuple[str, str]:
    """File and type of activations of ``FILE@DTYPE``."""
    file, _, dtype = name.partition("@")
    return file, dtype or "auto"


class Side:
    """One of what is compared."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        file, dtype = split_name(name)
        self.name = Path(name).name
        self.llm = LLM(
            file,
            dtype=dtype,
            num_threads=args.threads,
            max_num_seqs=1,
            max_model_len=max(args.pp + 1, args.tg + 1),
            enable_prefix_caching=False,
        )
        self._draw = random.Random(0)

    def _seconds(self, num_prompt: int, num_new: int) -> float:
        prompt = [self._draw.randrange(self.llm.tokenizer.vocab_size) for _ in range(num_prompt)]
        params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
        begin = time.perf_counter()
        self.llm.generate([prompt], params)
        return time.perf_counter() - begin

    def run(self, args: argparse.Namespace) -> dict[str, float]:
        """Tokens per second."""
        return {"prefill": args.pp / self._seconds(args.pp, 1), "decode": args.tg / self._seconds(1, args.tg)}


def summarize(rounds: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """A row per name: medians of every metric, and medians and quartiles of their ratios to those of the first name."""
    names = list(rounds[0])
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"name": name}
        for metric in METRICS:
            ratios = [each[name][metric] / each[names[0]][metric] for each in rounds]
            row[metric] = statistics.median(each[name][metric] for each in rounds)
            row[f"{metric}_ratio"] = statistics.median(ratios)
            low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
            row[f"{metric}_quartiles"] = [low, high]
        rows.append(row)
    return rows


def ratio(row: dict[str, Any], metric: str) -> str:
    """The ratio and its quartiles."""
    low, high = row[f"{metric}_quartiles"]
    return f"{row[f'{metric}_ratio']:.3f}, {low:.2f} to {high:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="FILE[@DTYPE]")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pp", type=int, default=512)
    parser.add_argument("--tg", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    for name in args.names:
        if not Path(split_name(name)[0]).is_file():
            parser.error(f"{split_name(name)[0]} is not a file")
    if len({Path(name).name for name in args.names}) < len(args.names):
        parser.error("a name stands twice")
    before = {"load": load_average(), "read_gb_s": read_bandwidth(args.threads)}
    sides = [Side(name, args) for name in args.names]
    for side in sides:
        side.run(args)
    rounds = []
    for number in range(args.rounds):
        measured = {side.name: side.run(args) for side in (sides if number % 2 == 0 else reversed(sides))}
        rounds.append({side.name: measured[side.name] for side in sides})
    rows = summarize(rounds)
    for row, side in zip(rows, sides, strict=True):
        row |= {key: side.llm.config[key] for key in FACTS}
    for row in rows:
        print(
            f"{row['name']:28} {row['backend']} {row['dtype']:5} {row['weight_bytes'] / 1e6:8.1f} MB"
            f"  prefill {row['prefill']:8.1f} tok/s ({ratio(row, 'prefill')})"
            f"  decode {row['decode']:7.1f} tok/s ({ratio(row, 'decode')})"
        )
    if args.json is not None:
        after = {"load": load_average(), "read_gb_s": read_bandwidth(args.threads)}
        report = {"date": datetime.now(UTC).date().isoformat(), "cpu": cpu_name(), "threads": args.threads}
        report |= {"pp": args.pp, "tg": args.tg, "rounds": args.rounds, "before": before, "after": after}
        args.json.write_text(json.dumps(report | {"rows": rows, "every_round": rounds}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
