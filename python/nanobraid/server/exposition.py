"""Prometheus' text format, version 0.0.4: the part of it that `metrics` needs.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

#: Of an answer with this text.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Kind = Literal["counter", "gauge", "histogram"]

_LABEL_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
_HELP_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n"})


def labels_text(labels: Iterable[tuple[str, str]]) -> str:
    """``name="value"`` of each label, with commas between them."""
    return ",".join(f'{name}="{value.translate(_LABEL_ESCAPES)}"' for name, value in labels)


def number_text(value: float) -> str:
    """A number as the format wants it, which reads back as the same one."""
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(value)


class Histogram:
    """Counts of values up to each of some bounds.

    Args:
        bounds: Upper bounds, inclusive, ascending. There is one more bucket for what exceeds the last.

    Raises:
        ValueError: The bounds are not ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = [float(bound) for bound in bounds]
        if any(left >= right for left, right in zip(self.bounds, self.bounds[1:], strict=False)):
            raise ValueError(f"the bounds of a histogram must ascend, got {self.bounds}")
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = [0.0]
        self.observe = self._make_observe()

    def _make_observe(self) -> Callable[[float], None]:
        # Called once a token: names of the closure cost half of what attributes do.
        def observe(value: float) -> None:
            counts[bisect_left(bounds, value)] += 1
            total[0] += value

        bounds, counts, total = self.bounds, self._counts, self._sum
        return observe

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self._counts)

    @property
    def sum(self) -> float:
        """Of all values."""
        return self._sum[0]

    def cumulative(self) -> list[int]:
        """For each bound, and for infinity, how many values did not exceed it."""
        total, counts = 0, []
        for count in self._counts:
            total += count
            counts.append(total)
        return counts


class TextWriter:
    """Collects metrics as text.

    Args:
        labels: Of every sample, before its own.
    """

    def __init__(self, labels: Sequence[tuple[str, str]]) -> None:
        self._labels = labels_text(labels)
        self._lines: list[str] = []

    def metric(
        self, name: str, kind: Kind, text: str, samples: Iterable[tuple[Sequence[tuple[str, str]], float]]
    ) -> None:
        """Adds a counter or gauge with its samples: their own labels and their values.

        The name of a counter is given without ``_total``, which this adds.
        """
        name += "_total" if kind == "counter" else ""
        self._head(name, kind, text)
        for labels, value in samples:
            own = "," + labels_text(labels) if labels else ""
            self._lines.append(f"{name}{{{self._labels}{own}}} {number_text(value)}")

    def histogram(self, name: str, text: str, histogram: Histogram) -> None:
        """Adds a histogram: its buckets, sum and count."""
        self._head(name, "histogram", text)
        counts = histogram.cumulative()
        for bound, count in zip([*histogram.bounds, math.inf], counts, strict=True):
            self._lines.append(f'{name}_bucket{{{self._labels},le="{number_text(bound)}"}} {count}')
        self._lines.append(f"{name}_sum{{{self._labels}}} {number_text(histogram.sum)}")
        self._lines.append(f"{name}_count{{{self._labels}}} {counts[-1]}")

    def _head(self, name: str, kind: Kind, text: str) -> None:
        self._lines.append(f"# HELP {name} {text.translate(_HELP_ESCAPES)}")
        self._lines.append(f"# TYPE {name} {kind}")

    def encode(self) -> bytes:
        """All of it."""
        # A name from a command line may hold bytes that are no text.
        return ("\n".join(self._lines) + "\n").encode("utf-8", "replace")
