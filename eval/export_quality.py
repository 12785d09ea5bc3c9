"""Quality of exported files: KL divergence to the float32 source, with float activations on both sides.

    python eval/export_quality.py                                   # the default model, every dtype, llama.cpp's Q4_0
    python eval/export_quality.py --source FOLDER --dtypes w4 w8 --also other.gguf

SRC (a Hugging Face folder, GGUF or .braid) is exported as f32, the reference, and to each dtype; every file is run
through this engine with f32 activations and f32 keys and values. The text is cut into windows of `--context` tokens;
every position of a window counts. KL is KL(reference || file) in nats, mean over positions. Time and peak memory of
each export are those of a process of its own. Exits with 1 if a bound of BOUNDS is exceeded, or w4 is worse than half
of the KL of a file in `--also`, or larger.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import nanobraid as nb
from nanobraid import models
from nanobraid._core import ModelFile
from nanobraid.bench_kv.divergence import mean_kl, negative_log_likelihood

TEXT = Path(__file__).parent / "text" / "mixed.txt"
BOUNDS = {"f32": 0.0, "keep": 1e-4, "bf16": 1e-4, "f16": 1e-4, "w8": 1e-3}
# What a child process runs: an export, and its summary as JSON.
EXPORT = """
import dataclasses, json, sys
from pathlib import Path
from nanobraid.export import export_model
summary = export_model(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
worst = max(summary.tensors, key=lambda tensor: tensor.relative_error)
print(json.dumps({
    "bits_per_weight": summary.bits_per_weight, "file_bytes": summary.file_bytes, "seconds": summary.seconds,
    "calibration_seconds": summary.calibration_seconds, "calibration_tokens": summary.calibration_tokens,
    "peak_rss_bytes": summary.peak_rss_bytes, "worst_tensor": worst.name, "worst_relative_error": worst.relative_error,
}))
"""


def windows_of(path: Path, text: Path, context: int, tokens: int) -> list[list[int]]:
    ids = nb.Tokenizer(path).encode(text.read_text(encoding="utf-8"))[:tokens]
    return [ids[begin : begin + context] for begin in range(0, len(ids) - context + 1, context)]


def export(source: Path, out: Path, dtype: str, before: str = "") -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", before + EXPORT, str(source), str(out), dtype],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(done.stderr)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def bits_per_weight(path: Path) -> float:
    tensors = ModelFile(str(path)).tensors()
    return 8.0 * sum(size for *_, size in tensors) / sum(int(np.prod(shape)) for _, _, shape, _ in tensors)


def logits_of(path: Path, windows: list[list[int]], dtype: str = "f32") -> list[Any]:
    with nb.LLM(path, dtype=dtype, kv_dtype="f32") as llm:
        return [llm.logits(ids) for ids in windows]


def quality(path: Path, windows: list[list[int]], reference: list[Any], dtype: str = "f32") -> dict[str, float]:
    kl, nll, agree = [], [], []
    for ids, theirs, ours in zip(windows, reference, logits_of(path, windows, dtype), strict=True):
        kl.extend(mean_kl(theirs, ours))
        nll.extend(negative_log_likelihood(ours, ids))
        agree.extend(theirs.argmax(axis=1) == ours.argmax(axis=1))
    return {"kl": float(np.mean(kl)), "perplexity": float(np.exp(np.mean(nll))), "same_greedy": float(np.mean(agree))}


def add_text_options(parser: argparse.ArgumentParser, tokens: int) -> None:
    """What is exported, the text that tells how well, and where the report goes."""
    parser.add_argument("--source", type=Path, default=None, help="what is exported (default: the default model)")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--json", type=Path, help="write the report here")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser, tokens=3072)
    parser.add_argument("--dtypes", nargs="+", default=["keep", "bf16", "f16", "w8", "w4"])
    parser.add_argument("--also", nargs="*", type=Path, default=[], help="model files to compare, such as another Q4_0")
    args = parser.parse_args()
    source = args.source or models.pull(models.DEFAULT_MODEL)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.braid"
        export(source, path, "f32")
        windows = windows_of(path, args.text, args.context, args.tokens)
        reference = logits_of(path, windows)
        path.unlink()
        for dtype in args.dtypes:
            path = Path(folder) / f"{dtype}.braid"
            report = export(source, path, dtype)
            rows.append({"name": dtype, **report, **quality(path, windows, reference)})
            path.unlink()
            print_row(rows[-1])
        for also in args.also:
            sizes = {"bits_per_weight": bits_per_weight(also), "file_bytes": also.stat().st_size}
            rows.append({"name": also.name, **sizes, **quality(also, windows, reference)})
            print_row(rows[-1])
    report = {"source": source.name, "text": args.text.name, "windows": len(windows), "context": args.context}
    if args.json:
        args.json.write_text(json.dumps({**report, "files": rows}, indent=1) + "\n")
    return 1 if failures(rows) else 0


def print_row(row: dict[str, Any]) -> None:
    seconds = f"{row['seconds']:.1f} s" if "seconds" in row else ""
    memory = f"{row['peak_rss_bytes'] / 2**20:.0f} MiB" if "peak_rss_bytes" in row else ""
    print(
        f"| {row['name']} | {row['bits_per_weight']:.2f} | {row['file_bytes'] / 1e6:.0f} MB | {row['kl']:.5f} | "
        f"{row['perplexity']:.2f} | {100 * row['same_greedy']:.1f} % | {seconds} | {memory} |",
        flush=True,
    )


def failures(rows: list[dict[str, Any]]) -> bool:
    failed = [row["name"] for row in rows if row["kl"] > BOUNDS.get(row["name"], float("inf"))]
    ours = next((row for row in rows if row["name"] == "w4"), None)
    for row in rows:
        if ours and row["name"] not in (*BOUNDS, "w4"):
            if ours["kl"] > row["kl"] / 2:
                failed.append(f"w4 against {row['name']}: KL")
            if ours["bits_per_weight"] > row["bits_per_weight"]:
                failed.append(f"w4 against {row['name']}: bits per weight")
    if failed:
        print(f"out of bounds: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
