"""Modes of reuse, and how far each is from full prefill: what `kv_quality.py` computes, whatever it runs on.

KL is KL(full prefill || mode) in nats over the tokens known to follow (teacher forcing); intervals are 95 %, from
resampling the texts, the same draws for every mode. The modes named `control` encode every chunk behind all that
precedes it: they have nothing to approximate, and one that does not reach full prefill is broken.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kv_plans import Case, Piece
from nanobraid.bench_kv.divergence import log_softmax, mean_kl, same_tokens, same_top1

Values = NDArray[np.float64]
Logits = NDArray[np.float32]
Sink = Literal["mask", "keep"]
RATIOS = (0.05, 0.15, 0.3, 0.5, 1.0)
BASELINE = "mask"
NUM_RESAMPLED = 2000


@dataclass(frozen=True)
class Mode:
    """One way to serve a composed prompt: isolated, or with a `ratio` of the chunk tokens recomputed (blend)."""

    name: str
    anchor: str = "none"
    sink: Sink = "mask"
    ratio: float | None = None
    select: Literal["deviation", "first"] = "deviation"


def series(label: str, anchor: str, sink: Sink) -> list[Mode]:
    """Isolated, then more and more tokens recomputed, up to all: KL may only fall."""
    blends = [Mode(f"{label}, {100 * ratio:.0f} %", anchor, sink, ratio) for ratio in RATIOS]
    return [Mode(label, anchor, sink), *blends]


SERIES = {
    "mask": series("mask", "none", "mask"),
    "bos": series("bos", "bos", "keep"),
    "prefix": series("prefix", "prefix", "keep"),
}
CONTROLS = [Mode("control", "before", "keep"), Mode("control, 15 %", "before", "keep", 0.15)]
MODES = [
    *CONTROLS,
    Mode("keep", sink="keep"),
    *SERIES["mask"],
    *(Mode(f"mask, first {100 * ratio:.0f} %", ratio=ratio, select="first") for ratio in (0.01, 0.05, 0.15)),
    Mode("keep, 15 %", "none", "keep", 0.15),
    *SERIES["bos"],
    Mode("bos and mask", "bos"),
    Mode("bos and mask, 15 %", "bos", "mask", 0.15),
    *SERIES["prefix"],
    Mode("prefix and mask", "prefix"),
    Mode("prefix and mask, 15 %", "prefix", "mask", 0.15),
]
# Of the default model: plan, mode, largest mean KL, smallest share of rows with the same most likely token.
BANDS = (("doc", "mask", 0.08, 0.85), ("doc", "prefix, 15 %", 0.045, 0.89), ("doc", "prefix, 30 %", 0.035, 0.90))


@dataclass(frozen=True)
class Served:
    """Greedy tokens behind a composed prompt, and how many tokens of its chunks were recomputed."""

    tokens: list[int]
    recomputed: int


class Backend(Protocol):
    """What is measured: an engine, or in tests the oracle. `bos` is the token that anchors stand for."""

    bos: int

    def full(self, tokens: Sequence[int], rows: int) -> Logits:
        """Full prefill: the last `rows` rows."""
        ...

    def full_greedy(self, tokens: Sequence[int], count: int) -> list[int]: ...

    def composed(self, pieces: Sequence[Piece], mode: Mode, rows: int) -> Logits:
        """The last `rows` rows of the last piece."""
        ...

    def composed_greedy(self, pieces: Sequence[Piece], mode: Mode, count: int) -> Served: ...


@dataclass(frozen=True)
class Row:
    """A mode on one text."""

    text: str
    kl: Values
    agree: NDArray[np.bool_]
    gold: Values
    greedy: list[int]
    recomputed: float = 0.0


def compare(case: Case, full: Logits, other: Logits, greedy: list[int], recomputed: float = 0.0) -> Row:
    """Raises ValueError where a figure is not finite: such a mean would hide everything else."""
    kl = mean_kl(full, other)
    gold = log_softmax(other)[np.arange(len(case.answer)), case.answer]
    if not (np.isfinite(kl).all() and np.isfinite(gold).all()):
        raise ValueError(f"{case.name}: a divergence is not finite")
    return Row(case.name, kl, same_top1(full, other), gold, greedy, recomputed)


def measure(
    backend: Backend, cases: Sequence[Case], modes: Sequence[Mode], greedy: int, yardsticks: dict[str, Backend]
) -> dict[str, list[Row]]:
    """Rows per mode and yardstick, in the order of `cases`; "full" is full prefill against itself."""
    out: dict[str, list[Row]] = {}
    for case in cases:
        count, query = len(case.answer), case.scored_query()
        prompt = case.prompt()
        scored = [*prompt, *case.answer[:-1]]
        full = backend.full(scored, count)
        rows = {"full": compare(case, full, full, backend.full_greedy(prompt, greedy))}
        for mode in modes:
            logits = backend.composed(case.pieces(mode.anchor, backend.bos, query), mode, count)
            served = backend.composed_greedy(case.pieces(mode.anchor, backend.bos, case.query), mode, greedy)
            share = served.recomputed / sum(map(len, case.chunks))
            rows[mode.name] = compare(case, full, logits, served.tokens, share)
        turned = case.reversed().prompt()
        other = backend.full([*turned, *case.answer[:-1]], count)
        rows["full, chunks reversed"] = compare(case, full, other, backend.full_greedy(turned, greedy))
        for name, yardstick in yardsticks.items():
            other = yardstick.full(scored, count)
            rows[name] = compare(case, full, other, yardstick.full_greedy(prompt, greedy))
        for name, row in rows.items():
            out.setdefault(name, []).append(row)
        print(f"{case.name}: {len(scored)} tokens", file=sys.stderr, flush=True)
    return out


def interval(per_text: Values) -> list[float]:
    """95 % of the means over texts drawn with replacement; the draws depend on the number of texts alone."""
    draws = np.random.default_rng(7).integers(0, len(per_text), (NUM_RESAMPLED, len(per_text)))
    return [float(bound) for bound in np.percentile(per_text[draws].mean(axis=1), [2.5, 97.5])]


def means(rows: Sequence[Row]) -> Values:
    """Mean KL of every text."""
    return np.array([row.kl.mean() for row in rows])


def summary(rows: Sequence[Row], full: Sequence[Row], baseline: Sequence[Row] | None) -> dict[str, Any]:
    kl = np.concatenate([row.kl for row in rows])
    per_text = means(rows)
    worst = int(per_text.argmax())
    same = [same_tokens(row.greedy, reference.greedy) for row, reference in zip(rows, full, strict=True)]
    gold = np.concatenate([row.gold for row in rows])
    out: dict[str, Any] = {
        "kl": float(kl.mean()),
        "kl_95": interval(per_text),
        **{f"kl_p{level}": float(np.percentile(kl, level)) for level in (50, 95, 99)},
        "kl_max": float(kl.max()),
        "top1": float(np.concatenate([row.agree for row in rows]).mean()),
        "gold_logprob": float(gold.mean()),
        "gold_logprob_minus_full": float((gold - np.concatenate([row.gold for row in full])).mean()),
        "greedy_same_tokens": same,
        "greedy_same_median": float(np.median(same)),
        "recomputed": float(np.mean([row.recomputed for row in rows])),
        "worst_text": rows[worst].text,
        "worst_text_kl": float(per_text[worst]),
    }
    if baseline is not None:
        out["kl_minus_baseline_95"] = interval(per_text - means(baseline))
    return out


def answers(rows: Sequence[Row], full: Sequence[Row], cases: Sequence[Case]) -> dict[str, int]:
    """Of the questions that full prefill answers rightly, how many a mode does too."""

    def right(row: Row, case: Case) -> bool:
        return row.greedy[: len(case.answer)] == list(case.answer)

    asked = [(row, case) for row, reference, case in zip(rows, full, cases, strict=True) if right(reference, case)]
    return {"right": sum(right(row, case) for row, case in asked), "of": len(asked)}


def failures(measured: dict[str, list[Row]], exact_kl: float) -> list[str]:
    """What no engine may show: a control or a ratio of 1 off full prefill, or KL that rises with the ratio."""
    failed = []
    exact = [*(mode.name for mode in CONTROLS), *(modes[-1].name for modes in SERIES.values())]
    for name in exact:
        if name in measured and (worst := max(row.kl.max() for row in measured[name])) > exact_kl:
            failed.append(f"{name}: KL {worst:.2g} at a position where nothing is approximate")
    for modes in SERIES.values():
        present = [mode.name for mode in modes if mode.name in measured]
        for less, more in itertools.pairwise(present):
            low, _ = interval(means(measured[more]) - means(measured[less]))
            if low > exact_kl:
                failed.append(f"{more}: KL rises from that of {less} by {low:.2g} or more")
    return failed


def bands_left(plan: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{plan}, {mode}: KL {rows[mode]['kl']:.4f}, bound {most}; top-1 {rows[mode]['top1']:.3f}, bound {least}"
        for of, mode, most, least in BANDS
        if of == plan and mode in rows and (rows[mode]["kl"] > most or rows[mode]["top1"] < least)
    ]


def report_of(measured: dict[str, list[Row]], cases: Sequence[Case], with_answers: bool) -> dict[str, Any]:
    full, baseline = measured["full"], measured.get(BASELINE)
    rows = {name: summary(found, full, baseline) for name, found in measured.items()}
    if with_answers:
        for name, row in rows.items():
            row["answers"] = answers(measured[name], full, cases)
    return {"texts": [case.name for case in cases], "tokens": [len(case.prompt()) for case in cases], "rows": rows}
