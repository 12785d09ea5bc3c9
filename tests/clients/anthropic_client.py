"""The anthropic SDK: messages, streams, tools and their results, errors."""

from __future__ import annotations

import sys
from typing import Any

import anthropic
from checks import ASK, ASK_WEATHER, KEY, MODEL, WEATHER, main, raises, small_url, url

TOOL = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": WEATHER["function"]["parameters"],  # type: ignore[index]
}


GREEDY = {"temperature": 0}  # 2.x of the SDK has no argument for it


def client(**options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url(), **{"api_key": "unused", "max_retries": 0, **options})


def check_message() -> None:
    message = client().messages.create(model=MODEL, max_tokens=20, extra_body=GREEDY, messages=ASK)
    assert "Paris" in message.content[0].text
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message.usage.output_tokens > 0
    counted = client().messages.count_tokens(model=MODEL, messages=ASK)
    sent = message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
    assert counted.input_tokens == sent


def check_system() -> None:
    with_system = client().messages.create(
        model=MODEL, max_tokens=4, extra_body=GREEDY, messages=ASK, system="You are a pirate who only talks of ships."
    )
    without = client().messages.count_tokens(model=MODEL, messages=ASK)
    usage = with_system.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) != without.input_tokens


def check_stream() -> None:
    options = {"model": MODEL, "max_tokens": 20, "extra_body": GREEDY, "messages": ASK}
    whole = client().messages.create(**options)
    with client().messages.stream(**options) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == final.content[0].text == whole.content[0].text
    assert len(texts) > 3
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def check_stop_sequence() -> None:
    message = client().messages.create(
        model=MODEL, max_tokens=30, extra_body=GREEDY, messages=ASK, stop_sequences=["Paris"]
    )
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence == "Paris"


def check_tools() -> None:
    options = {"model": MODEL, "max_tokens": 120, "extra_body": GREEDY, "messages": ASK_WEATHER, "tools": [TOOL]}
    message = client().messages.create(**options, tool_choice={"type": "any"})
    use = next(block for block in message.content if block.type == "tool_use")
    assert message.stop_reason == "tool_use"
    assert use.name == "get_weather"
    assert use.input["unit"] in ("celsius", "fahrenheit")
    with client().messages.stream(**options, tool_choice={"type": "tool", "name": "get_weather"}) as stream:
        final = stream.get_final_message()
    streamed = next(block for block in final.content if block.type == "tool_use")
    assert set(streamed.input) == {"city", "unit"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "21 degrees"}
    options["messages"] = [
        *ASK_WEATHER,
        {"role": "assistant", "content": [block.model_dump() for block in message.content]},
        {"role": "user", "content": [result]},
    ]
    after = client().messages.create(**options, tool_choice={"type": "none"})
    assert after.content[0].type == "text"


def check_errors() -> None:
    with raises(anthropic.NotFoundError) as caught:
        client().messages.create(model="no-such-model", max_tokens=5, messages=ASK)
    assert caught[0].body["type"] == "error"
    assert caught[0].body["error"]["type"] == "not_found_error"
    with raises(anthropic.BadRequestError) as caught:
        client().messages.create(model=MODEL, max_tokens=5, messages=ASK, extra_body={"temperature": 7})
    assert caught[0].body["error"]["type"] == "invalid_request_error"
    bad = anthropic.Anthropic(base_url=small_url(), api_key="wrong", max_retries=0)
    with raises(anthropic.AuthenticationError):
        bad.messages.create(model=MODEL, max_tokens=5, messages=ASK)
    good = anthropic.Anthropic(base_url=small_url(), api_key=KEY, max_retries=3)
    assert good.messages.create(model=MODEL, max_tokens=5, messages=ASK).usage.output_tokens > 0


if __name__ == "__main__":
    sys.exit(main("anthropic", globals()))
