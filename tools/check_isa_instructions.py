#!/usr/bin/env python3
"""Checks that kernel objects hold the instructions they are named after, and none that their processors lack.

Without the first, a table may fall back to slower code and nobody sees it; without the second it dies on a machine that
has only what its name says. RULES has a row for each kernels_<isa> of x86-64. Products fetch ahead (FETCHING),
which a compiler may leave out without a word. Instructions are read from `objdump -d`; EVEX encoding (AVX-512) is told
by its first byte, 0x62, whatever the mnemonic. Prints FILE: WHAT for each violation; exit 1.

Usage: check_isa_instructions.py OBJECT...
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Address, bytes, then what they mean; objdump goes on with the bytes of long instructions on lines of their own.
LINE = re.compile(r"^\s*[0-9a-f]+:\t(?P<bytes>(?:[0-9a-f]{2} )+)\s*(?:\t(?P<code>.+))?$")
SEGMENT_PREFIXES = {"26", "2e", "36", "3e", "64", "65", "67"}
FUNCTION = re.compile(r"^[0-9a-f]+ <(?P<name>[^>]+)>:$", re.MULTILINE)
FETCHING = ("strip_int8", "strip_codes", "strip_bf16", "score_codes", "value_codes")
VPDPBUSD, VDPBF16PS = r"vpdpbusds?\b", r"vdpbf16ps\b"


@dataclass(frozen=True)
class Rule:
    needs: str  # a pattern that at least one instruction matches
    lacks: tuple[str, ...]  # patterns that none may match
    evex: bool = False


RULES = {
    "scalar": Rule(r"mulss\b|mulps\b", (r"^(\{vex\} )?v", r"%[yz]mm")),
    "avx2": Rule(r"vpmaddubsw .*%ymm", (VPDPBUSD,)),
    "avxvnni": Rule(r"\{vex\} vpdpbusd .*%ymm", (r"vpmaddubsw .*%ymm",)),
    "avx512": Rule(r"^vpdpbusd .*%zmm", (VDPBF16PS,), evex=True),
    "avx512bf16": Rule(r"vdpbf16ps .*%zmm", (), evex=True),
}


def instructions(listing: str) -> Iterator[tuple[bool, str]]:
    """(whether EVEX-encoded, text) of each line that `objdump -d` printed."""
    for line in listing.splitlines():
        match = LINE.match(line)
        if match is None or match["code"] is None:
            continue
        opcode = next((byte for byte in match["bytes"].split() if byte not in SEGMENT_PREFIXES), "")
        yield opcode == "62", " ".join(match["code"].split())


def without_fetching(listing: str) -> Iterator[str]:
    """The functions that should fetch ahead and do not."""
    parts = FUNCTION.split(listing)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        if any(f"{len(kind)}{kind}I" in name for kind in FETCHING) and not re.search(r"\tprefetch", body):
            yield name


def violations(name: str, listing: str) -> Iterator[str]:
    isa = name.removeprefix("kernels_").split(".")[0]
    if isa not in RULES:
        yield f"there is no rule for {isa}"
        return
    rule = RULES[isa]
    code = list(instructions(listing))
    if not any(re.search(rule.needs, text) for _, text in code):
        yield f"none of {len(code)} instructions matches {rule.needs}"
    yield from (f"{function} does not fetch ahead" for function in without_fetching(listing))
    for is_evex, text in code:
        pattern = next((pattern for pattern in rule.lacks if re.search(pattern, text)), None)
        if pattern is not None:
            yield f"{text} is not for {isa}"
        elif is_evex and not rule.evex:
            yield f"{text} is EVEX-encoded, not for {isa}"


def disassemble(path: Path) -> str:
    result = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{path}: objdump: {result.stderr.strip()}")
    return result.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", nargs="+", type=Path, metavar="OBJECT")
    args = parser.parse_args()
    found = [f"{path}: {what}" for path in args.objects for what in violations(path.name, disassemble(path))]
    print("\n".join(found[:50]) if found else f"instructions: ok ({len(args.objects)} objects)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
