"""What the rows of ablation.py share: the engine that is measured, sizes, turns of the two sides, programs."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nanobraid._options import backend_of
from nanobraid.export import export_model

T = TypeVar("T")


class NotMeasured(Exception):
    """A row that this device or installation cannot measure; the message says why."""


@dataclass
class Case:
    """One line of the table: a quantity with an optimisation off and on, round by round.

    Attributes:
        what: The quantity, with its unit.
        off: What each round measured without the optimisation.
        on: With it, in the same round.
        higher_is_better: Of speeds and of numbers that fit; not of times and bytes.
        off_is: What "off" means here.
        on_is: What "on" means here.
        note: What a reader must know beside it.
    """

    what: str
    off: list[float]
    on: list[float]
    higher_is_better: bool
    off_is: str
    on_is: str
    note: str = ""

    def summary(self) -> dict[str, Any]:
        """Medians, the median of the rounds' gains (above 1: better with it) and their quartiles."""
        if not self.off or len(self.off) != len(self.on) or min(self.off + self.on) <= 0:
            raise ValueError(f"{self.what}: rounds {self.off} and {self.on} cannot be compared")
        pairs = list(zip(self.off, self.on, strict=True))
        gains = [on / off if self.higher_is_better else off / on for off, on in pairs]
        low, high = gains[0], gains[0]
        if len(gains) > 1:
            low, _, high = statistics.quantiles(gains, n=4, method="inclusive")
        return {
            "case": self.what,
            "off": statistics.median(self.off),
            "on": statistics.median(self.on),
            "gain": statistics.median(gains),
            "gain_quartiles": [low, high],
            "rounds": len(gains),
            "higher_is_better": self.higher_is_better,
            "off_is": self.off_is,
            "on_is": self.on_is,
            "note": self.note,
            "every_round": {"off": self.off, "on": self.on},
        }


@dataclass
class Setup:
    """What is measured, on which device and how long.

    Attributes:
        model: The model file.
        device: As `LLM` takes it.
        threads: Of the engine.
        rounds: That count; one before them does not.
        quick: Take small sizes, at which figures say little.
        programs: Folder of the programs of eval/kernels, or None.
        folder: A temporary one, for files that rows make.
        seed: Of prompts.
    """

    model: Path
    device: str
    threads: int
    rounds: int
    quick: bool
    programs: Path | None
    folder: Path
    seed: int = 1
    _exported: dict[str, Path] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Of every `LLM`."""
        return {"device": self.device, "num_threads": self.threads}

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def exported(self, dtype: str) -> Path:
        """The model with its matrices in that format."""
        if dtype not in self._exported:
            path = self.folder / f"{self.model.stem}-{dtype}.braid"
            export_model(self.model, path, dtype, force=True)
            self._exported[dtype] = path
        return self._exported[dtype]

    def namespace(self, **more: Any) -> argparse.Namespace:
        """What functions of the other scripts take as their options."""
        return argparse.Namespace(model=self.model, threads=self.threads, seed=self.seed, **more)

    def run(self, program: str, *args: object) -> list[dict[str, Any]]:
        """The lines of JSON that a program of eval/kernels prints.

        Raises:
            NotMeasured: `programs` is not given.
            RuntimeError: The program is missing or failed.
        """
        if self.programs is None:
            raise NotMeasured("needs --programs, the folder of the compiled programs of eval/kernels")
        command = [str(self.programs / program), *map(str, args)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise RuntimeError(f"{program} cannot be run: {error.strerror}") from error
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed with {done.returncode}: {done.stderr.strip()}")
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    @property
    def backend(self) -> str:
        """The device as the programs take it; empty for the fastest."""
        return backend_of(self.device)

    def turns(self) -> Iterator[tuple[int, int]]:
        """Rounds and sides (0: off, 1: on) in the order in which they are measured, every second round the other way.

        Round -1 comes first and does not count.
        """
        for number in range(-1, self.rounds):
            for side in (1, 0) if number > 0 and number % 2 == 1 else (0, 1):
                yield number, side

    def alternate(self, off: Callable[[int], T], on: Callable[[int], T]) -> tuple[list[T], list[T]]:
        """Calls both with the number of the round, as turns() says, and returns what they measured."""
        measured: tuple[list[T], list[T]] = [], []
        for number, side in self.turns():
            one = (off, on)[side](number)
            if number >= 0:
                measured[side].append(one)
        return measured


def seed_of(setup: Setup, number: int) -> int:
    """A seed for each round; both sides of a round get the same prompts."""
    return 1000 * setup.seed + number + 1
