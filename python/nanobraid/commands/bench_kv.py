"""Measure speed, memory and quality of the ways to keep keys and values.

Each method runs in a process of its own, on the same made-up prompts and with the same
number of new tokens. Quality is that of the answers under its cache: perplexity, KL and
top-1 against full precision, greedy tokens, and codes hidden in long documents. With -o
the report is written as JSON, CSV, Markdown with advice, and plots.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from nanobraid.commands import _options
from nanobraid.commands._terminal import note, table
from nanobraid.errors import InvalidArgumentError
from nanobraid.models import DEFAULT_MODEL

_QUALITY = ("quality_dtype", "text_tokens", "agreement_tokens", "needle_lengths", "needle_depths", "needle_draws")
_MODEL = ("model", "yes", "device", "dtype", "kv_dtype", "num_threads", "max_model_len", "max_batch_tokens")
_SIZES = ("window_sizes", "block_sizes", "chunk_sizes", "prompt_tokens", "prompts", "max_new_tokens", "batch_size")
_OF_MEASURING = ("methods", *_SIZES, "rounds", "seed", "stop_at_eos", "no_quality", *_QUALITY, *_MODEL)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _shares(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


_numbers.__name__ = "list of integers"
_shares.__name__ = "list of numbers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    from nanobraid.bench_kv.methods import NAMES

    def numbers(flag: str, default: str, text: str) -> None:
        parser.add_argument(flag, type=_numbers, default=_numbers(default), metavar="N,N", help=f"{text} ({default})")

    def number(flag: str, default: int, text: str) -> None:
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} (default: {default})")

    parser.add_argument(
        "--methods", type=_names, default=list(NAMES), metavar="NAME,NAME", help=f"of {', '.join(NAMES)} (default: all)"
    )
    numbers("--window-sizes", "64,128,256,512", "windows of sliding_window")
    numbers("--block-sizes", "64", "groups of block_cache, multiples of 16")
    numbers("--chunk-sizes", "64", "groups of chunked_cache, multiples of 16")
    numbers("--prompt-tokens", "64,128,256,512,1024", "lengths of the prompts, in turn")
    parser.add_argument("--prompts", type=int, metavar="N", help="how many prompts (default: as many as run at once)")
    number("--max-new-tokens", 32, "tokens of each answer")
    number("--batch-size", 8, "prompts that run at once")
    number("--rounds", 3, "timed rounds, of which medians are taken")
    number("--seed", 42, "of prompts and documents")
    parser.add_argument("--stop-at-eos", action="store_true", help="let answers end, in every method")
    quality = parser.add_argument_group("quality")
    quality.add_argument("--no-quality", action="store_true", help="measure speed and memory alone")
    quality.add_argument("--quality-dtype", help="activations while quality is measured (default: bf16)")
    quality.add_argument("--text-tokens", type=int, metavar="N", help="of each text (default: 1024)")
    quality.add_argument("--agreement-tokens", type=int, metavar="N", help="greedy tokens compared (default: 32)")
    quality.add_argument(
        "--needle-lengths", type=_numbers, metavar="N,N", help="of documents with a code; '' for none (512,1024)"
    )
    quality.add_argument(
        "--needle-depths", type=_shares, metavar="X,X", help="where the code stands (0,0.25,0.5,0.75,1)"
    )
    quality.add_argument("--needle-draws", type=int, metavar="N", help="documents of each (default: 2)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("-o", "--output", type=Path, metavar="DIR", help="write kv.json, kv.csv, kv.md and plots there")
    output.add_argument("--render", type=Path, metavar="FILE", help="measure nothing: render a kv.json again")
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEFAULT_MODEL, help="as for generate (default: %(default)s)")
    group.add_argument("-y", "--yes", action="store_true", help="download a model from a hub without asking")
    group.add_argument("--device", default="auto", help="as for generate (default: auto)")
    group.add_argument("--dtype", default="auto", help="activations: auto, int8, bf16 or f32 (default: auto)")
    group.add_argument("--kv-dtype", default="auto", help="of the methods that name none (default: auto)")
    group.add_argument("--num-threads", "--threads", type=int, metavar="N", help="default: one per usable processor")
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="what full_cache reserves a prompt (default: the longest needed)"
    )
    number("--max-batch-tokens", 512, "tokens in one step")
    parser.set_defaults(of_measuring={name: parser.get_default(name) for name in _OF_MEASURING})


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code: 1 if a method failed."""
    from nanobraid.bench_kv import report as reports

    found = _measure(options) if options.render is None else _render(options)
    if options.output is not None:
        for path in reports.write(found, options.output):
            note(f"wrote {path}")
    if options.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        print(table(reports.cells(found)))
        if text := reports.saving(found):
            print(text)
    failed = [row for row in found["rows"] if row["status"] != "ok"]
    for row in failed:
        note(f"{row['label']}: {row['status']}: {row['message']}")
    return 1 if any(row["status"] == "failed" for row in failed) else 0


def _render(options: argparse.Namespace) -> dict[str, Any]:
    from nanobraid.bench_kv import report as reports

    given = [name for name, default in options.of_measuring.items() if getattr(options, name) != default]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InvalidArgumentError(f"--render measures nothing: leave {flags} out")
    return reports.read(options.render)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    from nanobraid.bench_kv import documents
    from nanobraid.bench_kv.benchmarker import KVCacheBenchmarker
    from nanobraid.bench_kv.config import BenchmarkConfig, QualityConfig

    given = {name.removeprefix("quality_"): getattr(options, name) for name in _QUALITY}
    given = {name: value for name, value in given.items() if value is not None}
    if options.no_quality and given:
        raise InvalidArgumentError(f"--no-quality together with {', '.join(sorted(given))} has no meaning")
    if given.get("needle_lengths") == []:
        given.setdefault("needle_depths", [])
    quality = None if options.no_quality else QualityConfig(**given)
    config = BenchmarkConfig(options.methods, options.window_sizes, options.block_sizes, options.chunk_sizes)
    batch_size = _options.require_at_least("--batch-size", options.batch_size, 1)
    count = batch_size if options.prompts is None else _options.require_at_least("--prompts", options.prompts, 1)
    if not options.prompt_tokens or min(options.prompt_tokens) < 1:
        raise InvalidArgumentError(f"--prompt-tokens must be integers >= 1, got {options.prompt_tokens}")
    with KVCacheBenchmarker(
        _options.model_path(options),
        device=options.device,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        batch_size=batch_size,
        max_model_len=options.max_model_len,
        num_threads=options.num_threads,
        max_batch_tokens=options.max_batch_tokens,
        stop_at_eos=options.stop_at_eos,
        rounds=options.rounds,
        seed=options.seed,
    ) as bench:
        lengths = [options.prompt_tokens[i % len(options.prompt_tokens)] for i in range(count)]
        draw = random.Random(options.seed)
        prompts = [documents.prose(bench.tokenizer, length, draw) for length in lengths]
        progress = note if sys.stderr.isatty() else None
        return bench.run(
            prompts, config, max_new_tokens=options.max_new_tokens, quality=quality, progress=progress
        )  # fmt: skip
