"""Measure the speed of a model.

Prefill: a prompt of --pp random tokens, with logits of the last only. Decode: --tg tokens
from an empty context, one at a time. With --depth both come after that many tokens, which
are computed beforehand. Medians of --repeat runs after one that does not count.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

from nanobraid import __version__
from nanobraid.commands import _options
from nanobraid.commands._terminal import note, table
from nanobraid.errors import InvalidArgumentError, NanobraidError
from nanobraid.llm import LLM
from nanobraid.sampling_params import SamplingParams
from nanobraid.streaming import stream_line

_STREAMING = (
    "weight_budget_bytes",
    "weight_resident_bytes",
    "streamed_layers",
    "streamed_bytes",
    "streamed_gb_per_s",
    "streamed_wait_seconds",
)
_BLOCK = 16  # tokens of a KV block: what the prefix cache shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--pp", type=int, default=512, metavar="N", help="tokens of the prompt (default: 512; 0: skip)")
    parser.add_argument("--tg", type=int, default=128, metavar="N", help="tokens to generate (default: 128; 0: skip)")
    parser.add_argument(
        "--depth", type=int, default=0, metavar="N", help=f"tokens of context before either, a multiple of {_BLOCK}"
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _options.add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    num_prefill = _options.require_at_least("--pp", options.pp, 0)
    num_decode = _options.require_at_least("--tg", options.tg, 0)
    repeat = _options.require_at_least("--repeat", options.repeat, 1)
    depth = _options.require_at_least("--depth", options.depth, 0)
    if depth % _BLOCK != 0:
        raise InvalidArgumentError(f"--depth must be a multiple of {_BLOCK}, got {depth}")
    if not num_prefill and not num_decode:
        raise InvalidArgumentError("--pp and --tg are both 0: there is nothing to measure")
    needed = depth + max(num_prefill, num_decode) + 1
    # Context that lies before the measured tokens comes out of the prefix cache; without it nothing is to be reused.
    caching = depth > 0
    with _options.make_llm(
        options, max_model_len=options.max_model_len or needed, enable_prefix_caching=caching
    ) as llm:
        prefill = _measure(llm, depth, num_prefill, 1, repeat)
        decode = _measure(llm, depth, 1, num_decode, repeat)
        config, stats = llm.config, llm.stats()
    pp_tok_s = num_prefill / statistics.median(prefill) if prefill else None
    tg_tok_s = num_decode / statistics.median(decode) if decode else None
    result = {
        "model": config["path"],
        "version": __version__,
        "backend": config["backend"],
        "dtype": config["dtype"],
        "kv_dtype": config["kv_dtype"],
        "num_threads": config["num_threads"],
        "max_batch_tokens": options.max_batch_tokens,
        "pp": num_prefill,
        "tg": num_decode,
        "depth": depth,
        "repeat": repeat,
        "pp_tok_s": pp_tok_s,
        "tg_tok_s": tg_tok_s,
        "pp_seconds": prefill,
        "tg_seconds": decode,
        "weight_bytes": config["weight_bytes"],
        # Every token generated reads all weights once; keys, values and activations are not counted.
        "tg_gb_s": tg_tok_s * config["weight_bytes"] / 1e9 if tg_tok_s else None,
        "load_seconds": config["load_seconds"],
        "kv_bytes_per_token": stats["kv_bytes_per_token"],
        "peak_rss_bytes": stats["peak_rss_bytes"],
        **{key: stats[key] for key in _STREAMING},
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    note(
        f"{config['path']}: {config['weight_bytes'] / 1e6:.1f} MB of weights, {config['backend']}, "
        f"{config['dtype']} activations, {config['kv_dtype']} KV, {config['num_threads']} threads"
    )
    rows: list[tuple[str, ...]] = [("test", "tokens/s", "spread", "weights GB/s")]
    after = f" after {depth}" if depth else ""
    if pp_tok_s:
        rows.append((f"pp{num_prefill}{after}", f"{pp_tok_s:.1f}", _spread(prefill), ""))
    if tg_tok_s:
        rows.append((f"tg{num_decode}{after}", f"{tg_tok_s:.1f}", _spread(decode), f"{result['tg_gb_s']:.1f}"))
    print(table(rows))
    if line := stream_line(stats):
        note(line)
    return 0


def _measure(llm: LLM, depth: int, num_prompt: int, num_new: int, repeat: int) -> list[float]:
    """Seconds of each run, first one left out; empty if there is nothing to do."""
    if not num_prompt or not num_new:
        return []
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(llm.tokenizer.vocab_size) for _ in range(count)]

    context = tokens(depth)
    if depth:
        llm.generate([context], SamplingParams(temperature=0.0, max_tokens=1))
    params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
    seconds = []
    for _ in range(repeat + 1):
        prompt = context + tokens(num_prompt)
        start = time.perf_counter()
        output = llm.generate([prompt], params)[0]
        seconds.append(time.perf_counter() - start)
        if output.num_cached_tokens != depth:
            raise NanobraidError(f"{output.num_cached_tokens} of {depth} tokens of context were in the cache")
    return seconds[1:]


def _spread(seconds: list[float]) -> str:
    """Half the range of the runs, as a share of the median."""
    return f"+-{50 * (max(seconds) - min(seconds)) / statistics.median(seconds):.1f} %"
