"""One server with everything at once: an AWQ checkpoint, streamed from disk, guessed for by a draft model, with chunks
and int8 keys and values. It answers as the same checkpoint does in memory and without guesses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from default_checkpoint import write_default
from quantized_hf import Scheme
from test_serve_command import started

from nanobraid.export import export_model

NOTES = [
    "The library of the town opens at nine and closes at six. On Sundays it is closed. Children need company.",
    "The code of the door is 4417. Visitors ask at the desk. The lift goes to the third floor, and no further.",
]
BODIES: list[dict[str, Any]] = [
    {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 40},
    {"prompt": "Question: when does it open?", "chunks": [{"text": text} for text in NOTES], "reuse": "isolated",
     "temperature": 0, "max_tokens": 40},
    {"prompt": "Question: and the door?", "chunks": [{"text": text} for text in NOTES], "reuse": "blend",
     "temperature": 0, "max_tokens": 40},
    {"prompt": "Once upon a time", "temperature": 0.9, "seed": 7, "max_tokens": 40, "n": 2, "logprobs": 2},
]  # fmt: skip


def _answers(url: str) -> list[Any]:
    """Texts of all requests, one streamed in pieces, and the log probabilities."""
    out: list[Any] = []
    for body in BODIES:
        done = httpx.post(f"{url}/v1/completions", json={**body, "ignore_eos": True}, timeout=120)
        assert done.status_code == 200, done.text
        out.append([(choice["text"], choice["logprobs"]) for choice in done.json()["choices"]])
    body = {**BODIES[1], "ignore_eos": True, "stream": True}
    lines = httpx.post(f"{url}/v1/completions", json=body, timeout=120).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    out.append("".join(choice["text"] for event in events for choice in event["choices"]))
    return out


def _metric(url: str, name: str) -> float:
    found = re.search(rf"^nanobraid:{name}\{{.*\}} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def test_answers_are_those_of_the_plain_run(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_default(tmp_path, model_path, Scheme("awq", 64), monkeypatch)
    export_model(tmp_path / "hf", tmp_path / "awq.braid", "keep")
    own = ["--model", str(tmp_path / "awq.braid"), "--kv-dtype", "int8", "--force-kv-dtype"]
    with started(*own) as (url, _):
        wanted = _answers(url)
        assert _metric(url, "draft_tokens_total") == 0
    together = ["--stream-weights", "least", "--stream-cache-dir", str(tmp_path / "layers")]
    together += ["--speculative", "draft", "--draft-model", str(tmp_path / "awq.braid"), "--num-draft-tokens", "5"]
    with started(*own, *together) as (url, lines):
        assert _answers(url) == wanted
        assert _metric(url, "streamed_bytes_total") > 0
        assert _metric(url, "accepted_draft_tokens_total") > 20
        assert _metric(url, "chunk_hits_total") >= 2
        assert _metric(url, "draft_model_tokens_total") > 0
    assert "awq" in "".join(lines)
