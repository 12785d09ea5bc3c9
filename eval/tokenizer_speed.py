"""Speed of encoding and decoding, in MB of UTF-8 per second on one core, and how it grows on hostile text.

    python eval/tokenizer_speed.py [--model smollm2-135m] [--text FILE] [--rounds 7] [--json FILE]

Text: Python's own language reference (`pydoc_data`, English with code), or a file. With the package `tokenizers` and
--hf tokenizer.json the same text goes through that, in alternation, one thread; the ids are compared. Hostile texts are
one letter, one space, one symbol, one combining mark and random bytes as Latin-1, each at three sizes: the exponent is
log(time ratio) / log(size ratio) of the last two, 1 for linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nanobraid as nb

HOSTILE = {
    "one letter": lambda n: "a" * n,
    "spaces": lambda n: " " * n,
    "newlines": lambda n: "\n" * n,
    "one symbol": lambda n: "^" * n,
    "digits": lambda n: "7" * n,
    "combining marks": lambda n: "a" + "\u0301\u0327" * (n // 4),
    "CJK": lambda n: "\u6f22" * (n // 3),
    "random Latin-1": lambda n: "".join(map(chr, random.Random(0).choices(range(1, 256), k=n * 2 // 3))),
}


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def plain_text(path: Path | None) -> str:
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = nb.Tokenizer(args.model)
    text = plain_text(args.text)
    megabytes = len(text.encode()) / 1e6
    ids = tokenizer.encode(text)
    works: dict[str, Callable[[], Any]] = {
        "encode": lambda: tokenizer.encode(text),
        "encode_with_offsets": lambda: tokenizer.encode_with_offsets(text),
        "decode": lambda: tokenizer.decode(ids),
    }
    out: dict[str, Any] = {"model": Path(args.model).name, "megabytes": round(megabytes, 3), "tokens": len(ids)}
    if args.hf is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import tokenizers

        peer = tokenizers.Tokenizer.from_file(str(args.hf))
        works["tokenizers encode"] = lambda: peer.encode(text, add_special_tokens=False).ids
        same = works["tokenizers encode"]() == tokenizer.encode(text, add_special_tokens=False)
        out["ids equal tokenizers'"] = same
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(args.rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    out["megabytes_per_second"] = {name: round(megabytes / statistics.median(t), 2) for name, t in times.items()}
    out["hostile"] = {name: hostile(tokenizer, make, args.rounds) for name, make in HOSTILE.items()}
    return out


def hostile(tokenizer: nb.Tokenizer, make: Callable[[int], str], rounds: int) -> dict[str, float]:
    sizes = (62_500, 250_000, 1_000_000)
    medians = []
    for size in sizes:
        text = make(size)
        medians.append(statistics.median(seconds(lambda text=text: tokenizer.encode(text)) for _ in range(rounds)))
    exponent = math.log(medians[-1] / medians[-2]) / math.log(sizes[-1] / sizes[-2])
    return {"seconds_per_megabyte": round(medians[-1], 4), "exponent": round(exponent, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a model file, folder or known name")
    parser.add_argument("--text", type=Path, help="UTF-8 text; Python's language reference by default")
    parser.add_argument("--hf", type=Path, metavar="TOKENIZER_JSON", help="also measure `tokenizers` with this file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the report to this file")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    report = measure(args)
    for name, speed in report["megabytes_per_second"].items():
        print(f"{name:20} {speed:8.2f} MB/s")
    for name, row in report["hostile"].items():
        print(f"{name:20} {row['seconds_per_megabyte']:8.4f} s/MB, exponent {row['exponent']:.2f}")
    if "ids equal tokenizers'" in report:
        print("same ids as tokenizers:", report["ids equal tokenizers'"])
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
