"""Sampling options at their edges and beyond: refused by name, or served as documented."""

from __future__ import annotations

import json
from typing import Any

import pytest
from http_checks import ANY, refused

TYPE, VALUE = "invalid_type", "invalid_value"
CONTEXT = 1024
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BOTH = (CHAT, TEXT)

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -1}, "temperature", VALUE),
    ({"temperature": 2.1}, "temperature", VALUE),
    ({"temperature": "0"}, "temperature", TYPE),
    ({"temperature": True}, "temperature", TYPE),
    ({"temperature": []}, "temperature", TYPE),
    ({"top_p": 0}, "top_p", VALUE),
    ({"top_p": -0.1}, "top_p", VALUE),
    ({"top_p": 1.1}, "top_p", VALUE),
    ({"top_k": -2}, "top_k", VALUE),
    ({"top_k": 1.5}, "top_k", TYPE),
    ({"top_k": 2**31}, "top_k", VALUE),
    ({"top_k": 2**70}, "top_k", ANY),
    ({"min_p": 1.1}, "min_p", VALUE),
    ({"min_p": -0.1}, "min_p", VALUE),
    ({"presence_penalty": 3}, "presence_penalty", VALUE),
    ({"presence_penalty": -2.01}, "presence_penalty", VALUE),
    ({"frequency_penalty": 3}, "frequency_penalty", VALUE),
    ({"frequency_penalty": "1"}, "frequency_penalty", TYPE),
    ({"repetition_penalty": 0}, "repetition_penalty", VALUE),
    ({"repetition_penalty": -1}, "repetition_penalty", VALUE),
    ({"kv_policy": "half"}, "kv_policy", VALUE),
    ({"kv_policy": ""}, "kv_policy", VALUE),
    ({"kv_policy": "sliding_window(0)"}, "kv_policy", VALUE),
    ({"kv_policy": "sliding_window(8, sinks=-1)"}, "kv_policy", VALUE),
    ({"kv_policy": "sliding_window(__import__('os'))"}, "kv_policy", VALUE),
    ({"kv_policy": "sliding_window(" * 13}, "kv_policy", VALUE),
    ({"kv_policy": 8}, "kv_policy", TYPE),
    ({"max_tokens": 0}, "max_tokens", VALUE),
    ({"max_tokens": -1}, "max_tokens", VALUE),
    ({"max_tokens": 1.5}, "max_tokens", TYPE),
    ({"max_tokens": 2**63}, "max_tokens", ANY),
    ({"max_tokens": 2**200}, "max_tokens", ANY),
    ({"max_tokens": CONTEXT + 1}, "max_tokens", VALUE),
    ({"n": 0}, "n", VALUE),
    ({"n": 129}, "n", VALUE),
    ({"n": 2**31}, "n", VALUE),
    ({"n": 1.5}, "n", TYPE),
    ({"seed": 2**63}, "seed", ANY),
    ({"seed": -(2**63) - 1}, "seed", ANY),
    ({"seed": 1.5}, "seed", TYPE),
    ({"seed": "1"}, "seed", TYPE),
    ({"stop": ""}, "stop", VALUE),
    ({"stop": [""]}, "stop", VALUE),
    ({"stop": [str(i) for i in range(17)]}, "stop", VALUE),
    ({"stop": "a" * 1_000_000}, "stop", VALUE),
    ({"stop": [1]}, "stop", TYPE),
    ({"stop": {"a": 1}}, "stop", TYPE),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", VALUE),
    ({"stop_token_ids": [2**40]}, "stop_token_ids[0]", VALUE),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", TYPE),
    ({"allowed_token_ids": []}, "allowed_token_ids", VALUE),
    ({"allowed_token_ids": [10**9]}, "allowed_token_ids", VALUE),
    ({"logit_bias": {"abc": 1}}, "logit_bias", VALUE),
    ({"logit_bias": {"-1": 1}}, "logit_bias", VALUE),
    ({"logit_bias": {" 1": 1}}, "logit_bias", VALUE),
    ({"logit_bias": {"1_0": 1}}, "logit_bias", VALUE),
    ({"logit_bias": {"VOCAB": 1}}, "logit_bias", VALUE),
    ({"logit_bias": {"1": 101}}, "logit_bias", VALUE),
    ({"logit_bias": {"1": -100.5}}, "logit_bias", VALUE),
    ({"logit_bias": {"1": "5"}}, "logit_bias", TYPE),
    ({"logit_bias": {"1": None}}, "logit_bias", TYPE),
    ({"logit_bias": []}, "logit_bias", TYPE),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", VALUE),
    ({"min_tokens": -1}, "min_tokens", VALUE),
    ({"ignore_eos": 1}, "ignore_eos", TYPE),
]


def _body(path: str, **fields: Any) -> dict[str, Any]:
    given = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "The sea"}
    return {**given, "max_tokens": 3, "temperature": 0, **fields}


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("fields, param, code", REFUSED, ids=lambda value: str(value)[:40])
def test_refused(server: Any, path: str, fields: dict[str, Any], param: str, code: Any) -> None:
    fields = json.loads(json.dumps(fields).replace("VOCAB", str(server.engine.llm.tokenizer.vocab_size)))
    refused(server.post(path, _body(path, **fields)), 400, param, code)
    refused(server.post(path, _body(path, **fields, stream=True)), 400, param, code)


@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed"]
)
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_no_number(server: Any, field: str, value: str) -> None:
    body = json.dumps(_body(CHAT)).replace("{", f'{{"{field}": {value}, ', 1)
    if field == "temperature":
        body = body.replace(', "temperature": 0', "")
    response = server.client.post(CHAT, content=body, headers={"content-type": "application/json"})
    refused(response, 400, None, "invalid_json")
    body = json.dumps(_body(CHAT)).replace("{", f'{{"logit_bias": {{"1": {value}}}, ', 1)
    response = server.client.post(CHAT, content=body, headers={"content-type": "application/json"})
    refused(response, 400, None, "invalid_json")


@pytest.mark.parametrize(
    "path, fields, param, code",
    [
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", VALUE),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs", VALUE),
        (CHAT, {"logprobs": True, "top_logprobs": True}, "top_logprobs", TYPE),
        (CHAT, {"logprobs": 5}, "logprobs", TYPE),
        (TEXT, {"logprobs": True}, "logprobs", TYPE),
        (TEXT, {"logprobs": 21}, "logprobs", VALUE),
        (TEXT, {"logprobs": -1}, "logprobs", VALUE),
        (TEXT, {"best_of": 0}, "best_of", VALUE),
        (TEXT, {"best_of": 3}, "best_of", "unsupported_parameter"),
        (TEXT, {"echo": "yes"}, "echo", TYPE),
        (CHAT, {"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens", VALUE),
        (CHAT, {"max_tokens": None, "max_completion_tokens": CONTEXT + 1}, "max_completion_tokens", VALUE),
    ],
)
def test_refused_by_one_route(server: Any, path: str, fields: dict[str, Any], param: str, code: str) -> None:
    refused(server.post(path, _body(path, **fields)), 400, param, code)


@pytest.mark.parametrize("path", BOTH)
def test_edges_that_are_served_like_greedy(server: Any, path: str) -> None:
    greedy = server.post(path, _body(path)).json()["choices"]
    for fields in (
        {"temperature": 1e-40},
        {"temperature": 5e-324},
        {"temperature": -0.0},
        {"temperature": 2, "top_k": 1},
        {"temperature": 2, "top_p": 1e-300},
        {"temperature": 2, "min_p": 1},
        {"top_k": 2**31 - 1},
        {"top_k": -1},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"logit_bias": {}},
        {"stop": []},
        {"stop": None},
        {"presence_penalty": 0, "frequency_penalty": -0.0, "repetition_penalty": 1},
        {"min_tokens": 3},
    ):
        response = server.post(path, _body(path, **fields))
        assert response.status_code == 200, (fields, response.text)
        assert response.json()["choices"] == greedy, fields


@pytest.mark.parametrize("path", BOTH)
def test_edges_that_are_served(server: Any, path: str) -> None:
    every = {str(i): -100 for i in range(server.engine.llm.tokenizer.vocab_size)}
    for fields in (
        {"temperature": 2, "top_p": 1, "n": 3},
        {"logit_bias": every},
        {"logit_bias": every, "temperature": 1},
        {"presence_penalty": 2, "frequency_penalty": -2},
        {"repetition_penalty": 100},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 1e-30, "temperature": 1},
        {"repetition_penalty": 5e-324},
        {"stop": [chr(97 + i) * 4096 for i in range(16)]},
        {"allowed_token_ids": [5]},
        {"stop_token_ids": list(range(1000))},
        {"min_tokens": 2, "logit_bias": {str(t): 100 for t in server.engine.llm.tokenizer.eos_token_ids}},
    ):
        response = server.post(path, _body(path, **{"max_tokens": 2, "min_tokens": 1, **fields}))
        assert response.status_code == 200, (fields, response.text[:300])
        for choice in response.json()["choices"]:
            assert choice["finish_reason"] in ("stop", "length")


def test_most_answers(server: Any) -> None:
    response = server.post(TEXT, _body(TEXT, n=64, max_tokens=1, temperature=1))
    assert response.status_code == 200
    assert len(response.json()["choices"]) == 64
    refused(server.post(TEXT, _body(TEXT, n=128)), 503)  # this engine lets 64 wait


def test_max_tokens_zero_only_with_echo(server: Any) -> None:
    answer = server.post(TEXT, _body(TEXT, max_tokens=0, echo=True, logprobs=0)).json()
    assert answer["choices"][0]["text"] == "The sea"
    assert answer["usage"]["completion_tokens"] == 0
    refused(server.post(TEXT, _body(TEXT, max_tokens=0)), 400, "max_tokens", VALUE)


def test_a_bias_of_minus_100_for_all_changes_nothing_but_ends(server: Any) -> None:
    every = {str(i): -100 for i in range(server.engine.llm.tokenizer.vocab_size)}
    plain = server.post(TEXT, _body(TEXT, max_tokens=4)).json()["choices"]
    assert server.post(TEXT, _body(TEXT, max_tokens=4, logit_bias=every)).json()["choices"] == plain
