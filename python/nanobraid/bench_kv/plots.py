"""Plots as SVG, with nothing but text: memory against KL, perplexity against window, found needles as a heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 200, 50, 60
_INK, _GRID, _MARK = "#222", "#ddd", "#1f6fb4"


@dataclass(frozen=True)
class _Axis:
    """Maps values to places between two coordinates; `log` axes have no zero."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        value, low, high = (math.log10(v) if self.log else v for v in (value, self.low, self.high))
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1)]
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        step = next(step * m for m in (0.1, 0.2, 0.5, 1, 2) if (self.high - self.low) / (step * m) <= 8)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _linear(values: Sequence[float], begin: float, end: float, *, from_zero: bool) -> _Axis:
    low, high = min(values), max(values)
    low = 0.0 if from_zero else low - 0.1 * (high - low or abs(low) or 1.0)
    return _Axis(low, high + 0.05 * (high - low or 1.0), begin, end)


def _text(x: float, y: float, text: str, anchor: str = "start", *, size: int = 12, turn: bool = False) -> str:
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{_INK}"{turned}>'
        f"{escape(text)}</text>"
    )


def _line(begin: tuple[float, float], end: tuple[float, float], colour: str, extra: str = "") -> str:
    (x1, y1), (x2, y2) = begin, end
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{extra}/>'


def _document(title: str, parts: Sequence[str], height: int = _HEIGHT) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">'
    ground = f'<rect width="{_WIDTH}" height="{height}" fill="white"/>'
    return "\n".join(
        [head, f"<title>{escape(title)}</title>", ground, _text(_LEFT, 26, title, size=15), *parts, "</svg>"]
    )


def _frame(x: _Axis, y: _Axis, x_name: str, y_name: str) -> list[str]:
    parts = []
    for value in x.ticks():
        parts += [_line((x.place(value), y.begin), (x.place(value), y.end), _GRID)]
        parts += [_text(x.place(value), y.begin + 18, f"{value:g}", "middle")]
    for value in y.ticks():
        parts += [_line((x.begin, y.place(value)), (x.end, y.place(value)), _GRID)]
        parts += [_text(x.begin - 8, y.place(value) + 4, f"{value:g}", "end")]
    parts += [_line((x.begin, y.begin), (x.end, y.begin), _INK), _line((x.begin, y.begin), (x.begin, y.end), _INK)]
    parts += [_text((x.begin + x.end) / 2, y.begin + 42, x_name, "middle")]
    return [*parts, _text(22, (y.begin + y.end) / 2, y_name, "middle", turn=True)]


def _apart(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Labels moved down where they would lie on each other."""
    placed: list[tuple[float, float, str]] = []
    for x, at, label in sorted(points, key=lambda point: point[1]):
        y = at
        while any(abs(y - other) < 12 and abs(x - beside) < 150 for beside, other, _ in placed):
            y += 3
        placed.append((x, y, label))
    return placed


def memory_against_kl(rows: Sequence[dict[str, Any]]) -> str | None:
    """A point for each method; KL on a logarithmic axis. None if no row has both figures.

    Args:
        rows: Of a report.
    """
    points = [
        (row["est_kv_cache_mb_avg"], row["quality"]["kl"], row["label"])
        for row in rows
        if row["status"] == "ok" and row.get("quality") and row["quality"]["kl"] > 0
    ]
    if not points:
        return None
    x = _linear([point[0] for point in points], _LEFT, _WIDTH - _RIGHT, from_zero=True)
    kl = [point[1] for point in points]
    low, high = 10.0 ** math.floor(math.log10(min(kl))), 10.0 ** math.ceil(math.log10(max(kl)) + 1e-6)
    y = _Axis(low, high, _HEIGHT - _BOTTOM, _TOP, log=True)
    parts = _frame(x, y, "keys and values of a prompt (MiB)", "KL to full precision (nats)")
    parts += [
        f'<circle cx="{x.place(mb):.1f}" cy="{y.place(kl):.1f}" r="4" fill="{_MARK}"/>' for mb, kl, _ in points
    ]  # fmt: skip
    labels = _apart([(x.place(mb) + 7, y.place(kl) + 4, label) for mb, kl, label in points])
    return _document("Memory against KL", [*parts, *(_text(*label, size=10) for label in labels)])


def perplexity_against_window(rows: Sequence[dict[str, Any]]) -> str | None:
    """Perplexity for each window of sliding_window, and that of full precision. None without such rows."""
    found = [row for row in rows if row["status"] == "ok" and row["method"] == "sliding_window" and row.get("quality")]
    if not found:
        return None
    points = sorted((row["window_size"], row["quality"]["perplexity"]) for row in found)
    exact = found[0]["quality"]["reference_perplexity"]
    x = _linear([window for window, _ in points], _LEFT, _WIDTH - _RIGHT, from_zero=True)
    y = _linear([*(value for _, value in points), exact], _HEIGHT - _BOTTOM, _TOP, from_zero=False)
    parts = _frame(x, y, "window (tokens)", "perplexity")
    parts += [_line((x.begin, y.place(exact)), (x.end, y.place(exact)), "#b43c1f", ' stroke-dasharray="6 4"')]
    parts += [_text(x.end + 6, y.place(exact) + 4, f"nothing forgotten: {exact:.2f}")]
    path = " ".join(f"{x.place(window):.1f},{y.place(value):.1f}" for window, value in points)
    parts += [f'<polyline points="{path}" fill="none" stroke="{_MARK}"/>']
    for window, value in points:
        parts += [f'<circle cx="{x.place(window):.1f}" cy="{y.place(value):.1f}" r="4" fill="{_MARK}"/>']
        parts += [_text(x.place(window) + 7, y.place(value) - 7, f"{value:.2f}", size=10)]
    return _document("Perplexity against window", parts)


def needle_map(rows: Sequence[dict[str, Any]]) -> str | None:
    """A row for each method, a cell for each length and depth: dark where needles were found. None without needles.

    Grey cells are those that the reference does not find either.
    """
    found = [row for row in rows if row["status"] == "ok" and row.get("quality", {}).get("needles")]
    if not found:
        return None
    columns = [(cell["length"], cell["depth"]) for cell in found[0]["quality"]["needles"]]
    left, top = 250, 86
    width = (_WIDTH - left - 20) / len(columns)
    parts = [_text(left, 50, "length, and below it the depth: 0 is the beginning", size=11)]
    for i, (length, depth) in enumerate(columns):
        middle = left + width * (i + 0.5)
        if i == 0 or columns[i - 1][0] != length:
            parts += [_text(left + width * i + 2, top - 20, f"{length}", size=11)]
        parts += [_text(middle, top - 6, f"{depth:g}", "middle", size=10)]
    for j, row in enumerate(found):
        y = top + 22 * j
        parts += [_text(left - 8, y + 15, row["label"], "end", size=11)]
        for i, cell in enumerate(row["quality"]["needles"]):
            share = cell["retrieved"] / cell["of"] if cell["of"] else None
            shade = "#ccc" if share is None else f"hsl(207 70% {95 - 60 * share:.0f}%)"
            parts += [
                f'<rect x="{left + width * i:.1f}" y="{y}" width="{width - 1:.1f}" height="21" fill="{shade}">'
                f"<title>{cell['retrieved']} of {cell['of']}</title></rect>"
            ]
    return _document("Needles found", parts, height=top + 22 * len(found) + 20)
