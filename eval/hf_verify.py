"""Compares nanobraid with transformers (float32, same file): logits, greedy tokens, first divergence.

    python eval/hf_verify.py [--model smollm2-135m] [--device reference] [--json]

Checks, on five prompts of more than 100 tokens: the largest difference of logits relative to the largest logit of the
row, and 128 greedy tokens. Exits with 1 if a check fails. Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import nanobraid as nb
from nanobraid.models import resolve
from oracle import Oracle

TEXT = Path(__file__).parent / "text" / "mixed.txt"


def prompts(llm: nb.LLM, count: int, length: int) -> list[list[int]]:
    """`count` pieces of `length` tokens from different places of the text."""
    ids = llm.tokenizer.encode(TEXT.read_text())
    stride = (len(ids) - length) // max(count - 1, 1)
    return [ids[i * stride : i * stride + length] for i in range(count)]


def top5(row: Any, llm: nb.LLM) -> list[str]:
    best = np.argsort(-row, kind="stable")[:5]
    return [f"{int(token)} {llm.tokenizer.decode([int(token)])!r} {row[token]:.4f}" for token in best]


def compare_prompt(llm: nb.LLM, oracle: Oracle, ids: list[int], num_tokens: int) -> dict[str, Any]:
    ours, theirs = llm.logits(ids), oracle.logits(ids)
    relative = np.abs(ours - theirs).max(axis=-1) / np.abs(theirs).max(axis=-1)
    params = nb.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    tokens = llm.generate([ids], params)[0].token_ids
    expected = oracle.greedy(ids, num_tokens)
    same = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), num_tokens)
    row: dict[str, Any] = {
        "prompt_tokens": len(ids),
        "max_relative_difference": float(relative.max()),
        "identical_tokens": same,
    }
    if same < num_tokens:
        context = ids + expected[:same]
        row["divergence"] = {
            "ours": top5(llm.logits(context)[-1], llm),
            "transformers": top5(oracle.logits(context)[-1], llm),
        }
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="reference", help="backend to verify")
    parser.add_argument("--dtype", default="auto", help="activations: auto, int8, bf16, f32")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=128, help="greedy tokens to compare")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference of logits")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    llm = nb.LLM(args.model, device=args.device, dtype=args.dtype, kv_dtype=args.kv_dtype)
    oracle = Oracle(resolve(args.model))
    rows = [compare_prompt(llm, oracle, ids, args.tokens) for ids in prompts(llm, args.prompts, args.prompt_tokens)]
    worst = max(row["max_relative_difference"] for row in rows)
    identical = all(row["identical_tokens"] == args.tokens for row in rows)
    passed = identical and worst <= args.tolerance
    report = {
        "model": args.model,
        "backend": llm.config["backend"],
        "dtype": llm.config["dtype"],
        "kv_dtype": llm.config["kv_dtype"],
        "max_relative_difference": worst,
        "tolerance": args.tolerance,
        "greedy_identical": identical,
        "passed": passed,
        "prompts": rows,
    }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(
            f"{report['backend']}, activations {report['dtype']}, KV {report['kv_dtype']} against transformers float32"
        )
        for i, row in enumerate(rows):
            print(
                f"prompt {i}: {row['prompt_tokens']} tokens, logits within {row['max_relative_difference']:.2e}, "
                f"{row['identical_tokens']} of {args.tokens} greedy tokens identical"
            )
            for side, lines in row.get("divergence", {}).items():
                print(f"  {side:>12}: " + " | ".join(lines))
        print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
