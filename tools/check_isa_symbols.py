#!/usr/bin/env python3
"""Checks that object files compiled for one instruction set export their kernel table and nothing else.

An inline function compiled with AVX-512 is a weak symbol; the linker may keep that copy for the whole program, which
then dies on machines without AVX-512. So each object may define no weak symbol, and no global one but those that match
--allow, of which there must be at least one. Prints FILE: SYMBOL for each violation; exit 1.

Usage: check_isa_symbols.py [--allow REGEX] OBJECT...
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

DEFAULT_ALLOW = r"nb_kernels_\w+"
WEAK = {"W": "weak function", "V": "weak object", "u": "unique global"}
GLOBAL = {
    "T": "global function",
    "i": "indirect function",
    "D": "global data",
    "B": "global data",
    "R": "global constant",
    "G": "global data",
    "S": "global data",
    "C": "common data",
}
LINE = re.compile(r"^(?:[0-9a-fA-F]+|\s+) ([A-Za-z?]) (.+)$")


def symbols(listing: str) -> Iterator[tuple[str, str]]:
    """(type, name) of each line that `nm -C` printed."""
    for line in listing.splitlines():
        match = LINE.match(line)
        if match:
            yield match[1], match[2]


def violations(listing: str, allow: re.Pattern[str]) -> Iterator[str]:
    tables = 0
    for kind, name in symbols(listing):
        if kind in WEAK:
            yield f"{WEAK[kind]} {name}"
        elif kind in GLOBAL:
            if allow.fullmatch(name):
                tables += 1
            else:
                yield f"{GLOBAL[kind]} {name}"
    if tables == 0:
        yield f"no symbol matches {allow.pattern}: not a kernel object, or the pattern is wrong"


def list_symbols(path: Path) -> str:
    result = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{path}: nm: {result.stderr.strip()}")
    return result.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allow", type=re.compile, default=re.compile(DEFAULT_ALLOW), metavar="REGEX")
    parser.add_argument("objects", nargs="+", type=Path, metavar="OBJECT")
    args = parser.parse_args()
    found = [f"{path}: {what}" for path in args.objects for what in violations(list_symbols(path), args.allow)]
    print("\n".join(found) if found else f"symbols: ok ({len(args.objects)} objects)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
