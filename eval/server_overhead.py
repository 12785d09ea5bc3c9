"""What HTTP costs: `nanobraid serve` beside the same engine in a process without HTTP (`AsyncEngine`), in turns.

    python eval/server_overhead.py [--streams 16] [--tokens 128] [--rounds 5] [--output results.txt]

1. Throughput: so many streams at the same time, through the server and without; the median of the rounds' ratios.
2. Processor time per streamed token: of every thread but the engine's own, server less `AsyncEngine`. Threads of the
   engine are left out by their number, because what they compute is a thousand times what is looked for; their time,
   which HTTP must not change, is shown beside it.
3. Time to the first token of one request at a time: as the client sees it, less what `AsyncEngine` needs.
4. `stub`: processor time per event of the server over an engine that computes nothing, one stream and many. It is no
   figure of serving; it shows the HTTP layer alone.

The clients are one process that only counts bytes (http_load.py); it shares the processors with what is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from http_load import Body, load
from http_side import ServedNanobraid, spent, thread_seconds
from machine import load_average
from nanobraid.bench_kv.machine import cpu_name
from nanobraid.models import resolve
from serving import Ids, Prompts

HERE = Path(__file__).parent
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Engine:
    """`AsyncEngine` in a process of its own."""

    def __init__(self, model: str, **options: Any) -> None:
        command = [sys.executable, str(HERE / "engine_side.py"), "engine", model, json.dumps(options)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about: dict[str, str] = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def run(self, prompts: list[Ids], max_tokens: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps({"prompts": prompts, "max_tokens": max_tokens}), file=self.process.stdin, flush=True)
        result: dict[str, Any] = self._answer()
        return result

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def completion(prompt: Ids, max_tokens: int) -> Body:
    return {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def chat(text: str, max_tokens: int) -> Body:
    body = completion([], max_tokens)
    del body["prompt"]
    return {**body, "messages": [{"role": "user", "content": text}]}


def checked(report: dict[str, Any]) -> dict[str, Any]:
    """Raises unless every request was answered in full."""
    errors = [request["error"] for request in report["requests"] if request["error"] is not None]
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed, the first: {errors[0]}")
    return report


def costs(pid: int, names: set[int], work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Runs work; returns its result and the seconds of these threads and of all others of the process."""
    before = thread_seconds(pid)
    result = work()
    used = spent(before, thread_seconds(pid))
    outside = sum(seconds for tid, (_, seconds) in used.items() if tid in names)
    return result, outside, sum(seconds for _, seconds in used.values()) - outside


def python_threads(pid: int, work: Callable[[], Any]) -> set[int]:
    """The threads that serve: all but those that computed when there was work (more than half of what any did)."""
    before = thread_seconds(pid)
    work()
    used = spent(before, thread_seconds(pid))
    most = max(seconds for _, seconds in used.values())
    return {tid for tid, (_, seconds) in used.items() if seconds < most / 3}


def throughput(args: argparse.Namespace, server: ServedNanobraid, engine: Engine, prompts: Prompts) -> dict[str, Any]:
    def through(path: str, count: int, tokens: int) -> dict[str, Any]:
        taken = [prompts.take(args.prompt_tokens) for _ in range(count)]
        bodies = [completion(ids, tokens) for ids in taken]
        if path == CHAT:
            bodies = [chat(args.tokenizer.decode(ids[: args.prompt_tokens - 30]), tokens) for ids in taken]
        return checked(load(server.port, path, [[body] for body in bodies]))

    def alone(count: int, tokens: int) -> dict[str, Any]:
        return engine.run([prompts.take(args.prompt_tokens) for _ in range(count)], tokens)

    mine = python_threads(server.pid, lambda: through(COMPLETIONS, args.streams, 32))
    theirs = python_threads(engine.process.pid, lambda: alone(args.streams, 32))
    result: dict[str, Any] = {}
    for path in (CHAT, COMPLETIONS):
        rows = []
        for number in range(args.rounds):
            parts: dict[str, Any] = {}

            def server_part(path: str = path, parts: dict[str, Any] = parts) -> None:
                parts["server"] = costs(server.pid, mine, lambda: through(path, args.streams, args.tokens))

            def engine_part(parts: dict[str, Any] = parts) -> None:
                parts["engine"] = costs(engine.process.pid, theirs, lambda: alone(args.streams, args.tokens))

            for part in (server_part, engine_part) if number % 2 == 0 else (engine_part, server_part):
                part()
            report, outside, inside = parts["server"]
            tokens = sum(request["tokens"] for request in report["requests"])
            bare, bare_outside, bare_inside = parts["engine"]
            rows.append(
                {
                    "server_tok_s": tokens / report["seconds"],
                    "engine_tok_s": bare["tokens"] / bare["seconds"],
                    "ratio": tokens / report["seconds"] * bare["seconds"] / bare["tokens"],
                    "server_us": 1e6 * outside / tokens,
                    "engine_us": 1e6 * bare_outside / bare["tokens"],
                    "http_us": 1e6 * outside / tokens - 1e6 * bare_outside / bare["tokens"],
                    "compute_us_server": 1e6 * inside / tokens,
                    "compute_us_engine": 1e6 * bare_inside / bare["tokens"],
                    "client_us": 1e6 * report["client_cpu_s"] / tokens,
                }
            )
            print(f"  {path} {rows[-1]['ratio']:.3f} of the engine, {rows[-1]['http_us']:.1f} us a token", flush=True)
        result[path] = {"median": {key: statistics.median(row[key] for row in rows) for key in rows[0]}, "rounds": rows}
    return result


def first_tokens(args: argparse.Namespace, server: ServedNanobraid, engine: Engine, prompts: Prompts) -> dict[str, Any]:
    times: dict[str, list[float]] = {"engine": [], COMPLETIONS: [], CHAT: []}
    for _ in range(args.first_tokens):
        # No prompt twice: a cache would know it. In chat, text of about as many tokens; the engine has them all.
        ids = prompts.take(args.prompt_tokens)
        times["engine"].append(engine.run([ids], 2)["ttft_s"][0])
        times[COMPLETIONS].append(
            checked(load(server.port, COMPLETIONS, [[completion(ids, 2)]]))["requests"][0]["ttft_s"]
        )
        body = chat(args.tokenizer.decode(prompts.take(args.prompt_tokens)), 2)
        times["engine, chat"] = times.get("engine, chat", [])
        encoded = args.template_ids(body["messages"])
        times["engine, chat"].append(engine.run([encoded], 2)["ttft_s"][0])
        times[CHAT].append(checked(load(server.port, CHAT, [[body]]))["requests"][0]["ttft_s"])
    medians = {key: 1e3 * statistics.median(values) for key, values in times.items()}
    more = {
        path: 1e3 * statistics.median(a - b for a, b in zip(times[path], times[base], strict=True))
        for path, base in ((COMPLETIONS, "engine"), (CHAT, "engine, chat"))
    }
    return {"ms": medians, "more_ms": more}


def stub(args: argparse.Namespace) -> dict[str, Any]:
    """Processor time per event, all threads of the server."""
    program = [sys.executable, str(HERE / "engine_side.py"), "stub", str(resolve(args.model))]
    result = {}
    with ServedNanobraid(program=program) as server:
        for path in (CHAT, COMPLETIONS):
            for streams in (1, args.streams):
                values = []
                for _ in range(4):
                    body = chat("x", 8000 // streams) if path == CHAT else completion([100], 8000 // streams)
                    before = thread_seconds(server.pid)
                    report = checked(load(server.port, path, [[body]] * streams))
                    used = spent(before, thread_seconds(server.pid))
                    num = sum(len(request["arrivals_s"]) for request in report["requests"])
                    values.append(1e6 * sum(seconds for _, seconds in used.values()) / num)
                result[f"{path}, {streams} streams"] = statistics.median(values[1:])
    return result


def text_of(report: dict[str, Any]) -> str:
    lines = [
        f"{report['date']}  {report['cpu']}, {report['threads']} threads, {report['model']}, "
        f"{', '.join(report['about'].values())}, "
        f"{report['streams']} streams of {report['prompt_tokens']} + {report['tokens']} tokens, "
        f"{report['rounds']} rounds, medians; load average {report['load_before']:.2f} before",
    ]
    for path, row in report["throughput"].items():
        m = row["median"]
        lines.append(
            f"{path:<22} server {m['server_tok_s']:.1f} tok/s, AsyncEngine alone {m['engine_tok_s']:.1f}, "
            f"ratio {m['ratio']:.3f}; outside the engine {m['server_us']:.1f} us a token, AsyncEngine "
            f"{m['engine_us']:.1f}: HTTP {m['http_us']:.1f} us; engine threads {m['compute_us_server']:.0f} and "
            f"{m['compute_us_engine']:.0f} us; client {m['client_us']:.1f} us"
        )
    for path, more in report["first_token"]["more_ms"].items():
        lines.append(f"{path:<22} first token {report['first_token']['ms'][path]:.2f} ms, HTTP adds {more:.2f} ms")
    for name, value in report["stub"].items():
        lines.append(f"stub engine, {name}: {value:.1f} us an event")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a known name or a GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of every answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-tokens", type=int, default=30, help="requests of which the first token is timed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the lines here; .json: the whole report")
    args = parser.parse_args()
    if min(args.threads, args.streams, args.tokens, args.rounds, args.first_tokens) < 1 or args.prompt_tokens < 40:
        parser.error("counts must be at least 1, --prompt-tokens at least 40")
    import nanobraid as nb

    path = resolve(args.model)
    args.tokenizer = nb.Tokenizer(path)
    template = nb.ChatTemplate.of(args.tokenizer)
    args.template_ids = lambda messages: template.encode(messages, args.tokenizer)
    prompts = Prompts(path, args.seed)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "model": path.name,
        **{key: getattr(args, key) for key in ("threads", "streams", "prompt_tokens", "tokens", "rounds", "seed")},
        "load_before": load_average(),
    }
    report["stub"] = stub(args)
    options = {"num_threads": args.threads, "max_model_len": 1024, "max_num_seqs": args.streams}
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    engine = Engine(str(path), **options)
    try:
        report["about"] = engine.about
        with ServedNanobraid(str(path), *arguments) as server:
            report["first_token"] = first_tokens(args, server, engine, prompts)
            report["throughput"] = throughput(args, server, engine, prompts)
    finally:
        engine.close()
    text = text_of(report)
    print(text, end="")
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=2) + "\n" if args.output.suffix == ".json" else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
