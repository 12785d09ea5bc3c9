"""How long prompts disturb answers: the time between tokens of running requests while others arrive.

    python eval/interference.py [--peer BUILD/bin/llama-server] [--running 4] [--prompt-tokens 4000] [--arrivals 2]
                                [--rounds 3] [--json out.json]

Some short requests run. First nothing else does: the median time between two of their tokens is the idle step. Then
prompts of --prompt-tokens arrive, each when the one before has got its answer of one token; the percentiles are over
every gap that ends in that time, of all the running requests, with nothing left out. Then nothing arrives again: the
contexts of the running requests have grown meanwhile, and so has the idle step. Both sides in turn, in every round with
new prompts and new requests.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

from nanobraid.models import resolve
from serving import Prompts, Side, ask, facts, finish, open_sides, parser_of, percentiles

SHORT = 64  # tokens of the prompts that run


class Listener:
    """Reads one answer and notes when its tokens came."""

    def __init__(self, side: Side, prompt: list[int], max_tokens: int) -> None:
        self.times: list[float] = []
        self.task = asyncio.create_task(self._listen(side, prompt, max_tokens))

    async def _listen(self, side: Side, prompt: list[int], max_tokens: int) -> None:
        async for piece in side.stream(prompt, max_tokens):
            if piece.num_tokens > 0:
                self.times.append(time.perf_counter())

    def gaps_ms(self, begin: float, end: float) -> list[float]:
        """Times between tokens of which the later one came between `begin` and `end`."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [(after - before) * 1e3 for before, after in pairs if begin < after <= end]


async def until(listeners: list[Listener], count: int) -> None:
    """Waits until every listener has `count` tokens. Raises what one of them raised, or RuntimeError if one ended."""
    while min(len(listener.times) for listener in listeners) < count:
        check(listeners)
        await asyncio.sleep(0.005)


def check(listeners: list[Listener]) -> None:
    for listener in listeners:
        if listener.task.done():
            listener.task.result()
            raise RuntimeError("a running request ended before the prompts were through; raise --max-model-len")


async def one_round(side: Side, prompts: Prompts, args: argparse.Namespace) -> dict[str, Any]:
    listeners = [Listener(side, prompts.take(SHORT), args.max_model_len - SHORT - 1) for _ in range(args.running)]
    try:
        await until(listeners, 8)
        begin = time.perf_counter()
        warm = max(len(listener.times) for listener in listeners)
        await until(listeners, warm + args.idle_tokens)
        middle = time.perf_counter()
        ttft = []
        for _ in range(args.arrivals):
            outcome = await ask(side, prompts.take(args.prompt_tokens), 1)
            if outcome.error is not None:
                raise RuntimeError(f"{side.name}: a prompt failed: {outcome.error}")
            ttft.append(outcome.ttft_ms)
        end = time.perf_counter()
        await until(listeners, max(len(listener.times) for listener in listeners) + 1)
        # The gap in which the last prompt ended may end after it.
        end = max([end, *(next(t for t in listener.times if t > end) for listener in listeners)])
        after = max(len(listener.times) for listener in listeners)
        rest = time.perf_counter()
        await until(listeners, after + args.idle_tokens)
        last = time.perf_counter()
        check(listeners)
    finally:
        for listener in listeners:
            listener.task.cancel()
        await asyncio.gather(*(listener.task for listener in listeners), return_exceptions=True)
    return {
        "idle_ms": [gap for listener in listeners for gap in listener.gaps_ms(begin, middle)],
        "idle_after_ms": [gap for listener in listeners for gap in listener.gaps_ms(rest, last)],
        "loaded_ms": [listener.gaps_ms(middle, end) for listener in listeners],
        "prompt_ttft_ms": ttft,
    }


def relative(one: dict[str, Any]) -> list[float]:
    """The gaps of a round over the idle step at that time, between the one before and the one after."""
    before, after = (statistics.median(one[key]) for key in ("idle_ms", "idle_after_ms"))
    ratios = []
    for gaps in one["loaded_ms"]:
        for i, gap in enumerate(gaps):
            ratios.append(gap / (before + (after - before) * (i + 0.5) / len(gaps)))
    return ratios


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    idle = [gap for one in rounds for gap in one["idle_ms"]]
    loaded = [gap for one in rounds for gaps in one["loaded_ms"] for gap in gaps]
    step = statistics.median(idle)
    step_after = statistics.median(gap for one in rounds for gap in one["idle_after_ms"])
    result = percentiles(loaded)
    return {
        "idle_step_ms": step,
        "idle_step_after_ms": step_after,
        "loaded_over_idle_then": percentiles([ratio for one in rounds for ratio in relative(one)]),
        "idle_ms": percentiles(idle),
        "loaded_ms": result,
        "p99_over_idle_step": result["p99"] / step,
        "gaps": len(loaded),
        "prompt_ttft_ms": statistics.median(ttft for one in rounds for ttft in one["prompt_ttft_ms"]),
        "p99_over_idle_step_by_round": [
            percentiles([gap for gaps in one["loaded_ms"] for gap in gaps])["p99"] / statistics.median(one["idle_ms"])
            for one in rounds
        ],
    }


async def measure(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Adds what was measured to the report."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    async with AsyncExitStack() as stack:
        sides = await open_sides(stack, args)
        report["about"] = {side.name: side.about for side in sides}
        for number in range(args.rounds):
            for side in sides:
                prompts = Prompts(resolve(args.model), args.seed + number)
                rounds.setdefault(side.name, []).append(await one_round(side, prompts, args))
    report["sides"] = {name: summary(runs) for name, runs in rounds.items()}


def main() -> int:
    parser = parser_of(__doc__, max_model_len=8192, slots=5)
    parser.add_argument("--running", type=int, default=4, help="requests that are being answered; fewer than --slots")
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--arrivals", type=int, default=2, help="prompts, one after another")
    parser.add_argument("--idle-tokens", type=int, default=64, help="tokens of each request before the first arrives")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if min(args.running, args.arrivals, args.idle_tokens, args.prompt_tokens, args.rounds) < 1:
        parser.error("all counts must be positive")
    if args.running >= args.slots or args.prompt_tokens + 1 > args.max_model_len:
        parser.error("--running must be below --slots, and --prompt-tokens below --max-model-len")

    report = facts(args)
    report.update({key: getattr(args, key) for key in ("running", "prompt_tokens", "arrivals", "rounds")})
    asyncio.run(measure(args, report))
    finish(report, args)
    for name, side in report["sides"].items():
        loaded = side["loaded_ms"]
        print(
            f"{name:<10} idle step {side['idle_step_ms']:.1f} ms (p99 {side['idle_ms']['p99']:.1f}); while prompts of "
            f"{args.prompt_tokens} tokens arrive "
            f"p50 {loaded['p50']:.1f}, p90 {loaded['p90']:.1f}, p99 {loaded['p99']:.1f} ms = "
            f"{side['p99_over_idle_step']:.2f} x idle, max {loaded['max']:.1f} ms ({side['gaps']} gaps); "
            f"idle step after that {side['idle_step_after_ms']:.1f} ms; p99 of gaps over the idle step of their time "
            f"{side['loaded_over_idle_then']['p99']:.2f}; TTFT of a prompt {side['prompt_ttft_ms']:.0f} ms"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
