"""Download a model into the cache.

NAME is a known model, or org/name[:quant] of a Hugging Face hub: with a quantization, the GGUF
file of that name (all parts of a split one); without, config, tokenizer and safetensors if there
are safetensors, else the GGUF file Q4_K_M or the first one. What is on this machine already is
not fetched again. Sizes and checksums are verified, and the path is printed. Without a name, lists
the known models.
"""

from __future__ import annotations

import argparse

from nanobraid import models
from nanobraid.commands._terminal import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a known model, or org/name[:quant]")


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
    if known is None:
        print(models.pull_announced(options.name))
        return 0
    if known.path.exists():
        print(models.pull(known.name))
        return 0
    with models.announced(known) as progress:
        path = models.pull(known.name, progress)
    print(path)
    return 0


def _state(known: models.KnownModel) -> str:
    return "in the cache" if known.path.exists() else "not downloaded"
