"""What `KVCacheBenchmarker.run` found, as a table for terminals, CSV, Markdown with advice, and plots.

Advice is a fixed sentence or two about each method (`methods`), then figures of this run. Two of its words depend on
figures, by rules that the document states: how large a KL is called (`verdict`), and a warning where needles are lost.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanobraid.bench_kv import plots
from nanobraid.bench_kv.methods import DEFAULTS, METHODS
from nanobraid.bench_kv.quality import needle_rate
from nanobraid.errors import InvalidArgumentError, ModelIOError

_VERDICTS = ((0.001, "negligible"), (0.01, "small"), (0.1, "noticeable"))
_QUALITY = ("perplexity", "reference_perplexity", "kl", "kl_p99", "kl_max", "kl_second_half", "top1_agreement",
            "token_agreement", "text_similarity", "first_difference", "worst_text")  # fmt: skip
_SPEED = ("elapsed_sec", "total_new_tokens", "tokens_per_sec", "cpu_mem_used_mb", "gpu_peak_mb", "est_kv_cache_mb_avg",
          "ttft_ms", "latency_ms", "ms_per_token", "peak_rss_mb", "kv_cache_bytes", "kv_pool_bytes")  # fmt: skip
_FACTS = ("backend", "dtype", "kv_dtype", "kv_policy", "num_threads", "max_model_len", "batch_size", "memory_source")
_KEYS = ("version", "cpu", "model", "prompt_tokens", "max_new_tokens", "batch_size", "rounds")
COLUMNS = ("label", "method", "status", *_SPEED, *DEFAULTS, *_FACTS, *_QUALITY, "needles_found", "message")


def verdict(kl: float) -> str:
    """The word for a KL."""
    return next((word for bound, word in _VERDICTS if kl <= bound), "large")


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a report with the keys of `COLUMNS`; None where there is no figure."""
    quality = row.get("quality") or {}
    out = {name: row.get(name) for name in COLUMNS} | {name: quality.get(name) for name in _QUALITY}
    out["needles_found"] = needle_rate(quality["needles"]) if quality.get("needles") else None
    return out


def as_csv(report: dict[str, Any]) -> str:
    """One line for each row, `COLUMNS` first."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in flat(row).items()} for row in report["rows"])
    return out.getvalue()


def _number(value: float | None, digits: int, percent: bool = False) -> str:
    if value is None:
        return ""
    return f"{100 * value:.{digits}f} %" if percent else f"{value:.{digits}f}"


_HEADER = ("method", "tok/s", "ms/token", "TTFT ms", "cache MB", "peak MB", "process MB", "perplexity", "KL",
           "KL, 2nd half", "top-1", "same tokens", "text", "needles")  # fmt: skip


def cells(report: dict[str, Any]) -> list[list[str]]:
    """Header and rows of the table. Rows without figures say why behind their name."""
    with_gpu = any(row.get("gpu_peak_mb") is not None for row in report["rows"])
    with_quality = any(row.get("quality") for row in report["rows"])
    header = [name for name in _HEADER if with_quality or _HEADER.index(name) < _HEADER.index("perplexity")]
    table = [[*header, *(["GPU MB"] if with_gpu else [])]]
    for row in report["rows"]:
        f = flat(row)
        if f["status"] != "ok":
            table.append([f"{f['label']}: {f['status']}", *[""] * (len(table[0]) - 1)])
            continue
        line = [f["label"], *(_number(f[name], 1) for name in ("tokens_per_sec", "ms_per_token", "ttft_ms"))]
        line += [_number(f["est_kv_cache_mb_avg"], 2), _number(f["cpu_mem_used_mb"], 1), _number(f["peak_rss_mb"], 1)]
        if with_quality:
            line += [_number(f["perplexity"], 2), _number(f["kl"], 5), _number(f["kl_second_half"], 5)]
            line += [_number(f[name], 1, True) for name in ("top1_agreement", "token_agreement", "text_similarity")]
            line += [_number(f["needles_found"], 0, True)]
        table.append([*line, *([_number(f["gpu_peak_mb"], 1)] if with_gpu else [])])
    return table


def saving(report: dict[str, Any]) -> str | None:
    """How far the peak of paged_attention is below that of full_cache; None unless both were measured."""
    ok = {row["method"]: row for row in report["rows"] if row["status"] == "ok"}
    if not {"full_cache", "paged_attention"} <= set(ok):
        return None
    full, paged = ok["full_cache"], ok["paged_attention"]

    def less(name: str) -> str:
        return f"{paged[name]:.0f} MB against {full[name]:.0f}, {100 * (1 - paged[name] / full[name]):.0f} % less"

    return (
        f"Peak memory of paged_attention against contiguous reservation (full_cache), {report['batch_size']} prompts "
        f"at once, {min(report['prompt_tokens'])} to {max(report['prompt_tokens'])} tokens and "
        f"{report['max_new_tokens']} new ones: {less('peak_rss_mb')} of the whole process; "
        f"{less('cpu_mem_used_mb')} without the loaded model."
    )


def advice(method: str, report: dict[str, Any]) -> str:
    """A paragraph on one method: what holds always, then what this run measured with each of its sizes."""
    rows = [row for row in report["rows"] if row["method"] == method]
    parts = [METHODS[method].advice]
    for row in rows:
        name = f" with {row['label'].partition('(')[2].removesuffix(')')}" if len(rows) > 1 else ""
        if row["status"] == "ok":
            parts.append(f"Measured{name}: {_measured(row, report)}")
        else:
            parts.append(f"Not measured{name}: {row['status']}, {row['message']}.")
    if any(_needles(row)[0] < _needles(row)[1] for row in rows):
        parts.append("Do not use it where a single fact of the text may be asked for.")
    return " ".join(parts)


def _needles(row: dict[str, Any]) -> tuple[int, int]:
    """Needles found, of those that full precision finds."""
    cells = (row.get("quality") or {}).get("needles", ())
    return sum(cell["retrieved"] for cell in cells), sum(cell["of"] for cell in cells)


def _measured(row: dict[str, Any], report: dict[str, Any]) -> str:
    others = [r for r in report["rows"] if r["status"] == "ok" and r is not row]
    paged = next((r["est_kv_cache_mb_avg"] for r in others if r["method"] == "paged_attention"), None)
    text = f"{row['est_kv_cache_mb_avg']:.2f} MB of keys and values a prompt"
    text += f" ({100 * row['est_kv_cache_mb_avg'] / paged:.0f} % of paged_attention's)" if paged else ""
    text += f", {row['tokens_per_sec']:.1f} tok/s"
    quality = row.get("quality")
    if not quality:
        return f"{text}."
    text += (
        f"; KL {quality['kl']:.5f} ({verdict(quality['kl'])}), top-1 {100 * quality['top1_agreement']:.1f} %, "
        f"perplexity {quality['perplexity']:.2f} against {quality['reference_perplexity']:.2f}"
    )
    dropped = [r for r in others if r["method"] == "sliding_window" and r["window_size"] == row["keep_last"]]
    if row["method"] == "chunked_cache" and dropped and dropped[0].get("quality"):
        text += f" (dropping the same tokens, sliding_window, costs KL {dropped[0]['quality']['kl']:.5f})"
    found, of = _needles(row)
    return f"{text}; {found} of {of} needles." if of else f"{text}."


def as_markdown(report: dict[str, Any]) -> str:
    """Table, saving and advice as a document."""
    ok = next((row for row in report["rows"] if row["status"] == "ok"), None)
    lines = ["# Keys and values: speed, memory, quality", ""]
    if ok is not None:
        lines += [
            f"{report['model']}, {report['cpu']}, {ok['backend']}, {ok['dtype']} "
            f"activations, {ok['num_threads']} threads; {len(report['prompt_tokens'])} prompts of "
            f"{min(report['prompt_tokens'])} to {max(report['prompt_tokens'])} tokens, {report['batch_size']} at once, "
            f"{report['max_new_tokens']} new tokens each; medians over rounds: {report['rounds']}. nanobraid "
            f"{report['version']}. Each method ran in a process of its own; memory: {ok['memory_source']}.",
            "",
        ]
    table = cells(report)
    lines += [f"| {' | '.join(table[0])} |", f"|{'---|' * len(table[0])}"]
    lines += [f"| {' | '.join(row)} |" for row in table[1:]]
    lines += [
        "",
        "MB are MiB. cache: the blocks of keys and values that a prompt keeps while it is answered, mean over the "
        "prompts. peak: resident memory of the process while it ran, less what was resident with the model loaded. "
        "process: its whole peak. "
        "KL, top-1, perplexity: to the same engine with f32 keys and values and nothing forgotten, with float "
        "activations; 2nd half: of each text. same tokens, text: greedy continuations, place by place and as "
        "characters. needles: of those that full precision finds.",
        "",
    ]
    if text := saving(report):
        lines += [text, ""]
    bounds = ", ".join(f"{word} up to {bound:g}" for bound, word in _VERDICTS)
    lines += ["## Advice", ""]
    lines += [f"A KL is called {bounds}, large above. A method that loses a needle is warned of."]
    for method in dict.fromkeys(row["method"] for row in report["rows"]):
        lines += ["", f"**{method}.** {advice(method, report)}"]
    return "\n".join(lines) + "\n"


def files(report: dict[str, Any]) -> dict[str, str]:
    """File name to contents: JSON, CSV, Markdown and those plots there are figures for."""
    out = {"kv.json": json.dumps(report, indent=1, allow_nan=False) + "\n", "kv.csv": as_csv(report)}
    drawn = {
        "kv-memory.svg": plots.memory_against_kl(report["rows"]),
        "kv-windows.svg": plots.perplexity_against_window(report["rows"]),
        "kv-needles.svg": plots.needle_map(report["rows"]),
    }
    out |= {name: text + "\n" for name, text in drawn.items() if text is not None}
    out["kv.md"] = as_markdown(report)
    shown = [name for name in drawn if name in out]
    if shown:
        out["kv.md"] += "\n" + "".join(f"![{name.removesuffix('.svg')}]({name})\n" for name in shown)
    return out


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the files of a report into a folder, which is made if it is not there.

    Raises:
        ModelIOError: The folder cannot be made, or a file not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, text in files(report).items():
            (folder / name).write_text(text, encoding="utf-8")
            paths.append(folder / name)
    except OSError as error:
        raise ModelIOError(f"{folder}: {error.strerror}") from None
    return paths


def read(path: Path) -> dict[str, Any]:
    """A report from its JSON.

    Raises:
        ModelIOError: The file cannot be read.
        InvalidArgumentError: It is not a report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelIOError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is not JSON: {error}") from None
    rows = report.get("rows") if isinstance(report, dict) else None
    known: Sequence[Any] = rows if isinstance(rows, list) else ()
    if not known or not all(isinstance(row, dict) and row.get("method") in METHODS for row in known):
        raise InvalidArgumentError(f"{path} is no report of bench-kv: it has no rows of known methods")
    if missing := [name for name in _KEYS if name not in report]:
        raise InvalidArgumentError(f"{path} is no report of bench-kv: it has no {', '.join(missing)}")
    return dict(report)
