"""List the models on this machine.

Models in the cache of nanobraid, in installed packages and in the Hugging Face cache, each with
the name to use for --model. A Hugging Face folder is exported when it is first used; the last
column says whether that has been done.
"""

from __future__ import annotations

import argparse
import json

from nanobraid import models
from nanobraid.commands._terminal import note, printable, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    found = models.list_models()
    if options.json:
        rows = [
            {
                "name": model.name,
                "kind": model.kind,
                "num_bytes": model.num_bytes,
                "where": model.where,
                "path": str(model.path),
                "exported": [str(path) for path in model.exported],
            }
            for model in found
        ]
        print(json.dumps(rows, indent=2))
        return 0
    if not found:
        note("no models on this machine: 'nanobraid pull' lists what can be fetched by a short name")
        return 0
    lines = [("name", "kind", "size", "where", "exported")]
    for model in found:
        exported = ("yes" if model.exported else "no") if model.kind == "hf folder" else "-"
        lines.append((printable(model.name), model.kind, f"{model.num_bytes / 1e6:,.1f} MB", model.where, exported))
    print(table(lines))
    return 0
