"""Start to first token, and peak memory of the native demo beside the size of the file.

    python eval/startup.py --demo build/demo/generate [--model smollm2-135m] [--rounds 5] [--json]

First token: a fresh Python process that imports nanobraid, opens the model and streams one token of a short prompt; the
time runs from before `LLM()` to the token, the import is given apart. Memory: the demo's peak resident size as the
kernel counts it, less the KV and workspace it used.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from nanobraid.models import resolve

PROGRAM = """
import json, sys, time
begin = time.perf_counter()
import nanobraid as nb
imported = time.perf_counter()
llm = nb.LLM(sys.argv[1], **json.loads(sys.argv[2]))
opened = time.perf_counter()
piece = next(iter(llm.stream("The capital of France is", nb.SamplingParams(temperature=0, max_tokens=4))))
print(imported - begin, opened - imported, time.perf_counter() - imported)
"""


def first_token(path: Path, **options: Any) -> dict[str, float]:
    """Seconds in a fresh process; `options` are those of `LLM`."""
    command = [sys.executable, "-c", PROGRAM, str(path), json.dumps(options)]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    imported, opened, first = map(float, output.stdout.split())
    return {"import_s": imported, "open_s": opened, "first_token_s": first}


def memory(demo: Path, path: Path) -> dict[str, float]:
    output = subprocess.run(
        [str(demo), "--model", str(path), "--max-tokens", "64", "The capital of France is"],
        check=True,
        capture_output=True,
        text=True,
    )
    names = {
        "file": "file_mib",
        "weights": "weights_mib",
        "KV used": "kv_used_mib",
        "workspace": "workspace_mib",
        "peak resident": "peak_mib",
    }
    values: dict[str, float] = {}
    for name, key in names.items():
        found = re.search(rf"{name} ([0-9.]+)", output.stderr)
        if found is None:
            raise SystemExit(f"the demo printed no '{name}': {output.stderr}")
        values[key] = float(found.group(1))
    values["ratio"] = (values["peak_mib"] - values["kv_used_mib"] - values["workspace_mib"]) / values["file_mib"]
    return values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True, help="path of the native demo `generate`")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    path = resolve(args.model)
    runs = [first_token(path) for _ in range(args.rounds)]
    report: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    report["memory"] = memory(args.demo, path)
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(
        f"import {report['import_s']:.2f} s, LLM() {report['open_s']:.2f} s, "
        f"LLM() to first token {report['first_token_s']:.2f} s (medians of {args.rounds})"
    )
    used = report["memory"]
    print(
        f"file {used['file_mib']:.1f} MiB, KV used {used['kv_used_mib']:.1f}, workspace {used['workspace_mib']:.1f}, "
        f"peak resident {used['peak_mib']:.1f}; without KV and workspace {used['ratio']:.3f} of the file"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
