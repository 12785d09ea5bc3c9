"""One device against the processor on the same weights: do they say the same, and does the device keep its promises?

    python eval/compare_devices.py --model smollm2-135m
    python eval/compare_devices.py --model FOLDER --tokens 0 --new 8       # random weights: no text, tokens only

Two sections. `divergence`: KL(processor || device) in nats, mean over the positions of --tokens tokens of text, the
processor with float activations (bf16 as on the device, so that what is left is the order of sums and the rounding of
weights). `promises`: greedy tokens on the device, bit for bit the same alone, in batches of 2 to --batch rows, and in a
second run; and how many of them are the processor's too, which is told but no promise. Exits with 1 if a promise is
broken, or the divergence is above --max-kl.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

import nanobraid as nb
from nanobraid.bench_kv.divergence import mean_kl

TEXT = Path(__file__).parent / "text" / "mixed.txt"
Prompts = list[list[int]]


def open_model(args: argparse.Namespace, device: str, dtype: str) -> nb.LLM:
    return nb.LLM(
        args.model,
        device=device,
        dtype=dtype,
        kv_dtype=args.kv_dtype,
        max_model_len=args.max_len,
        max_num_seqs=args.batch,
        enable_prefix_caching=False,
    )


def divergence(device: nb.LLM, processor: nb.LLM, args: argparse.Namespace) -> dict[str, float]:
    """Over windows of the text; the last one may be shorter."""
    ids = device.tokenizer.encode(args.text.read_text(encoding="utf-8"))[: args.tokens]
    kl: list[float] = []
    agree: list[bool] = []
    for begin in range(0, len(ids), args.context):
        window = ids[begin : begin + args.context]
        theirs, ours = processor.logits(window), device.logits(window)
        kl.extend(mean_kl(theirs, ours))
        agree.extend(theirs.argmax(axis=-1) == ours.argmax(axis=-1))
    return {
        "positions": len(kl),
        "mean_kl": float(np.mean(kl)),
        "max_kl": float(np.max(kl)),
        "top1_agreement": float(np.mean(agree)),
    }


def greedy(llm: nb.LLM, prompts: Prompts, new: int) -> Prompts:
    params = nb.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    return [output.token_ids for output in llm.generate(prompts, params, progress=False)]


def promises(device: nb.LLM, processor: nb.LLM, args: argparse.Namespace) -> dict[str, Any]:
    """Which batches broke the promise, and the share of tokens that agree with the processor's up to the first other
    one of an answer (from there on the texts differ)."""
    draw = random.Random(args.seed)
    vocab = int(device.config["vocab_size"])
    # Of up to 8 tokens each: a longer prompt is a batch of rows itself, whose matrix path the promise leaves open.
    prompts = [[draw.randrange(vocab) for _ in range(1 + i % 8)] for i in range(args.batch)]
    alone = [greedy(device, [prompt], args.new)[0] for prompt in prompts]
    broken = []
    for size in range(2, args.batch + 1):
        if greedy(device, prompts[:size], args.new) != alone[:size]:
            broken.append(f"batch of {size}")
    if [greedy(device, [prompt], args.new)[0] for prompt in prompts] != alone:
        broken.append("second run")
    expected = greedy(processor, prompts, args.new)
    same = 0
    for ours, theirs in zip(alone, expected, strict=True):
        differing = [i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
        same += differing[0] if differing else len(ours)
    return {"answers": len(alone), "broken": broken, "share_of_processor": same / (len(alone) * args.new)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processor", default="cpu", help="what it is compared with: cpu, reference, avx2, ...")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "f32"), help="on the device")
    parser.add_argument("--processor-dtype", default="bf16", choices=("bf16", "f32"))
    parser.add_argument("--kv-dtype", default="bf16", choices=("bf16", "f32"))
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=2048, help="of the text; 0: no divergence")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--max-kl", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=8, help="most rows of a batch, up to 8")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the report")
    args = parser.parse_args()
    if args.tokens < 0 or args.context < 2 or args.new < 1 or not 1 <= args.batch <= 8:
        parser.error("--tokens >= 0, --context >= 2, --new >= 1, --batch from 1 to 8")
    args.max_len = max(args.context + 1, 8 + args.new + 1)
    with (
        open_model(args, args.device, args.dtype) as device,
        open_model(args, args.processor, args.processor_dtype) as processor,
    ):
        keys = ("backend", "dtype", "kv_dtype")
        report: dict[str, Any] = {
            "model": Path(str(args.model)).name,
            "device": {key: device.config[key] for key in keys},
            "processor": {key: processor.config[key] for key in keys},
        }
        failed = []
        if args.tokens > 0:
            found = report["divergence"] = divergence(device, processor, args)
            if not found["mean_kl"] <= args.max_kl:
                failed.append(f"mean KL {found['mean_kl']:.2e} is above {args.max_kl:.0e}")
        report["promises"] = promises(device, processor, args)
        failed += [f"other tokens: {what}" for what in report["promises"]["broken"]]
    report["failed"] = failed
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
