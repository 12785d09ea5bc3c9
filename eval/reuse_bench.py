"""What reuse saves: time to the first token and memory, for prompts whose pieces were computed before.

    python eval/reuse_bench.py [--parts ttft,decode,agents,rag,document,novelty] [--rounds 3] [--json out.json]
                               [--plot out.svg]

ttft      4,096 tokens in 16 chunks and a query of 64: computed, behind a cached beginning, isolated, blended. What
          computing the chunks took before is a row of its own.
decode    a token behind 16 chunks and behind one contiguous context of the same length.
agents    four agents with up to 100 tokens of their own behind one context of 2,048 tokens, and one alone: blocks.
rag       queries over a few of many documents, drawn by Zipf's law, in random order: mode by mode.
document  questions about one document.
novelty   a store with room for half of the documents and combinations that never come again: hits, early and late.

Times count from submission to the first token on the host. Every round has texts of its own, so nothing is warm but
what the row says; the first request of the process (memory, code) is not timed. Modes take turns within a round;
figures are medians. Approximate modes: what they cost in quality is measured by kv_quality.py.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nanobraid as nb
from nanobraid.models import resolve
from serving import Ids, Prompts, facts, finish, parser_of

Row = dict[str, float]
MODES: dict[str, Any] = {
    "isolated": nb.Isolated(),
    "blend 15 %": nb.Blend(0.15),
    "blend 30 %": nb.Blend(0.3),
}
FIRST = nb.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


class Bench:
    """One engine and texts that never repeat."""

    def __init__(self, args: argparse.Namespace, **options: Any) -> None:
        limits: dict[str, Any] = {"max_model_len": args.max_model_len, "max_num_seqs": args.slots} | options
        self.llm = nb.LLM(args.model, num_threads=args.threads, **limits)
        self.prompts = Prompts(resolve(args.model), args.seed)
        self.random = random.Random(args.seed)
        self._marks = 0

    def take(self, length: int) -> Ids:
        """Text that no cache has seen: it begins with a number of its own."""
        self._marks += 1
        mark = self.llm.tokenizer.encode(f"Text {self._marks}. ", add_special_tokens=False)
        return (mark + self.prompts.take(length))[:length]

    def ttft(self, segments: list[nb.Segment | str], reuse: Any = "exact") -> nb.ReuseReport:
        report = self.llm.compose(segments, FIRST, reuse=reuse).reuse
        assert report is not None
        return report


def chunks_of(texts: list[Ids]) -> list[nb.Segment | str]:
    return [nb.Segment(text, chunk=True) for text in texts]


def medians(rows: dict[str, list[float]]) -> Row:
    return {name: statistics.median(values) for name, values in rows.items()}


def add(rows: dict[str, list[float]], name: str, value: float) -> None:
    rows.setdefault(name, []).append(value)


def part_ttft(bench: Bench, rounds: int) -> dict[str, Any]:
    rows: dict[str, list[float]] = {}
    for _ in range(rounds):
        lead = nb.Segment(bench.take(16))
        texts = [bench.take(256) for _ in range(16)]
        query = lambda: nb.Segment(bench.take(64))  # noqa: E731
        context = [lead, *chunks_of(texts)]
        full = bench.ttft([*context, query()])
        assert full.exact_prefix < 16
        add(rows, "computed", full.ttft_ms)
        hit = bench.ttft([*context, query()])
        assert hit.computed < 64 + 16
        add(rows, "exact hit", hit.ttft_ms)
        begun = time.perf_counter()
        bench.llm.chunks.compute(texts)
        add(rows, "computing the chunks before", (time.perf_counter() - begun) * 1e3)
        bench.random.shuffle(texts)
        for name, reuse in MODES.items():
            report = bench.ttft([lead, *chunks_of(texts), query()], reuse)
            assert report.isolated + report.recomputed == 16 * 256
            add(rows, name, report.ttft_ms)
        for chunk in bench.llm.chunks.list():
            bench.llm.chunks.remove(chunk.id)
    result = medians(rows)
    shares = {f"{name} / computed": value / result["computed"] for name, value in result.items() if name != "computed"}
    return {"ttft_ms": result, "shares": shares, "rounds": rows}


def part_decode(bench: Bench, rounds: int, tokens: int = 64) -> dict[str, Any]:
    rows: dict[str, list[float]] = {}
    params = nb.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for _ in range(rounds):
        texts = [bench.take(256) for _ in range(16)]
        whole = [token for text in texts for token in text]
        query = nb.Segment(bench.take(64))
        cases = {
            "16 chunks": ([*chunks_of(texts), query], nb.Isolated()),
            "16 chunks, blend 15 %": ([*chunks_of(texts), query], nb.Blend(0.15)),
            "one context": ([nb.Segment(whole), query], "exact"),
        }
        for _ in range(2):
            for name, (segments, reuse) in cases.items():
                metrics = bench.llm.compose(segments, params, reuse=reuse).metrics
                add(rows, name, 1e3 / metrics.tokens_per_s)
        for chunk in bench.llm.chunks.list():
            bench.llm.chunks.remove(chunk.id)
    result = medians(rows)
    ratios = {f"{name} / one context": result[name] / result["one context"] for name in result if name != "one context"}
    return {"ms_per_token": result, "ratios": ratios, "rounds": rows}


def part_agents(bench: Bench, agents: int = 4) -> dict[str, Any]:
    """The most blocks of keys and values that are owned while all agents answer, over those of one agent alone.

    The context has been asked before, so that they all answer at the same time.
    """

    def owned(count: int, own_first: bool, reuse: Any) -> int:
        shared = nb.Segment(bench.take(2048), chunk=True)
        params = nb.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        bench.ttft(["First", shared, "So"] if own_first else [shared, "So"], reuse)

        def answer(own: Ids) -> None:
            segments = [nb.Segment(own), shared, "So"] if own_first else [shared, nb.Segment(own)]
            bench.llm.compose(segments, params, reuse=reuse)

        threads = [threading.Thread(target=answer, args=(bench.take(50),)) for _ in range(count)]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            stats = bench.llm.stats()
            if stats["running"] == count:
                most = max(most, int(stats["blocks_owned"]))
            time.sleep(0.002)
        for chunk in bench.llm.chunks.list():
            bench.llm.chunks.remove(chunk.id)
        return most

    result = {}
    for name, own_first, reuse in (
        ("the context first, exact", False, "exact"),
        ("their own text first, exact", True, "exact"),
        ("their own text first, isolated", True, nb.Isolated()),
    ):
        one, all_ = owned(1, own_first, reuse), owned(agents, own_first, reuse)
        result[name] = {"one_blocks": one, "all_blocks": all_, "ratio": all_ / one}
    return result


def part_rag(bench: Bench, queries: int = 40, documents: int = 60, per_query: int = 6) -> dict[str, Any]:
    texts = [bench.take(200) for _ in range(documents)]
    weights = [1 / (i + 1) ** 0.9 for i in range(documents)]
    arms: dict[str, Any] = {"exact": "exact", **MODES}
    result = {}
    for name, reuse in arms.items():
        drawn = random.Random(7)
        times, reused, total = [], 0, 0
        for _ in range(queries):
            chosen: list[int] = []
            while len(chosen) < per_query:
                (i,) = drawn.choices(range(documents), weights)
                if i not in chosen:
                    chosen.append(i)
            lead, query = nb.Segment(texts[0][:16]), nb.Segment(bench.take(32))
            report = bench.ttft([lead, *chunks_of([texts[i] for i in chosen]), query], reuse)
            times.append(report.ttft_ms)
            reused += report.exact_prefix + report.isolated
            total += report.exact_prefix + report.isolated + report.recomputed + report.computed
        times.sort()
        result[name] = {
            "ttft_p50_ms": times[len(times) // 2],
            "ttft_p95_ms": times[int(len(times) * 0.95)],
            "tokens_reused": reused / total,
        }
        for chunk in bench.llm.chunks.list():
            bench.llm.chunks.remove(chunk.id)
    return result


def part_document(bench: Bench, questions: int = 10) -> dict[str, Any]:
    document = nb.Segment(bench.take(4096))
    times = [bench.ttft([document, nb.Segment(bench.take(32))]).ttft_ms for _ in range(questions)]
    return {
        "first_ms": times[0],
        "later_ms": statistics.median(times[1:]),
        "ratio": times[0] / statistics.median(times[1:]),
    }


def part_novelty(
    args: argparse.Namespace, queries: int = 160, documents: int = 40, per_query: int = 5
) -> dict[str, Any]:
    probe = Bench(args)
    block_bytes = probe.llm.stats()["kv_bytes"] // probe.llm.stats()["blocks_total"]
    probe.llm.close()
    length = 96
    room = documents // 2 * (length // 16) + 60  # blocks: half of the documents, and the requests
    bench = Bench(args, max_model_len=768, max_num_seqs=1, kv_cache_bytes=room * block_bytes)
    texts = [bench.take(length) for _ in range(documents)]
    weights = [1 / (i + 1) ** 0.9 for i in range(documents)]
    seen: set[tuple[int, ...]] = set()
    rates = []
    for _ in range(queries):
        while True:
            chosen: list[int] = []
            while len(chosen) < per_query:
                (i,) = bench.random.choices(range(documents), weights)
                if i not in chosen:
                    chosen.append(i)
            if tuple(chosen) not in seen:
                seen.add(tuple(chosen))
                break
        before = bench.llm.stats()
        bench.ttft([nb.Segment(bench.take(8)), *chunks_of([texts[i] for i in chosen]), "And"], nb.Isolated())
        after = bench.llm.stats()
        hits = after["chunk_hits"] - before["chunk_hits"]
        rates.append(hits / (hits + after["chunk_misses"] - before["chunk_misses"]))
    quarter = queries // 4
    early, late = statistics.mean(rates[quarter : 2 * quarter]), statistics.mean(rates[-quarter:])
    evictions = bench.llm.stats()["chunk_evictions"]
    bench.llm.close()
    return {"second_quarter": early, "last_quarter": late, "ratio": late / early, "evictions": evictions}


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of the times to the first token, if they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["parts"]["ttft"]["ttft_ms"]
    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    bars = axes.barh(list(rows), list(rows.values()))
    axes.bar_label(bars, fmt="%.0f ms", padding=3)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("time to the first token (ms)")
    axes.set_title(f"4,096 tokens of context and a query of 64, {report['model']}, {report['cpu']}")
    figure.savefig(path)


def main() -> int:
    parser = parser_of(__doc__, max_model_len=8192, slots=4)
    names = ("ttft", "decode", "agents", "rag", "document", "novelty")
    parser.add_argument("--parts", default=",".join(names), help="which to run, with commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="draw the times to the first token (.svg or .png; needs matplotlib)")
    args = parser.parse_args()
    wanted = args.parts.split(",")
    if not set(wanted) <= set(names) or args.rounds < 1:
        parser.error(f"--parts are some of {', '.join(names)}; --rounds is at least 1")
    if args.plot is not None and "ttft" not in wanted:
        parser.error("--plot draws the part ttft")

    report = facts(args)
    bench = Bench(args)
    bench.ttft([nb.Segment(bench.take(600))])
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "ttft": lambda: part_ttft(bench, args.rounds),
        "decode": lambda: part_decode(bench, args.rounds),
        "agents": lambda: part_agents(bench),
        "rag": lambda: part_rag(bench),
        "document": lambda: part_document(bench),
        "novelty": lambda: part_novelty(args),
    }
    report["parts"] = {name: parts[name]() for name in names if name in wanted}
    finish(report, args)
    if args.plot is not None:
        plot(report, args.plot)
    for name, part in report["parts"].items():
        print(name)
        for key, value in part.items():
            if key == "rounds":
                continue
            values = value if isinstance(value, dict) else {"": value}
            for item, number in values.items():
                shown = (
                    ", ".join(f"{k} {v:.3g}" for k, v in number.items())
                    if isinstance(number, dict)
                    else f"{number:.4g}"
                )
                print(f"  {key} {item}: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
