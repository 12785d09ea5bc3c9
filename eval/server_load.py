"""Many streaming clients over HTTP: `nanobraid serve` beside llama.cpp's `llama-server`, in turns.

    python eval/server_load.py --peer BUILD/bin/llama-server [--streams 16 64] [--rounds 3] [--output results.txt]

So many clients at the same time, each with its requests one after the other: the same bodies to both, token ids to
/v1/completions, greedy, answers of exactly --tokens tokens. Both servers compute with the same threads, as many
requests at a time as there are clients, and contexts of the same length; the clients are one process that only counts
bytes (http_load.py) and shares the processors with them. Prompts differ, so that no cache has them. Throughput is that
of all answers from the first byte sent to the last received; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from http_load import Body, load
from http_side import ServedNanobraid
from machine import cpu_name, load_average, read_bandwidth
from nanobraid.models import resolve
from serving import LlamaServer, Prompts, percentiles


def bodies(prompts: Prompts, args: argparse.Namespace, streams: int) -> list[list[Body]]:
    fields = {"max_tokens": args.tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    fields["stream_options"] = {"include_usage": True}
    return [[{"prompt": prompts.take(args.prompt_tokens), **fields} for _ in range(args.each)] for _ in range(streams)]


def summary(report: dict[str, Any], tokens: int) -> dict[str, Any]:
    """One round of one side; a request with another number of tokens is an error."""
    errors, gaps, firsts, total = [], [], [], 0
    for request in report["requests"]:
        if request["error"] is not None or request["tokens"] != tokens:
            errors.append(request["error"] or f"{request['tokens']} tokens came, {tokens} were wanted")
            continue
        total += tokens
        firsts.append(1e3 * request["ttft_s"])
        arrivals = request["arrivals_s"]
        gaps += [1e3 * (b - a) for a, b in pairwise(arrivals)]
    return {
        "requests": len(report["requests"]),
        "errors": len(errors),
        "first_errors": errors[:3],
        "tok_s": total / report["seconds"],
        "ttft_ms": percentiles(firsts),
        "inter_token_ms": percentiles(gaps),
        "client_cpu_share": report["client_cpu_s"] / report["seconds"],
    }


async def measure(args: argparse.Namespace, streams: int, prompts: Prompts) -> dict[str, Any]:
    model = resolve(args.model)
    context = args.prompt_tokens + args.tokens + 32
    arguments = [f"--num-threads={args.threads}", f"--max-model-len={context}", f"--max-num-seqs={streams}"]
    ports = {}
    rounds: dict[str, list[dict[str, Any]]] = {}
    async with AsyncExitStack() as stack:
        if args.peer is not None:
            peer = LlamaServer(args.peer, model, threads=args.threads, slots=streams, context=context, cache=True)
            await stack.enter_async_context(peer)
            ports["llama-server"] = peer.port
        server = stack.enter_context(ServedNanobraid(str(model), *arguments))
        ports["nanobraid"] = server.port
        for port in ports.values():  # the first requests of a process load kernels and pages
            load(port, "/v1/completions", bodies(prompts, argparse.Namespace(**{**vars(args), "tokens": 4}), 2))
        for number in range(args.rounds):
            clients = bodies(prompts, args, streams)
            for name in sorted(ports, reverse=number % 2 == 1):
                report = await asyncio.to_thread(load, ports[name], "/v1/completions", clients)
                rounds.setdefault(name, []).append(summary(report, args.tokens))
                row = rounds[name][-1]
                print(f"  {streams} {name} {row['tok_s']:.1f} tok/s, {row['errors']} errors", flush=True)
    result: dict[str, Any] = {"streams": streams, "context": context, "about": server.about, "rounds": rounds}
    for name, rows in rounds.items():
        result[name] = {
            "tok_s": statistics.median(row["tok_s"] for row in rows),
            "errors": sum(row["errors"] for row in rows),
            "requests": sum(row["requests"] for row in rows),
            "ttft_p50_ms": _median(rows, "ttft_ms", "p50"),
            "inter_token_p50_ms": _median(rows, "inter_token_ms", "p50"),
            "inter_token_p99_ms": _median(rows, "inter_token_ms", "p99"),
        }
    if len(rounds) == 2:
        pairs = zip(rounds["nanobraid"], rounds["llama-server"], strict=True)
        result["ratio"] = statistics.median(a["tok_s"] / max(b["tok_s"], 1e-9) for a, b in pairs)
    return result


def _median(rows: list[dict[str, Any]], key: str, percentile: str) -> float:
    return statistics.median(row[key].get(percentile, float("nan")) for row in rows)


def text_of(report: dict[str, Any]) -> str:
    lines = [
        f"{report['date']}  {report['cpu']}, {report['threads']} threads, {report['model']}, "
        f"{report['each']} requests a client of {report['prompt_tokens']} + {report['tokens']} tokens, "
        f"{report['rounds']} rounds, medians; load average {report['load_before']:.2f} before; "
        f"{report['read_gb_s']:.1f} GB/s read"
    ]
    lines.append(f"{report['rows'][0]['about']}; default types of activations, keys and values on both sides")
    for row in report["rows"]:
        for name in ("nanobraid", "llama-server"):
            if name in row:
                side = row[name]
                lines.append(
                    f"{row['streams']:>3} streams  {name:<12} {side['tok_s']:7.1f} tok/s  TTFT p50 "
                    f"{side['ttft_p50_ms']:.0f} ms  inter-token p50 {side['inter_token_p50_ms']:.1f}, p99 "
                    f"{side['inter_token_p99_ms']:.1f} ms  errors {side['errors']}/{side['requests']}"
                )
        if "ratio" in row:
            lines.append(f"{row['streams']:>3} streams  throughput {row['ratio']:.2f} of llama-server's")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a known name or a GGUF file")
    parser.add_argument("--peer", type=Path, metavar="LLAMA_SERVER", help="also measure this llama-server")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--each", type=int, default=1, help="requests of one client, one after the other")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128, help="of every answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the lines here; .json: the whole report")
    args = parser.parse_args()
    if min(args.threads, *args.streams, args.each, args.prompt_tokens, args.tokens, args.rounds) < 1:
        parser.error("counts must be at least 1")
    path = resolve(args.model)
    prompts = Prompts(path, args.seed)
    names = ("threads", "each", "prompt_tokens", "tokens", "rounds", "seed")
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "model": path.name,
        **{name: getattr(args, name) for name in names},
        "load_before": load_average(),
        "read_gb_s": read_bandwidth(args.threads),
    }
    report["rows"] = [asyncio.run(measure(args, streams, prompts)) for streams in args.streams]
    text = text_of(report)
    print(text, end="")
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=2) + "\n" if args.output.suffix == ".json" else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
