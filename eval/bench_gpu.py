"""Speed on one GPU: what the machine can do, what nanobraid makes of it, and transformers on the same weights.

    python tools/make_random_model.py --like llama-3.2-1b --dtype bf16 FOLDER
    python eval/bench_gpu.py --models FOLDER [--op-bench BUILD/eval/op_bench] [--json out.json]

First the ceilings: read bandwidth (the sum of a large tensor) and a large bf16 matrix product, both by torch. Then for
every folder of Hugging Face weights and every round, the sides in turn: the time of a decode step after --context
tokens, the rate of a prompt of --prompt tokens, and the throughput of batches. A decode step is the time of --new
tokens over their number, without the prompt. `limit` is the time to read the weights once at the measured bandwidth,
`overhead` what a step takes beyond it, per layer. nanobraid runs twice, with recorded steps (CUDA graphs) and with
`enforce_eager`, which is `nanobraid eager`. transformers runs eagerly, and with a static cache and compiled.

With --device cpu it runs on the processor, at sizes that suit one; the figures then say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import nanobraid as nb
from nanobraid.models import resolve

Seconds = float
Step = Callable[[list[list[int]], int], None]  # answers prompts with so many tokens each


def facts_of(device: str) -> dict[str, Any]:
    """What every figure depends on."""
    import torch

    facts: dict[str, Any] = {"date": date.today().isoformat(), "device": device, "torch": torch.__version__}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        output = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
        facts[query] = output.stdout.strip()
    return facts


def wait_for(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def median_seconds(device: str, function: Callable[[], Any], repeat: int = 7) -> Seconds:
    """Median over calls that each wait for the device; the first call does not count."""
    samples = []
    for _ in range(repeat + 1):
        wait_for(device)
        begin = time.perf_counter()
        function()
        wait_for(device)
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples[1:])


def ceilings(device: str, megabytes: int, size: int) -> dict[str, float]:
    """Read bandwidth in GB/s and TFLOP/s of a bf16 product of two matrices of size x size."""
    import torch

    data = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    read = data.numel() * 4 / median_seconds(device, data.sum) / 1e9
    del data
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = 2.0 * size**3 / median_seconds(device, lambda: left @ right) / 1e12
    return {"read_gb_s": read, "matmul_tflop_s": product}


class Nanobraid:
    """nanobraid in this process."""

    name: str = "nanobraid"

    def __init__(self, folder: Path, args: argparse.Namespace, eager: bool = False) -> None:
        if eager:
            self.name = "nanobraid eager"
        self.llm = nb.LLM(
            folder,
            device=args.device,
            max_model_len=args.max_len,
            max_num_seqs=max(args.batches),
            max_batch_tokens=args.prompt,
            enable_prefix_caching=False,
            enforce_eager=eager,
        )
        config = self.llm.config
        self.weight_bytes = int(config["weight_bytes"])
        self.layers = int(config["num_layers"])
        self.vocab_size = int(config["vocab_size"])
        self.about = {key: config[key] for key in ("backend", "dtype", "kv_dtype")}

    def answer(self, prompts: list[list[int]], num_tokens: int) -> None:
        params = nb.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        outputs = self.llm.generate(prompts, params, progress=False)
        assert all(len(output.token_ids) == num_tokens for output in outputs)

    def close(self) -> None:
        self.llm.close()


class Transformers:
    """transformers over torch, eager or with a static cache and compiled."""

    def __init__(self, folder: Path, args: argparse.Namespace, compiled: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.name = f"transformers {'compiled' if compiled else 'eager'}"
        self.device = args.device
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(args.device).eval()
        self.options = {"cache_implementation": "static"} if compiled else {}
        self.torch = torch

    def answer(self, prompts: list[list[int]], num_tokens: int) -> None:
        ids = self.torch.tensor(prompts, device=self.device)
        with self.torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
                **self.options,
            )
        assert output.shape[1] == len(prompts[0]) + num_tokens
        wait_for(self.device)

    def close(self) -> None:
        del self.model
        gc.collect()
        if self.device == "cuda":
            self.torch.cuda.empty_cache()


def timed(step: Step, prompts: list[list[int]], num_tokens: int) -> Seconds:
    begin = time.perf_counter()
    step(prompts, num_tokens)
    return time.perf_counter() - begin


def measure_side(side: Any, args: argparse.Namespace, draw: random.Random, vocab: int) -> dict[str, float]:
    """One round of one side."""

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[draw.randrange(vocab) for _ in range(length)] for _ in range(count)]

    result: dict[str, float] = {}
    first = timed(side.answer, prompts(1, args.prompt), 1)
    result["prompt_tok_s"] = args.prompt / first
    for batch in args.batches:
        asked = prompts(batch, args.context)
        without = timed(side.answer, asked, 1)
        long = timed(side.answer, asked, 1 + args.new)
        result[f"step_us_batch_{batch}"] = max(long - without, 0.0) / args.new * 1e6
    return result


def measure_model(folder: Path, args: argparse.Namespace, report: dict[str, Any]) -> None:
    makers: list[Callable[[], Any]] = [lambda: Nanobraid(folder, args), lambda: Nanobraid(folder, args, True)]
    if not args.no_peer:
        makers += [lambda: Transformers(folder, args, False), lambda: Transformers(folder, args, True)]
    row: dict[str, Any] = {"model": folder.name, "sides": {}}
    sides = [make() for make in makers]
    ours = sides[0]
    row.update(weight_bytes=ours.weight_bytes, layers=ours.layers, about=ours.about)
    rounds: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for number in range(args.rounds + 1):
        for side in sides:
            figures = measure_side(side, args, random.Random(args.seed + number), ours.vocab_size)
            if number > 0:  # the first round compiles and warms up
                rounds[side.name].append(figures)
    for side in sides:
        side.close()
    limit_us = ours.weight_bytes / report["ceilings"]["read_gb_s"] / 1e3
    row["limit_us"] = limit_us
    for name, runs in rounds.items():
        figures = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        step = figures[f"step_us_batch_{args.batches[0]}"]
        if name in (ours.name, sides[1].name) and step > 0:
            figures["share_of_read_bandwidth"] = limit_us / step
            figures["overhead_us_per_layer"] = (step - limit_us) / ours.layers
        row["sides"][name] = figures
    report["models"].append(row)
    print_model(row, args)


def print_model(row: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"{row['model']}: {row['weight_bytes'] / 1e9:.2f} GB, {row['about']}, limit {row['limit_us']:.0f} us a step")
    for name, figures in row["sides"].items():
        steps = ", ".join(f"{batch}: {figures[f'step_us_batch_{batch}']:.0f}" for batch in args.batches)
        extra = ""
        if "share_of_read_bandwidth" in figures:
            extra = (
                f", {figures['share_of_read_bandwidth']:.0%} of the read bandwidth, overhead "
                f"{figures['overhead_us_per_layer']:.1f} us a layer"
            )
        print(f"  {name:22} us per step by batch: {steps}; prompt {figures['prompt_tok_s']:.0f} tok/s{extra}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders of Hugging Face weights")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=128, help="tokens before the first decode step")
    parser.add_argument("--new", type=int, default=128, help="decode steps")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt that is timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ceiling-mb", type=int, default=4096, help="size of the tensor that is read")
    parser.add_argument("--matmul", type=int, default=8192, help="size of the matrices that are multiplied")
    parser.add_argument("--no-peer", action="store_true", help="nanobraid alone")
    parser.add_argument("--op-bench", type=Path, help="program op_bench: operators one by one, into the report")
    parser.add_argument("--json", type=Path, help="where to write the report")
    args = parser.parse_args()
    counts = (*args.batches, args.context, args.new, args.prompt, args.rounds, args.ceiling_mb, args.matmul)
    if min(counts) < 1:
        parser.error("all counts must be positive")
    args.max_len = max(args.prompt, args.context) + args.new + 1

    report: dict[str, Any] = {**facts_of(args.device), **{k: getattr(args, k) for k in ("context", "new", "prompt")}}
    report["ceilings"] = ceilings(args.device, args.ceiling_mb, args.matmul)
    limits = report["ceilings"]
    print(f"read {limits['read_gb_s']:.0f} GB/s, bf16 product {limits['matmul_tflop_s']:.1f} TFLOP/s")
    report["models"] = []
    for name in args.models:
        measure_model(Path(name) if Path(name).is_dir() else resolve(name), args, report)
    if args.op_bench:
        backend = "cuda:0" if args.device == "cuda" else ""
        output = subprocess.run([args.op_bench, backend], capture_output=True, text=True, check=True)
        report["operators"] = output.stdout.splitlines()
        print(output.stdout, end="")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
