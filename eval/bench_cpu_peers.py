"""nanobraid beside other engines on the processor: the same GGUF files, the same threads, in turn, in one run.

    python eval/bench_cpu_peers.py --peer BUILD/bin --models FOLDER [FOLDER ...] [--rows 'decode*' ...] [--rounds 5]
                                   [--openvino PYTHON] [--op-bench build/eval/op_bench] [--json out.json] [--plot x.svg]

Every round measures the peers, then nanobraid; a row compares medians, and goes to stderr once it is done. Its columns:
both sides, their ratio, what it must be and what is aimed at. llama.cpp runs in every configuration of `peers.py`
in every round; the one with the best median is compared, and named. Limits of the machine are measured before and
after, where the higher counts, and in every round of a row that is a share of one, where the median counts: the read
bandwidth on 2 MB pages and, with --op-bench, the peak of int8 products. Shares of them count the bytes of the file that
a token needs and the products of its matrices (not the head, of which a prompt needs one row; not attention).

`--models` are folders that hold the files named in the rows; a row whose file is missing says so. The Qwen2-shaped
files come from tools/make_random_model.py and llama-quantize. A file under --files gets the rows prefill and decode.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import batch_decode
import nanobraid as nb
import startup
from machine import load_average, read_bandwidth
from nanobraid.bench_kv.machine import cpu_name
from peers import NEW_TOKENS, LlamaCpp, Measured, OpenVino, PeerError, peak_mib, run
from serving import Prompts

TEXT = Path(__file__).with_name("text") / "mixed.txt"
DEPTH = 4096
CONTEXT = 2048
OURS = "nanobraid"
LOWER_IS_BETTER = ("first_token", "memory")
UNITS = {"first_token": "s", "memory": "MiB"}


@dataclass(frozen=True)
class Row:
    """One comparison: a metric of a kind of measurement on a file, and the ratios wanted (none: for the record)."""

    kind: str  # speed, deep, batch, start or memory: rows of one kind and file are measured together
    metric: str
    model: str
    must: float | None = None
    aim: float | None = None

    @property
    def name(self) -> str:
        return f"{self.metric}{'-4k' if self.kind == 'deep' else ''}:{self.model}"


ROWS = (
    Row("speed", "prefill", "smollm2-Q4_1", 5, 7),
    Row("speed", "decode", "smollm2-Q4_1", 1.7, 2.4),
    Row("speed", "prefill", "smollm2-Q4_0", 1.9, 2.6),
    Row("speed", "decode", "smollm2-Q4_0", 1.3, 1.65),
    Row("speed", "prefill", "smollm2-Q8_0", 2.4, 3.3),
    Row("speed", "decode", "smollm2-Q8_0", 1.3, 1.5),
    Row("speed", "prefill", "qwen2.5-0.5b-Q4_K_M", 2.5, 3.3),
    Row("speed", "decode", "qwen2.5-0.5b-Q4_K_M", 1.6, 1.8),
    Row("speed", "prefill", "qwen2.5-1.5b-Q4_K_M", 1.8, 2.2),
    Row("speed", "decode", "qwen2.5-1.5b-Q4_K_M", 1.0, 1.08),
    Row("speed", "prefill", "qwen2.5-0.5b-Q4_0"),
    Row("speed", "decode", "qwen2.5-0.5b-Q4_0"),
    Row("batch", "batch-8", "smollm2-Q4_0", 2.0, 3.5),
    Row("batch", "batch-16", "smollm2-Q4_0", 2.0, 3.0),
    Row("deep", "prefill", "smollm2-Q4_0", 2.5, 4),
    Row("deep", "decode", "smollm2-Q4_0", 2.0, 2.6),
    Row("start", "first_token", "smollm2-Q4_1", 0.6, 0.3),
    Row("memory", "memory", "smollm2-Q4_1", 0.95, 0.8),
)

# Peak memory of nanobraid: the whole Python process, as a user of the package has it.
MEMORY_PROGRAM = """
import json, sys
import nanobraid as nb
llm = nb.LLM(sys.argv[1], **json.loads(sys.argv[2]))
params = nb.SamplingParams(temperature=0, max_tokens=int(sys.argv[4]), ignore_eos=True)
output = llm.generate(open(sys.argv[3]).read(), params, progress=False)[0]
assert len(output.token_ids) == int(sys.argv[4])
"""


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one token costs by the file: bytes that decode reads, operations of the layers' matrices."""

    bytes_per_token: int
    ops_per_token: int


def work_of(tensors: list[list[Any]]) -> Work:
    """From tensors as `nanobraid inspect --json` lists them: name, format, shape, bytes."""
    names = {str(tensor[0]) for tensor in tensors}
    tied = "output.weight" not in names
    num_bytes = num_ops = 0
    for name, _, shape, size in tensors:
        if name != "token_embd.weight" or tied:  # a table of its own is read one row at a time
            num_bytes += size
        if name.startswith("blk.") and len(shape) == 2:
            num_ops += 2 * math.prod(shape)
    return Work(num_bytes, num_ops)


def best_of(rounds: list[Measured], metric: str) -> tuple[str, float]:
    """The configuration with the best median of a metric, and that median."""
    medians = {name: statistics.median(each[name][metric] for each in rounds) for name in rounds[0]}
    choose = min if metric in LOWER_IS_BETTER else max
    best = choose(medians, key=medians.__getitem__)
    return best, medians[best]


def verdict(row: Row, ratio: float) -> str:
    """``aim``, ``must`` or ``below``; empty without a wanted ratio."""
    if row.must is None or row.aim is None:
        return ""
    sign = -1 if row.metric in LOWER_IS_BETTER else 1
    for name, wanted in (("aim", row.aim), ("must", row.must)):
        if sign * ratio >= sign * wanted:
            return name
    return "below"


def shares(row: Row, speed: float, work: Work, limits: dict[str, float]) -> dict[str, float]:
    """The part of the machine's limit that a speed in tokens/s reaches, for the rows that have one."""
    if row.kind != "speed":
        return {}
    if row.metric == "decode":
        return {"of_read": speed * work.bytes_per_token / (limits["read_gb_s"] * 1e9)}
    if "int8_dot_gop_s" in limits:
        return {"of_int8": speed * work.ops_per_token / (limits["int8_dot_gop_s"] * 1e9)}
    return {}


def parse_ceilings(stdout: str) -> dict[str, float]:
    """Lines ``ceiling int8_dot_gop_s 910.1`` of op_bench."""
    return {name: float(value) for name, value in re.findall(r"^ceiling (\w+) +([0-9.]+)$", stdout, re.MULTILINE)}


def limits_of(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The higher of two measurements of each ceiling: other programs can only lower one."""
    both = {name: max(before[name], after[name]) for name in before.keys() & after.keys()}
    return {**both, "read_gb_s": max(both["read_gb_s"], both.get("read_2m_all_gb_s", 0.0))}


def median_ceilings(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each ceiling; read_gb_s is the better of its two measurements in every round."""
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {**medians, "read_gb_s": statistics.median(limits_of(each, each)["read_gb_s"] for each in rounds)}


# ---- measurements: each takes the number of its round and answers {side: {configuration: {metric: value}}} -----------

Measure = Callable[[int], dict[str, Measured]]


def ours_speed(file: Path, threads: int, pp: int, tg: int, depth: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "nanobraid", "bench", "--model", str(file), "--threads", str(threads)]
    command += ["--device", "cpu", "--pp", str(pp), "--tg", str(tg), "--depth", str(depth), "--repeat", "1", "--json"]
    return dict(json.loads(run(command).stdout))


@contextmanager
def speed(
    file: Path, metrics: set[str], depth: int, args: argparse.Namespace, about: dict[str, Any]
) -> Iterator[Measure]:
    pp, tg = (args.pp if "prefill" in metrics else 0), (args.tg if "decode" in metrics else 0)
    llama = LlamaCpp(args.peer, args.threads)
    openvino: OpenVino | None = None
    if args.openvino is not None and depth == 0:
        try:
            openvino = OpenVino(args.openvino, file, args.threads)
            about["openvino"] = openvino.about
        except PeerError as error:
            about["openvino_refused"] = str(error)

    def measure(number: int) -> dict[str, Measured]:
        sides = {llama.name: llama.speed(file, pp, tg, depth)}
        if openvino is not None:
            sides[openvino.name] = openvino.speed(pp, tg, args.seed + number)
        ours = ours_speed(file, args.threads, pp, tg, depth)
        about.update({key: ours[key] for key in ("backend", "dtype", "kv_dtype")})
        named = {"prefill": ours["pp_tok_s"], "decode": ours["tg_tok_s"]}
        sides[OURS] = {"its defaults": {metric: named[metric] for metric in metrics}}
        return sides

    try:
        yield measure
    finally:
        if openvino is not None:
            openvino.close()


@contextmanager
def batch(file: Path, metrics: set[str], args: argparse.Namespace, about: dict[str, Any]) -> Iterator[Measure]:
    sizes = sorted(int(metric.removeprefix("batch-")) for metric in metrics)
    options = argparse.Namespace(
        threads=args.threads, batches=sizes, prompt_tokens=args.batch_prompt, new_tokens=args.tg
    )
    program = Path(LlamaCpp(args.peer, args.threads).program("llama-batched-bench"))
    longest = args.batch_prompt + 1 + args.tg
    with nb.LLM(file, device="cpu", num_threads=args.threads, max_model_len=longest, max_num_seqs=max(sizes)) as llm:
        about.update({key: llm.config[key] for key in ("backend", "dtype", "kv_dtype")})

        def measure(number: int) -> dict[str, Measured]:
            theirs = {}
            for flash in ("off", "on"):
                speeds = batch_decode.run_peer(program, file, options, flash)
                theirs[f"fa {flash}"] = {f"batch-{size}": value for size, value in speeds.items()}
            prompts = Prompts(file, args.seed + number)
            ours = {}
            for size in sizes:
                asked = [prompts.take(args.batch_prompt + 1) for _ in range(size)]
                ours[f"batch-{size}"] = batch_decode.run_ours(llm, asked, options)["tok_s"]
            return {LlamaCpp.name: theirs, OURS: {"its defaults": ours}}

        yield measure


@contextmanager
def start(file: Path, metrics: set[str], args: argparse.Namespace, about: dict[str, Any]) -> Iterator[Measure]:
    llama = LlamaCpp(args.peer, args.threads)
    options = {"device": "cpu", "num_threads": args.threads, "max_model_len": CONTEXT}

    def measure(number: int) -> dict[str, Measured]:
        theirs = llama.first_token(file, CONTEXT)
        ours = startup.first_token(file, **options)
        about.setdefault("import_s", []).append(ours["import_s"])  # of Python and the package, not in the figure
        return {llama.name: theirs, OURS: {"its defaults": {"first_token": ours["first_token_s"]}}}

    yield measure


@contextmanager
def memory(file: Path, metrics: set[str], args: argparse.Namespace, about: dict[str, Any]) -> Iterator[Measure]:
    llama = LlamaCpp(args.peer, args.threads)
    options = {"device": "cpu", "num_threads": args.threads, "max_model_len": CONTEXT, "max_num_seqs": 1}
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.txt"
        tokenizer = nb.Tokenizer(file)
        ids = tokenizer.encode(TEXT.read_text())[: CONTEXT - NEW_TOKENS - 8]
        prompt.write_text(tokenizer.decode(ids).rstrip())
        about["prompt_tokens"] = len(ids)
        command = [sys.executable, "-c", MEMORY_PROGRAM, str(file), json.dumps(options), str(prompt), str(NEW_TOKENS)]

        def measure(number: int) -> dict[str, Measured]:
            theirs = llama.memory(file, CONTEXT, prompt)
            return {llama.name: theirs, OURS: {"whole Python process": {"memory": peak_mib(command)}}}

        yield measure


KINDS: dict[str, Callable[..., Any]] = {
    "speed": lambda file, metrics, args, about: speed(file, metrics, 0, args, about),
    "deep": lambda file, metrics, args, about: speed(file, metrics, args.depth, args, about),
    "batch": batch,
    "start": start,
    "memory": memory,
}


# ---- the report ------------------------------------------------------------------------------------------------------


def measure_ceilings(args: argparse.Namespace) -> dict[str, float]:
    ceilings = {"read_gb_s": read_bandwidth(args.threads)}
    if args.op_bench is not None:
        ceilings.update(parse_ceilings(run([str(args.op_bench), "--ceilings", str(args.threads)]).stdout))
    return ceilings


def compare(file: Path, rows: list[Row], args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rounds of rows that are measured together."""
    about: dict[str, Any] = {}
    rounds = []
    load = load_average()
    ceilings = []
    with KINDS[rows[0].kind](file, {row.metric for row in rows}, args, about) as measure:
        for number in range(args.rounds):
            if rows[0].kind == "speed":
                ceilings.append(measure_ceilings(args))
            rounds.append(measure(number))
    if ceilings:
        about.update(ceilings=median_ceilings(ceilings), every_ceiling=ceilings)
    return [result_of(row, rounds, about, load) for row in rows]


def result_of(row: Row, rounds: list[dict[str, Measured]], about: dict[str, Any], load: float) -> dict[str, Any]:
    """One row of the report: the best configuration of each side, ratios of ours to each peer, all rounds."""
    result: dict[str, Any] = {"row": row.name, "must": row.must, "aim": row.aim, "about": about, "load_before": load}
    result["sides"] = {}
    for side in rounds[0]:
        mine = [each[side] for each in rounds]
        name, value = best_of(mine, row.metric)
        runs = {each: [measured[each][row.metric] for measured in mine] for each in mine[0]}
        result["sides"][side] = {"configuration": name, "median": value, "all": runs}
    ours = result["sides"][OURS]["median"]
    result["ratios"] = {side: ours / v["median"] for side, v in result["sides"].items() if side != OURS}
    result["verdict"] = verdict(row, result["ratios"][LlamaCpp.name])
    return result


def line_of(row: Row, result: dict[str, Any]) -> str:
    """The row as it is printed."""
    if "skipped" in result:
        return f"{row.name:<32} not measured: {result['skipped']}"
    unit = UNITS.get(row.metric, "tok/s")
    ours, peer = result["sides"][OURS], result["sides"][LlamaCpp.name]
    wanted = f"must {row.must:g}, aim {row.aim:g}: {result['verdict']}" if result["verdict"] else ""
    line = f"{row.name:<32} {ours['median']:9.2f} {unit:<5}  llama.cpp {peer['median']:9.2f} ({peer['configuration']})"
    line += f"  ratio {result['ratios'][LlamaCpp.name]:5.2f}  {wanted}"
    for name, what in (("of_read", "of read bandwidth"), ("of_int8", "of int8 peak")):
        if name in ours.get("shares", {}):
            line += f"  {ours['shares'][name]:.0%} {what} (llama.cpp {peer['shares'][name]:.0%})"
    if OpenVino.name in result["ratios"]:
        value = result["sides"][OpenVino.name]["median"]
        line += f"  {OpenVino.name} {value:.2f}, ratio {result['ratios'][OpenVino.name]:.2f}"
    if "openvino_refused" in result["about"]:
        line += f"  {OpenVino.name}: {result['about']['openvino_refused']}"
    return line


def plot(rows: list[tuple[Row, dict[str, Any]]], title: str, path: Path) -> None:
    """Ratio to llama.cpp of each row, drawn so that longer is better, with what it must be and what is aimed at."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [(row, result) for row, result in reversed(rows) if "ratios" in result]
    figure, axes = pyplot.subplots(figsize=(10, 0.4 * len(measured) + 1.5), layout="constrained")
    for i, (row, result) in enumerate(measured):
        power = -1 if row.metric in LOWER_IS_BETTER else 1
        value = result["ratios"][LlamaCpp.name] ** power
        axes.barh(i, value, color="tab:orange" if result["verdict"] == "below" else "tab:blue", height=0.6)
        axes.text(value, i, f" {value:.2f}", va="center", fontsize=8)
        for wanted, mark in ((row.must, "|"), (row.aim, "D")):
            if wanted is not None:
                axes.plot(wanted**power, i, mark, color="black", markersize=5 if mark == "D" else 12)
    names = [f"{row.name}{', inverse' if row.metric in LOWER_IS_BETTER else ''}" for row, _ in measured]
    axes.set_yticks(range(len(measured)), names, fontsize=8)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="nanobraid / llama.cpp (bar: must, diamond: aim)", title=title)
    figure.savefig(path)


def chosen_rows(patterns: list[str] | None, extra: list[Path]) -> list[Row]:
    """The rows whose names match a pattern; those of extra files follow."""
    rows = [*ROWS, *(Row("speed", metric, str(file)) for file in extra for metric in ("prefill", "decode"))]
    return [row for row in rows if patterns is None or any(fnmatch.fnmatch(row.name, each) for each in patterns)]


def find_file(model: str, folders: list[Path]) -> Path | None:
    """The file of a row: a path as it is, else NAME.gguf in one of the folders."""
    candidates = [Path(model)] if model.endswith(".gguf") else [folder / f"{model}.gguf" for folder in folders]
    return next((path for path in candidates if path.is_file()), None)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="folders with the files of the rows")
    parser.add_argument("--files", type=Path, nargs="+", default=[], help="more GGUF files: prefill and decode")
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="names of rows, * for any letters (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names of the rows chosen and end")
    parser.add_argument("--openvino", type=Path, metavar="PYTHON", help="Python of an environment with openvino-genai")
    parser.add_argument("--op-bench", type=Path, help="path of op_bench, for the peak of int8 products")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pp", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tg", type=int, default=128, help="tokens to decode")
    parser.add_argument("--depth", type=int, default=DEPTH, help="context of the rows '-4k'")
    parser.add_argument("--batch-prompt", type=int, default=128, help="tokens of a prompt in a batch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--plot", type=Path, help="draw the ratios (.svg or .png; needs matplotlib)")
    args = parser.parse_args()
    if min(args.threads, args.rounds, args.pp, args.tg, args.depth, args.batch_prompt) < 1:
        parser.error("all counts must be positive")
    if any(count % batch_decode.BLOCK for count in (args.depth, args.batch_prompt)):
        parser.error(f"--depth and --batch-prompt must be multiples of {batch_decode.BLOCK}")
    if args.plot is not None:
        import matplotlib  # noqa: F401  before the work, not after it
    args.chosen = chosen_rows(args.rows, args.files)
    if not args.chosen:
        parser.error(f"no row matches {args.rows}")
    return args


def main() -> int:
    args = arguments()
    if args.list:
        print("\n".join(row.name for row in args.chosen))
        return 0
    options = {key: getattr(args, key) for key in ("threads", "rounds", "pp", "tg", "depth", "batch_prompt")}
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), **options}
    report["load_before"] = load_average()
    before = measure_ceilings(args)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in args.chosen:
        groups.setdefault((row.kind, row.model), []).append(row)
    done: list[tuple[Row, dict[str, Any]]] = []
    works: dict[str, Work] = {}
    for (_, model), rows in groups.items():
        file = find_file(model, args.models)
        try:
            if file is None:
                raise PeerError(f"no {model}.gguf in the folders of --models")
            inspected = run([sys.executable, "-m", "nanobraid", "inspect", "--json", str(file)])
            works[model] = work_of(json.loads(inspected.stdout)["tensors"])
            done += zip(rows, compare(file, rows, args), strict=True)
        except (PeerError, subprocess.CalledProcessError) as error:
            done += [(row, {"row": row.name, "skipped": str(error)}) for row in rows]
        for row, result in done[-len(rows) :]:
            print(line_of(row, result), file=sys.stderr, flush=True)
    after = measure_ceilings(args)
    limits = limits_of(before, after)
    report.update(ceilings_before=before, ceilings_after=after, limits=limits, load_after=load_average())
    for row, result in done:
        for side in result.get("sides", {}).values():
            side["shares"] = shares(row, side["median"], works[row.model], result["about"].get("ceilings", limits))
    report["rows"] = [result for _, result in done]
    title = f"{report['cpu']}, {args.threads} threads, medians of {args.rounds} rounds"
    print(f"{title}; load {report['load_before']:.2f} before, {report['load_after']:.2f} after")
    for name, value in sorted(limits.items()):
        first, last = before.get(name, value), after.get(name, value)
        print(f"{name:<32} {value:9.1f}   (before {first:.1f}, after {last:.1f})")
    for row, result in done:
        print(line_of(row, result))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot is not None:
        plot(done, title, args.plot)
    return 1 if any("skipped" in result for _, result in done) else 0


if __name__ == "__main__":
    sys.exit(main())
