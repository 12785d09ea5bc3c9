"""Tools, reasoning, Responses and Messages over HTTP, with the default model."""

from __future__ import annotations

import json
from typing import Any

import pytest

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def stream(server: Any, path: str, body: dict[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
    """The events of an answer, with their names."""
    events: list[tuple[str | None, dict[str, Any]]] = []
    name = None
    with server.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: {"):
                events.append((name, json.loads(line.removeprefix("data: "))))
    return events


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_is_made_and_streamed(server: Any, choice: Any) -> None:
    body = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 64, "parallel_tool_calls": False}
    answer = server.chat("What is the weather in Paris?", **body).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert list(json.loads(call["function"]["arguments"])) == ["city"]
    body |= {"messages": [{"role": "user", "content": "What is the weather in Paris?"}], "temperature": 0}
    deltas = [c["delta"] for _, e in stream(server, "/v1/chat/completions", body) for c in e["choices"]]
    parts = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert parts[0]["function"]["name"] == "get_weather" and parts[0]["id"].startswith("call_")
    assert "".join(part["function"].get("arguments", "") for part in parts) == call["function"]["arguments"]
    assert len(parts) > 2


def test_results_of_calls_reach_the_model(server: Any) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'}}
    messages = [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 31 degrees"},
    ]
    prompt = server.post("/v1/chat/completions/render", {"messages": messages, "tools": [TOOL]}).json()["prompt"]
    for text in ("get_weather", "Rome", "sunny, 31 degrees", "The weather of a city."):
        assert text in prompt
    without = server.post(
        "/v1/chat/completions/render", {"messages": messages, "tools": [TOOL], "tool_choice": "none"}
    ).json()["prompt"]
    assert "The weather of a city." not in without


def test_a_wrong_schema_is_named(server: Any) -> None:
    tool = json.loads(json.dumps(TOOL))
    tool["function"]["parameters"]["properties"]["city"] = {"type": "string", "pattern": "(?<=a)b"}
    response = server.chat("x", tools=[TOOL | {}, tool | {"function": tool["function"] | {"name": "other"}}])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools[1].function.parameters"


def test_reasoning_effort_is_refused_where_the_template_cannot_change_it(server: Any) -> None:
    response = server.chat("x", reasoning_effort="high")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "reasoning_effort"
    assert server.chat("x", reasoning_effort="none").status_code == 200


def test_responses(server: Any) -> None:
    body = {"input": "Say hello.", "max_output_tokens": 8, "temperature": 0}
    chat = server.chat("Say hello.").json()["choices"][0]["message"]["content"]
    answer = server.post("/v1/responses", body).json()
    assert answer["object"] == "response"
    assert answer["output"][0]["content"][0]["text"] == chat
    events = stream(server, "/v1/responses", body)
    assert [name for name, _ in events][:2] == ["response.created", "response.in_progress"]
    assert events[-1][0] in ("response.completed", "response.incomplete")
    assert "".join(e["delta"] for name, e in events if name == "response.output_text.delta") == chat
    error = server.post("/v1/responses", {**body, "previous_response_id": "resp_1"})
    assert error.status_code == 400 and error.json()["error"]["param"] == "previous_response_id"
    error = server.post("/v1/responses", {**body, "max_output_tokens": 10**6})
    assert error.json()["error"]["param"] == "max_output_tokens"


def test_messages(server: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "temperature": 0}
    chat = server.chat("Say hello.").json()["choices"][0]["message"]["content"]
    answer = server.post("/v1/messages", {**body, "model": server.app.service.name}).json()
    assert answer["type"] == "message"
    assert answer["content"][0]["text"] == chat
    events = stream(server, "/v1/messages", {**body, "model": server.app.service.name})
    assert events[0][0] == "message_start" and events[-1][0] == "message_stop"
    assert "".join(e["delta"].get("text", "") for name, e in events if name == "content_block_delta") == chat
    count = server.post("/v1/messages/count_tokens", {k: body[k] for k in ("messages",)} | {"model": "smollm2-135m"})
    usage = answer["usage"]  # Anthropic counts what was cached apart
    assert count.json()["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    error = server.post("/v1/messages", {"messages": body["messages"], "model": "smollm2-135m"})
    assert error.status_code == 400 and error.json()["type"] == "error"
    error = server.post("/v1/messages", {**body, "model": "other"})
    assert error.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("stream", [False, True])
def test_numbers_beyond_64_bits_come_back_as_they_were(server: Any, stream: bool) -> None:
    """Answers repeat the tools of the request."""
    parameters = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 10**30}}}
    tools = [{"type": "function", "name": "f", "parameters": parameters}]
    body = {"input": "x", "tools": tools, "max_output_tokens": 2, "stream": stream}
    answer = server.post("/v1/responses", body)
    assert answer.status_code == 200
    assert str(10**30) in answer.text
    assert ("response.incomplete" in answer.text) == stream


def test_metrics_count_what_was_served(server: Any) -> None:
    def value(name: str) -> float:
        lines = server.client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    before = {
        name: value(name)
        for name in ("vllm:time_to_first_token_seconds_count", "vllm:request_generation_tokens_sum", "nanobraid:http")
    }
    server.chat("Count me.", max_tokens=5)
    assert value("vllm:time_to_first_token_seconds_count") == before["vllm:time_to_first_token_seconds_count"] + 1
    assert value("vllm:request_generation_tokens_sum") == before["vllm:request_generation_tokens_sum"] + 5
    assert value("nanobraid:http") > before["nanobraid:http"]


def test_the_page_and_its_state(server: Any) -> None:
    page = server.client.get("/")
    assert page.status_code == 200 and "text/html" in page.headers["content-type"]
    state = server.client.get("/state").json()
    assert state["model"] == server.app.service.name and state["requests"] == []
