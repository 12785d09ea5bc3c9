"""Show what a model file contains.

Prints metadata and tensors without reading the weights. FILE may also be the name of a model
that is on this machine (see 'nanobraid models').
"""

from __future__ import annotations

import argparse
import json

from nanobraid import _core, models
from nanobraid.commands._terminal import printable, table
from nanobraid.errors import UnsupportedError, core_errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("file", metavar="FILE", help="a .braid or GGUF file, or a name")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    path = models.resolve(options.file)
    if path.is_dir():
        raise UnsupportedError(f"{path} is a Hugging Face folder: inspect the file that 'nanobraid export' makes of it")
    with core_errors():
        info = _core.inspect_file(str(path))
    if options.json:
        print(json.dumps({"file": str(path), **info}, indent=2))
        return 0
    tensors = info["tensors"]
    num_values = 0
    formats: dict[str, int] = {}
    for _, form, shape, _ in tensors:
        count = 1
        for size in shape:
            count *= size
        num_values += count
        formats[form] = formats.get(form, 0) + 1
    print(f"{path}: {info['format']} version {info['version']}, {info['file_bytes']:,} bytes")
    print(f"\nmetadata ({len(info['metadata'])} entries)")
    rows = [(printable(key, 60), printable(kind), printable(text, 100)) for key, kind, text in info["metadata"]]
    print(table(rows, "  "))
    kinds = ", ".join(f"{count} {form}" for form, count in sorted(formats.items()))
    print(f"\ntensors ({len(tensors)}: {kinds}; {num_values / 1e6:,.1f} million values)")
    lines = [
        (printable(name, 64), printable(form), " x ".join(map(str, shape)), f"{num_bytes:,} bytes")
        for name, form, shape, num_bytes in tensors
    ]
    print(table(lines, "  "))
    return 0
