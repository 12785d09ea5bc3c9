"""Every field of OpenAI's request schema is honoured or refused by name; fields that a new SDK adds fail the test."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from http_checks import refused
from marked_model import marked_model
from typing_extensions import get_type_hints, is_typeddict

from conftest import running

pytest.importorskip("openai")

from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

import nanobraid as nb

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
Case = tuple[Any, ...]


def members(kind: Any, prefix: str = "") -> set[str]:
    """The paths of all members of a typed dict, those of lists and unions within included."""
    found: set[str] = set()
    if is_typeddict(kind):
        for name, hint in get_type_hints(kind).items():
            found |= {prefix + name} | members(hint, f"{prefix}{name}.")
    elif get_origin(kind) is not Literal:
        for argument in get_args(kind):
            found |= members(argument, prefix)
    return found


# Only these go into depth: the members of messages are in test_bad_requests.py, refused fields are refused whole.
DEEP = ("stream_options", "response_format", "tools", "tool_choice")


def fields(*kinds: Any) -> set[str]:
    names = set().union(*(members(kind) for kind in kinds))
    return {name for name in names if "." not in name or name.split(".")[0] in DEEP}


# ---- how a field shows ----


def _content(answer: dict[str, Any]) -> Any:
    return [choice.get("message", choice.get("text")) for choice in answer["choices"]]


def changes(value: Any, look: Callable[[dict[str, Any]], Any] = _content, **others: Any) -> Case:
    """The field changes what `look` finds in the answer; `others` are in both requests."""
    return ("changes", value, look, others)


def refusal(value: Any, param: str | None = None, **others: Any) -> Case:
    """The field is refused by its name."""
    return ("refused", value, param, others)


def logged(value: Any) -> Case:
    """The field is for people: it is in the access log."""
    return ("logged", value)


def annotation(value: Any, without: Any, wrong: Any, **others: Any) -> Case:
    """The field is documented as one that changes nothing; still it must be well formed."""
    return ("annotation", value, without, wrong, others)


def _format(**given: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, **given}}


def _keys(answer: dict[str, Any]) -> Any:
    return sorted(json.loads(answer["choices"][0]["message"]["content"]))


def _is_called(answer: dict[str, Any]) -> Any:
    return [bool(choice["message"].get("tool_calls")) for choice in answer["choices"]]


def _prompt(answer: dict[str, Any]) -> Any:
    return answer["usage"]["prompt_tokens"]


def _length(answer: dict[str, Any]) -> Any:
    return [answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]]


def _logprobs(answer: dict[str, Any]) -> Any:
    return answer["choices"][0]["logprobs"]


WARM = {"temperature": 1.5, "seed": 3, "max_tokens": 24}
LONGER = {"max_tokens": 24}
COMMON: dict[str, Case] = {
    "model": refusal("gpt-4"),
    "frequency_penalty": changes(2, max_tokens=40),
    "presence_penalty": changes(2, max_tokens=40),
    "logit_bias": changes({"28": 100}),
    "n": changes(3, lambda answer: len(answer["choices"])),
    "seed": changes(12, **{**WARM, "seed": None}),
    "stop": changes([" ", "e"], **LONGER),
    "temperature": changes(1.7, seed=5, **LONGER),
    "top_p": changes(1e-6, **WARM),
    "max_tokens": changes(2, _length),
    "user": logged("u-17"),
}
CHAT_CASES: dict[str, Case] = {
    **COMMON,
    "messages": changes([{"role": "user", "content": "Count to ten."}]),
    "max_completion_tokens": changes(2, _length, max_tokens=None),
    "logprobs": changes(True, _logprobs),
    "top_logprobs": changes(4, _logprobs, logprobs=True),
    "metadata": logged({"purpose": "test"}),
    "safety_identifier": logged("s-18"),
    "prompt_cache_key": logged("k-19"),
    "audio": refusal({"voice": "alloy", "format": "wav"}),
    "function_call": refusal("auto"),
    "functions": refusal([{"name": "f"}]),
    "modalities": refusal(["text", "audio"]),
    "moderation": refusal({"model": "omni"}),
    "prediction": refusal({"type": "content", "content": "a"}),
    "prompt_cache_options": refusal({"mode": "implicit"}),
    "prompt_cache_retention": refusal("24h"),
    # The default model's template knows no thinking; one that does is below.
    "reasoning_effort": refusal("high"),
    "service_tier": refusal("priority"),
    "store": refusal(True),
    "verbosity": refusal("low"),
    "web_search_options": refusal({}),
    "response_format": changes({"type": "json_object"}),
    "response_format.type": refusal({"type": "xml"}),
    "response_format.json_schema": changes(_format(), max_tokens=40),
    "response_format.json_schema.name": refusal(_format(name="a b")),
    # No schema is put into a prompt, so there is nothing that a description could explain to the model.
    "response_format.json_schema.description": annotation(
        _format(description="A number"), _format(), _format(description=5), max_tokens=40
    ),
    "response_format.json_schema.schema": changes(_format(), _keys, max_tokens=40),
    "response_format.json_schema.strict": changes(_format(strict=True), max_tokens=40),
    "tools": changes([TOOL], _prompt),
    "tools.type": refusal([{"type": "custom", "custom": {"name": "a"}}], "tools[0].type"),
    "tools.function": changes([TOOL], _prompt),
    "tools.function.name": changes([TOOL], _prompt),
    "tools.function.description": changes(
        [{"type": "function", "function": {**TOOL["function"], "description": "Tells the weather."}}],  # type: ignore[dict-item]
        _prompt,
    ),
    "tools.function.parameters": changes([TOOL], _prompt),
    "tools.function.strict": changes([TOOL], _prompt),
    "tools.custom": refusal([{"type": "custom", "custom": {"name": "a"}}], "tools[0].type"),
    "tool_choice": changes("required", _is_called, tools=[TOOL], max_tokens=60),
    "tool_choice.type": refusal({"type": "custom", "custom": {"name": "a"}}, tools=[TOOL]),
    "tool_choice.function": changes(
        {"type": "function", "function": {"name": "get_weather"}}, _is_called, tools=[TOOL], max_tokens=60
    ),
    "tool_choice.function.name": refusal({"type": "function", "function": {"name": "g"}}, tools=[TOOL]),
    "tool_choice.custom": refusal({"type": "custom", "custom": {"name": "a"}}, "tool_choice.type", tools=[TOOL]),
    "tool_choice.allowed_tools": refusal(
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOL]}}, "tool_choice.type", tools=[TOOL]
    ),
}
TEXT_CASES: dict[str, Case] = {
    **COMMON,
    "prompt": changes("One, two, three"),
    "best_of": refusal(5),
    "echo": changes(True),
    "logprobs": changes(3, _logprobs),
    "suffix": refusal("the end"),
}
# Under these a whole object is refused, or tested as part of the member above.
COVERED_BY = ("tools.custom", "tool_choice.custom", "tool_choice.allowed_tools")
# They are told by streams, below.
STREAMED = {"stream", "stream_options", "stream_options.include_usage", "stream_options.include_obfuscation"}
# Has a test of its own, below.
ALONE = {"parallel_tool_calls"}


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_kv_policy(server: Any, route: str) -> None:
    """Answers say that they are approximate where a token did not see all before it, and only there."""
    body = {**_request(route), "max_tokens": 24}
    exact, same, lossy, again = (
        server.post(route, {**body, "kv_policy": policy}).json()
        for policy in (None, "sliding_window(4096)", "sliding_window(6, sinks=1)", "none")
    )
    assert _content(same) == _content(exact) == _content(again) != _content(lossy)
    assert [answer["nanobraid"]["mode"] for answer in (exact, same, lossy, again)] == [
        *("exact", "exact", "approximate", "exact")
    ]
    chunks = {"chunks": [{"text": "Colours are red, green and blue."}], "reuse": "isolated"}
    refused(server.post(route, {**body, **chunks, "kv_policy": "budget(64)"}), 400, "kv_policy")


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_speculative(server: Any, route: str) -> None:
    """This server does not guess tokens, so that only a wish for it cannot be honoured."""
    body = {**_request(route), "max_tokens": 12}
    plain, without = (server.post(route, {**body, "speculative": value}).json() for value in (None, False))
    assert _content(plain) == _content(without)
    refused(server.post(route, {**body, "speculative": True}), 400, "speculative")


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_no_field_is_forgotten(route: str) -> None:
    module: Any = chat_params if route == CHAT else text_params
    known = set(CHAT_CASES if route == CHAT else TEXT_CASES) | STREAMED | ALONE
    kinds = get_args(module.CompletionCreateParams)
    assert get_origin(module.CompletionCreateParams) is Union and len(kinds) == 2
    wanted = {name for name in fields(*kinds) if not name.startswith(tuple(f"{name}." for name in COVERED_BY))}
    assert "messages" in wanted or "prompt" in wanted
    assert wanted - known == set(), "fields of the SDK that no case is for"
    assert known - wanted - ALONE == set(), "cases for fields that the SDK does not have"


def _request(route: str) -> dict[str, Any]:
    given = {"messages": [{"role": "user", "content": "Name a colour."}]} if route == CHAT else {"prompt": "The sea is"}
    return {**given, "temperature": 0, "max_tokens": 8}


ALL = [(CHAT, name) for name in CHAT_CASES] + [(TEXT, name) for name in TEXT_CASES]


@pytest.mark.parametrize("route, name", ALL, ids=[f"{route.split('/')[2]}-{name}" for route, name in ALL])
def test_field(server: Any, route: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, value, *rest = (CHAT_CASES if route == CHAT else TEXT_CASES)[name]
    field = name.split(".", maxsplit=1)[0]
    if kind == "refused":
        param, others = rest
        refused(
            server.post(route, {**_request(route), **others, field: value}),
            404 if field == "model" else 400,
            param or name,
        )
        return
    if kind == "logged":
        with caplog.at_level(logging.INFO, logger="nanobraid.access"):
            assert server.post(route, {**_request(route), field: value}).status_code == 200
        end = time.monotonic() + 2  # the line comes behind the answer
        while not (lines := [record.access for record in caplog.records if hasattr(record, "access")]):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert lines[-1][field] == value
        return
    if kind == "annotation":
        plain, wrong, others = rest
        body = {**_request(route), **others}
        answers = [server.post(route, {**body, field: given}) for given in (value, plain)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert _content(answers[0].json()) == _content(answers[1].json())
        assert "are accepted as annotations" in (Path(__file__).parents[3] / "SERVER.md").read_text()
        refused(server.post(route, {**body, field: wrong}), 400, name)
        return
    look, others = rest
    plain = {**_request(route), **others}
    without = server.post(route, plain)
    given = server.post(route, {**plain, field: value})
    assert without.status_code == given.status_code == 200, given.text
    found = look(given.json())
    assert found == look(server.post(route, {**plain, field: value}).json())  # not by chance
    try:
        before = look(without.json())
    except ValueError:  # no JSON without the field
        before = None
    assert found != before, f"{name} changes nothing"


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_streams(server: Any, route: str) -> None:
    def lines(**given: Any) -> list[str]:
        answer = server.post(route, {**_request(route), **given})
        assert answer.status_code == 200, answer.text
        return [line for line in answer.text.split("\n") if line.startswith("data: ")]

    assert lines() == lines(stream=False) == []
    assert lines(stream=True)[-1] == "data: [DONE]"
    assert '"usage"' not in "".join(lines(stream=True))
    usage = json.loads(lines(stream=True, stream_options={"include_usage": True})[-2].removeprefix("data: "))
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 0
    for options in ({"include_usage": True}, {}):
        refused(server.post(route, {**_request(route), "stream_options": options}), 400, "stream_options")
    options = {"include_obfuscation": True}
    body = {**_request(route), "stream": True, "stream_options": options}
    refused(server.post(route, body), 400, "stream_options.include_obfuscation")
    assert lines(stream=True, stream_options={"include_obfuscation": False})


def test_parallel_tool_calls(server: Any) -> None:
    """With false there is one call at most; what the format does about it is in test_tool_formats.py."""
    body = {**_request(CHAT), "tools": [TOOL], "tool_choice": "required", "max_tokens": 200, "temperature": 1}
    many = [
        len(
            server.post(CHAT, {**body, "seed": seed, "parallel_tool_calls": False}).json()["choices"][0]["message"][
                "tool_calls"
            ]
        )
        for seed in range(3)
    ]
    assert many == [1, 1, 1]
    refused(server.post(CHAT, {**body, "parallel_tool_calls": "no"}), 400, "parallel_tool_calls")


def test_strict_is_checked(server: Any) -> None:
    body = {**_request(CHAT), "response_format": _format(strict="yes")}
    refused(server.post(CHAT, body), 400, "response_format.json_schema.strict")


THINKING = """{{ messages[-1].content }}{% if reasoning_effort is defined %} Effort: {{ reasoning_effort }}.{% endif %}
{%- if add_generation_prompt %}<|turn|>{% if enable_thinking is defined and not enable_thinking %}<think></think>
{%- endif %}{% endif %}"""


def test_reasoning_effort_changes_the_prompt_of_a_model_that_thinks(tmp_path: Path) -> None:
    path = marked_model(tmp_path, ["<think>", "</think>", "<|turn|>"], THINKING)
    with nb.LLM(path, num_threads=1) as llm, running(nb.AsyncEngine(llm)) as server:
        efforts = (None, "none", "minimal", "low", "medium", "high", "xhigh", "max")
        prompts = {}
        for effort in efforts:
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "reasoning_effort": effort}
            prompts[effort] = server.post(f"{CHAT}/render", body).json()["prompt"]
            assert server.post(CHAT, body).json()["usage"]["prompt_tokens"] == len(
                llm.tokenizer.encode(prompts[effort], parse_special=True)
            )
        assert prompts[None] == "Hi<|turn|>"
        assert prompts["none"] == "Hi Effort: none.<|turn|><think></think>"
        for effort in efforts[2:]:
            assert prompts[effort] == f"Hi Effort: {effort}.<|turn|>"
        refused(server.post(CHAT, {**body, "reasoning_effort": "lots"}), 400, "reasoning_effort")
