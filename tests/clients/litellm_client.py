"""The litellm SDK: answers, streams, tools, error classes."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no table of prices from the network

import litellm
from checks import ASK, ASK_WEATHER, CITY_SCHEMA, MODEL, WEATHER, main, raises, url

litellm.suppress_debug_info = True


def complete(**options: Any) -> Any:
    given = {"messages": ASK, "max_tokens": 60, "temperature": 0, "num_retries": 0, "max_retries": 0, **options}
    return litellm.completion(model=f"hosted_vllm/{MODEL}", api_base=f"{url()}/v1", api_key="unused", **given)


def check_chat_and_stream() -> None:
    answer = complete()
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.prompt_tokens > 0
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


def check_openai_provider() -> None:
    answer = litellm.completion(
        model=f"openai/{MODEL}", api_base=f"{url()}/v1", api_key="unused", messages=ASK, max_tokens=20, temperature=0
    )
    assert "Paris" in answer.choices[0].message.content


def check_text_completion() -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=f"{url()}/v1",
        api_key="unused",
        prompt="The capital of France is",
        max_tokens=8,
        temperature=0,
    )
    assert "Paris" in answer.choices[0].text


def check_tools_and_schema() -> None:
    options = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    answer = complete(messages=ASK_WEATHER, max_tokens=150, **options)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert "unit" in json.loads(answer.choices[0].message.tool_calls[0].function.arguments)
    response_format = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA}}
    assert "name" in json.loads(complete(response_format=response_format).choices[0].message.content)


def check_errors() -> None:
    with raises(litellm.ContextWindowExceededError):
        complete(messages=[{"role": "user", "content": "word " * 20000}])
    with raises(litellm.NotFoundError):
        litellm.completion(
            model="hosted_vllm/no-such-model", api_base=f"{url()}/v1", api_key="unused", messages=ASK, max_retries=0
        )
    with raises(litellm.BadRequestError):
        complete(temperature=3)


if __name__ == "__main__":
    sys.exit(main("litellm", globals()))
