"""Prompts that arrive all at once beside running streams: when their first tokens come, and what the streams feel.

    python eval/burst.py [--running 0 8] [--arriving 16] [--prompt-tokens 64 200] [--new-tokens 64] [--slots 24]
                         [--rounds 3] [--json out.json]

Some short requests stream answers of --running-tokens tokens. When each has a few, --arriving prompts come in the same
moment, of lengths between the two of --prompt-tokens; times to the first token are theirs. Gaps are those between
tokens of the requests that ran before, as far as they end while one of the newcomers waits for its first token, each
over the median gap before the arrival. Tokens per second are all that come from the arrival until all newcomers have
ended, prompts not counted. Without running requests the newcomers are alone.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

from interference import Listener
from nanobraid.models import resolve
from serving import Outcome, Prompts, Side, ask, facts, finish, open_sides, parser_of, percentiles

SHORT = 32  # tokens of the prompts that run
FIRST = 16  # tokens that each of them has when the others arrive


async def one_round(side: Side, prompts: Prompts, args: argparse.Namespace, running: int) -> dict[str, Any]:
    listeners = [Listener(side, prompts.take(SHORT), args.running_tokens) for _ in range(running)]
    while any(len(listener.times) < FIRST for listener in listeners):
        await asyncio.sleep(0.005)
    low, high = args.prompt_tokens
    lengths = [low + (high - low) * i // max(args.arriving - 1, 1) for i in range(args.arriving)]
    lengths = lengths[::2] + lengths[1::2]  # not from short to long
    begin = time.perf_counter()
    asked = [ask(side, prompts.take(length), args.new_tokens, start=begin) for length in lengths]
    outcomes: list[Outcome] = await asyncio.gather(*asked)
    seconds = time.perf_counter() - begin
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    if errors:
        raise RuntimeError(f"{side.name}: {errors[0]}")
    await asyncio.gather(*(listener.task for listener in listeners))
    waited = begin + max(outcome.ttft_ms for outcome in outcomes) / 1e3
    before = [gap for listener in listeners for gap in listener.gaps_ms(0.0, begin)]
    theirs = sum(1 for listener in listeners for at in listener.times if begin < at <= begin + seconds)
    return {
        "ttft_ms": [outcome.ttft_ms for outcome in outcomes],
        "before_ms": before,
        "gaps_ms": [gap for listener in listeners for gap in listener.gaps_ms(begin, waited)],
        "new_gaps_ms": [gap for outcome in outcomes for gap in outcome.gaps_ms],
        "seconds": seconds,
        "tok_s": (sum(outcome.num_tokens for outcome in outcomes) + theirs) / seconds,
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds of the first tokens and speeds; gaps of all rounds together."""
    result: dict[str, Any] = {
        "ttft_p50_ms": statistics.median(statistics.median(one["ttft_ms"]) for one in rounds),
        "ttft_max_ms": statistics.median(max(one["ttft_ms"]) for one in rounds),
        "new_gaps_ms": percentiles([gap for one in rounds for gap in one["new_gaps_ms"]]),
        "seconds": statistics.median(one["seconds"] for one in rounds),
        "tok_s": statistics.median(one["tok_s"] for one in rounds),
    }
    gaps = [gap for one in rounds for gap in one["gaps_ms"]]
    if gaps:
        result["before_ms"] = statistics.median(gap for one in rounds for gap in one["before_ms"])
        result["gaps_ms"] = percentiles(gaps)
        result["num_gaps"] = len(gaps)
    return result


def text_of(name: str, running: int, arriving: int, one: dict[str, Any]) -> str:
    text = (
        f"{name:<10} {running:>2} running, {arriving} arrive: first token p50 {one['ttft_p50_ms']:.0f}, "
        f"max {one['ttft_max_ms']:.0f} ms; {one['tok_s']:.0f} tok/s, all ended after {one['seconds']:.2f} s"
    )
    if "gaps_ms" in one:
        gaps = one["gaps_ms"]
        text += (
            f"; gap of the running {one['before_ms']:.1f} ms before, meanwhile p50 {gaps['p50']:.1f}, "
            f"p99 {gaps['p99']:.1f}, max {gaps['max']:.1f} ms ({one['num_gaps']} gaps)"
        )
    return text


async def measure(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Adds what was measured to the report."""
    rounds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    async with AsyncExitStack() as stack:
        sides = await open_sides(stack, args)
        report["about"] = {side.name: side.about for side in sides}
        for side in sides:
            await ask(side, Prompts(resolve(args.model), args.seed - 1).take(200), 16)
        for number in range(args.rounds):
            for running in args.running:
                for side in sides:
                    prompts = Prompts(resolve(args.model), args.seed + 100 * number + running)
                    one = await one_round(side, prompts, args, running)
                    rounds.setdefault((side.name, running), []).append(one)
    report["rows"] = [{"side": name, "running": running, **summary(runs)} for (name, running), runs in rounds.items()]


def main() -> int:
    parser = parser_of(__doc__, max_model_len=2048, slots=24)
    parser.add_argument("--running", type=int, nargs="+", default=[0, 8], help="requests that are being answered")
    parser.add_argument("--running-tokens", type=int, default=200, help="of their answers")
    parser.add_argument("--arriving", type=int, default=16, help="prompts that come at once")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[64, 200], metavar=("LEAST", "MOST"))
    parser.add_argument("--new-tokens", type=int, default=64, help="of the answers to those")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if min(args.arriving, args.new_tokens, args.rounds, *args.prompt_tokens) < 1 or min(args.running) < 0:
        parser.error("counts must be positive; --running may be 0")
    if args.running_tokens <= FIRST or max(args.running) > args.slots:
        parser.error(f"--running-tokens must be above {FIRST}, --running at most --slots")
    report = facts(args)
    names = ("arriving", "prompt_tokens", "new_tokens", "running_tokens", "rounds")
    report.update({key: getattr(args, key) for key in names})
    asyncio.run(measure(args, report))
    finish(report, args)
    for row in report["rows"]:
        print(text_of(row["side"], row["running"], args.arriving, row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
