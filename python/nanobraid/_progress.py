"""The progress bar of `LLM.generate`; a file of its own because importing rich takes time."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from typing_extensions import Self

_INTERVAL_S = 0.1


class PromptBar:
    """Finished prompts and generated tokens per second, on stderr.

    Counting is cheap: the terminal is written at most ten times a second, by the thread that counts.

    Args:
        total: Prompts in all.
        console: Where to; None is stderr.
        clock: Seconds, for tests.
    """

    def __init__(
        self, total: int, console: Console | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        columns = (
            "prompts",
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(
            *columns, console=console or Console(stderr=True), transient=True, auto_refresh=False, get_time=clock
        )
        self._task = self._bar.add_task("prompts", total=total, speed="")
        self._clock = clock
        self._begun = self._shown = clock()
        self._prompts = 0
        self._tokens = 0

    def __enter__(self) -> Self:
        self._begun = self._shown = self._clock()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def add(self, *, tokens: int, prompts: int) -> None:
        """Counts new tokens and newly finished prompts."""
        self._tokens += tokens
        self._prompts += prompts
        now = self._clock()
        if now - self._shown < _INTERVAL_S:
            return
        self._shown = now
        speed = f"{self._tokens / (now - self._begun):,.0f} tokens/s"
        self._bar.update(self._task, completed=self._prompts, speed=speed, refresh=True)
