"""What policies of keys and values cost on long texts: perplexity and KL behind the point where they begin to forget.

    python eval/kv_policies.py                                        # windows with and without sinks
    python eval/kv_policies.py --tokens 2048 --from 1024 "budget(256, window=256)" "chunk_summary(window=256)"

Every text of the package is read up to `--tokens` tokens, by the same model under each policy; positions from `--from`
on count. KL is KL(full || policy) in nats. Activations, keys and values are f32, so that nothing else differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import nanobraid as nb
from nanobraid.bench_kv.divergence import mean_kl, negative_log_likelihood, perplexity, same_top1
from nanobraid.bench_kv.documents import texts
from nanobraid.bench_kv.machine import cpu_name

WINDOWS = ["full", "sliding_window(192, sinks=4)", "sliding_window(192, sinks=0)"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="*", help=f"default: {', '.join(WINDOWS)}")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024, help="of each text (default: 1024)")
    parser.add_argument("--from", dest="first", type=int, default=512, help="position that counts first (default: 512)")
    parser.add_argument("--output", type=Path, help="also write the table here")
    args = parser.parse_args()
    policies = [nb.kv_policy.parse(policy) for policy in args.policies or WINDOWS]
    found: dict[str, list[np.ndarray]] = {}
    with nb.LLM(args.model, dtype="f32", kv_dtype="f32", max_model_len=args.tokens, max_num_seqs=2) as full:
        encoded = {name: full.tokenizer.encode(text)[: args.tokens] for name, text in texts().items()}
        exact = {name: full.logits(ids)[args.first :] for name, ids in encoded.items()}
    for policy in policies:
        options = {"dtype": "f32", "kv_dtype": "f32", "max_model_len": args.tokens, "max_num_seqs": 2}
        nll, kl, top1 = [], [], []
        with nb.LLM(args.model, kv_policy=policy, **options) as llm:
            for name, ids in encoded.items():
                ours = llm.logits(ids)[args.first :]
                nll.append(negative_log_likelihood(ours, ids[args.first :]))
                kl.append(mean_kl(exact[name], ours))
                top1.append(same_top1(exact[name], ours))
        found[str(policy)] = [np.concatenate(nll), np.concatenate(kl), np.concatenate(top1)]
    lengths = ", ".join(f"{name} {len(ids)}" for name, ids in encoded.items())
    lines = [
        f"{args.model}, {cpu_name()}, f32; tokens of {lengths}; positions from {args.first} on",
        f"{'policy':42} {'perplexity':>10} {'KL':>8} {'top-1':>7}",
    ]
    lines += [
        f"{name:42} {perplexity(nll):10.2f} {kl.mean():8.4f} {100 * top1.mean():6.1f} %"
        for name, (nll, kl, top1) in found.items()
    ]
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
