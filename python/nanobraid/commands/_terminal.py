"""What commands write."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from nanobraid.outputs import RequestMetrics

_KEPT = "\n\t"


def printable(text: str, limit: int | None = None) -> str:
    """Returns text from a model file or a model for one line of output: control characters become spaces."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if limit is None or len(line) <= limit else line[: limit - 3] + "..."


class TextOut:
    """Writes generated text to stdout at once, piece by piece.

    On a terminal, control characters are left out: a model must not be able to move the cursor or change the title.
    """

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows '?'
        self._on_terminal = sys.stdout.isatty()

    def write(self, text: str) -> None:
        """Writes and flushes."""
        if self._on_terminal:
            text = "".join(c for c in text if c in _KEPT or c.isprintable())
        sys.stdout.write(text)
        sys.stdout.flush()


def note(text: str) -> None:
    """A line for the user that is not a result: on stderr."""
    print(text, file=sys.stderr, flush=True)


def guesses(metrics: RequestMetrics | None) -> str:
    """What became of the guesses of an answer's tokens; empty if there were none."""
    if metrics is None or metrics.num_draft_tokens == 0:
        return ""
    return f"{metrics.num_accepted_tokens} of {metrics.num_draft_tokens} guessed tokens were right"


def table(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Returns rows as lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join((indent + line).rstrip() for line in lines)
