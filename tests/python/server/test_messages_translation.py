"""Anthropic's Messages as a translation: checked against the types of the anthropic package and run with its client."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

anthropic = pytest.importorskip("anthropic")

from anthropic import types as sdk  # noqa: E402
from anthropic.types import beta  # noqa: E402
from anthropic.types import message_create_params as params  # noqa: E402
from anthropic.types.beta import message_create_params as beta_params  # noqa: E402
from pydantic import BaseModel  # noqa: E402
from scripted_chat import (  # noqa: E402
    ID,
    MODEL,
    Json,
    Playing,
    Route,
    call,
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
from nanobraid.server.messages import (  # noqa: E402
    anthropic_error,
    error_from_chat,
    from_chat,
    from_count,
    to_chat,
    to_count,
)
from nanobraid.server.messages_stream import StreamTranslator  # noqa: E402

HI = {"role": "user", "content": "Hi"}
ASK: Json = {"model": MODEL, "max_tokens": 50, "messages": [HI]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "Tells it", "input_schema": SCHEMA}
CHAT_TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": SCHEMA}}
MARK = {"type": "ephemeral", "ttl": "5m"}
PARALLEL = [*call(0, "weather", '{"city":', ' "Ulm"}'), *call(1, "weather", '{"city": "Aue"}')]

SCRIPTS: dict[str, list[Any]] = {
    "text": chunks(text("Hello", ", ", "you")),
    "nothing": chunks(),
    "cut": chunks(text("Hello"), finish="length"),
    "cut thought": chunks(thought("Hm"), finish="length"),
    "stopped": chunks(text("Hello"), stop_reason="END"),
    "stopped by a token": chunks(text("Hello"), stop_reason=2),
    "reasoning": chunks(thought("Let ", "me"), text("Yes")),
    "calls": chunks(PARALLEL, finish="tool_calls"),
    "prescribed call": chunks(call(0, "weather", '{"city": "Ulm"}'), finish="stop"),
    "all": chunks(thought("Hm"), text("Look:"), PARALLEL, finish="tool_calls"),
    "no arguments": chunks(call(0, "now"), finish="tool_calls"),
    "cut behind a call": chunks(call(0, "weather", '{"city": "Ulm"}'), finish="length"),
}
ENDS = {
    "text": ("end_turn", None),
    "nothing": ("end_turn", None),
    "cut": ("max_tokens", None),
    "cut thought": ("max_tokens", None),
    "stopped": ("stop_sequence", "END"),
    "stopped by a token": ("end_turn", None),
    "reasoning": ("end_turn", None),
    "calls": ("tool_use", None),
    "prescribed call": ("tool_use", None),
    "all": ("tool_use", None),
    "no arguments": ("tool_use", None),
    "cut behind a call": ("max_tokens", None),
}
CUT_CALL = chunks(text("Look:"), call(0, "weather", '{"ci'), finish="length")


def streamed(script: list[Any], request: Json | None = None) -> list[tuple[str, Json]]:
    return events(StreamTranslator(request or ASK, id=ID, model=MODEL), script)


def kinds(sent: list[tuple[str, Json]]) -> list[str]:
    """The events with the type of their delta instead of their own name, if they have one."""
    return [data.get("delta", {}).get("type", name) for name, data in sent]


def bare(*content: Any, role: str = "user", **more: Any) -> Json:
    return {"max_tokens": 5, "messages": [{"role": role, "content": [*content]}], **more}


# Requests


def test_the_simplest_request() -> None:
    chat = {"model": MODEL, "max_completion_tokens": 50, "messages": [HI]}
    assert to_chat(ASK) == chat
    assert to_chat({**ASK, "system": "Be brief."})["messages"] == [{"role": "system", "content": "Be brief."}, HI]


def test_a_conversation_with_tools_and_thinking() -> None:
    body = {
        "max_tokens": 5,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": MARK}, {"type": "text", "text": "Be kind."}],
        "messages": [
            HI,
            {"role": "user", "content": [{"type": "text", "text": "Ho"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": ""},
                    {"type": "text", "text": "Look:", "citations": None},
                    {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Köln"}},
                    {"type": "tool_use", "id": "c2", "name": "weather", "input": {}, "caller": {"type": "direct"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": "rain"},
                    {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "sun"}]},
                    {"type": "text", "text": "So?"},
                ],
            },
            {"role": "assistant", "content": "Rain."},
            {"role": "assistant", "content": "And sun."},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c3"}]},
            {"role": "system", "content": "Now in Latin."},
        ],
    }
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}},
        {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
    ]

    def parts(*texts: str) -> list[Json]:
        return [{"type": "text", "text": one} for one in texts]

    assert to_chat(body)["messages"] == [
        {"role": "system", "content": parts("Be brief.", "Be kind.")},
        {"role": "user", "content": parts("Hi", "Ho")},
        {"role": "assistant", "content": "Look:", "reasoning_content": "Hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": parts("Rain.", "And sun.")},
        {"role": "tool", "tool_call_id": "c3", "content": ""},
        {"role": "system", "content": "Now in Latin."},
    ]


def test_a_tool_that_failed_says_so_to_the_model() -> None:
    block = {"type": "tool_result", "tool_use_id": "c1", "content": "no such city"}
    assert to_chat(bare({**block, "is_error": True}))["messages"][0]["content"] == "Error: no such city"
    assert to_chat(bare({**block, "is_error": False}))["messages"][0]["content"] == "no such city"
    several = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    content = to_chat(bare({**block, "content": several, "is_error": True}))["messages"][0]["content"]
    assert content == [{"type": "text", "text": "Error: a"}, several[1]]


def test_an_answer_that_the_client_has_begun_is_continued() -> None:
    begun = {"role": "assistant", "content": "The best answer is ("}
    sent = to_chat({**ASK, "messages": [HI, begun]})
    more = {"continue_final_message": True, "add_generation_prompt": False}
    assert sent == {**to_chat(ASK), "messages": [HI, begun], **more}


@pytest.mark.parametrize("name", ["all", "reasoning", "calls", "text"])
def test_an_answer_sent_back_is_the_message_it_was_made_of(name: str) -> None:
    source = completion(SCRIPTS[name])
    answer = from_chat(source, ASK)
    sent = to_chat({**ASK, "messages": [HI, {"role": "assistant", "content": answer["content"]}, HI]})["messages"]
    assert sent == [HI, source["choices"][0]["message"], HI]


@pytest.mark.parametrize(
    ("choice", "chat"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        (
            {"type": "tool", "name": "weather"},
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        ),
        (
            {"type": "any", "disable_parallel_tool_use": True},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"type": "auto", "disable_parallel_tool_use": False},
            {"tool_choice": "auto", "parallel_tool_calls": True},
        ),
    ],
)
def test_tools_and_choices_take_the_shape_of_chat(choice: Json, chat: Json) -> None:
    sent = to_chat({**ASK, "tools": [TOOL], "tool_choice": choice})
    assert sent == {**to_chat(ASK), "tools": [CHAT_TOOL], **chat}


BUDGET = {"type": "enabled", "budget_tokens": 1024}


@pytest.mark.parametrize(
    ("body", "chat"),
    [
        ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}),
        ({"thinking": {"type": "adaptive"}}, {"reasoning_effort": "high"}),
        ({"thinking": BUDGET}, {"reasoning_effort": "high", "chat_template_kwargs": {"thinking_budget": 1024}}),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "max"}),
        ({"output_config": {"effort": "low"}, "thinking": {"type": "adaptive"}}, {"reasoning_effort": "low"}),
        (
            {"chat_template_kwargs": {"date": "today"}, "thinking": {"type": "disabled"}},
            {"reasoning_effort": "none", "chat_template_kwargs": {"date": "today"}},
        ),
    ],
)
def test_thinking_and_effort_are_what_chat_calls_reasoning_effort(body: Json, chat: Json) -> None:
    assert to_chat({**ASK, **body}) == {**to_chat(ASK), **chat}


def test_fields_about_thinking_may_not_contradict() -> None:
    both = {**ASK, "thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}
    assert_refused(to_chat, both, "output_config.effort")
    both = {**ASK, "thinking": BUDGET, "chat_template_kwargs": {"thinking_budget": 5}}
    assert_refused(to_chat, both, "chat_template_kwargs.thinking_budget", "invalid_value")


def test_a_format_takes_the_shape_of_chat() -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    inner = {"name": "output", "schema": SCHEMA, "strict": True}
    sent = to_chat({**ASK, "output_config": {"format": form}})
    assert sent["response_format"] == {"type": "json_schema", "json_schema": inner}


def test_a_streamed_request_asks_for_the_usage() -> None:
    assert to_chat({**ASK, "stream": True})["stream_options"] == {"include_usage": True}
    assert "stream_options" not in to_chat({**ASK, "stream": False})


def test_marks_for_the_cache_are_taken_wherever_they_may_stand() -> None:
    plain = {
        **ASK,
        "tools": [TOOL],
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "rain"}]},
        ],
    }
    marked = {
        **plain,
        "cache_control": MARK,
        "tools": [{**TOOL, "cache_control": MARK}],
        "system": [{**plain["system"][0], "cache_control": MARK}],
        "messages": [
            {**turn, "content": [{**block, "cache_control": {"type": "ephemeral"}} for block in turn["content"]]}
            for turn in plain["messages"]
        ],
    }
    assert to_chat(marked) == to_chat(plain)
    assert_refused(to_chat, {**ASK, "cache_control": {"type": "forever"}}, "cache_control.type", "invalid_value")
    tools = [{**TOOL, "cache_control": {"type": "ephemeral", "ttl": "1y"}}]
    assert_refused(to_chat, {**ASK, "tools": tools}, "tools[0].cache_control.ttl", "invalid_value")


def test_fields_of_ours_go_on_to_chat_and_unknown_ones_are_ignored_unless_strict() -> None:
    assert_extensions_reach_chat(to_chat, ASK)
    odd = {**ASK, "n": 7}
    assert to_chat(odd) == to_chat(ASK)
    assert_refused(lambda body: to_chat(body, strict=True), odd, "n", "unknown_parameter")
    inner = {**ASK, "messages": [{**HI, "mood": "good"}]}
    assert_refused(lambda body: to_chat(body, strict=True), inner, "messages[0].mood", "unknown_parameter")


def placed_block(block: Json) -> Json:
    return bare(block)


def placed_answer(block: Json) -> Json:
    return {"max_tokens": 5, "messages": [HI, {"role": "assistant", "content": [block]}, HI]}


def placed_choice(choice: Json) -> Json:
    return {**ASK, "tools": [TOOL], "tool_choice": choice}


#: Fields of requests for an answer that those to count have too, and what changes.
SHARED: Json = {
    "messages": [{"role": "user", "content": "Ho"}],
    "model": MODEL,
    "output_config": {"effort": "low"},
    "system": "Be brief.",
    "thinking": {"type": "adaptive"},
    "tool_choice": {"type": "any"},
    "tools": [TOOL],
}
WITH_TOOLS = {"tool_choice": {"tools": [TOOL]}}
OBJECTS = {
    "body": Object(
        (
            params.MessageCreateParamsNonStreaming,
            params.MessageCreateParamsStreaming,
            beta_params.MessageCreateParamsNonStreaming,
        ),
        lambda body: body,
        "",
        {"max_tokens": 50, "messages": [HI]},
        honoured={
            **SHARED,
            "max_tokens": 5,
            "metadata": {"user_id": "me"},
            "stop_sequences": ["END"],
            "stream": True,
            "temperature": 0.5,
            "top_k": 5,
            "top_p": 0.5,
        },
        served={
            "service_tier": (["auto", "standard_only"], "priority"),
            "speed": (["standard"], "fast"),
        },
        dropped={"cache_control": MARK},  # a mark for the cache, which every prefix goes to
        together=WITH_TOOLS,
    ),
    "thinking": Object(
        (sdk.ThinkingConfigEnabledParam, sdk.ThinkingConfigAdaptiveParam, sdk.ThinkingConfigDisabledParam),
        lambda value: {**ASK, "thinking": value},
        "thinking",
        {"type": "enabled", "budget_tokens": 1024},
        honoured={"type": "disabled", "budget_tokens": 2048},
        dropped={"display": "omitted"},  # changes the answer, see below
    ),
    "output_config": Object(
        (sdk.OutputConfigParam, beta.BetaOutputConfigParam),
        lambda value: {**ASK, "output_config": value},
        "output_config",
        {},
        honoured={"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
    ),
    "format": Object(
        (sdk.JSONOutputFormatParam,),
        lambda value: {**ASK, "output_config": {"format": value}},
        "output_config.format",
        {"type": "json_schema", "schema": SCHEMA},
        honoured={"type": "json_schema", "schema": {"type": "object"}},
    ),
    "metadata": Object(
        (sdk.MetadataParam,), lambda value: {**ASK, "metadata": value}, "metadata", {}, honoured={"user_id": "me"}
    ),
    "tool": Object(
        (sdk.ToolParam,),
        lambda value: {**ASK, "tools": [value]},
        "tools[0]",
        {"name": "weather", "input_schema": SCHEMA},
        honoured={"name": "other", "description": "Tells it", "input_schema": {"type": "object"}, "strict": True},
        served={
            "allowed_callers": ([["direct"]], ["code_execution_20250825"]),
            "defer_loading": ([False], True),
            "eager_input_streaming": ([True], False),
            "type": (["custom"], "bash_20250124"),
        },
        dropped={"cache_control": MARK},
    ),
    "tool_choice": Object(
        (sdk.ToolChoiceAutoParam, sdk.ToolChoiceAnyParam, sdk.ToolChoiceToolParam, sdk.ToolChoiceNoneParam),
        placed_choice,
        "tool_choice",
        {"type": "tool", "name": "weather"},
        honoured={"type": "any", "name": "other", "disable_parallel_tool_use": True},
    ),
    "text": Object(
        (sdk.TextBlockParam,),
        placed_block,
        "messages[0].content[0]",
        {"type": "text", "text": "Ho"},
        honoured={"type": "text", "text": "Hu"},
        served={"citations": ([[]], [{"type": "char_location"}])},
        dropped={"cache_control": MARK},
    ),
    "tool_use": Object(
        (sdk.ToolUseBlockParam,),
        placed_answer,
        "messages[1].content[0]",
        {"type": "tool_use", "id": "c1", "name": "weather", "input": {}},
        honoured={"type": "tool_use", "id": "c2", "name": "other", "input": {"city": "Ulm"}},
        dropped={"cache_control": MARK, "caller": {"type": "direct"}},
    ),
    "tool_result": Object(
        (sdk.ToolResultBlockParam,),
        placed_block,
        "messages[0].content[0]",
        {"type": "tool_result", "tool_use_id": "c1"},
        honoured={"type": "tool_result", "tool_use_id": "c2", "content": "rain", "is_error": True},
        dropped={"cache_control": MARK},
    ),
    "thinking_block": Object(
        (sdk.ThinkingBlockParam,),
        placed_answer,
        "messages[1].content[0]",
        {"type": "thinking", "thinking": "Hm"},
        honoured={"type": "thinking", "thinking": "Ah"},
        dropped={"signature": "c2lnbmVk"},
    ),
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, one in OBJECTS.items() for name in one.fields()], ids=str
)
def test_every_field_is_honoured_or_refused(kind: str, name: str) -> None:
    OBJECTS[kind].check(to_chat, name)


COUNTED = Object(
    (sdk.MessageCountTokensParams, beta.message_count_tokens_params.MessageCountTokensParams),
    lambda body: body,
    "",
    {"messages": [HI]},
    honoured=SHARED,
    served={"speed": (["standard"], "fast")},
    dropped={"cache_control": MARK},
    together=WITH_TOOLS,
)


@pytest.mark.parametrize("name", COUNTED.fields())
def test_every_field_of_a_request_to_count_is_honoured_or_refused(name: str) -> None:
    COUNTED.check(to_count, name)


def test_what_is_counted_is_the_prompt_of_the_same_request_for_an_answer() -> None:
    body = {name: value for name, value in {**ASK, **SHARED}.items() if name != "max_tokens"}
    answer = to_chat({**body, "max_tokens": 5})
    assert answer.pop("max_completion_tokens") == 5
    assert to_count(body) == answer
    assert from_count(7) == {"input_tokens": 7}


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}
CALLED = {"type": "tool_use", "id": "c1", "name": "weather", "input": {}}
FAILED = {"type": "tool_result", "tool_use_id": "c1", "content": [IMAGE]}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ("x", None, "invalid_type"),
        ({"messages": [HI]}, "max_tokens", "missing_required_parameter"),
        ({"max_tokens": 5}, "messages", "missing_required_parameter"),
        ({**ASK, "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({**ASK, "max_tokens": 5.5}, "max_tokens", "invalid_type"),
        ({**ASK, "messages": []}, "messages", "invalid_value"),
        ({**ASK, "messages": {}}, "messages", "invalid_type"),
        ({**ASK, "messages": [HI, 3]}, "messages[1]", "invalid_type"),
        ({**ASK, "messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({**ASK, "messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({**ASK, "messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_type"),
        ({**ASK, "messages": [HI, {"role": "assistant", "content": [CALLED]}]}, "messages[1]", "invalid_value"),
        ({**ASK, "max_tokens": True}, "max_tokens", "invalid_type"),
        (bare(IMAGE), "messages[0].content[0].type", "unsupported_parameter"),
        (bare({"type": "document"}), "messages[0].content[0].type", "unsupported_parameter"),
        (bare(FAILED), "messages[0].content[0].content[0].type", "unsupported_parameter"),
        (bare({}), "messages[0].content[0].type", "missing_required_parameter"),
        (bare({"type": "text"}), "messages[0].content[0].text", "missing_required_parameter"),
        (
            bare({"type": "text", "text": "a"}, {"type": "tool_result", "tool_use_id": "c1"}),
            "messages[0].content[1]",
            "invalid_value",
        ),
        (bare({"type": "redacted_thinking", "data": ""}, role="assistant"), "messages[0].content[0].type", None),
        ({**ASK, "metadata": {"user_id": 3}}, "metadata.user_id", "invalid_type"),
        ({**ASK, "stop_sequences": "END"}, "stop_sequences", "invalid_type"),
        ({**ASK, "stop_sequences": ["END", ""]}, "stop_sequences[1]", "invalid_value"),
        ({**ASK, "stop_sequences": [3]}, "stop_sequences[0]", "invalid_type"),
        ({**ASK, "system": [IMAGE]}, "system[0].type", "unsupported_parameter"),
        ({**ASK, "thinking": {"type": "enabled"}}, "thinking.budget_tokens", "missing_required_parameter"),
        ({**ASK, "thinking": {"type": "between_tools"}}, "thinking.type", "unsupported_parameter"),
        ({**ASK, "tool_choice": {"type": "any"}}, "tool_choice", "invalid_value"),
        ({**ASK, "tools": [TOOL], "tool_choice": "any"}, "tool_choice", "invalid_type"),
        ({**ASK, "tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name", "missing_required_parameter"),
        ({**ASK, "tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type", "unsupported_parameter"),
        ({**ASK, "tools": [{"name": "weather"}]}, "tools[0].input_schema", "missing_required_parameter"),
    ],
)
def test_what_is_wrong_is_named(body: Any, param: str | None, code: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        to_chat(body)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.code == (code or "unsupported_parameter")


@pytest.mark.parametrize(
    ("chat", "ours"),
    [
        ("max_completion_tokens", "max_tokens"),
        ("messages[3].content", "messages"),
        ("stop", "stop_sequences"),
        ("stop[1]", "stop_sequences"),
        ("user", "metadata.user_id"),
        ("reasoning_effort", "thinking"),
        ("response_format.json_schema.schema", "output_config.format"),
        ("tools[1].function.parameters", "tools[1].input_schema"),
        ("tools[1].function.name", "tools[1].name"),
        ("temperature", "temperature"),
        (None, None),
    ],
)
def test_an_error_of_chat_names_the_field_that_the_client_sent(chat: str | None, ours: str | None) -> None:
    error = error_from_chat(ApiError(422, f"the field {chat} is wrong", param=chat, code="x"))
    assert (error.status, error.param, error.message) == (422, ours, f"the field {ours} is wrong")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (415, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_errors_have_the_envelope_of_anthropic(status: int, kind: str) -> None:
    body = anthropic_error(ApiError(status, "it is wrong", param="top_k"))
    assert body == {"type": "error", "error": {"type": kind, "message": "top_k: it is wrong"}}
    if kind != "request_too_large":  # the package has no type for it
        checked(sdk.ErrorResponse, body)
    assert anthropic_error(errors.missing("model"))["error"]["message"].count("model") == 1


# Answers


@pytest.mark.parametrize("name", SCRIPTS)
def test_answers_have_the_type_of_the_package(name: str) -> None:
    source = completion(SCRIPTS[name])
    answer = checked(sdk.Message, from_chat(source, ASK))
    message = source["choices"][0]["message"]
    assert "".join(one.text for one in answer.content if one.type == "text") == message["content"]
    assert [one.type for one in answer.content].count("tool_use") == len(message.get("tool_calls", []))
    assert (answer.stop_reason, answer.stop_sequence) == ENDS[name]
    usage = answer.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 16, 7)
    assert usage.output_tokens_details.thinking_tokens == 3


def test_calls_carry_their_input() -> None:
    content = from_chat(completion(SCRIPTS["all"]), ASK)["content"]
    assert content == [
        {"type": "thinking", "thinking": "Hm", "signature": ""},
        {"type": "text", "text": "Look:"},
        {"type": "tool_use", "id": "call_0", "name": "weather", "input": {"city": "Ulm"}},
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Aue"}},
    ]


def test_a_call_that_is_cut_off_is_not_handed_over() -> None:
    answer = from_chat(completion(CUT_CALL), ASK)
    assert (answer["stop_reason"], answer["content"]) == ("max_tokens", [{"type": "text", "text": "Look:"}])


@pytest.mark.parametrize("arguments", ['{"city"', "[1]", '"x"', "[" * 100_000])
def test_a_call_without_an_object_is_an_error_either_way(arguments: str) -> None:
    script = chunks(call(0, "weather", arguments), call(1, "weather", "{}"), finish="tool_calls")
    with pytest.raises(ApiError, match="weather") as caught:
        from_chat(completion(script), ASK)
    assert caught.value.status == 500
    assert streamed(script)[-1] == ("error", anthropic_error(caught.value))
    last = chunks(call(0, "weather", arguments), finish="tool_calls")
    assert streamed(last)[-1] == ("error", anthropic_error(caught.value))


def test_thinking_is_left_empty_for_who_wants_it_so() -> None:
    request = {**ASK, "thinking": {"type": "adaptive", "display": "omitted"}}
    empty = {"type": "thinking", "thinking": "", "signature": ""}
    assert from_chat(completion(SCRIPTS["reasoning"]), request)["content"][0] == empty
    sent = streamed(SCRIPTS["reasoning"], request)
    assert "thinking_delta" not in kinds(sent)
    assert sent[2][1]["content_block"] == empty


def test_what_we_say_about_reuse_is_handed_on() -> None:
    report = {"kv_reuse_ratio": 0.5}
    assert from_chat({**completion(SCRIPTS["text"]), "nanobraid": report}, ASK)["nanobraid"] == report
    script = [*SCRIPTS["text"][:-1], {**SCRIPTS["text"][-1], "nanobraid": report}]
    assert streamed(script)[-2][1]["nanobraid"] == report


# Events


@pytest.mark.parametrize("name", SCRIPTS)
def test_events_have_the_types_of_the_package(name: str) -> None:
    for kind, data in streamed(SCRIPTS[name]):
        assert data["type"] == kind
        if kind != "ping":
            checked(sdk.RawMessageStreamEvent, data)


def test_events_of_a_text_come_in_the_order_of_anthropic() -> None:
    block = ["content_block_start", "text_delta", "text_delta", "content_block_stop"]
    sent = streamed(chunks(text("a", "b")))
    assert kinds(sent) == ["message_start", "ping", *block, "message_delta", "message_stop"]


def test_blocks_are_never_mixed() -> None:
    sent = streamed(SCRIPTS["all"])
    blocks = [["thinking_delta"], ["text_delta"], ["input_json_delta"] * 2, ["input_json_delta"]]
    middle = [kind for block in blocks for kind in ("content_block_start", *block, "content_block_stop")]
    assert kinds(sent) == ["message_start", "ping", *middle, "message_delta", "message_stop"]
    places = [data["index"] for _, data in sent if "index" in data]
    assert places == sorted(places) and set(places) == {0, 1, 2, 3}


def test_the_length_of_the_prompt_may_be_known_at_once() -> None:
    translator = StreamTranslator(ASK, id=ID, model=MODEL, input_tokens=20)
    assert translator.begin()[0][1]["message"]["usage"]["input_tokens"] == 20
    assert translator.ping() == ("ping", {"type": "ping"})


@pytest.mark.parametrize(
    "error", [errors.internal(), errors.overloaded("full", 1), errors.invalid_value("top_k", "odd")]
)
def test_a_stream_that_breaks_says_why(error: ApiError) -> None:
    sent = streamed([*chunks(text("Hel"), finish=None), error, *chunks(text("lo"))])
    assert kinds(sent)[-2:] == ["text_delta", "error"]
    assert sent[-1][1] == anthropic_error(error)


def test_a_stream_without_an_end_is_no_answer() -> None:
    assert kinds(streamed(chunks(text("Hel"), finish=None)))[-2:] == ["text_delta", "error"]


def test_nothing_follows_the_last_event() -> None:
    for end in (lambda one: one.finish(), lambda one: one.fail(errors.internal())):
        translator = StreamTranslator(ASK, id=ID, model=MODEL)
        for one in SCRIPTS["text"]:
            translator.feed(one)
        assert end(translator)
        assert translator.finish() == [] and translator.fail(errors.internal()) == []


# The client


@pytest.fixture
def server() -> Iterator[Playing]:
    def translator(request: Json) -> StreamTranslator:
        return StreamTranslator(request, id=ID, model=MODEL)

    def count(body: Any) -> Json:
        return from_count(sum(len(one["content"]) for one in to_count(body)["messages"]))

    route = Route(to_chat, from_chat, translator, anthropic_error)
    with serving({"/v1/messages": route}, {"/v1/messages/count_tokens": count}) as playing:
        yield playing


@pytest.fixture
def client(server: Playing) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0) as one:
        yield one


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_client_reads_answers(server: Playing, client: Any, name: str) -> None:
    server.script = SCRIPTS[name]
    answer = client.messages.create(**ASK, tools=[TOOL], stop_sequences=["END"])
    assert [one.to_dict() for one in answer.content] == from_chat(completion(SCRIPTS[name]), ASK)["content"]
    assert (answer.stop_reason, answer.stop_sequence) == ENDS[name]
    assert (server.asked[-1]["tools"], server.asked[-1]["stop"]) == ([CHAT_TOOL], ["END"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_client_puts_streams_together_to_the_same_answer(server: Playing, client: Any, name: str) -> None:
    server.script = SCRIPTS[name]
    with client.messages.stream(**ASK, tools=[TOOL]) as stream:
        seen = "".join(event.text for event in stream if event.type == "text")
        final = stream.get_final_message().to_dict()
    whole = from_chat(completion(SCRIPTS[name]), ASK)
    assert {key: final[key] for key in whole if key in final} == {key: whole[key] for key in whole if key in final}
    assert set(whole) - set(final) <= {"stop_sequence"}
    assert seen == completion(SCRIPTS[name])["choices"][0]["message"]["content"]
    assert server.asked[-1]["stream_options"] == {"include_usage": True}


def test_wherever_chunks_are_cut_the_client_gets_the_same(server: Playing, client: Any) -> None:
    rng = random.Random(5)

    def pieces(word: str) -> list[str]:
        cuts = sorted(rng.sample(range(1, len(word)), rng.randrange(len(word) - 1)))
        return [word[a:b] for a, b in zip([0, *cuts], [*cuts, len(word)], strict=True)]

    for _ in range(10):
        parts = [thought(*pieces("Let me see: über")), text(*pieces('Look "here"'))]
        calls = [*call(0, "weather", *pieces('{"city": "Ulm"}')), *call(1, "now", *pieces('{"city": "Aue"}'))]
        server.script = chunks(*parts, calls, finish="tool_calls")
        with client.messages.stream(**ASK) as stream:
            content = [one.to_dict() for one in stream.get_final_message().content]
        assert content == from_chat(completion(server.script), ASK)["content"]


def test_the_client_gets_what_there_is_of_a_call_that_is_cut_off(server: Playing, client: Any) -> None:
    server.script = CUT_CALL
    with client.messages.stream(**ASK, tools=[TOOL]) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.content[-1].type) == ("max_tokens", "tool_use")


def test_the_client_parses_what_a_schema_prescribes(server: Playing, client: Any) -> None:
    class Place(BaseModel):
        city: str

    server.script = chunks(text('{"city":', ' "Ulm"}'))
    parsed = client.messages.parse(**ASK, output_format=Place)
    assert parsed.parsed_output == Place(city="Ulm")
    assert server.asked[-1]["response_format"]["json_schema"]["schema"]["required"] == ["city"]


def test_the_client_goes_on_with_the_content_of_an_answer(server: Playing, client: Any) -> None:
    server.script = SCRIPTS["all"]
    first = client.messages.create(**ASK, tools=[TOOL])
    results = [
        {"type": "tool_result", "tool_use_id": one.id, "content": "rain"}
        for one in first.content
        if one.type == "tool_use"
    ]
    server.script = SCRIPTS["text"]
    turns = [HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    again = client.messages.create(model=MODEL, max_tokens=5, messages=turns, tools=[TOOL])
    assert again.content[0].text == "Hello, you"
    assert [one["role"] for one in server.asked[-1]["messages"]] == ["user", "assistant", "tool", "tool"]
    assert server.asked[-1]["messages"][1] == completion(SCRIPTS["all"])["choices"][0]["message"]


def test_the_client_counts(client: Any) -> None:
    assert client.messages.count_tokens(model=MODEL, messages=[HI], system="Be").input_tokens == 4


def test_the_client_raises_on_errors(server: Playing, client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="inference_geo") as refused:
        client.messages.create(**ASK, inference_geo="eu")
    assert refused.value.body["error"]["type"] == "invalid_request_error"
    server.script = [errors.model_not_found("x")]
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**ASK)
    server.script = [errors.overloaded("full", 1)]
    with pytest.raises(anthropic.InternalServerError, match="overloaded_error"):
        client.messages.create(**ASK)


def test_the_client_raises_when_a_stream_breaks(server: Playing, client: Any) -> None:
    server.script = [*chunks(text("Hel"), finish=None), errors.overloaded("shutting down", 1)]
    seen = []
    with pytest.raises(anthropic.APIStatusError, match="shutting down"):
        for event in client.messages.create(**ASK, stream=True):
            seen.append(event.type)
    assert seen[-1] == "content_block_delta"
