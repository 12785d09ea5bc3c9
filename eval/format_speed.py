"""Speed of files in several formats of weights, activations, or keys and values, in turn and in one run.

    python eval/format_speed.py smollm2-Q4_0.gguf smollm2-w4.braid smollm2-Q4_0.gguf@bf16 [--rounds 25] [--json FILE]
    python eval/format_speed.py --depth 4096 m.gguf@auto@bf16 m.gguf@auto@int8 m.gguf@auto@mixed

FILE@DTYPE@KV names the type of the activations and the format of keys and values (else the defaults). All are loaded at
once and run in turns, each run some tenths of a second, every second round in the opposite order: what else the machine
does hits all of them. A line gives the medians, and the medians of the ratios to the first one in the same round, with
their quartiles. With --depth, prefill and decode come after that many tokens of context, computed once and cached.
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


BLOCK = 16  # tokens of a KV block: what the prefix cache shares


def split_name(name: str) -> tuple[str, str, str]:
    """File, type of activations and format of keys and values of ``FILE@DTYPE@KV``."""
    file, _, types = name.partition("@")
    dtype, _, kv_dtype = types.partition("@")
    return file, dtype or "auto", kv_dtype or "auto"


class Side:
    """One of what is compared; `options` are further ones of its `LLM`."""

    def __init__(self, name: str, args: argparse.Namespace, **options: Any) -> None:
        file, dtype, kv_dtype = split_name(name)
        self.name = Path(name).name
        self.llm = LLM(
            file,
            dtype=dtype,
            kv_dtype=kv_dtype,
            num_threads=args.threads,
            max_num_seqs=1,
            max_model_len=args.depth + max(args.pp, args.tg) + 2 * BLOCK,
            enable_prefix_caching=args.depth > 0,
            **options,
        )
        self._draw = random.Random(0)
        self._context = self._tokens(args.depth)
        self._warm = False  # whether the context has been computed

    def _tokens(self, count: int) -> list[int]:
        return [self._draw.randrange(self.llm.tokenizer.vocab_size) for _ in range(count)]

    def _seconds(self, num_prompt: int, num_new: int) -> float:
        prompt = self._context + self._tokens(num_prompt)
        params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
        begin = time.perf_counter()
        output = self.llm.generate([prompt], params)[0]
        seconds = time.perf_counter() - begin
        if self._warm and output.num_cached_tokens != len(self._context):
            raise SystemExit(f"{self.name}: {output.num_cached_tokens} of {len(self._context)} tokens were cached")
        self._warm = True
        return seconds

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
    parser.add_argument("names", nargs="+", metavar="FILE[@DTYPE[@KV]]")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pp", type=int, default=512)
    parser.add_argument("--tg", type=int, default=64)
    parser.add_argument("--depth", type=int, default=0, help="tokens of context, a multiple of 16 (default: none)")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    for name in args.names:
        if not Path(split_name(name)[0]).is_file():
            parser.error(f"{split_name(name)[0]} is not a file")
    if args.depth % BLOCK != 0:
        parser.error("--depth must be a multiple of 16")
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
            f"  KV {row['kv_dtype']:5}"
            f"  prefill {row['prefill']:8.1f} tok/s ({ratio(row, 'prefill')})"
            f"  decode {row['decode']:7.1f} tok/s ({ratio(row, 'decode')})"
        )
    if args.json is not None:
        after = {"load": load_average(), "read_gb_s": read_bandwidth(args.threads)}
        report = {"date": datetime.now(UTC).date().isoformat(), "cpu": cpu_name(), "threads": args.threads}
        report |= {"pp": args.pp, "tg": args.tg, "depth": args.depth, "rounds": args.rounds}
        report |= {"before": before, "after": after}
        args.json.write_text(json.dumps(report | {"rows": rows, "every_round": rounds}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
