#!/usr/bin/env python3
"""Checks that includes between modules go down the layers only. Prints FILE:LINE for each that does not; exit 1.

A module may include itself and modules of lower layers, never another module of its own layer. Besides: engine includes
neither text nor io (it knows integers, not text); cuda only base, tensor, quant and ops; nobody includes cuda.

Usage: check_layers.py [--root DIR]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

LAYERS = {
    "base": 0,
    "tensor": 1,
    "quant": 1,
    "text": 1,
    "ops": 2,
    "cuda": 2,
    "kv": 3,
    "io": 3,
    "model": 4,
    "sampling": 4,
    "engine": 5,
    "bindings": 6,
}
FORBIDDEN = {"engine": {"text", "io"}}
EMULATOR = "cuda_emulation/emulator.h"  # what kernels are compiled with where there is no nvcc; see tests/
ONLY = {"cuda": {"base", "tensor", "quant", "ops"}}
SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".inc"}
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"')


def module_of(path: Path, root: Path) -> str | None:
    """The module that a file of the tree belongs to; None if it belongs to none."""
    try:
        parts = path.resolve().relative_to(root.resolve()).parts
    except ValueError:
        return None
    if parts[:2] == ("python", "bindings"):
        return "bindings"
    if parts[0] == "cuda":
        return "cuda"
    return parts[1] if parts[0] == "cpp" and len(parts) > 2 else None


def included_module(target: str, source: Path, root: Path) -> str | None:
    """The module that `#include "target"` in `source` reaches, whether or not the file exists; None if unknown."""
    for folder in (source.parent, root / "cpp", root / "cuda", root):
        if (folder / target).is_file():
            return module_of(folder / target, root)
    first = next((part for part in Path(target).parts if part not in ("..", "cpp", "python")), "")
    return first if first in LAYERS else None


def objection(module: str, included: str) -> str | None:
    """Why `module` may not include `included`; None if it may."""
    if module == included:
        return None
    if included == "cuda":
        return "nobody includes cuda"
    if included in FORBIDDEN.get(module, set()):
        return f"{module} does not include {included}"
    if module in ONLY:
        only = ONLY[module]
        return None if included in only else f"{module} includes only {', '.join(sorted(only))}"
    if LAYERS[included] >= LAYERS[module]:
        return f"{module} is layer {LAYERS[module]}, {included} is layer {LAYERS[included]}"
    return None


def violations(root: Path) -> Iterator[str]:
    sources = sorted(
        path
        for folder in ("cpp", "cuda", "python/bindings")
        for path in (root / folder).rglob("*")
        if path.suffix in SUFFIXES and path.is_file()
    )
    if not sources:
        yield f"{root}: no sources under cpp/, cuda/ or python/bindings/"
    for path in sources:
        name = path.relative_to(root)
        module = module_of(path, root)
        if module not in LAYERS:
            yield f"{name}:1: module {module} has no layer"
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = INCLUDE.match(line)
            if not match:
                continue
            if module == "cuda" and match[1] == EMULATOR:
                continue
            included = included_module(match[1], path, root)
            if included not in LAYERS:
                yield f'{name}:{number}: "{match[1]}" belongs to no module; system headers take <>'
                continue
            reason = objection(module, included)
            if reason:
                yield f'{name}:{number}: "{match[1]}": {reason}'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    found = list(violations(parser.parse_args().root))
    print("\n".join(found) if found else "layers: ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
