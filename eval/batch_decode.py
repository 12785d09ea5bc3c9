"""Decode throughput of a batch, beside llama.cpp's, and what a decode step spends outside the forward pass.

    python eval/batch_decode.py --files a.gguf b.gguf [--peer BUILD/bin/llama-batched-bench] [--batches 1 8 16]
                                [--rounds 5] [--json out.json]

The peer and nanobraid in turn, every round with new prompts. nanobraid answers B distinct prompts through
`LLM.generate`; all but the last token of each is in the prefix cache, so that every step is a decode, as in the
peer's `tg` phase, and the time is the whole call: submission, scheduling, sampling, text. The peer's program has no
requests, sampler or text. It runs with 2 MB pages and its defaults (f16 KV, flash attention where it chooses).

Outside forward: the time of the call less the decoder and head (`stats()["forward_seconds"]`), as a share of the call.
Of it the engine counts planning (plan, batch, commit) and sampling itself; the rest is threads, Python and text.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nanobraid as nb
from machine import read_bandwidth
from nanobraid.bench_kv.machine import cpu_name
from nanobraid.models import resolve
from serving import Prompts

COUNTERS = ("steps", "prompt_tokens", "plan_seconds", "forward_seconds", "sample_seconds")
BLOCK = 16  # tokens of a KV block: what the prefix cache shares


def run_peer(peer: Path, file: Path, args: argparse.Namespace, flash_attention: str = "auto") -> dict[int, float]:
    """Tokens per second of the decode phase, by batch size."""
    context = max(args.batches) * (args.prompt_tokens + args.new_tokens)
    command = [str(peer), "-m", str(file), "-t", str(args.threads), "-c", str(context)]
    command += ["-npp", str(args.prompt_tokens), "-ntg", str(args.new_tokens), "--output-format", "jsonl"]
    command += ["-npl", ",".join(map(str, args.batches)), "-fa", flash_attention]
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in output.stdout.splitlines() if line.startswith("{")]
    speeds = {int(row["pl"]): float(row["speed_tg"]) for row in rows}
    if sorted(speeds) != sorted(args.batches):
        raise SystemExit(f"{peer} reported batches {sorted(speeds)}, wanted {args.batches}:\n{output.stdout[-2000:]}")
    return speeds


def run_ours(llm: nb.LLM, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, float]:
    """One timed batch. Every step of it has one row per prompt, or the figure would not be one of decoding."""
    once = nb.SamplingParams(temperature=0, max_tokens=1)
    params = nb.SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
    llm.generate(prompts, once, progress=False)
    before = llm.stats()
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, progress=False)
    seconds = time.perf_counter() - begin
    after = llm.stats()
    spent = {key: after[key] - before[key] for key in COUNTERS}
    num_tokens = sum(len(output.token_ids) for output in outputs)
    if num_tokens != len(prompts) * args.new_tokens or spent["prompt_tokens"] != len(prompts):
        raise SystemExit(f"{num_tokens} tokens came, and {spent['prompt_tokens']} prompt tokens were computed")
    forward = spent["forward_seconds"]
    return {
        "tok_s": num_tokens / seconds,
        "step_ms": 1e3 * seconds / spent["steps"],
        "steps": spent["steps"],
        "plan_share": spent["plan_seconds"] / seconds,
        "sample_share": spent["sample_seconds"] / seconds,
        "other_share": 1 - (forward + spent["plan_seconds"] + spent["sample_seconds"]) / seconds,
        "outside_forward_share": 1 - forward / seconds,
    }


def compare(file: Path, args: argparse.Namespace) -> dict[str, Any]:
    ours: dict[int, list[dict[str, float]]] = {batch: [] for batch in args.batches}
    theirs: dict[int, list[float]] = {batch: [] for batch in args.batches}
    longest = args.prompt_tokens + 1 + args.new_tokens
    with nb.LLM(file, num_threads=args.threads, max_model_len=longest, max_num_seqs=max(args.batches)) as llm:
        row: dict[str, Any] = {"file": file.name}
        row.update({key: llm.config[key] for key in ("backend", "dtype", "kv_dtype")})
        for number in range(args.rounds):
            if args.peer is not None:
                for batch, speed in run_peer(args.peer, file, args).items():
                    theirs[batch].append(speed)
            prompts = Prompts(file, args.seed + number)
            for batch in args.batches:
                ours[batch].append(run_ours(llm, [prompts.take(args.prompt_tokens + 1) for _ in range(batch)], args))
    row["batches"] = [summary(batch, ours, theirs, args) for batch in args.batches]
    return row


def summary(
    batch: int, ours: dict[int, list[dict[str, float]]], theirs: dict[int, list[float]], args: argparse.Namespace
) -> dict[str, Any]:
    def speed(size: int) -> float:
        return statistics.median(run["tok_s"] for run in ours[size])

    first = args.batches[0]
    result: dict[str, Any] = {
        "batch": batch,
        "nanobraid": {key: statistics.median(run[key] for run in ours[batch]) for key in ours[batch][0]},
        f"ratio_to_batch_{first}": speed(batch) / speed(first),
        "all": {"nanobraid": ours[batch]},
    }
    if theirs[batch]:
        peer = statistics.median(theirs[batch])
        result["llama.cpp"] = {"tok_s": peer}
        result["ratio_to_llama.cpp"] = speed(batch) / peer
        result["all"]["llama.cpp"] = theirs[batch]
    return result


def show(row: dict[str, Any], first: int) -> None:
    for result in row["batches"]:
        mine = result["nanobraid"]
        peer = ""
        if "llama.cpp" in result:
            peer = f"llama.cpp {result['llama.cpp']['tok_s']:7.1f}, ratio {result['ratio_to_llama.cpp']:.2f}   "
        print(
            f"{row['file']:<24} batch {result['batch']:<3} {mine['tok_s']:7.1f} tok/s, "
            f"{result[f'ratio_to_batch_{first}']:.2f} x batch {first}   {peer}"
            f"step {mine['step_ms']:.2f} ms, outside forward {mine['outside_forward_share']:.2%} "
            f"(plan {mine['plan_share']:.2%}, sample {mine['sample_share']:.2%}, other {mine['other_share']:.2%})",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=["smollm2-135m"], help="known names or GGUF files")
    parser.add_argument("--peer", type=Path, help="path of llama-batched-bench")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128, help=f"a multiple of {BLOCK}")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    if args.prompt_tokens % BLOCK != 0 or min(args.prompt_tokens, args.new_tokens, args.rounds, *args.batches) < 1:
        parser.error(f"--prompt-tokens must be a multiple of {BLOCK}, and all counts positive")

    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu_name()}
    report.update({key: getattr(args, key) for key in ("threads", "prompt_tokens", "new_tokens", "rounds")})
    report["read_gb_s_before"] = read_bandwidth(args.threads)
    report["rows"] = []
    for name in args.files:
        report["rows"].append(compare(resolve(name), args))
        show(report["rows"][-1], args.batches[0])
    report["read_gb_s_after"] = read_bandwidth(args.threads)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
