"""openai-python, 2.x and 3.x: chat and completions, both clients, streams, formats, tools, errors, retries."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
from checks import ASK, ASK_WEATHER, CITY_SCHEMA, KEY, MODEL, WEATHER, main, raises, small_url, url
from pydantic import BaseModel, Field


def client(**options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url()}/v1", api_key="unused", **{"max_retries": 0, **options})


def small(**options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{small_url()}/v1", **{"max_retries": 0, "api_key": KEY, **options})


def check_models() -> None:
    models = client().models.list().data
    assert [model.id for model in models] == [MODEL]
    assert client().models.retrieve(MODEL).id == MODEL


def check_chat() -> None:
    answer = client().chat.completions.create(model=MODEL, messages=ASK, max_completion_tokens=20, temperature=0)
    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert "Paris" in choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def check_stream_equals_answer() -> None:
    options = {"model": MODEL, "messages": ASK, "max_tokens": 20, "temperature": 0}
    whole = client().chat.completions.create(**options)
    chunks = list(client().chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 5  # token by token
    assert len({chunk.id for chunk in chunks}) == 1
    finish = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finish[-1] == whole.choices[0].finish_reason
    assert set(finish[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def check_stream_helper() -> None:
    with client().chat.completions.stream(model=MODEL, messages=ASK, max_tokens=30, temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content != ""


def check_async() -> None:
    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url()}/v1", api_key="unused", max_retries=0) as asynchronous:

            async def one() -> str:
                stream = await asynchronous.chat.completions.create(
                    model=MODEL, messages=ASK, max_tokens=12, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            whole = await asynchronous.chat.completions.create(model=MODEL, messages=ASK, max_tokens=12, temperature=0)
            return [whole.choices[0].message.content, *await asyncio.gather(*(one() for _ in range(4)))]

    assert len(set(asyncio.run(several()))) == 1


def check_leaving_a_stream_is_no_error() -> None:
    stream = client().chat.completions.create(model=MODEL, messages=ASK, max_tokens=900, stream=True)
    next(iter(stream))
    stream.close()
    check_chat()


def check_logprobs() -> None:
    answer = client().chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    rows = answer.choices[0].logprobs.content
    assert len(rows) == answer.usage.completion_tokens
    assert "".join(row.token for row in rows[:3]) in answer.choices[0].message.content
    for row in rows:
        assert len(row.top_logprobs) == 3
        assert row.logprob == row.top_logprobs[0].logprob <= 0  # greedy
        assert row.top_logprobs[0].logprob >= row.top_logprobs[1].logprob


def check_n_seed_and_stop() -> None:
    options = {"model": MODEL, "messages": ASK, "max_tokens": 16, "temperature": 1.0, "n": 3}
    texts = [
        [choice.message.content for choice in client().chat.completions.create(**options, seed=seed).choices]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1
    stopped = client().chat.completions.create(model=MODEL, messages=ASK, max_tokens=30, temperature=0, stop=["Paris"])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content.rstrip().endswith("is")


def check_completions() -> None:
    whole = client().completions.create(model=MODEL, prompt="The capital of France is", max_tokens=8, temperature=0)
    chunks = client().completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=8, temperature=0, stream=True
    )
    assert "Paris" in whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    several = client().completions.create(model=MODEL, prompt=["One, two,", "A, b,"], max_tokens=4, temperature=0, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    echoed = client().completions.create(model=MODEL, prompt="One, two", max_tokens=0, echo=True, logprobs=1)
    assert echoed.choices[0].text == "One, two"
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in echoed.choices[0].logprobs.token_logprobs[1:])


def check_json_schema() -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True}}
    answer = client().chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=80, temperature=0, response_format=response_format
    )
    city = json.loads(answer.choices[0].message.content)
    assert set(city) == {"name", "inhabitants"}
    assert isinstance(city["inhabitants"], int)


class City(BaseModel):
    name: str = Field(max_length=20)
    inhabitants: int = Field(ge=0, le=99999999)


def check_parse() -> None:
    answer = client().chat.completions.parse(
        model=MODEL, messages=ASK, max_tokens=80, temperature=0, response_format=City
    )
    assert isinstance(answer.choices[0].message.parsed, City)


def check_tools() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = client().chat.completions.create(
            model=MODEL, messages=ASK_WEATHER, tools=[WEATHER], tool_choice=choice, temperature=0, max_tokens=120
        )
        (call,) = answer.choices[0].message.tool_calls[:1]
        assert answer.choices[0].finish_reason in (("tool_calls",) if choice == "required" else ("tool_calls", "stop"))
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments)["unit"] in ("celsius", "fahrenheit")
    conversation = [
        *ASK_WEATHER,
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "21 degrees and sunny"},
    ]
    after = client().chat.completions.create(
        model=MODEL, messages=conversation, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=40
    )
    assert after.choices[0].message.content
    assert not after.choices[0].message.tool_calls


def check_tools_stream() -> None:
    options = {"model": MODEL, "messages": ASK_WEATHER, "tools": [WEATHER], "tool_choice": "required"}
    options |= {"temperature": 0, "max_tokens": 120, "parallel_tool_calls": False}
    whole = client().chat.completions.create(**options).choices[0].message.tool_calls
    pieces: list[Any] = []
    for chunk in client().chat.completions.create(**options, stream=True):
        pieces += chunk.choices[0].delta.tool_calls or ()
        finish = chunk.choices[0].finish_reason
    assert len(whole) == 1
    assert finish == "tool_calls"
    assert {piece.index for piece in pieces} == {0}
    assert pieces[0].id
    assert pieces[0].function.name == "get_weather"
    arguments = "".join(piece.function.arguments or "" for piece in pieces)
    assert json.loads(arguments) == json.loads(whole[0].function.arguments)
    assert len(pieces) > 3  # as they grow


def check_errors() -> None:
    create = client().chat.completions.create
    with raises(openai.NotFoundError) as caught:
        create(model="no-such-model", messages=ASK)
    assert (caught[0].code, caught[0].param, caught[0].type) == ("model_not_found", "model", "invalid_request_error")
    assert caught[0].request_id
    with raises(openai.BadRequestError) as caught:
        create(model=MODEL, messages=[{"role": "user", "content": "word " * 20000}])
    assert (caught[0].code, caught[0].param) == ("context_length_exceeded", "messages")
    with raises(openai.BadRequestError) as caught:
        create(model=MODEL, messages=ASK, temperature=3)
    assert (caught[0].code, caught[0].param) == ("invalid_value", "temperature")
    with raises(openai.BadRequestError) as caught:
        create(model=MODEL, messages=ASK, extra_body={"prediction": {"type": "content", "content": "x"}})
    assert (caught[0].code, caught[0].param) == ("unsupported_parameter", "prediction")
    with raises(openai.BadRequestError) as caught:
        create(model=MODEL, messages=[{"role": "user"}])
    assert (caught[0].code, caught[0].param) == ("missing_required_parameter", "messages[0].content")
    with raises(openai.AuthenticationError) as caught:
        small(api_key="wrong").models.list()
    assert caught[0].code == "invalid_api_key"


def check_busy_and_retries() -> None:
    """A full server answers 503 with Retry-After; the client comes again and is served."""
    ask = {"model": MODEL, "messages": ASK, "temperature": 0}
    running = small().chat.completions.create(**ask, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(iter(running))
    waiting = threading.Thread(target=lambda: small().chat.completions.create(**ask, max_tokens=4))
    waiting.start()
    one_waits = re.compile(r"^vllm:num_requests_waiting\{.*\} 1$", re.MULTILINE)
    wait_until(lambda: bool(one_waits.search(metrics_of_small())), "the server is full")
    with raises(openai.InternalServerError) as caught:
        small().chat.completions.create(**ask, max_tokens=1)
    refused = caught[0]
    assert refused.status_code == 503
    assert refused.code == "server_is_overloaded"
    assert int(refused.response.headers["retry-after"]) >= 1
    statuses: list[int] = []
    hooks = {"response": [lambda response: statuses.append(response.status_code)]}
    patient = small(max_retries=20, http_client=httpx.Client(event_hooks=hooks))
    answers: list[Any] = []
    retrying = threading.Thread(target=lambda: answers.append(patient.chat.completions.create(**ask, max_tokens=4)))
    retrying.start()
    wait_until(lambda: bool(statuses), "it has asked once")
    running.close()
    waiting.join()
    retrying.join()
    assert answers[0].usage.completion_tokens >= 1
    assert (statuses[0], statuses[-1]) == (503, 200)


def metrics_of_small() -> str:
    return httpx.get(f"{small_url()}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, f"it never was so: {what}"
        time.sleep(0.01)


def check_responses() -> None:
    answer = client().responses.create(
        model=MODEL, input="Name the capital of France.", temperature=0, max_output_tokens=30
    )
    assert "Paris" in answer.output_text
    events = list(
        client().responses.create(
            model=MODEL, input="Name the capital of France.", temperature=0, max_output_tokens=30, stream=True
        )
    )
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text != ""


if __name__ == "__main__":
    sys.exit(main("openai", globals()))
