#!/usr/bin/env python3
"""The same prompts without a cache, with a reserved one, with the engine's blocks, and in 8 bits: speed and memory.

Each method runs in a process of its own. Without a cache the answers are the same, every token of them computed from
the whole text again.

    demo/basic_benchmark.py --max-tokens 32
"""

from __future__ import annotations

import argparse
import sys

import nanobraid as nb

PROMPTS = (
    "Explain in simple words why the sky is blue.",
    "The harbour was quiet in the early morning. " * 12 + "Then",
    "List three uses of a rope:",
)
METHODS = ("no_cache", "full_cache", "paged_attention", "quant_int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    try:
        with nb.KVCacheBenchmarker(options.model, batch_size=len(PROMPTS)) as bench:
            print(f"{'method':16} {'tokens':>6} {'tok/s':>8} {'first token':>12} {'cache a prompt':>15}  same answers")
            first = None
            for method in METHODS:
                row = bench.benchmark_method(PROMPTS, method, options.max_tokens)
                first = first or row["token_ids"]
                print(
                    f"{method:16} {row['total_new_tokens']:6} {row['tokens_per_sec']:8.1f} {row['ttft_ms']:9.0f} ms "
                    f"{row['est_kv_cache_mb_avg']:12.2f} MB  {'yes' if row['token_ids'] == first else 'no'}"
                )
    except nb.NanobraidError as error:
        sys.exit(f"basic_benchmark: error: {error}")


if __name__ == "__main__":
    main()
