"""llama-index-llms-openai-like: chat, completions, streams, tools."""

import sys
from typing import Annotated, Any, Literal

from checks import MODEL, main, url
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import Field


def model(**options: Any) -> OpenAILike:
    given = {"temperature": 0, "max_tokens": 100, "max_retries": 0, "context_window": 4096, **options}
    return OpenAILike(model=MODEL, api_base=f"{url()}/v1", api_key="unused", **given)


def check_chat() -> None:
    messages = [ChatMessage(role="user", content="Name the capital of France.")]
    answer = model(is_chat_model=True).chat(messages).message.content
    assert "Paris" in answer
    assert [*model(is_chat_model=True).stream_chat(messages)][-1].message.content == answer


def check_completions() -> None:
    short = model(is_chat_model=False, max_tokens=8)
    text = short.complete("The capital of France is").text
    assert "Paris" in text
    assert "".join(chunk.delta for chunk in short.stream_complete("The capital of France is")) == text


def get_weather(city: Annotated[str, Field(max_length=20)], unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather in a city."""
    return f"21 degrees {unit} in {city}"


def check_tools() -> None:
    caller = model(is_chat_model=True, is_function_calling_model=True)
    tool = FunctionTool.from_defaults(get_weather)
    answer = caller.chat_with_tools([tool], user_msg="What is the weather in Paris?", tool_required=True)
    (call,) = caller.get_tool_calls_from_response(answer)[:1]
    assert call.tool_name == "get_weather"
    assert call.tool_kwargs["unit"] in ("celsius", "fahrenheit")


if __name__ == "__main__":
    sys.exit(main("llama-index-llms-openai-like", globals()))
