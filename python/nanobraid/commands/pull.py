"""Download a known model into the cache.

Without a name, lists the known models. With one, the file is downloaded unless it is there,
its checksum is verified, and its path is printed.
"""

from __future__ import annotations

import argparse

from nanobraid import models
from nanobraid.commands._terminal import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a known model")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if options.name is None:
        rows = [
            (known.name, f"{known.num_bytes / 1e6:.0f} MB", known.license, _state(known), known.description)
            for known in models.KNOWN_MODELS.values()
        ]
        print(table(rows))
        return 0
    known = models.KNOWN_MODELS.get(options.name.lower())
    if known is None or known.path.exists():
        print(models.pull(options.name))
        return 0
    with models.announced(known) as progress:
        path = models.pull(known.name, progress)
    print(path)
    return 0


def _state(known: models.KnownModel) -> str:
    return "in the cache" if known.path.exists() else "not downloaded"
