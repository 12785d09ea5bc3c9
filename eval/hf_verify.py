"""Compares a model run by nanobraid with transformers in float32: logits, greedy tokens, first divergence.

    python eval/hf_verify.py [--model smollm2-135m] [--device reference] [--json]
    python eval/hf_verify.py --model qwen.braid --oracle path/to/hf_folder

`--model` is whatever `nb.LLM` opens, `--oracle` a Hugging Face folder or a GGUF file of the same model (by default the
same file). Checks, on several prompts: the largest difference of logits relative to the largest logit of the row; the
greedy tokens of every prompt computed alone, and of all prompts computed as one batch. Exits with 1 if a check fails.
Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nanobraid as nb
from oracle import Oracle, source_of

TEXT = Path(__file__).parent / "text" / "mixed.txt"
TOP = 5


def prompts(llm: nb.LLM, text: Path, count: int, length: int) -> list[list[int]]:
    """`count` pieces of `length` tokens from different places of the text."""
    ids = llm.tokenizer.encode(text.read_text())
    if len(ids) < length + count - 1:
        raise SystemExit(f"{text} has {len(ids)} tokens, too few for {count} prompts of {length}")
    stride = (len(ids) - length) // max(count - 1, 1)
    return [ids[i * stride : i * stride + length] for i in range(count)]


def top5(row: NDArray[np.float32], llm: nb.LLM) -> list[str]:
    best = np.argsort(-row, kind="stable")[:TOP]
    return [f"{int(token)} {llm.tokenizer.decode([int(token)])!r} {row[token]:.4f}" for token in best]


def compare_logits(llm: nb.LLM, oracle: Oracle, ids: list[int]) -> float:
    ours, theirs = llm.logits(ids), oracle.logits(ids)
    if ours.shape != theirs.shape:
        raise SystemExit(f"the models have {ours.shape[1]} and {theirs.shape[1]} tokens: not the same model")
    return float((np.abs(ours - theirs).max(axis=-1) / np.abs(theirs).max(axis=-1)).max())


def compare_tokens(llm: nb.LLM, oracle: Oracle, ids: list[int], ours: list[int], theirs: list[int]) -> dict[str, Any]:
    """How many tokens agree, and the most likely ones of both sides where they part."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs))
    if same == len(theirs):
        return {"identical_tokens": same}
    context = ids + theirs[:same]
    return {
        "identical_tokens": same,
        "divergence": {
            "ours": top5(llm.logits(context)[-1], llm),
            "transformers": top5(oracle.logits(context)[-1], llm),
        },
    }


def compare(llm: nb.LLM, oracle: Oracle, batch: list[list[int]], num_tokens: int) -> list[dict[str, Any]]:
    """One report per prompt."""
    params = nb.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    alone = [llm.generate([ids], params)[0].token_ids for ids in batch]
    together = [out.token_ids for out in llm.generate(batch, params, progress=False)]
    rows = []
    for i, ids in enumerate(batch):
        expected = oracle.greedy(ids, num_tokens)
        rows.append(
            {
                "prompt_tokens": len(ids),
                "max_relative_difference": compare_logits(llm, oracle, ids),
                **compare_tokens(llm, oracle, ids, alone[i], expected),
                "batched": compare_tokens(llm, oracle, ids, together[i], expected),
            }
        )
    return rows


def describe(report: dict[str, Any], num_tokens: int) -> None:
    print(
        f"{report['model']}: {report['backend']}, activations {report['dtype']}, KV {report['kv_dtype']}; "
        f"against transformers float32 on {report['oracle']}"
    )
    for i, row in enumerate(report["prompts"]):
        print(
            f"prompt {i}: {row['prompt_tokens']} tokens, logits within {row['max_relative_difference']:.2e}, greedy "
            f"tokens identical: {row['identical_tokens']} of {num_tokens} alone, "
            f"{row['batched']['identical_tokens']} of {num_tokens} in a batch of {len(report['prompts'])}"
        )
        for name, part in (("alone", row), ("batched", row["batched"])):
            for side, lines in part.get("divergence", {}).items():
                print(f"  {name:>7} {side:>12}: " + " | ".join(lines))
    print("passed" if report["passed"] else "FAILED")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="what nanobraid runs: a file, folder or name")
    parser.add_argument("--oracle", type=Path, help="what transformers runs: a folder or GGUF file; default: the model")
    parser.add_argument("--device", default="reference", help="backend to verify")
    parser.add_argument("--dtype", default="auto", help="activations: auto, int8, bf16, f32")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=128, help="greedy tokens to compare")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference of logits")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    llm = nb.LLM(args.model, device=args.device, dtype=args.dtype, kv_dtype=args.kv_dtype)
    source = args.oracle or source_of(args.model)
    oracle = Oracle(source)
    rows = compare(llm, oracle, prompts(llm, args.text, args.prompts, args.prompt_tokens), args.tokens)
    worst = max(row["max_relative_difference"] for row in rows)
    identical = all(row["identical_tokens"] == args.tokens for row in rows)
    batched = all(row["batched"]["identical_tokens"] == args.tokens for row in rows)
    report = {
        "model": args.model,
        "oracle": str(source),
        "architecture": llm.config["architecture"],
        "backend": llm.config["backend"],
        "dtype": llm.config["dtype"],
        "kv_dtype": llm.config["kv_dtype"],
        "max_relative_difference": worst,
        "tolerance": args.tolerance,
        "greedy_identical": identical,
        "greedy_identical_batched": batched,
        "passed": identical and batched and worst <= args.tolerance,
        "prompts": rows,
    }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        describe(report, args.tokens)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
