"""Show what a model file contains.

Prints metadata and tensors; reads the weights only to check them. FILE is a .braid file, a
GGUF file or any part of a split one, or the name of a model that is on this machine (see
'nanobraid models').
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nanobraid import _core, models
from nanobraid._kv_selftest import measured, result_line
from nanobraid._options import backend_of, fusion_lines
from nanobraid.commands._terminal import note, printable, table
from nanobraid.errors import UnsupportedError, core_errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("file", metavar="FILE", help="a .braid or GGUF file, or a name")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--check-tensors",
        action="store_true",
        help="also read every weight: compare checksums (.braid), look for NaN and infinity",
    )
    parser.add_argument(
        "--check-fusion",
        nargs="?",
        const="auto",
        metavar="DEVICE",
        help="also load the model on a device (default: auto) and measure the errors of its fused operators",
    )
    parser.add_argument(
        "--check-kv",
        metavar="DTYPE",
        help="also load the model and measure what keys and values of this type (int8, mixed, ...) change",
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code: 1 if --check-tensors finds weights that are not finite."""
    resolved = models.resolve(options.file)
    if resolved.is_dir():
        raise UnsupportedError(
            f"{resolved} is a Hugging Face folder: inspect the file that 'nanobraid export' makes of it"
        )
    path = str(resolved)
    with core_errors():
        info = _core.inspect_file(path)
    checked = _check_tensors(path) if options.check_tensors else None
    fusion = _check_fusion(path, options.check_fusion) if options.check_fusion else None
    kv_selftest = measured(path, options.check_kv) if options.check_kv else None
    totals = _totals(info["tensors"])
    if options.json:
        out = {"file": path, **info, "totals": totals}
        out |= {} if checked is None else {"check": checked}
        out |= {} if fusion is None else {"fusion": fusion}
        out |= {} if kv_selftest is None else {"kv_selftest": kv_selftest}
        print(json.dumps(out, indent=2))
    else:
        _print_info(path, info, totals)
        if checked is not None:
            _print_check(checked)
        if fusion is not None:
            print(f"\nfused operators on {fusion['backend']} (measured in {1000 * fusion['seconds']:.1f} ms)")
            print("\n".join(f"  {line}" for line in fusion_lines(fusion)))
        if kv_selftest is not None:
            print(f"\n{result_line(kv_selftest)}")
    return 1 if checked is not None and checked["nonfinite"] else 0


def _totals(tensors: list[tuple[str, str, list[int], int]]) -> dict[str, dict[str, float]]:
    """Tensors, values, bytes and bits per weight of each format and of 'all'; a format of unknown size has no bytes."""
    totals: dict[str, dict[str, float]] = {}
    for _, form, shape, num_bytes in tensors:
        for key in (form, "all"):
            row = totals.setdefault(key, {"tensors": 0, "values": 0, "bytes": 0})
            row["tensors"] += 1
            row["values"] += math.prod(shape)
            row["bytes"] += num_bytes
    for row in totals.values():
        row["bits_per_weight"] = round(8 * row["bytes"] / row["values"], 4)
    return dict(sorted(totals.items(), key=lambda item: (item[0] == "all", item[0])))


def _check_tensors(path: str) -> dict[str, Any]:
    with core_errors():
        file = _core.ModelFile(path)
        with _bar("checksums") as progress:
            has_checksums = file.verify(progress)
        with _bar("weights") as progress:
            nonfinite, skipped = file.check_weights(progress)
    return {"checksums": "ok" if has_checksums else "none in the file", "nonfinite": nonfinite, "skipped": skipped}


def _check_fusion(path: str, device: str) -> dict[str, Any]:
    backend = backend_of(device)
    with core_errors():
        model = _core.Model(path, backend, measure_fusion=True)
        return {"backend": model.backend, **model.fusion}


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (what, BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_info(path: str, info: dict[str, Any], totals: dict[str, dict[str, float]]) -> None:
    print(f"{path}: {info['format']} version {info['version']}, {info['file_bytes']:,} bytes")
    if info["fingerprint"]:
        print(f"fingerprint {info['fingerprint']}")
    if len(info["parts"]) > 1:
        print(f"\nparts ({len(info['parts'])})")
        print("\n".join(f"  {printable(part)}" for part in info["parts"]))
    if info["sections"]:
        print(f"\nsections ({len(info['sections'])})")
        sections = [(name, f"at {offset:,}", f"{size:,} bytes") for name, offset, size in info["sections"]]
        print(table(sections, "  "))
    print(f"\nmetadata ({len(info['metadata'])} entries)")
    rows = [(printable(key, 60), printable(kind), printable(text, 100)) for key, kind, text in info["metadata"]]
    print(table(rows, "  "))
    print(f"\ntensors ({len(info['tensors'])})")
    lines = [
        (printable(name, 64), printable(form), " x ".join(map(str, shape)), f"{num_bytes:,} bytes")
        for name, form, shape, num_bytes in info["tensors"]
    ]
    print(table(lines, "  "))
    print("\nformats")
    sums = [
        (
            printable(form),
            f"{row['tensors']} tensors",
            f"{row['values'] / 1e6:,.2f} million values",
            f"{row['bytes']:,} bytes",
            f"{row['bits_per_weight']:.2f} bits per weight",
        )
        for form, row in totals.items()
    ]
    print(table(sums, "  "))


def _print_check(checked: dict[str, Any]) -> None:
    print(f"\nchecked: checksums {checked['checksums']}; {len(checked['nonfinite'])} tensors with NaN or infinity")
    for name, num_nan, num_infinite in checked["nonfinite"]:
        print(f"  {printable(name, 64)}: {num_nan:,} NaN, {num_infinite:,} infinite")
    for name, form in checked["skipped"]:
        note(f"nanobraid: tensor {printable(name, 64)} was not looked into: format {printable(form)}")
