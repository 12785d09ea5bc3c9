"""Make a .braid file from a Hugging Face folder or a GGUF file.

SRC is a folder with config.json and safetensors, a GGUF file (any part of a split one), or
a .braid file. w8 and w4 search their scales with a short text that is run through the model,
a layer at a time. Norms and biases stay f32; --dtype keep copies every weight as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanobraid.commands._terminal import note, table
from nanobraid.export.summary import DTYPES, ExportSummary, Progress, TensorSummary

_WORST = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("source", metavar="SRC", type=Path, help="a Hugging Face folder, a GGUF file or a .braid file")
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, required=True, help="the .braid file to write")
    parser.add_argument("--dtype", choices=DTYPES, required=True, help="format of the matrices")
    parser.add_argument(
        "--head-dtype",
        choices=DTYPES[:-1],
        help="format of embedding and head (default: as --dtype says; w8 with --dtype w4)",
    )
    parser.add_argument("--w8-per-channel", action="store_true", help="one w8 scale per row instead of per 64 weights")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--verbose", action="store_true", help="list every tensor")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from nanobraid.export import export_model  # importing numpy takes time

    with _bar() as progress:
        summary = export_model(
            options.source,
            options.out,
            options.dtype,
            progress=progress,
            force=options.force,
            w8_per_channel=options.w8_per_channel,
            head_dtype=options.head_dtype,
        )
    print(describe(summary, verbose=options.verbose))
    return 0


def describe(summary: ExportSummary, *, verbose: bool) -> str:
    """The summary as text: totals, formats, then the tensors with the largest errors, or all."""
    lines = [
        f"{summary.out}: {_mb(summary.file_bytes)}, {summary.bits_per_weight:.2f} bits per weight "
        f"(source {_mb(summary.source_bytes)})"
    ]
    for name in sorted({tensor.format for tensor in summary.tensors}):
        group = [tensor for tensor in summary.tensors if tensor.format == name]
        size, weights = sum(tensor.bytes for tensor in group), sum(tensor.num_weights for tensor in group)
        bits = 8 * size / max(weights, 1)
        noun = "tensor" if len(group) == 1 else "tensors"
        lines.append(f"  {name}: {len(group)} {noun}, {_mb(size)}, {bits:.2f} bits per weight")
    lines.append(f"took {summary.seconds:.1f} s, at most {_mb(summary.peak_rss_bytes)} of memory")
    if summary.calibration_tokens:
        lines.append(
            f"  of this calibration: {summary.calibration_seconds:.1f} s, {_mb(summary.calibration_rss_bytes)}, "
            f"{summary.calibration_tokens} tokens of {summary.calibration_text}"
        )
    lines.extend(f"note: {line}" for line in summary.notes)
    rows = summary.tensors if verbose else _worst(summary.tensors)
    if rows:
        lines.append("tensors:" if verbose else "largest relative errors:")
        lines.append(table([_row(tensor) for tensor in rows]))
    return "\n".join(lines)


def _worst(tensors: tuple[TensorSummary, ...]) -> list[TensorSummary]:
    changed = [tensor for tensor in tensors if tensor.relative_error > 0.0]
    return sorted(changed, key=lambda tensor: -tensor.relative_error)[:_WORST]


def _row(tensor: TensorSummary) -> tuple[str, ...]:
    shape = "x".join(map(str, tensor.shape))
    return (
        tensor.name,
        tensor.format,
        shape,
        _mb(tensor.bytes),
        f"{tensor.bits_per_weight:.2f}",
        f"{tensor.relative_error:.5f}",
    )


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


@contextmanager
def _bar() -> Iterator[Progress | None]:
    """A progress bar on stderr if that is a terminal; else a line for each stage."""
    if not sys.stderr.isatty():
        stages: list[str] = []

        def tell(what: str, _done: int, _all: int) -> None:
            if what not in stages:
                stages.append(what)
                note(what)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("opening", total=None)
        yield lambda what, done, everything: bar.update(task, description=what, completed=done, total=everything)
