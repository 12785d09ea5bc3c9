"""A server whose engine guesses coming tokens: the same answers, whole and streamed, and what metrics say of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from engine_threads import THREADS

import nanobraid as nb
from conftest import running

BODY = {"prompt": "red, green, blue, red, green, blue, red, green,", "temperature": 0, "max_tokens": 32}


def _streamed(server: Any, body: dict[str, Any]) -> str:
    lines = server.post("/v1/completions", {**body, "stream": True}).text.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ") and line != "data: [DONE]"]
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


def test_answers_are_the_same_with_guesses_and_without(model_path: Path) -> None:
    config = nb.SpeculativeConfig(num_draft_tokens=6, adaptive=False)
    with (
        nb.LLM(model_path, num_threads=THREADS, max_model_len=512, speculative_config=config) as llm,
        running(nb.AsyncEngine(llm)) as server,
    ):
        plain = server.post("/v1/completions", {**BODY, "speculative": False}).json()
        assert llm.stats()["draft_tokens"] == 0
        guessed = server.post("/v1/completions", {**BODY, "speculative": True}).json()
        assert guessed["choices"][0]["text"] == plain["choices"][0]["text"]
        assert guessed["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
        assert llm.stats()["accepted_draft_tokens"] > 5
        assert _streamed(server, BODY) == plain["choices"][0]["text"]
        metrics = server.client.get("/metrics").text
        stats = llm.stats()
        assert 0 < stats["accepted_draft_tokens"] <= stats["draft_tokens"]
        for name, key in (
            ("nanobraid:accepted_draft_tokens", "accepted_draft_tokens"),
            ("vllm:spec_decode_num_drafts", "num_drafts"),
            ("vllm:spec_decode_num_draft_tokens", "draft_tokens"),
            ("vllm:spec_decode_num_accepted_tokens", "accepted_draft_tokens"),
        ):
            shown = re.search(rf"^{name}_total\{{.*\}} (\d+)$", metrics, re.MULTILINE)
            assert shown is not None and int(shown[1]) == stats[key], name
            assert f"# TYPE {name}_total counter\n" in metrics
