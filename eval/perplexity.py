"""Perplexity of a model on a text, and KL divergence to a second model or backend.

    python eval/perplexity.py --other transformers            # default backend against transformers in float32
    python eval/perplexity.py --device avx512 --other reference

The text is cut into windows of `--context` tokens, as many as fit into `--tokens`. Every position but the first of a
window counts. KL is KL(other || model) in nats, mean over positions. Exits with 1 if `--max-kl` is exceeded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nanobraid as nb
from nanobraid._core import available_backends
from nanobraid.models import resolve
from oracle import Oracle, log_softmax, mean_kl

TEXT = Path(__file__).parent / "text" / "mixed.txt"
Logits = Callable[[list[int]], NDArray[np.float32]]


def open_other(name: str, model: str, dtype: str, kv_dtype: str) -> Logits:
    """`transformers`, a backend name, or a model file."""
    if name == "transformers":
        return Oracle(resolve(model)).logits
    if name in available_backends():
        return nb.LLM(model, device=name, dtype=dtype, kv_dtype=kv_dtype).logits
    return nb.LLM(name, dtype=dtype, kv_dtype=kv_dtype).logits


def negative_log_likelihood(logits: NDArray[np.float32], ids: list[int]) -> NDArray[np.float64]:
    logprobs = log_softmax(logits[:-1])
    return np.asarray(-logprobs[np.arange(len(ids) - 1), ids[1:]])


def evaluate(llm: nb.LLM, other: Logits | None, windows: list[list[int]]) -> dict[str, Any]:
    nll: list[float] = []
    other_nll: list[float] = []
    kl: list[float] = []
    agree: list[bool] = []
    for ids in windows:
        ours = llm.logits(ids)
        nll.extend(negative_log_likelihood(ours, ids))
        if other is None:
            continue
        theirs = other(ids)
        other_nll.extend(negative_log_likelihood(theirs, ids))
        kl.extend(mean_kl(theirs, ours))
        agree.extend(ours.argmax(axis=-1) == theirs.argmax(axis=-1))
    report: dict[str, Any] = {"positions": len(nll), "perplexity": float(np.exp(np.mean(nll)))}
    if other is not None:
        report["other_perplexity"] = float(np.exp(np.mean(other_nll)))
        report["perplexity_ratio"] = report["perplexity"] / report["other_perplexity"]
        report["mean_kl"] = float(np.mean(kl))
        report["max_kl"] = float(np.max(kl))
        report["top1_agreement"] = float(np.mean(agree))
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="activations: auto, int8, bf16, f32")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--other", help="transformers, a backend name, or a model file")
    parser.add_argument("--other-dtype", default="auto")
    parser.add_argument("--other-kv-dtype", default="auto")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-kl", type=float, help="fail above this mean KL")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    llm = nb.LLM(args.model, device=args.device, dtype=args.dtype, kv_dtype=args.kv_dtype)
    ids = llm.tokenizer.encode(args.text.read_text())[: args.tokens]
    windows = [ids[i : i + args.context] for i in range(0, len(ids), args.context)]
    windows = [window for window in windows if len(window) > 1]
    other = open_other(args.other, args.model, args.other_dtype, args.other_kv_dtype) if args.other else None
    report: dict[str, Any] = {
        "model": args.model,
        "backend": llm.config["backend"],
        "dtype": llm.config["dtype"],
        "kv_dtype": llm.config["kv_dtype"],
        "other": args.other,
        "text": args.text.name,
        "tokens": sum(map(len, windows)),
        "context": args.context,
        **evaluate(llm, other, windows),
    }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for key, value in report.items():
            print(f"{key:>17}  {value:.6g}" if isinstance(value, float) else f"{key:>17}  {value}")
    return 1 if args.max_kl is not None and report.get("mean_kl", 0.0) > args.max_kl else 0


if __name__ == "__main__":
    sys.exit(main())
