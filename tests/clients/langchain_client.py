"""langchain-openai: answers, streams with usage, tools, structured output, log-probabilities, completions."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from checks import MODEL, main, url
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

QUESTION = "Name the capital of France."


def chat(**options: Any) -> ChatOpenAI:
    given = {"max_tokens": 60, "max_retries": 0, "temperature": 0, "stream_usage": True, **options}
    return ChatOpenAI(model=MODEL, base_url=f"{url()}/v1", api_key="unused", **given)


def check_invoke_and_stream() -> None:
    answer = chat().invoke(QUESTION)
    assert "Paris" in answer.content
    whole: Any = None
    for chunk in chat().stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole.content == answer.content
    assert whole.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"] > 0


def check_logprobs() -> None:
    answer = chat(logprobs=True, top_logprobs=2).invoke(QUESTION)
    rows = answer.response_metadata["logprobs"]["content"]
    assert len(rows) == answer.usage_metadata["output_tokens"]


@tool
def get_weather(city: Annotated[str, Field(max_length=20)], unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather in a city."""
    return f"21 degrees {unit} in {city}"


def check_tools() -> None:
    question = HumanMessage("What is the weather in Paris?")
    caller = chat(max_tokens=200).bind_tools([get_weather], tool_choice="get_weather")
    answer = caller.invoke([question])
    call = answer.tool_calls[0]
    assert call["name"] == "get_weather"
    assert call["args"]["unit"] in ("celsius", "fahrenheit")
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert chat(max_tokens=20).invoke([question, answer, result]).content


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    country: Literal["France", "Italy"]


def check_structured_output() -> None:
    for method in ("json_schema", "function_calling"):
        city = chat(max_tokens=200).with_structured_output(City, method=method).invoke(QUESTION)
        assert isinstance(city, City), method


def check_completions() -> None:
    model = OpenAI(model=MODEL, base_url=f"{url()}/v1", api_key="unused", max_tokens=8, temperature=0, max_retries=0)
    text = model.invoke("The capital of France is")
    assert "Paris" in text
    assert "".join(model.stream("The capital of France is")) == text


if __name__ == "__main__":
    sys.exit(main("langchain-openai", globals()))
