"""Serving under load: requests arrive at random moments, whatever the server is doing.

    python eval/serve_load.py [--peer BUILD/bin/llama-server] [--mix chat|rag|uniform] [--rates 1 2 4] [--requests 100]
                              [--rounds 1] [--json out.json] [--plot out.svg]

Arrivals are a Poisson process; the schedule (moments, prompts, lengths) follows from --seed and is the same for both
sides, which run it one after the other in every round. Every time counts from the moment a request was due, so a client
or server that falls behind cannot hide it. A mix says how long prompts and answers are and how many prompts begin with
a system prompt that they share; --prompt-lens, --output-lens, --system-tokens and --system-share replace parts of it.
A length is LOW:HIGH (each as likely), A,B,C (each as likely) or ~MEDIAN (log-normal, sigma 0.5, from a quarter to four
times the median). Answers have exactly the length that was drawn.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanobraid.models import resolve
from serving import Ids, Outcome, Prompts, Side, ask, facts, finish, open_sides, parser_of, percentiles


@dataclass(frozen=True)
class Mix:
    """Lengths in tokens: of prompts without the system prompt, of answers; the system prompt and who has it."""

    prompt_lens: str
    output_lens: str
    system_tokens: int = 0
    system_share: float = 0.0


MIXES = {
    "chat": Mix("~96", "~96", system_tokens=256, system_share=0.8),
    "rag": Mix("768:2048", "~64", system_tokens=128, system_share=1.0),
    "uniform": Mix("32:512", "16:128"),
}


@dataclass(frozen=True)
class Job:
    due_s: float
    prompt: Ids
    max_tokens: int


def draw_length(text: str, random: random.Random) -> int:
    """One length out of a description; see the head of this file. Raises ValueError if it is none."""
    if text.startswith("~"):
        median = int(text[1:])
        length = round(random.lognormvariate(0.0, 0.5) * median)
        least, most = max(1, median // 4), median * 4
        length = min(max(length, least), most)
    elif ":" in text:
        low, high = map(int, text.split(":"))
        length = random.randint(low, high)
    else:
        length = random.choice([int(word) for word in text.split(",")])
    if length < 1:
        raise ValueError(f"lengths must be at least 1: {text!r}")
    return length


def schedule(prompts: Prompts, mix: Mix, *, rate: float, requests: int, seed: int) -> list[Job]:
    """Poisson arrivals at `rate` requests a second, the first after one interval."""
    draw = random.Random(seed)
    system = prompts.take(mix.system_tokens)
    due = 0.0
    jobs = []
    for _ in range(requests):
        due += draw.expovariate(rate)
        shared = system if draw.random() < mix.system_share else []
        prompt = shared + prompts.take(draw_length(mix.prompt_lens, draw))
        jobs.append(Job(due, prompt, draw_length(mix.output_lens, draw)))
    return jobs


async def run(side: Side, jobs: list[Job]) -> list[Outcome]:
    start = time.perf_counter()
    return await asyncio.gather(*(ask(side, job.prompt, job.max_tokens, start=start, due_s=job.due_s) for job in jobs))


def summary(rounds: list[list[Outcome]]) -> dict[str, Any]:
    """Of the rounds of one side at one rate; requests that failed count as errors only."""
    everything = [outcome for outcomes in rounds for outcome in outcomes]
    done = [outcome for outcome in everything if outcome.error is None]
    seconds = sum(max(o.due_s + o.end_s for o in outcomes) - outcomes[0].due_s for outcomes in rounds)
    return {
        "requests": len(everything),
        "errors": len(everything) - len(done),
        "first_errors": [outcome.error for outcome in everything if outcome.error is not None][:3],
        "output_tok_s": sum(outcome.num_tokens for outcome in done) / seconds,
        "seconds": seconds,
        "ttft_ms": percentiles([outcome.ttft_ms for outcome in done]),
        "inter_token_ms": percentiles([gap for outcome in done for gap in outcome.gaps_ms]),
        "queue_ms": percentiles([outcome.queue_ms for outcome in done]),
        "total_ms": percentiles([outcome.end_s * 1e3 for outcome in done]),
        "reused_share": sum(o.reuse_ratio * o.prompt_tokens for o in done) / max(sum(o.prompt_tokens for o in done), 1),
        "client_late_ms": percentiles([outcome.late_s * 1e3 for outcome in everything]),
    }


async def measure(args: argparse.Namespace, mix: Mix, report: dict[str, Any]) -> dict[str, list[Outcome]]:
    """Adds the sides and a row for each rate to the report; returns all outcomes by side and rate, for the plot."""
    rows: list[dict[str, Any]] = []
    all_outcomes: dict[str, list[Outcome]] = {}
    async with AsyncExitStack() as stack:
        sides = await open_sides(stack, args)
        report["about"] = {side.name: side.about for side in sides}
        report["rows"] = rows
        for side in sides:  # the first request of a process loads kernels and pages
            await ask(side, list(range(100, 164)), 4)
        for index, rate in enumerate(args.rates):
            rounds: dict[str, list[list[Outcome]]] = {side.name: [] for side in sides}
            requests = {"prompt_tokens": 0, "output_tokens": 0}
            for number in range(args.rounds):
                seed = args.seed + 1000 * index + number  # no prompt twice: a cache would know it
                prompts = Prompts(resolve(args.model), seed)
                jobs = schedule(prompts, mix, rate=rate, requests=args.requests, seed=seed)
                requests["prompt_tokens"] += sum(len(job.prompt) for job in jobs)
                requests["output_tokens"] += sum(job.max_tokens for job in jobs)
                for side in sides:
                    rounds[side.name].append(await run(side, jobs))
            rows.append({"rate": rate, **requests, **{name: summary(runs) for name, runs in rounds.items()}})
            for name, runs in rounds.items():
                all_outcomes[f"{name}, {rate:g}/s"] = [outcome for outcomes in runs for outcome in outcomes]
            show(rows[-1])
    return all_outcomes


def show(row: dict[str, Any]) -> None:
    for name in ("llama.cpp", "nanobraid"):
        if name not in row:
            continue
        side = row[name]
        columns = [
            f"{title} " + " / ".join(f"{side[key].get(p, float('nan')):.1f}" for p in ("p50", "p90", "p99"))
            for title, key in (("TTFT", "ttft_ms"), ("inter-token", "inter_token_ms"), ("queue", "queue_ms"))
        ]
        print(
            f"{row['rate']:6g}/s {name:<10} {side['output_tok_s']:7.1f} tok/s  {'  '.join(columns)} ms  "
            f"reused {side['reused_share']:.0%}  errors {side['errors']}/{side['requests']}",
            flush=True,
        )


def plot(outcomes: dict[str, list[Outcome]], title: str, path: Path) -> None:
    """Shares of requests by TTFT, and of tokens by the time since the one before; one line a side and rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    colours = {"nanobraid": "tab:blue", "llama.cpp": "tab:orange"}
    styles = ["-", "--", ":", "-."]
    seen: dict[str, int] = {}
    for label, runs in outcomes.items():
        name = label.split(",")[0]
        line = {"color": colours[name], "linestyle": styles[seen.get(name, 0) % len(styles)], "label": label}
        seen[name] = seen.get(name, 0) + 1
        done = [outcome for outcome in runs if outcome.error is None]
        for axes, values in (
            (left, [outcome.ttft_ms for outcome in done]),
            (right, [gap for outcome in done for gap in outcome.gaps_ms]),
        ):
            ordered = sorted(values)
            axes.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], **line)
    for axes, what in ((left, "time to first token, ms"), (right, "time between tokens, ms")):
        axes.set(xscale="log", xlabel=what, ylabel="share", ylim=(0, 1))
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(title)
    figure.savefig(path)


def chosen_mix(args: argparse.Namespace) -> Mix:
    base = MIXES[args.mix]
    return Mix(
        args.prompt_lens or base.prompt_lens,
        args.output_lens or base.output_lens,
        base.system_tokens if args.system_tokens is None else args.system_tokens,
        base.system_share if args.system_share is None else args.system_share,
    )


def main() -> int:
    parser = parser_of(__doc__, max_model_len=4096, slots=16)
    parser.add_argument("--mix", choices=sorted(MIXES), default="chat")
    parser.add_argument("--prompt-lens", metavar="LENGTHS", help="instead of the mix's")
    parser.add_argument("--output-lens", metavar="LENGTHS", help="instead of the mix's")
    parser.add_argument("--system-tokens", type=int, help="instead of the mix's")
    parser.add_argument("--system-share", type=float, help="of the prompts, instead of the mix's")
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0], help="requests a second")
    parser.add_argument("--requests", type=int, default=100, help="of one round")
    parser.add_argument("--rounds", type=int, default=1, help="schedules for each rate; figures are over all of them")
    parser.add_argument("--plot", type=Path, help="draw the distributions (.svg or .png; needs matplotlib)")
    args = parser.parse_args()
    if min(args.rates) <= 0 or args.requests < 1 or args.rounds < 1:
        parser.error("--rates, --requests and --rounds must be positive")
    mix = chosen_mix(args)
    for text in (mix.prompt_lens, mix.output_lens):
        try:
            draw_length(text, random.Random(0))
        except ValueError as error:
            parser.error(f"{text!r} is no length: {error}")
    if args.plot is not None:
        import matplotlib  # noqa: F401  before the work, not after it

    report: dict[str, Any] = {
        **facts(args),
        "mix": {"name": args.mix, **vars(mix)},
        "requests": args.requests,
        "rounds": args.rounds,
    }
    outcomes = asyncio.run(measure(args, mix, report))
    finish(report, args)
    if args.plot is not None:
        plot(outcomes, f"{report['model']}, {args.threads} threads, mix {args.mix}", args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
