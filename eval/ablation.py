"""One table of what every optimisation of the engine gains: off against on, then all of them together.

    python eval/ablation.py --programs build/test/eval [--rows prefix speculation] [--device cpu] [--out table.json]
    python eval/ablation.py --quick --rows batching

Every row switches one thing off and on and measures both sides in one process in turn, every second round in the
opposite order; a round before them does not count. `gain` is the median over the rounds of one side over the other,
above 1 where it is better with the optimisation, beside its quartiles and the number of rounds. Two engines of one
kind differ by a few per cent, by where in memory the weights lie: a gain within that says nothing.

The off side is always something that runs: fused operators are composed of the small ones, attention is eager in the
program ablation_bench (the engine has no such mode), the cascade plan is an option of the engine. Only the memory of
the row paged_kv that would be reserved without blocks is computed, not measured. Rows of operators and the cascade
need --programs, the folder of the compiled eval/kernels. A row that a device or installation cannot measure is listed
as "not measured", with the reason.

--out writes the same as .json (with every round) or .txt.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import nanobraid as nb
from ablation_rows import ROWS
from ablation_setup import NotMeasured, Setup
from machine import load_average, read_bandwidth
from nanobraid import _core
from nanobraid._options import backend_of
from nanobraid.bench_kv.machine import cpu_name
from nanobraid.models import resolve

Result = dict[str, Any]


def measure(name: str, setup: Setup) -> list[Result]:
    """The lines of one row."""
    about: Result = {"device": setup.device, "row": name, "about": ROWS[name][0]}
    try:
        return [about | case.summary() for case in ROWS[name][1](setup)]
    except (NotMeasured, nb.UnsupportedError) as error:
        return [about | {"not_measured": without_paths(str(error))}]


def without_paths(text: str) -> str:
    """Names of files and folders alone: reports say nothing about where things lie on a machine."""
    return re.sub(r"(?<![\w.])/[^\s:,]*/", "", text)


def backend_facts(model: Path, device: str) -> Result:
    """What kernels a device has, and how they run the model."""
    try:
        with nb.LLM(model, device=device, max_model_len=64, max_num_seqs=1) as llm:
            facts = {key: llm.config[key] for key in ("backend", "dtype", "kv_dtype")}
    except nb.UnsupportedError as error:
        return {"not_usable": without_paths(str(error))}
    return facts | ({"hardware": _core.cuda_status()} if device.startswith("cuda") else {})


def line_of(result: Result) -> str:
    start = f"{result['device']:5} {result['row']:16}"
    if "not_measured" in result:
        return f"{start} not measured: {result['not_measured']}"
    low, high = result["gain_quartiles"]
    figures = f"{result['off']:12.5g} {result['on']:12.5g} {result['gain']:7.2f} {low:6.2f} to {high:<6.2f}"
    words = f"{result['case']} ({result['off_is']} / {result['on_is']})"
    return f"{start} {figures} {result['rounds']:4}  {words}" + (f"; {result['note']}" if result["note"] else "")


def heading(report: Result) -> list[str]:
    lines = [f"{report['date']}  {report['cpu']}, {report['threads']} threads, {report['model']}"]
    lines += [f"{device}: " + ", ".join(map(str, facts.values())) for device, facts in report["devices"].items()]
    lines.append(f"load average {report['load_before']:.2f} before; {report['read_gb_s_before']:.1f} GB/s read")
    if report["quick"]:
        lines.append("quick: sizes at which the figures say little")
    lines.append(f"{report['command']}\n")
    lines.append(f"{'':22} {'off':>12} {'on':>12} {'gain':>7} {'quartiles':>16} {'rounds':>6}")
    return lines


def command_of(arguments: list[str]) -> str:
    """The command, with names of files and folders instead of their paths."""
    return " ".join(["python eval/ablation.py", *(Path(word).name if "/" in word else word for word in arguments)])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a known name or a model file")
    parser.add_argument("--device", nargs="+", default=["cpu", "cuda"], help="as LLM takes it (default: cpu cuda)")
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--programs", type=Path, help="folder of ablation_bench and cascade_bench")
    parser.add_argument("--rounds", type=int, help="that count (default: 7; 2 with --quick)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1, help="of prompts")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the table here, .json or .txt")
    args = parser.parse_args(arguments)
    if args.rounds is None:
        args.rounds = 2 if args.quick else 7
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if args.out is not None and args.out.suffix not in (".json", ".txt"):
        parser.error(f"--out must end in .json or .txt, got {args.out.name}")
    if args.programs is not None and not args.programs.is_dir():
        parser.error(f"--programs: {args.programs} is not a folder")
    for device in args.device:
        try:
            backend_of(device)
        except nb.UnsupportedError:
            pass  # its rows are listed as not measured
        except nb.InvalidArgumentError as error:
            parser.error(f"--device: {error}")
    return args


def main() -> int:
    args = parse(sys.argv[1:])
    warnings.simplefilter("ignore")  # of weights that a device expands: int8_weights says so
    model = resolve(args.model)
    report: Result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": command_of(sys.argv[1:]),
        "version": nb.__version__,
        "cpu": cpu_name(),
        "threads": args.threads,
        "model": model.name,
        "quick": args.quick,
        "devices": {device: backend_facts(model, device) for device in args.device},
        "load_before": load_average(),
        "read_gb_s_before": read_bandwidth(args.threads),
        "rows": [],
    }
    lines = heading(report)
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for device in args.device:
            setup = Setup(
                model, device, args.threads, args.rounds, args.quick, args.programs, Path(folder), seed=args.seed
            )
            usable = "not_usable" not in report["devices"][device]
            for name in args.rows:
                absent = {
                    "device": device,
                    "row": name,
                    "about": ROWS[name][0],
                    "not_measured": "no such device, see above",
                }
                for result in measure(name, setup) if usable else [absent]:
                    report["rows"].append(result)
                    lines.append(line_of(result))
                    print(lines[-1], flush=True)
    report["load_after"] = load_average()
    report["read_gb_s_after"] = read_bandwidth(args.threads)
    lines.append(f"\nload average {report['load_after']:.2f} after; {report['read_gb_s_after']:.1f} GB/s read")
    print(lines[-1])
    if args.out is not None:
        text = json.dumps(report, indent=1) if args.out.suffix == ".json" else "\n".join(lines)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
