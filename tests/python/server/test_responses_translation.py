"""OpenAI's Responses as a translation: checked against the types of the openai package and run with its client."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai")

from openai.types import responses as sdk  # noqa: E402
from openai.types.responses import response_create_params as params  # noqa: E402
from openai.types.responses import response_input_item_param as items  # noqa: E402
from pydantic import BaseModel  # noqa: E402
from scripted_chat import (  # noqa: E402
    CREATED,
    ID,
    MODEL,
    Json,
    Playing,
    Route,
    call,
    chunk,
    chunks,
    completion,
    events,
    serving,
    text,
    thought,
)
from sdk_types import Object, assert_extensions_reach_chat, assert_refused, checked  # noqa: E402

from nanobraid.server import errors  # noqa: E402
from nanobraid.server.errors import ApiError  # noqa: E402
from nanobraid.server.responses import error_from_chat, from_chat, to_chat  # noqa: E402
from nanobraid.server.responses_stream import StreamTranslator  # noqa: E402
from nanobraid.server.schema import ChatRequest, parse  # noqa: E402

EXTRAS = frozenset({"store", "error", "name"})  # sent by OpenAI too, though the package's types lack them
ASK: Json = {"model": MODEL, "input": "Hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "name": "weather", "description": "Tells it", "parameters": SCHEMA, "strict": True}
CHAT_TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it", "parameters": SCHEMA, "strict": True},
}
PARALLEL = [*call(0, "weather", '{"city":', ' "Ulm"}'), *call(1, "weather", '{"city": "Aue"}')]
LOGPROB = {"token": "ü", "bytes": [195, 188], "logprob": -0.5, "top_logprobs": [{"token": "u", "logprob": -1.5}]}

SCRIPTS: dict[str, list[Any]] = {
    "text": chunks(text("Hello", ", ", "you")),
    "nothing": chunks(),
    "cut": chunks(text("Hello"), finish="length"),
    "cut thought": chunks(thought("Hm"), finish="length"),
    "reasoning": chunks(thought("Let ", "me"), text("Yes")),
    "calls": chunks(PARALLEL, finish="tool_calls"),
    "all": chunks(thought("Hm"), text("Look:"), PARALLEL, finish="tool_calls"),
    "cut call": chunks(text("Look:"), call(0, "weather", '{"ci'), finish="length"),
    "no arguments": chunks(call(0, "now"), finish="tool_calls"),
}


def streamed(script: list[Any], request: Json | None = None) -> list[tuple[str, Json]]:
    translator = StreamTranslator(request or ASK, id=ID, created=CREATED, model=MODEL)
    return events(translator, script)


def kinds(sent: list[tuple[str, Json]]) -> list[str]:
    return [name.removeprefix("response.") for name, _ in sent]


# Requests


def test_a_text_becomes_one_message_of_the_user() -> None:
    assert to_chat({"input": "Hi"}) == {"messages": [{"role": "user", "content": "Hi"}]}


def test_instructions_and_system_messages_behind_them_become_one_system_message() -> None:
    body = {
        "instructions": "Be brief.",
        "input": [
            {"role": "developer", "content": "Be kind."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"role": "system", "content": "Now in Latin."},
        ],
    }
    assert to_chat(body)["messages"] == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Now in Latin."},
    ]


def test_items_of_one_turn_become_one_message() -> None:
    body = {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
            {"role": "assistant", "content": "Look:"},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Ulm"}'},
            {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Rain."}]},
            {"role": "assistant", "content": "And sun."},
        ]
    }
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}},
        {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
    ]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert to_chat(body)["messages"] == [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "Look:", "reasoning_content": "Hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
        {"role": "assistant", "content": [{"type": "text", "text": "Rain."}, {"type": "text", "text": "And sun."}]},
    ]


def test_reasoning_of_several_items_is_joined_and_a_summary_stands_for_what_is_not_there() -> None:
    shown = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "no"}]}
    body = {
        "input": [
            {
                **shown,
                "content": [{"type": "reasoning_text", "text": "Hm, "}, {"type": "reasoning_text", "text": "so "}],
            },
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "yes"}]},
            {"role": "assistant", "content": "Yes."},
        ]
    }
    assert to_chat(body)["messages"] == [{"role": "assistant", "content": "Yes.", "reasoning_content": "Hm, so yes"}]


@pytest.mark.parametrize("name", ["all", "reasoning", "calls", "text", "cut call"])
def test_an_answer_sent_back_is_the_message_it_was_made_of(name: str) -> None:
    source = completion(SCRIPTS[name])
    answer = from_chat(source, ASK)
    sent = to_chat({"input": [{"role": "user", "content": "Hi"}, *answer["output"]]})["messages"]
    assert sent == [{"role": "user", "content": "Hi"}, source["choices"][0]["message"]]


def test_a_streamed_request_asks_for_the_usage() -> None:
    assert to_chat({**ASK, "stream": True})["stream_options"] == {"include_usage": True}
    assert "stream_options" not in to_chat({**ASK, "stream": False})


def test_formats_tools_and_choices_take_the_shape_of_chat() -> None:
    form = {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True, "description": "A place"}
    choice = {"type": "function", "name": "weather"}
    body = {**ASK, "text": {"format": form}, "tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    chat = to_chat(body)
    inner = {"name": "place", "schema": SCHEMA, "strict": True, "description": "A place"}
    assert chat["response_format"] == {"type": "json_schema", "json_schema": inner}
    assert chat["tools"] == [CHAT_TOOL]
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert chat["parallel_tool_calls"] is False


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max"])
def test_effort_is_what_chat_calls_reasoning_effort(effort: str) -> None:
    chat = to_chat({**ASK, "reasoning": {"effort": effort}, "chat_template_kwargs": {"date": "today"}})
    assert chat == {**to_chat(ASK), "reasoning_effort": effort, "chat_template_kwargs": {"date": "today"}}
    assert parse(ChatRequest, chat, strict=True).reasoning_effort == effort


def test_log_probabilities_are_asked_for_by_include_or_by_their_number() -> None:
    wanted = {"include": ["message.output_text.logprobs"]}
    assert to_chat({**ASK, **wanted})["logprobs"] is True
    assert to_chat({**ASK, **wanted, "top_logprobs": 3})["top_logprobs"] == 3
    assert to_chat({**ASK, "top_logprobs": 3})["logprobs"] is True
    assert "logprobs" not in to_chat({**ASK, "top_logprobs": 0, "include": []})


def test_fields_of_ours_go_on_to_chat_and_unknown_ones_are_ignored_unless_strict() -> None:
    assert_extensions_reach_chat(to_chat, ASK)
    odd = {**ASK, "messages": [], "n": 7}
    assert to_chat(odd) == to_chat(ASK)
    assert_refused(lambda body: to_chat(body, strict=True), odd, "messages", "unknown_parameter")
    inner = {"input": [{"role": "user", "content": "Hi", "mood": "good"}]}
    assert_refused(lambda body: to_chat(body, strict=True), inner, "input[0].mood", "unknown_parameter")


def placed_item(item: Json) -> Json:
    return {"input": [{"role": "user", "content": "Hi"}, item]}


def placed_part(role: str) -> Any:
    return lambda part: {"input": [{"role": role, "content": [part, part]}]}


FORMAT = {"type": "json_schema", "name": "place", "schema": SCHEMA}
OBJECTS = {
    "body": Object(
        (params.ResponseCreateParamsNonStreaming, params.ResponseCreateParamsStreaming),
        lambda body: body,
        "",
        {"input": "Hi"},
        honoured={
            "include": ["message.output_text.logprobs"],
            "input": "Ho",
            "instructions": "Be brief.",
            "max_output_tokens": 5,
            "metadata": {"a": "b"},
            "model": MODEL,
            "parallel_tool_calls": False,
            "prompt_cache_key": "a",
            "reasoning": {"effort": "none"},
            "safety_identifier": "a",
            "stream": True,
            "temperature": 0.5,
            "text": {"format": {"type": "json_object"}},
            "tool_choice": "required",
            "tools": [TOOL],
            "top_logprobs": 2,
            "top_p": 0.5,
            "user": "me",
        },
        served={
            "background": ([False], True),
            "service_tier": (["auto", "default"], "priority"),
            "store": ([False], True),
            "truncation": (["disabled"], "auto"),
            "stream_options": ([], {"include_obfuscation": True}),  # its only field is checked below
        },
        together={"parallel_tool_calls": {"tools": [TOOL]}, "tool_choice": {"tools": [TOOL]}},
    ),
    "text": Object(
        (sdk.ResponseTextConfigParam,),
        lambda value: {**ASK, "text": value},
        "text",
        {},
        honoured={"format": {"type": "json_object"}},
    ),
    "format": Object(
        (sdk.ResponseFormatTextJSONSchemaConfigParam,),
        lambda value: {**ASK, "text": {"format": value}},
        "text.format",
        FORMAT,
        honoured={
            "type": "json_schema",
            "name": "other",
            "schema": {"type": "string"},
            "strict": True,
            "description": "A place",
        },
    ),
    "reasoning": Object(
        (openai.types.shared_params.Reasoning,),
        lambda value: {**ASK, "reasoning": value},
        "reasoning",
        {},
        honoured={"effort": "low"},
        served={"context": (["auto"], "all_turns"), "mode": (["standard"], "pro")},
    ),
    "stream_options": Object(
        (params.StreamOptions,),
        lambda value: {**ASK, "stream": True, "stream_options": value},
        "stream_options",
        {},
        honoured={},
        served={"include_obfuscation": ([False], True)},
    ),
    "tool": Object(
        (sdk.FunctionToolParam,),
        lambda value: {**ASK, "tools": [value]},
        "tools[0]",
        {"type": "function", "name": "weather"},
        honoured={
            "type": "function",
            "name": "other",
            "description": "Tells it",
            "parameters": SCHEMA,
            "strict": True,
        },
        served={
            "async": ([False], True),
            "allowed_callers": ([["direct"]], ["programmatic"]),
            "defer_loading": ([False], True),
        },
    ),
    "message": Object(
        (sdk.EasyInputMessageParam, items.Message),
        placed_item,
        "input[1]",
        {"type": "message", "role": "user", "content": "Ho"},
        honoured={"content": "Hu", "role": "assistant"},
        dropped={"status": "completed", "type": "message"},
    ),
    "answer": Object(
        (sdk.ResponseOutputMessageParam,),
        placed_item,
        "input[1]",
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Ho"}]},
        honoured={"content": "Hu", "role": "user"},
        dropped={"id": "msg_1", "status": "completed", "type": "message"},
        together={"role": {"content": "Ho"}},
    ),
    "input_text": Object(
        (sdk.ResponseInputTextParam,),
        placed_part("user"),
        "input[0].content[0]",
        {"type": "input_text", "text": "Ho"},
        honoured={"text": "Hu", "type": "input_text"},
    ),
    "output_text": Object(
        (sdk.ResponseOutputTextParam,),
        placed_part("assistant"),
        "input[0].content[0]",
        {"type": "output_text", "text": "Ho"},
        honoured={"text": "Hu", "type": "output_text"},
        served={"annotations": ([[]], [{"type": "file_path", "file_id": "a", "index": 0}])},
        dropped={"logprobs": [LOGPROB]},
    ),
    "function_call": Object(
        (sdk.ResponseFunctionToolCallParam,),
        placed_item,
        "input[1]",
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        honoured={"type": "function_call", "call_id": "c2", "name": "other", "arguments": '{"a": 1}'},
        served={"async": ([False], True), "caller": ([{"type": "direct"}], {})},
        dropped={"id": "fc_1", "status": "completed"},
    ),
    "function_call_output": Object(
        (items.FunctionCallOutput,),
        placed_item,
        "input[1]",
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        honoured={"type": "function_call_output", "call_id": "c2", "output": "sun"},
        served={"caller": ([{"type": "direct"}], {})},
        dropped={"id": "fc_1", "status": "completed"},
    ),
    "reasoning_item": Object(
        (sdk.ResponseReasoningItemParam,),
        placed_item,
        "input[1]",
        {"type": "reasoning"},
        honoured={
            "type": "reasoning",
            "content": [{"type": "reasoning_text", "text": "Hm"}],
            "summary": [{"type": "summary_text", "text": "Hm"}],
        },
        dropped={"id": "rs_1", "status": "completed"},
    ),
}
#: Objects inside these fields have a kind of their own above, or a test of their own below.
INNER = {("body", "stream_options"), ("function_call", "caller"), ("function_call_output", "caller")}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, one in OBJECTS.items() for name in one.fields()], ids=str
)
def test_every_field_is_honoured_or_refused(kind: str, name: str) -> None:
    if (kind, name) in INNER:
        inner = {"body": "stream_options"}.get(kind)
        assert inner in OBJECTS or name == "caller"
        return
    OBJECTS[kind].check(to_chat, name)


@pytest.mark.parametrize("kind", ["function_call", "function_call_output"])
def test_only_the_model_itself_calls_functions(kind: str) -> None:
    one = OBJECTS[kind]
    assert to_chat(one.place({**one.base, "caller": {"type": "direct"}})) == to_chat(one.place(one.base))
    assert_refused(
        to_chat, one.place({**one.base, "caller": {"type": "program", "caller_id": "a"}}), "input[1].caller.type"
    )


IMAGE = {"type": "input_image", "image_url": "data:,", "detail": "auto"}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ([], None, "invalid_type"),
        ({}, "input", "missing_required_parameter"),
        ({"input": 3}, "input", "invalid_type"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ["a"]}, "input[0]", "invalid_type"),
        ({"input": [{}]}, "input[0].type", "missing_required_parameter"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
        ({"input": [{"role": "critic", "content": "a"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"role": "user", "content": 3}]}, "input[0].content", "invalid_type"),
        ({"input": [{"role": "user", "content": [{}]}]}, "input[0].content[0].type", "missing_required_parameter"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0].type", "unsupported_parameter"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type", "unsupported_parameter"),
        ({"input": [{"type": "web_search_call", "id": "a"}]}, "input[0].type", "unsupported_parameter"),
        (
            {"input": [{"type": "function_call_output", "output": "a"}]},
            "input[0].call_id",
            "missing_required_parameter",
        ),
        ({**ASK, "include": ["reasoning.encrypted_content"]}, "include[0]", "unsupported_parameter"),
        ({**ASK, "max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({**ASK, "max_output_tokens": True}, "max_output_tokens", "invalid_type"),
        ({**ASK, "reasoning": {"effort": "huge"}}, "reasoning.effort", "invalid_value"),
        ({**ASK, "store": 0}, "store", "unsupported_parameter"),
        ({**ASK, "stream_options": {}}, "stream_options", "invalid_value"),
        ({**ASK, "text": {"format": {"type": "grammar"}}}, "text.format.type", "invalid_value"),
        ({**ASK, "text": {"format": {"type": "json_schema"}}}, "text.format.name", "missing_required_parameter"),
        ({**ASK, "tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
        ({**ASK, "tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
        ({**ASK, "tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({**ASK, "tools": [TOOL], "tool_choice": "any"}, "tool_choice", "invalid_value"),
        ({**ASK, "tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice.type", "unsupported_parameter"),
    ],
)
def test_what_is_wrong_is_named(body: Any, param: str | None, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        to_chat(body)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


@pytest.mark.parametrize(
    ("chat", "ours"),
    [
        ("max_completion_tokens", "max_output_tokens"),
        ("messages[3].content", "input"),
        ("response_format.json_schema.schema", "text.format"),
        ("tools[1].function.parameters", "tools[1].parameters"),
        ("logprobs", "include"),
        ("top_logprobs", "top_logprobs"),
        ("reasoning_effort", "reasoning.effort"),
        ("chat_template_kwargs.date", "chat_template_kwargs.date"),
        (None, None),
    ],
)
def test_an_error_of_chat_names_the_field_that_the_client_sent(chat: str | None, ours: str | None) -> None:
    error = error_from_chat(ApiError(422, f"the field {chat} is wrong", param=chat, code="x", retry_after=3))
    assert (error.status, error.param, error.code, error.retry_after) == (422, ours, "x", 3)
    assert error.message == f"the field {ours} is wrong"


# Answers


@pytest.mark.parametrize("name", SCRIPTS)
def test_answers_have_the_type_of_the_package(name: str) -> None:
    response = checked(sdk.Response, from_chat(completion(SCRIPTS[name]), {**ASK, "tools": [TOOL]}), EXTRAS)
    message = completion(SCRIPTS[name])["choices"][0]["message"]
    assert response.output_text == message["content"]
    calls = [one for one in response.output if one.type == "function_call"]
    assert [one.arguments for one in calls] == [one["function"]["arguments"] for one in message.get("tool_calls", [])]
    assert response.status == ("incomplete" if name.startswith("cut") else "completed")
    assert response.usage.input_tokens_details.cached_tokens == 16
    assert response.usage.output_tokens_details.reasoning_tokens == 3
    assert response.usage.total_tokens == 27


def test_an_answer_that_is_cut_says_so() -> None:
    response = from_chat(completion(SCRIPTS["cut"]), ASK)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][-1]["status"] == "incomplete"
    assert response["completed_at"] is None


def test_an_answer_repeats_what_its_request_said() -> None:
    request = {
        **ASK,
        "instructions": "Be brief.",
        "max_output_tokens": 5,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "temperature": 0,
        "tool_choice": {"type": "function", "name": "weather"},
        "tools": [TOOL],
        "top_p": 0.5,
        "user": "me",
        "text": {"format": {**FORMAT, "strict": True}},
    }
    response = from_chat(completion(SCRIPTS["text"]), request)
    checked(sdk.Response, response, EXTRAS)
    assert {name: response[name] for name in request if name != "input"} == {
        name: value for name, value in request.items() if name != "input"
    }
    assert response["store"] is False


def test_what_we_say_about_reuse_is_handed_on() -> None:
    report = {"kv_reuse_ratio": 0.5}
    assert from_chat({**completion(SCRIPTS["text"]), "nanobraid": report}, ASK)["nanobraid"] == report
    script = [*SCRIPTS["text"][:-1], {**SCRIPTS["text"][-1], "nanobraid": report}]
    assert streamed(script)[-1][1]["response"]["nanobraid"] == report


# Events


@pytest.mark.parametrize("name", SCRIPTS)
def test_events_have_the_types_of_the_package_and_their_numbers(name: str) -> None:
    sent = streamed(SCRIPTS[name])
    for kind, data in sent:
        assert checked(sdk.ResponseStreamEvent, data, EXTRAS).type == kind
    assert [data["sequence_number"] for _, data in sent] == list(range(len(sent)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_streamed_answer_is_the_same_as_one_that_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: CREATED + 2.5)
    whole = from_chat(completion(SCRIPTS[name]), ASK)
    assert streamed(SCRIPTS[name])[-1][1]["response"] == whole
    assert whole["completed_at"] == (None if name.startswith("cut") else CREATED + 2)


def test_events_of_a_text_come_in_the_order_of_openai() -> None:
    part = ["content_part.added", "output_text.delta", "output_text.delta", "output_text.done", "content_part.done"]
    item = ["output_item.added", *part, "output_item.done"]
    assert kinds(streamed(chunks(text("a", "b")))) == ["created", "in_progress", *item, "completed"]


def test_events_of_reasoning_text_and_calls_are_never_mixed() -> None:
    sent = streamed(SCRIPTS["all"])
    middle = {"reasoning": "reasoning_text", "message": "output_text"}
    expected = ["created", "in_progress"]
    for kind in ("reasoning", "message"):
        part = ["content_part.added", f"{middle[kind]}.delta", f"{middle[kind]}.done", "content_part.done"]
        expected += ["output_item.added", *part, "output_item.done"]
    for deltas in (2, 1):
        arguments = [*["function_call_arguments.delta"] * deltas, "function_call_arguments.done"]
        expected += ["output_item.added", *arguments, "output_item.done"]
    assert kinds(sent) == [*expected, "completed"]
    places = [data["output_index"] for _, data in sent if "output_index" in data]
    assert places == sorted(places) and set(places) == {0, 1, 2, 3}
    ids = {data.get("item_id") or data["item"]["id"] for _, data in sent if "output_index" in data}
    assert ids == {item["id"] for item in sent[-1][1]["response"]["output"]}


def test_text_behind_a_call_is_an_item_of_its_own() -> None:
    sent = streamed(chunks(text("a"), call(0, "now", "{}"), text("b"), finish="tool_calls"))
    output = sent[-1][1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "message"]
    assert len({item["id"] for item in output}) == 3


def test_wherever_chunks_are_cut_the_answer_is_the_same() -> None:
    rng = random.Random(5)
    whole = {"reasoning": "Let me see: über", "content": 'Look "here"', "arguments": '{"city": "Ulm"}'}

    def pieces(word: str) -> list[str]:
        cuts = sorted(rng.sample(range(1, len(word)), rng.randrange(len(word) - 1)))
        return [word[a:b] for a, b in zip([0, *cuts], [*cuts, len(word)], strict=True)]

    answers = []
    for _ in range(50):
        parts = [thought(*pieces(whole["reasoning"])), text(*pieces(whole["content"]))]
        calls = [*call(0, "weather", *pieces(whole["arguments"])), *call(1, "now", *pieces(whole["arguments"]))]
        sent = streamed(chunks(*parts, calls, finish="tool_calls"))
        deltas = "".join(data["delta"] for name, data in sent if name == "response.output_text.delta")
        assert deltas == whole["content"]
        answers.append(sent[-1][1]["response"]["output"])
    assert all(one == answers[0] for one in answers)
    assert [item.get("arguments") for item in answers[0]] == [None, None, whole["arguments"], whole["arguments"]]


def test_log_probabilities_go_with_their_text() -> None:
    def scored(piece: str, *found: Json) -> Json:
        return chunk({"content": piece} if piece else {}, logprobs={"content": list(found)})

    other = {**LOGPROB, "token": "x", "bytes": None}
    script = [scored("", LOGPROB), scored("üx", other), scored("y", LOGPROB), *chunks()[1:]]
    sent = streamed(script)
    for _, data in sent:
        checked(sdk.ResponseStreamEvent, data, EXTRAS | {"bytes"})
    deltas = [data["logprobs"] for name, data in sent if name == "response.output_text.delta"]
    assert [[one["token"] for one in found] for found in deltas] == [["ü", "x"], ["ü"]]
    part = sent[-1][1]["response"]["output"][0]["content"][0]
    assert [one["bytes"] for one in part["logprobs"]] == [[195, 188], [120], [195, 188]]
    assert part["logprobs"][0]["top_logprobs"] == [{"token": "u", "bytes": [117], "logprob": -1.5}]
    whole = from_chat(completion([one for one in script if isinstance(one, dict)]), ASK)
    assert whole["output"][0]["content"][0] == part


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.internal(), "server_error"),
        (errors.overloaded("full", 1), "server_error"),
        (ApiError(429, "slow down", code="rate_limit_exceeded"), "rate_limit_exceeded"),
        (errors.invalid_value("input", "input is odd"), "invalid_prompt"),
    ],
)
def test_a_stream_that_breaks_fails_and_says_why(error: ApiError, code: str) -> None:
    sent = streamed([*chunks(text("Hel"), finish=None), error, *chunks(text("lo"))])
    for _, data in sent:
        checked(sdk.ResponseStreamEvent, data, EXTRAS)
    assert kinds(sent)[-3:] == ["output_text.delta", "failed", "error"]
    failed, last = sent[-2][1]["response"], sent[-1][1]
    assert (failed["status"], failed["error"]) == ("failed", {"code": code, "message": error.message})
    assert failed["output"][0]["status"] == "incomplete"
    assert failed["output"][0]["content"][0]["text"] == "Hel"
    assert (last["message"], last["param"], last["code"]) == (error.message, error.param, error.code)
    assert last["error"] == error.envelope()["error"]


def test_a_stream_without_an_end_is_no_answer() -> None:
    assert kinds(streamed(chunks(text("Hel"), finish=None)))[-2:] == ["failed", "error"]


def test_nothing_follows_the_last_event() -> None:
    for end in (lambda one: one.finish(), lambda one: one.fail(errors.internal())):
        translator = StreamTranslator(ASK, id=ID, created=CREATED, model=MODEL)
        for one in SCRIPTS["text"]:
            translator.feed(one)
        assert end(translator)
        assert translator.finish() == [] and translator.fail(errors.internal()) == []


# The client


@pytest.fixture
def server() -> Iterator[Playing]:
    def translator(request: Json) -> StreamTranslator:
        return StreamTranslator(request, id=ID, created=CREATED, model=MODEL)

    with serving({"/v1/responses": Route(to_chat, from_chat, translator, ApiError.envelope)}) as playing:
        yield playing


@pytest.fixture
def client(server: Playing) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as one:
        yield one


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_client_reads_answers(server: Playing, client: Any, name: str) -> None:
    server.script = SCRIPTS[name]
    response = client.responses.create(model=MODEL, input="Hi", tools=[TOOL], temperature=0)
    expected = from_chat(completion(SCRIPTS[name]), {**ASK, "tools": [TOOL], "temperature": 0})
    assert [one.to_dict() for one in response.output] == expected["output"]
    assert server.asked[-1]["tools"] == [CHAT_TOOL]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_client_reads_streams(server: Playing, client: Any, name: str) -> None:
    server.script = SCRIPTS[name]
    seen = ""
    with client.responses.stream(model=MODEL, input="Hi", tools=[TOOL]) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                seen += event.delta
                assert event.snapshot == seen
        if not name.startswith("cut"):  # the client wants a completed one
            final = stream.get_final_response()
            expected = from_chat(completion(SCRIPTS[name]), ASK)["output"]
            assert [(one.type, one.id) for one in final.output] == [(one["type"], one["id"]) for one in expected]
            assert final.output_text == seen
    assert seen == completion(SCRIPTS[name])["choices"][0]["message"]["content"]
    assert server.asked[-1]["stream_options"] == {"include_usage": True}


def test_the_client_parses_what_a_schema_prescribes(server: Playing, client: Any) -> None:
    class Place(BaseModel):
        city: str

    server.script = chunks(text('{"city":', ' "Ulm"}'))
    parsed = client.responses.parse(model=MODEL, input="Where?", text_format=Place)
    assert parsed.output_parsed == Place(city="Ulm")
    asked = server.asked[-1]["response_format"]["json_schema"]
    assert (asked["name"], asked["strict"], asked["schema"]["required"]) == ("Place", True, ["city"])


def test_the_client_goes_on_with_the_items_of_an_answer(server: Playing, client: Any) -> None:
    server.script = SCRIPTS["all"]
    first = client.responses.create(model=MODEL, input="Hi", tools=[TOOL])
    outputs = [
        {"type": "function_call_output", "call_id": one.call_id, "output": json.dumps("rain")}
        for one in first.output
        if one.type == "function_call"
    ]
    server.script = SCRIPTS["text"]
    again = client.responses.create(
        model=MODEL, input=[{"role": "user", "content": "Hi"}, *first.output, *outputs], tools=[TOOL]
    )
    assert again.output_text == "Hello, you"
    assert [one["role"] for one in server.asked[-1]["messages"]] == ["user", "assistant", "tool", "tool"]
    assert server.asked[-1]["messages"][1] == completion(SCRIPTS["all"])["choices"][0]["message"]


def test_the_client_raises_on_errors(server: Playing, client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=MODEL, input="Hi", previous_response_id="resp_1")
    assert (refused.value.param, refused.value.code) == ("previous_response_id", "unsupported_parameter")
    server.script = [errors.model_not_found("x")]
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="x", input="Hi")


def test_the_client_raises_when_a_stream_breaks(server: Playing, client: Any) -> None:
    server.script = [*chunks(text("Hel"), finish=None), errors.overloaded("shutting down", 1)]
    seen = []
    with pytest.raises(openai.APIError, match="shutting down") as caught:
        for event in client.responses.create(model=MODEL, input="Hi", stream=True):
            seen.append(event.type)
    assert caught.value.code == "server_is_overloaded"
    assert seen[-1] == "response.failed"
