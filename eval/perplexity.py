"""Perplexity of a model on a text, and KL divergence to a second model or backend.

    python eval/perplexity.py --other transformers            # default backend against transformers in float32
    python eval/perplexity.py --device avx512 --other reference
    python eval/perplexity.py --model w4.braid --dtype bf16 --other bf16.braid --other-dtype bf16
    python eval/perplexity.py --model w8.braid --other transformers:path/to/hf_folder

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
from nanobraid.bench_kv.divergence import mean_kl, negative_log_likelihood, same_top1
from oracle import Oracle, source_of

TEXT = Path(__file__).parent / "text" / "mixed.txt"
Logits = Callable[[list[int]], NDArray[np.float32]]


def open_other(name: str, model: str, device: str, dtype: str, kv_dtype: str) -> tuple[Logits, dict[str, Any]]:
    """The second model (see --other), and how it runs."""
    kind, _, source = name.partition(":")
    if kind == "transformers":
        path = Path(source) if source else source_of(model)
        return Oracle(path).logits, {"model": str(path), "backend": "transformers", "dtype": "f32", "kv_dtype": "f32"}
    if name in available_backends():
        llm = nb.LLM(model, device=name, dtype=dtype, kv_dtype=kv_dtype)
    else:
        llm = nb.LLM(name, device=device, dtype=dtype, kv_dtype=kv_dtype)
    return llm.logits, {
        "model": llm.config["path"],
        **{key: llm.config[key] for key in ("backend", "dtype", "kv_dtype")},
    }


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
        if theirs.shape != ours.shape:
            raise SystemExit(
                f"the models have {ours.shape[1]} and {theirs.shape[1]} tokens: no divergence between them"
            )
        other_nll.extend(negative_log_likelihood(theirs, ids))
        kl.extend(mean_kl(theirs, ours))
        agree.extend(same_top1(theirs, ours))
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
    parser.add_argument(
        "--other",
        help="what to compare with: another model file; the name of a backend, which runs the same file; "
        "transformers, which runs the same GGUF file; or transformers:PATH, a Hugging Face folder or GGUF file",
    )
    parser.add_argument("--other-device", default="auto", help="backend of another model file")
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
    other, how = None, None
    if args.other:
        other, how = open_other(args.other, args.model, args.other_device, args.other_dtype, args.other_kv_dtype)
    report: dict[str, Any] = {
        "model": args.model,
        "backend": llm.config["backend"],
        "dtype": llm.config["dtype"],
        "kv_dtype": llm.config["kv_dtype"],
        "other": how,
        "text": args.text.name,
        "tokens": sum(map(len, windows)),
        "context": args.context,
        **evaluate(llm, other, windows),
    }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for key, value in report.items():
            text = ", ".join(value.values()) if isinstance(value, dict) else value
            print(f"{key:>17}  {text:.6g}" if isinstance(text, float) else f"{key:>17}  {text}")
    return 1 if args.max_kl is not None and report.get("mean_kl", 0.0) > args.max_kl else 0


if __name__ == "__main__":
    sys.exit(main())
