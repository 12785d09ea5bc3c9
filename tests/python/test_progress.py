"""The progress bar of `LLM.generate`."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import nanobraid as nb
from nanobraid._progress import PromptBar


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def _written(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_shows_prompts_done_and_the_speed() -> None:
    console, clock = _terminal(), _Clock()
    with PromptBar(1000, console, clock) as bar:
        for _ in range(250):
            clock.now += 0.04
            bar.add(tokens=30, prompts=1)
    text = _written(console)
    assert "249/1000" in text.replace(" ", "")  # the last one came less than 0.1 s after it
    assert "750 tokens/s" in text  # 30 tokens in 0.04 s


def test_writes_at_most_ten_times_a_second() -> None:
    console, clock = _terminal(), _Clock()
    with PromptBar(1000, console, clock) as bar:
        for _ in range(1000):  # 5 seconds
            clock.now += 0.005
            bar.add(tokens=64, prompts=1)
    assert 40 <= _written(console).count("tokens/s") <= 50


def test_not_where_stderr_is_no_terminal(llm: nb.LLM, capfd: pytest.CaptureFixture[str]) -> None:
    params = nb.SamplingParams(temperature=0, max_tokens=2)
    for progress in (None, True, False):
        llm.generate(["One, two,", "Red, green,"], params, progress=progress)
    assert capfd.readouterr().err == ""


def test_on_a_terminal(model_path: Path) -> None:
    program = (
        "import sys, nanobraid as nb\n"
        "llm = nb.LLM(sys.argv[1], max_model_len=256, num_threads=1)\n"
        "llm.generate(['One, two,'] * 24, nb.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    run = subprocess.Popen([sys.executable, "-c", program, str(model_path)], stderr=theirs, env=environment)
    os.close(theirs)
    text = b""
    try:
        while piece := os.read(ours, 65536):
            text += piece
    except OSError:  # how a pseudo-terminal says that the other side is closed
        pass
    os.close(ours)
    assert run.wait(timeout=120) == 0, text.decode()
    assert b"tokens/s" in text
    assert b"/24" in text


@pytest.mark.parametrize(
    ("level", "loading", "shown"), [("warning", True, 1), ("warning", False, 0), ("info", False, 2)]
)
def test_a_terminal_sees_how_far_loading_has_come(level: str, loading: bool, shown: int) -> None:
    """What the command does in a terminal: lines of loading at any level, no others."""
    program = f"""
from nanobraid import _logging
_logging.show_on_stderr({level!r}, loading={loading})
_logging._sink("info", "loading big: 300 of 900 MB, 40 MB/s")
_logging._sink("info", "loaded big")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert len(lines) == shown
    if shown:
        assert lines[0] == "nanobraid: INFO: loading big: 300 of 900 MB, 40 MB/s"
