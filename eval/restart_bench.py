"""What the disk tier saves after a restart: time to the first token, computed, from memory and from disk.

    python eval/restart_bench.py [--prompt-tokens 1000 4000] [--rounds 5] [--store DIR] [--json out.json]

A restart is a new LLM over a store that another one has filled. Four ways to the first token of one prompt:

    computed    first request of a new LLM without a store
    disk warm   first request of a new LLM; the files are in the system's page cache
    memory      the same request again, in the LLM of `disk warm`
    disk cold   as `disk warm`, after the system was asked to forget the files (Linux; what it keeps stays)

Time counts from submission and nothing is warmed, so that `disk warm` has all that a first request has to pay besides.
`disk second` is what loading alone costs: the first request of an LLM that has answered another prompt. Rounds
alternate; figures are medians. Every way must give the same tokens, and the counters must say where they came from.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nanobraid as nb
from machine import read_bandwidth
from nanobraid.bench_kv.machine import cpu_name
from nanobraid.models import resolve

TEXT = Path(__file__).parent / "text/mixed.txt"
WAYS = ("computed", "disk cold", "disk warm", "memory", "disk second")


def prompt_tokens(tokenizer: nb.Tokenizer, begin: int, count: int) -> list[int]:
    """Tokens of the text, which is read again where it ends."""
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    return [ids[i % len(ids)] for i in range(begin, begin + count)]


def drop_from_page_cache(store: Path) -> None:
    for path in store.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Measurement:
    """TTFT of one prompt in all ways."""

    def __init__(self, args: argparse.Namespace, store: Path, num_tokens: int, **options: Any) -> None:
        self._options: dict[str, Any] = {"num_threads": args.threads, "max_model_len": num_tokens + 512} | options
        self._model, self._store, self._num_tokens = args.model, store, num_tokens
        self._params = nb.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        self._expected: list[int] | None = None
        self.facts: dict[str, str] = {}
        self.ttft_ms: dict[str, list[float]] = {way: [] for way in WAYS}

    def _open(self, *, stored: bool) -> nb.LLM:
        llm = nb.LLM(self._model, **self._options, **({"kv_store_path": self._store} if stored else {}))
        self.facts = {key: str(llm.config[key]) for key in ("backend", "dtype", "kv_dtype")}
        return llm

    def _ask(self, llm: nb.LLM, way: str | None, cached: int) -> None:
        prompt = prompt_tokens(llm.tokenizer, 0, self._num_tokens)
        (output,) = llm.generate([prompt], self._params, progress=False)
        self._expected = self._expected or output.token_ids
        if output.token_ids != self._expected:
            raise SystemExit(f"{way}: other tokens")
        if output.num_cached_tokens != cached:
            raise SystemExit(f"{way}: {output.num_cached_tokens} tokens were reused instead of {cached}")
        assert output.metrics is not None
        if way is not None:
            self.ttft_ms[way].append(output.metrics.ttft_ms)

    def fill(self) -> None:
        with self._open(stored=True) as llm:
            self._ask(llm, None, 0)

    def round(self) -> None:
        reusable = (self._num_tokens - 1) // 16 * 16
        with self._open(stored=False) as llm:
            self._ask(llm, "computed", 0)
        drop_from_page_cache(self._store)
        with self._open(stored=True) as llm:
            self._ask(llm, "disk cold", reusable)
        with self._open(stored=True) as llm:
            self._ask(llm, "disk warm", reusable)
            if llm.stats()["disk_hit_tokens"] != reusable:
                raise SystemExit("disk warm: the tokens did not come from the store")
            self._ask(llm, "memory", reusable)
        with self._open(stored=True) as llm:
            llm.generate([prompt_tokens(llm.tokenizer, 5000, 64)], self._params, progress=False)
            self._ask(llm, "disk second", reusable)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a known name or a model file")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", type=Path, help="directory on the disk to measure (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "model": resolve(args.model).name,
        "threads": args.threads,
        "rounds": args.rounds,
        "read_gb_s_before": read_bandwidth(args.threads),
        "prompts": [],
    }
    print(f"{'tokens':>6}  " + "  ".join(f"{way + ' ms':>14}" for way in WAYS) + f"  {'warm / memory':>14}")
    for num_tokens in args.prompt_tokens:
        with tempfile.TemporaryDirectory(dir=args.store) as folder:
            measurement = Measurement(args, Path(folder), num_tokens)
            measurement.fill()
            stored_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
            for _ in range(args.rounds):
                measurement.round()
        medians = {way: statistics.median(values) for way, values in measurement.ttft_ms.items()}
        ratio = medians["disk warm"] / medians["memory"]
        print(f"{num_tokens:6}  " + "  ".join(f"{medians[way]:14.1f}" for way in WAYS) + f"  {ratio:14.2f}", flush=True)
        report |= measurement.facts
        report["prompts"].append(
            {
                "prompt_tokens": num_tokens,
                "stored_bytes": stored_bytes,
                "ttft_ms": medians,
                "warm_over_memory": ratio,
                "all_ttft_ms": measurement.ttft_ms,
            }
        )
    report["read_gb_s_after"] = read_bandwidth(args.threads)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
