#!/usr/bin/env python3
"""One prompt with keys and values in fewer and fewer bits: the answers, how alike they are, the memory.

demo/quantized_cache.py "The capital of France is"
"""

from __future__ import annotations

import argparse
import sys

import nanobraid as nb
from nanobraid.bench_kv.divergence import text_similarity
from nanobraid.bench_kv.methods import MODES

PROMPT = "A rope on a ship must hold in wind and water. " * 6 + "A good sailor therefore"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    try:
        with nb.KVCacheBenchmarker(options.model, max_model_len=2048) as bench:
            exact, count, taken, _, _ = bench.generate_with_paged_attention(options.prompt, options.max_tokens)
            print(f"{bench.kv_dtype:6} {taken:6.2f} MB {count} tokens: {_answer(exact, options.prompt)}")
            for mode in options.modes:
                text, count, used = bench.generate_with_quantized_kv(options.prompt, options.max_tokens, mode)
                alike = text_similarity(_answer(exact, options.prompt), _answer(text, options.prompt))
                print(f"{mode:6} {used:6.2f} MB {count} tokens, {100 * alike:3.0f} % alike: ", end="")
                print(_answer(text, options.prompt))
    except nb.NanobraidError as error:
        sys.exit(f"quantized_cache: error: {error}")


def _answer(text: str, prompt: str) -> str:
    return " ".join(text.removeprefix(prompt).split())


if __name__ == "__main__":
    main()
