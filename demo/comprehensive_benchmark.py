#!/usr/bin/env python3
"""Every way to keep keys and values: speed, memory, quality under it; as a table, and as CSV, Markdown and plots.

Short and long prompts run in one batch, each method in a process of its own. What this engine does not offer on this
device is listed as refused.

    demo/comprehensive_benchmark.py --output kv-report
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nanobraid as nb
from nanobraid.bench_kv import BenchmarkConfig, Config, QualityConfig, report
from nanobraid.bench_kv.methods import NAMES

SHORT = ("Explain what a model of language is.", "What is a cache?", "Describe a harbour.")
LONG = "Every morning the keeper of the lighthouse wrote the weather, the ships and the hour into a book. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--long", type=int, default=40, help="sentences of the long prompt (default: 40)")
    parser.add_argument("--text-tokens", type=int, default=512, help="tokens of each text that are scored")
    parser.add_argument("--agreement-tokens", type=int, default=32, help="greedy tokens that are compared")
    parser.add_argument("--needle-lengths", type=int, nargs="*", default=[512], help="documents with a hidden code")
    parser.add_argument("--output", type=Path, help="folder for kv.csv, kv.md and plots")
    options = parser.parse_args()
    prompts = [*SHORT, LONG * options.long]
    try:
        depths = (0.0, 0.5, 1.0) if options.needle_lengths else ()
        quality = QualityConfig(
            text_tokens=options.text_tokens,
            agreement_tokens=options.agreement_tokens,
            needle_lengths=options.needle_lengths,
            needle_depths=depths,
            needle_draws=1,
        )
        sizes = BenchmarkConfig(options.methods, window_sizes=[64, 256], block_sizes=[64], chunk_sizes=[64])
        with nb.KVCacheBenchmarker(Config(options.model, batch_size=len(prompts))) as bench:
            found = bench.run(prompts, sizes, max_new_tokens=options.max_tokens, quality=quality)
        for row in report.cells(found):
            print(" | ".join(row))
        print(report.saving(found) or "")
        for row in found["rows"]:
            if row["status"] != "ok":
                print(f"{row['label']}: {row['status']}: {row['message']}")
        if options.output is not None:
            for path in report.write(found, options.output):
                print(f"wrote {path}")
    except nb.NanobraidError as error:
        sys.exit(f"comprehensive_benchmark: error: {error}")


if __name__ == "__main__":
    main()
