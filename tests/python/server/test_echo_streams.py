"""Completions that echo their prompt, with log-probabilities: streamed they are the same as whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from http_checks import refused

TEXT = "/v1/completions"
FACE = "\N{SLIGHTLY SMILING FACE}"


def joined(text: str, num_choices: int) -> list[dict[str, Any]]:
    """The choices of a stream, put together."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    choices: list[dict[str, Any]] = [{"index": i, "text": "", "logprobs": None} for i in range(num_choices)]
    for line in lines[:-1]:
        for given in json.loads(line)["choices"]:
            choice = choices[given["index"]]
            assert choice.get("finish_reason") is None
            choice["text"] += given["text"]
            choice["finish_reason"] = given["finish_reason"]
            if given["logprobs"] is not None:
                parts = choice["logprobs"] = choice["logprobs"] or {name: [] for name in given["logprobs"]}
                for name, values in given["logprobs"].items():
                    parts[name] += values
    return choices


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "The capital of France is"},
        {"prompt": "The capital of France is", "max_tokens": 0},
        {"prompt": "One", "logprobs": 0, "max_tokens": 1},
        {"prompt": [504, 3575, 282]},
        {"prompt": ["The sea", "A", f"h\u00e9 {FACE}{FACE} \u3053\u308c"], "n": 2, "temperature": 1.5, "seed": 4},
        {"prompt": ["The sea", "A"], "n": 2, "max_tokens": 0},
        {"prompt": "x", "temperature": 2, "seed": 1, "max_tokens": 60},  # characters in several tokens among them
        {"prompt": "The sea", "logprobs": None},
        {"prompt": "The sea", "echo": False},
        {"prompt": f"{FACE}", "echo": False, "temperature": 2, "seed": 2, "max_tokens": 60},
    ],
)
def test_the_stream_joined_is_the_answer(server: Any, fields: dict[str, Any]) -> None:
    body = {"max_tokens": 5, "temperature": 0, "echo": True, "logprobs": 2, **fields}
    whole = server.post(TEXT, body).json()["choices"]
    answer = server.post(TEXT, {**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert joined(answer.text, len(whole)) == whole
    if body["echo"] and body["logprobs"] is not None:
        assert whole[0]["logprobs"]["token_logprobs"][0] is None
        assert len(whole[0]["logprobs"]["tokens"]) > body["max_tokens"]


def test_the_prompt_comes_first_and_at_once(server: Any) -> None:
    body = {"prompt": "The capital of France is", "echo": True, "logprobs": 1, "stream": True, "max_tokens": 3}
    lines = [line for line in server.post(TEXT, body).text.split("\n") if line.startswith("data: {")]
    first, second = (json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:2])
    assert first["text"] == body["prompt"] and len(first["logprobs"]["tokens"]) == 5
    assert second["logprobs"]["text_offset"] == [len(body["prompt"])]


def test_what_is_wrong_shows_before_the_stream(server: Any) -> None:
    body = {"prompt": [1] * 5000, "echo": True, "logprobs": 1, "stream": True, "max_tokens": 0}
    refused(server.post(TEXT, body), 400, "prompt", "context_length_exceeded")
