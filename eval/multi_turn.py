"""What the prefix cache saves in a conversation: time to the first token and reuse, turn by turn, cache off and on.

    python eval/multi_turn.py [--peer BUILD/bin/llama-server] [--turns 8] [--question-tokens 68] [--answer-tokens 32]
                              [--rounds 5] [--json out.json]

A conversation goes on with what the side itself answered; each turn sends the whole of it. Rounds have conversations of
their own and alternate between the sides, cache off and on; figures are medians over the rounds. Then a prompt of
--prefix-tokens and --suffix-tokens, of which the first part was asked before, or nothing was. Time counts from
submission; nothing is warmed: the first request that a side ever sees is the first turn of round 1. Tokens are words of
a plain text, without a chat template, which would add the same few to both sides.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from contextlib import AsyncExitStack
from typing import Any

from nanobraid.models import resolve
from serving import LlamaServer, Nanobraid, Outcome, Prompts, ask, facts, finish, ours, parser_of, theirs

AnySide = Nanobraid | LlamaServer


async def turn_of(side: AnySide, history: list[int], max_tokens: int) -> Outcome:
    """Asks, and appends the answer to the history."""
    outcome = await ask(side, history, max_tokens)
    if outcome.error is not None:
        raise SystemExit(f"{side.name}: {outcome.error}")
    history += outcome.token_ids
    return outcome


async def conversation(side: AnySide, prompts: Prompts, args: argparse.Namespace) -> list[Outcome]:
    history: list[int] = []
    turns = []
    for _ in range(args.turns):
        history += prompts.take(args.question_tokens)
        turns.append(await turn_of(side, history, args.answer_tokens))
    return turns


async def behind_a_prefix(side: AnySide, prompts: Prompts, args: argparse.Namespace) -> Outcome:
    """The prefix is asked first; without a cache that changes nothing."""
    prefix = prompts.take(args.prefix_tokens)
    await turn_of(side, list(prefix), 1)
    return await turn_of(side, prefix + prompts.take(args.suffix_tokens), 1)


def by_turn(rounds: list[list[Outcome]]) -> list[dict[str, Any]]:
    return [
        {
            "turn": number + 1,
            "prompt_tokens": turns[0].prompt_tokens,
            "ttft_ms": statistics.median(turn.ttft_ms for turn in turns),
            "reuse_ratio": statistics.median(turn.reuse_ratio for turn in turns),
            "all_ttft_ms": [turn.ttft_ms for turn in turns],
        }
        for number, turns in enumerate(zip(*rounds, strict=True))
    ]


def of_prefix(outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "ttft_ms": statistics.median(outcome.ttft_ms for outcome in outcomes),
        "reuse_ratio": statistics.median(outcome.reuse_ratio for outcome in outcomes),
        "all_ttft_ms": [outcome.ttft_ms for outcome in outcomes],
    }


async def measure(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Adds the results of each side, with the cache off and on, to the report."""
    talks: dict[tuple[str, str], list[list[Outcome]]] = {}
    prefixes: dict[tuple[str, str], list[Outcome]] = {}
    async with AsyncExitStack() as stack:
        sides: list[tuple[str, AnySide]] = []
        for cache in (False, True):
            word = "cache on" if cache else "cache off"
            if args.peer is not None:
                sides.append((word, await stack.enter_async_context(theirs(args, cache=cache))))
            sides.append((word, await stack.enter_async_context(ours(args, cache=cache))))
        report["about"] = {side.name: side.about for _, side in sides}
        for number in range(args.rounds):
            for word, side in sides:
                prompts = Prompts(resolve(args.model), args.seed + number)
                talks.setdefault((side.name, word), []).append(await conversation(side, prompts, args))
            for word, side in sides:
                prompts = Prompts(resolve(args.model), args.seed + args.rounds + number)
                prefixes.setdefault((side.name, word), []).append(await behind_a_prefix(side, prompts, args))
    report["sides"] = {}
    for name in sorted({name for name, _ in talks}):
        side_report: dict[str, Any] = {
            word: {"turns": by_turn(talks[name, word]), "prefix": of_prefix(prefixes[name, word])}
            for word in ("cache off", "cache on")
        }
        off, on = side_report["cache off"], side_report["cache on"]
        side_report["cached_over_uncached_prefix"] = on["prefix"]["ttft_ms"] / off["prefix"]["ttft_ms"]
        if args.turns > 1:
            side_report["last_turn_over_turn_2"] = on["turns"][-1]["ttft_ms"] / on["turns"][1]["ttft_ms"]
        report["sides"][name] = side_report


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    for name, side in report["sides"].items():
        print(f"{name}: turn, prompt tokens, TTFT cache off, TTFT cache on, reused")
        for off, on in zip(side["cache off"]["turns"], side["cache on"]["turns"], strict=True):
            print(
                f"  {on['turn']:>2} {on['prompt_tokens']:>6} {off['ttft_ms']:>9.2f} ms {on['ttft_ms']:>9.2f} ms "
                f"{on['reuse_ratio']:>7.1%}"
            )
        if "last_turn_over_turn_2" in side:
            print(f"  turn {args.turns} takes {side['last_turn_over_turn_2']:.2f} x turn 2 with the cache on")
        off, on, ratio = (side[key] for key in ("cache off", "cache on", "cached_over_uncached_prefix"))
        off, on = off["prefix"], on["prefix"]
        print(
            f"  {args.prefix_tokens} + {args.suffix_tokens} tokens: uncached {off['ttft_ms']:.2f} ms, behind a "
            f"cached prefix {on['ttft_ms']:.2f} ms = {ratio:.2%} (reused {on['reuse_ratio']:.1%})"
        )


def main() -> int:
    parser = parser_of(__doc__, max_model_len=2048, slots=1)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--question-tokens", type=int, default=68)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--prefix-tokens", type=int, default=1000)
    parser.add_argument("--suffix-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    longest = max(args.turns * (args.question_tokens + args.answer_tokens), args.prefix_tokens + args.suffix_tokens + 1)
    if longest > args.max_model_len:
        parser.error(f"--max-model-len must be at least {longest}")
    lengths = (args.turns, args.question_tokens, args.answer_tokens, args.prefix_tokens, args.suffix_tokens)
    if min(*lengths, args.rounds) < 1:
        parser.error("all counts must be positive")

    names = ("turns", "question_tokens", "answer_tokens", "prefix_tokens", "suffix_tokens", "rounds")
    report = {**facts(args), **{name: getattr(args, name) for name in names}}
    asyncio.run(measure(args, report))
    finish(report, args)
    show(report, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
