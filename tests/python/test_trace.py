"""Traces of the steps: JSON that a viewer can show, in order of time, and what it says about requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import nanobraid as nb

Event = dict[str, Any]


def _trace(path: Path) -> list[Event]:
    text = path.read_text()
    if not text.endswith("]\n"):  # the process died; viewers do the same
        text = text[: text.rindex("}") + 1] + "]"
    events = json.loads(text)
    assert isinstance(events, list)
    return events


def _check(events: list[Event]) -> None:
    """Steps follow each other, phases lie inside their step one after the other, requests begin before they end."""
    end_of_step = end_of_phase = -1.0
    steps = 0
    last: dict[str, tuple[str, float]] = {}
    for event in events:
        if event["ph"] == "M":
            continue
        assert event["ts"] >= 0
        if event["ph"] in "bne":
            kind, before = last.get(event["id"], ("", -1.0))
            assert event["ts"] >= before
            assert (kind == "") == (event["ph"] == "b")
            assert kind != "e"
            last[event["id"]] = (event["ph"], event["ts"])
            continue
        begin, end = event["ts"], event["ts"] + event["dur"]
        assert event["dur"] >= 0
        if event["name"] == "step":
            assert begin >= end_of_step - 0.002  # times are rounded to nanoseconds
            end_of_step, end_of_phase = end, begin
            steps += 1
        else:
            assert event["cat"] == "phase"
            assert begin >= end_of_phase - 0.002
            assert end <= end_of_step + 0.002
            end_of_phase = end
    assert steps > 0


def test_a_trace_of_a_batch(model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    prompts = ["The capital of France is", "One, two, three, " * 20, "x"]
    with nb.LLM(model_path, num_threads=1, max_model_len=256, max_batch_tokens=64, trace_path=path) as llm:
        outputs = llm.generate(prompts, nb.SamplingParams(temperature=0.8, max_tokens=8, seed=1, ignore_eos=True, n=2))
        stats = llm.stats()
    events = _trace(path)
    json.loads(path.read_text())  # complete without help
    _check(events)
    steps = [event["args"] for event in events if event["name"] == "step"]
    assert sum(step["rows"] > 0 for step in steps) == stats["steps"]
    assert sum(step["prompt_rows"] for step in steps) == stats["prompt_tokens"]
    assert max(step["rows"] for step in steps) <= 64
    assert not any(step["failed"] for step in steps)
    phases = Counter(event["name"] for event in events if event.get("cat") == "phase")
    assert phases["plan"] == phases["commit"] == len(steps)
    assert phases["forward"] == stats["steps"]
    assert phases["head"] == phases["sample"] > 0
    ends = [event for event in events if event["ph"] == "e"]
    assert len(ends) == 2 * len(prompts)
    assert sum(event["args"]["generated_tokens"] for event in ends) == 2 * 8 * len(prompts)
    # The marks are the times that the outputs report.
    begin = {event["id"]: event["ts"] for event in events if event["ph"] == "b"}
    first = {event["id"]: event["ts"] for event in events if event["name"] == "first token"}
    ttft_ms = sorted((first[key] - begin[key]) / 1e3 for key in begin if key.endswith(".0"))
    assert ttft_ms == pytest.approx(sorted(out.metrics.ttft_ms for out in outputs), abs=0.01)


def test_readable_after_the_process_was_killed(model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    program = (
        "import os, signal, sys, nanobraid as nb\n"
        "llm = nb.LLM(sys.argv[1], num_threads=1, max_model_len=256, trace_path=sys.argv[2])\n"
        "pieces = llm.stream('One, two, three,', nb.SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))\n"
        "for _ in range(5): next(pieces)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(model_path), str(path)], check=False, timeout=120)
    assert run.returncode == -signal.SIGKILL
    events = _trace(path)
    _check(events)
    assert sum(event["name"] == "step" for event in events) >= 5
    assert not any(event["ph"] == "e" for event in events)


def test_a_path_that_cannot_be_written(model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "trace.json"
    with pytest.raises(nb.ModelIOError, match=r"trace_path: cannot write .*missing/trace.json: No such file"):
        nb.LLM(model_path, num_threads=1, max_model_len=256, trace_path=path)
    for bad in ("", 7, b"bytes", "a\0b"):
        with pytest.raises(nb.InvalidArgumentError, match="trace_path must be the path of a file"):
            nb.LLM(model_path, trace_path=bad)  # type: ignore[arg-type]


def test_no_trace_by_default(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with nb.LLM(model_path, num_threads=1, max_model_len=256) as llm:
        llm.generate("x", nb.SamplingParams(temperature=0, max_tokens=1))
    assert os.listdir(tmp_path) == []
