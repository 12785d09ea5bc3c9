"""Decoding with weights on disk, against what the disk and the processor allow, and memory against the budget.

    python eval/streaming.py [--like tinyllama-1.1b --layers 12] [--shares 0.4 0.7] [--folder DIR] [--json]
    python eval/streaming.py --device cuda [--shares 0.6]

A random model of at least 1 GB is written by tools/make_random_model.py, then for every budget, a share of the bytes of
all weights, alternating: direct reads of the file of packed layers without an engine; decoding with all weights in
memory; decoding within the budget. A step can be no faster than the slower of the disk, for what is streamed, and of
the processor: `share_of_limit` is how much of that was reached. With --device cuda the layers come from pinned host
memory, and instead of the disk it is copies of pinned memory, made by torch, that are measured.
Every run gives the same tokens, or this fails.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from machine import load_average

MAKE_MODEL = Path(__file__).resolve().parents[1] / "tools" / "make_random_model.py"
BLOCK = 4096
PIECE = 1 << 20  # what the reader asks for at once (cpp/io/blob_file.cpp)
READERS = 8  # pieces that are under way

# argv: model, options of LLM, fields of StreamingConfig or null, batch, tokens.
DECODE = """
import json, sys, time
import nanobraid as nb
options, streaming, batch, tokens = (json.loads(word) for word in sys.argv[2:])
config = None if streaming is None else nb.StreamingConfig(**streaming)
with nb.LLM(sys.argv[1], streaming_config=config, max_model_len=256, kv_cache_bytes=64 << 20, **options) as llm:
    prompts = [f"Story {i}:" for i in range(batch)]
    def run(count):
        params = nb.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params)
        return time.perf_counter() - begin, [list(output.token_ids) for output in outputs]
    run(2)
    before = llm.stats()
    seconds, answers = run(tokens)
    after = llm.stats()
    keys = ("steps", "streamed_bytes", "streamed_seconds", "streamed_wait_seconds", "forward_seconds")
    print(json.dumps({
        **{key: after[key] - before[key] for key in keys},
        "seconds": seconds, "answers": answers, "peak_rss_bytes": after["peak_rss_bytes"],
        **{key: after[key] for key in ("weight_resident_bytes", "weight_budget_bytes", "streamed_layers",
                                       "streamed_direct", "workspace_bytes")},
        "weight_bytes": llm.config["weight_bytes"], "backend": llm.config["backend"],
        "num_threads": llm.config["num_threads"],
    }))
"""


def decode(model: Path, streaming: dict[str, Any] | None, batch: int, tokens: int, **options: Any) -> dict[str, Any]:
    """What one process said of itself; `options` are those of `LLM`."""
    words = [json.dumps(word) for word in (options, streaming, batch, tokens)]
    output = subprocess.run(
        [sys.executable, "-c", DECODE, str(model), *words], check=True, capture_output=True, text=True
    )
    report: dict[str, Any] = json.loads(output.stdout)
    report["tokens_per_s"] = batch * tokens / report["seconds"]
    return report


def read_rate(path: Path, num_bytes: int) -> float:
    """GB/s of direct reads from the beginning of a file, several pieces at a time."""
    num_bytes = min(num_bytes, path.stat().st_size) // BLOCK * BLOCK
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read_every(first: int) -> int:
        memory, done = mmap.mmap(-1, PIECE), 0
        for offset in range(first * PIECE, num_bytes, READERS * PIECE):
            wanted = min(PIECE, num_bytes - offset)
            if os.preadv(descriptor, [memoryview(memory)[:wanted]], offset) != wanted:
                raise SystemExit(f"{path}: a read at {offset} was short")
            done += wanted
        return done

    try:
        with ThreadPoolExecutor(READERS) as pool:
            begin = time.perf_counter()
            done = sum(pool.map(read_every, range(READERS)))
            return done / (time.perf_counter() - begin) / 1e9
    finally:
        os.close(descriptor)


# In a process of its own, whose memory on the GPU goes with it. The first copy does not count.
COPY_RATE = """
import statistics, time, torch
source = torch.ones(1 << 28, dtype=torch.uint8).pin_memory()
target = torch.empty_like(source, device="cuda")
seconds = []
for _ in range(9):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    seconds.append(time.perf_counter() - begin)
print(source.numel() / statistics.median(seconds[1:]) / 1e9)
"""


def copy_rate() -> float:
    """GB/s of copies from pinned memory to the GPU."""
    return float(subprocess.run([sys.executable, "-c", COPY_RATE], check=True, capture_output=True, text=True).stdout)


def measure(model: Path, share: float, *, device: str, batch: int, tokens: int, repeat: int) -> dict[str, Any]:
    """One budget: medians of `repeat` rounds, each of a read, a run in memory and a streamed run."""
    folder = model.parent / "streamed"
    options = {"device": device}
    resident = [decode(model, None, batch, tokens, **options)]
    budget = int(share * resident[0]["weight_bytes"])
    streaming = {"budget_bytes": budget, "cache_dir": str(folder)}
    decode(model, streaming, batch, 1, **options)  # packs
    streamed, rates = [], []
    for i in range(repeat):
        if i > 0:
            resident.append(decode(model, None, batch, tokens, **options))
        rates.append(copy_rate() if device == "cuda" else read_rate(next(folder.glob("*.layers")), 1 << 30))
        streamed.append(decode(model, streaming, batch, tokens, **options))
        if streamed[-1]["answers"] != resident[0]["answers"]:
            raise SystemExit(f"within {budget} bytes the tokens are others")
    one = streamed[0]
    step_bytes = one["streamed_bytes"] / one["steps"]
    source = statistics.median(rates)
    compute = statistics.median(run["forward_seconds"] / run["steps"] for run in resident)
    step = statistics.median(run["forward_seconds"] / run["steps"] for run in streamed)
    peak = max(run["peak_rss_bytes"] for run in streamed)
    return {
        "batch": batch,
        "budget_bytes": budget,
        "weight_bytes": one["weight_bytes"],
        "weight_resident_bytes": one["weight_resident_bytes"],
        "streamed_layers": one["streamed_layers"],
        "direct": one["streamed_direct"],
        "step_bytes": round(step_bytes),
        "source_gb_per_s": source,
        "streamed_gb_per_s": statistics.median(
            run["streamed_bytes"] / run["streamed_seconds"] / 1e9 for run in streamed
        ),
        "resident_step_s": compute,
        "streamed_step_s": step,
        "limit_step_s": max(step_bytes / source / 1e9, compute),
        "share_of_limit": max(step_bytes / source / 1e9, compute) / step,
        "resident_tokens_per_s": statistics.median(run["tokens_per_s"] for run in resident),
        "streamed_tokens_per_s": statistics.median(run["tokens_per_s"] for run in streamed),
        "wait_share": statistics.median(run["streamed_wait_seconds"] / run["seconds"] for run in streamed),
        "peak_rss_bytes": peak,
        "peak_beyond_budget_bytes": peak - budget,
        "resident_peak_rss_bytes": max(run["peak_rss_bytes"] for run in resident),
        "backend": one["backend"],
        "num_threads": one["num_threads"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--like", default="tinyllama-1.1b", help="shape of the model, as make_random_model.py knows it")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8], help="budgets, of the weights' bytes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where model and layers are written (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        model = Path(scratch) / "random.gguf"
        shape = ["--format", "gguf", "--like", args.like, "--layers", str(args.layers)]
        subprocess.run([sys.executable, str(MAKE_MODEL), str(model), *shape], check=True, stdout=subprocess.DEVNULL)
        for share in args.shares:
            for batch in args.batches:
                before = load_average()
                row = measure(model, share, device=args.device, batch=batch, tokens=args.tokens, repeat=args.repeat)
                rows.append(row | {"share": share, "load_average": [before, load_average()]})
                if not args.json:
                    print(
                        f"budget {row['budget_bytes'] / 1e6:.0f} of {row['weight_bytes'] / 1e6:.0f} MB, batch {batch}: "
                        f"{row['streamed_tokens_per_s']:.2f} tokens/s ({row['resident_tokens_per_s']:.2f} in memory), "
                        f"{100 * row['share_of_limit']:.0f} % of the limit; "
                        f"{row['streamed_gb_per_s']:.2f} of {row['source_gb_per_s']:.2f} GB/s, "
                        f"peak {row['peak_beyond_budget_bytes'] / 1e6:+.0f} MB to the budget"
                    )
    if args.json:
        print(json.dumps({"like": args.like, "layers": args.layers, "tokens": args.tokens, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
