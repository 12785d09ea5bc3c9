"""`nanobraid bench-kv` and ``python -m nanobraid.bench_kv``, run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_threads import THREADS

SMALL = (
    "--methods", "paged_attention,quant_int8", "--prompt-tokens", "20,40", "--batch-size", "2", "--max-new-tokens", "2",
    "--rounds", "1", "--text-tokens", "48", "--agreement-tokens", "2", "--needle-lengths", "96", "--needle-depths",
    "0.5", "--needle-draws", "1", "--threads", str(THREADS),
)  # fmt: skip


def run(*arguments: str | Path, module: str = "nanobraid.bench_kv") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, env={**os.environ}, check=False
    )


def test_help_names_the_methods_and_options() -> None:
    for done in (run("--help"), run("bench-kv", "--help", module="nanobraid")):
        assert done.returncode == 0
        for word in ("sliding_window", "--window-sizes", "--needle-depths", "--output", "--render", "--max-model-len"):
            assert word in done.stdout


def test_a_run_writes_its_report_which_can_be_rendered_again(model_path: Path, tmp_path: Path) -> None:
    done = run(*SMALL, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["method", "tok/s", "ms/token"]
    assert [line.split()[0] for line in lines[1:3]] == ["paged_attention", "quant_int8"]
    report = json.loads((tmp_path / "out/kv.json").read_text())
    assert report["prompt_tokens"] == [20, 40]
    assert [row["status"] for row in report["rows"]] == ["ok", "ok"]
    assert report["rows"][1]["quality"]["kl"] > 0
    assert report["cpu"]

    again = run("--render", tmp_path / "out/kv.json", "-o", tmp_path / "again", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == report
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_text() == path.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--methods", "fast_cache"), "method must be one of no_cache"),
        (("--methods", ""), "methods must be names"),
        (("--methods", "no_cache,no_cache"), "none of them twice"),
        (("--window-sizes", "64,x"), "invalid list of integers value: '64,x'"),
        (("--window-sizes", ""), "window_sizes must not be empty"),
        (("--block-sizes", "40"), "must be a multiple of 16"),
        (("--prompt-tokens", "0"), "--prompt-tokens must be integers >= 1"),
        (("--prompts", "0"), "--prompts must be an integer >= 1"),
        (("--batch-size", "0"), "--batch-size must be an integer >= 1"),
        (("--max-new-tokens", "0"), "max_new_tokens must be"),
        (("--rounds", "0"), "rounds must be"),
        (("--needle-depths", "2"), "needle_depths must be numbers in"),
        (("--needle-lengths", "8"), "needle_lengths must be"),
        (("--needle-depths", ""), "needle_lengths and needle_depths must both"),
        (("--quality-dtype", "fp16"), "quality dtype must be one of"),
        (("--no-quality", "--text-tokens", "64"), "--no-quality together with text_tokens"),
        (("--render", "nowhere.json"), "No such file"),
        (("--render", "nowhere.json", "--rounds", "5"), "--render measures nothing: leave --rounds out"),
        (("--model", "nowhere.gguf"), "nowhere.gguf"),
        (("--fast",), "unrecognized arguments: --fast"),
    ],
)
def test_wrong_inputs_are_one_line_that_names_them(model_path: Path, arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("nanobraid: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr
    assert done.stdout == ""
