"""Requests that are wrong: each is answered in the envelope, with the field's name, and the engine does not notice."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
from http_checks import ANY, refused

from nanobraid.server.settings import Settings

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module", autouse=True)
def still_serves(shared_server: Any) -> Iterator[None]:
    """After all of these the server answers as before."""
    before = shared_server.chat().json()["choices"]
    # The first grammar of a process costs more.
    assert shared_server.chat(response_format={"type": "json_object"}, max_tokens=1).status_code == 200
    yield
    assert shared_server.chat().json()["choices"] == before
    assert shared_server.app.service.num_active == 0


def _raw(server: Any, content: bytes, path: str = CHAT, **headers: str) -> Any:
    return server.client.post(path, content=content, headers={"content-type": "application/json", **headers})


BODIES: dict[str, bytes] = {
    "nothing": b"",
    "spaces": b"  \n",
    "brace": b"{",
    "list": b"[]",
    "string": b'"x"',
    "number": b"1",
    "null": b"null",
    "two objects": b'{"messages": []} {"messages": []}',
    "depth": b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "depth in an ignored field": b'{"messages":[{"role":"user","content":"a"}],"x":'
    + b'{"a":' * 300
    + b"1"
    + b"}" * 301,
    "open depth": b"[" * 100_000,
    "duplicate": b'{"model": "a", "messages": [], "model": "b"}',
    "duplicate inside": b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
    "byte order mark": b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "a"}]}',
    "UTF-16": '{"messages": [{"role": "user", "content": "a"}]}'.encode("utf-16"),
    "UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "overlong UTF-8": b'{"messages": [{"role": "user", "content": "\xc0\x80"}]}',
    "NUL": b'{"messages": [{"role": "user", "content": "a\x00b"}]}',
    "NUL behind": b'{"messages": [{"role": "user", "content": "a"}]}\x00',
    "surrogate": rb'{"messages": [{"role": "user", "content": "\ud800"}]}',
    "surrogate in a name": rb'{"messages": [{"role": "user", "content": "a"}], "\udfff": 1}',
    "NaN": b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "infinity": b'{"messages": [{"role": "user", "content": "a"}], "temperature": -Infinity}',
    "overflow": b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    "digits": b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 10_000 + b"}",
    "single quotes": b"{'messages': []}",
    "comma": b'{"messages": [],}',
}


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/chunks", "/tokenize"])
@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_json_object(server: Any, name: str, path: str) -> None:
    begin = time.monotonic()
    error = refused(_raw(server, BODIES[name], path), 400, None, "invalid_json")
    assert "Traceback" not in error["message"]
    assert time.monotonic() - begin < 1


def test_an_escaped_nul_is_a_character(server: Any) -> None:
    assert server.chat("a\0b", max_tokens=1).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "", None])
def test_content_types(server: Any, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    body = json.dumps({"messages": [USER], "max_tokens": 1}).encode()
    refused(server.client.post(CHAT, content=body, headers=headers), 415, None, None)
    kind = "Application/JSON; charset=utf-8"
    assert server.client.post(CHAT, content=body, headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", CHAT, 405),
        ("DELETE", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("POST", "/v1/models", 405),
        ("PATCH", "/v1/chunks", 405),
        ("OPTIONS", CHAT, 405),
        ("GET", "/nowhere", 404),
        ("POST", "/v1", 404),
        ("POST", CHAT + "/", 404),
        ("GET", "/v1/chat/../../etc/passwd", 404),
        ("GET", "/%00", 404),
        ("GET", "/v1/models/%ff", 404),
        ("GET", "/v1/chunks/%2e%2e%2f", 404),
        ("DELETE", "/v1/chunks/chunk-0", 404),
        ("GET", "/v1/models/gpt-4", 404),
    ],
)
def test_routes_and_methods(server: Any, method: str, path: str, status: int) -> None:
    refused(server.client.request(method, path), status)


def test_models(server: Any) -> None:
    for model in ("gpt-4", "", "x" * 100_000, "../../etc/passwd"):
        error = refused(server.chat(model=model), 404, "model", "model_not_found")
        assert len(error["message"]) < 300
    refused(server.chat(model=5), 400, "model", "invalid_type")
    assert server.chat(max_tokens=1).status_code == 200  # without a model it is the one that is there
    assert server.chat(max_tokens=1, model=None).status_code == 200
    assert server.chat(max_tokens=1, model=server.app.service.name).status_code == 200


MISSING, TYPE, VALUE, UNSUPPORTED = (
    "missing_required_parameter",
    "invalid_type",
    "invalid_value",
    "unsupported_parameter",
)
MESSAGES: list[tuple[Any, str, Any]] = [
    (None, "messages", TYPE),
    ("hi", "messages", TYPE),
    ({}, "messages", TYPE),
    ([], "messages", VALUE),
    ([{}], "messages[0].role", MISSING),
    ([1], "messages[0]", TYPE),
    ([None], "messages[0]", TYPE),
    ([[USER]], "messages[0]", TYPE),
    ([{"role": 1, "content": "a"}], "messages[0].role", TYPE),
    ([{"role": "root", "content": "a"}], "messages[0].role", VALUE),
    ([{"role": "function", "content": "a", "name": "f"}], "messages[0].role", VALUE),
    ([{"role": "user"}], "messages[0].content", MISSING),
    ([{"role": "user", "content": None}], "messages[0].content", MISSING),
    ([{"role": "user", "content": 5}], "messages[0].content", TYPE),
    ([{"role": "user", "content": {"text": "a"}}], "messages[0].content", TYPE),
    ([{"role": "user", "content": []}], "messages[0].content", VALUE),
    ([{"role": "user", "content": ["a"]}], "messages[0].content[0]", TYPE),
    ([{"role": "user", "content": [{}]}], "messages[0].content[0].type", MISSING),
    ([{"role": "user", "content": [{"type": "hologram"}]}], "messages[0].content[0].type", VALUE),
    ([{"role": "user", "content": [{"type": ["text"], "text": "a"}]}], "messages[0].content[0].type", VALUE),
    ([{"role": "user", "content": [{"type": {"a": 1}}]}], "messages[0].content[0].type", VALUE),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        "messages[0].content[0].type",
        UNSUPPORTED,
    ),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", MISSING),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text", TYPE),
    ([USER, {"role": "tool", "content": "a"}], "messages[1].tool_call_id", MISSING),
    ([USER, {"role": "tool", "content": "a", "tool_call_id": 5}], "messages[1].tool_call_id", TYPE),
    ([{"role": "user", "content": "a", "name": "a b"}], "messages[0].name", VALUE),
    ([{"role": "user", "content": "a", "name": 1}], "messages[0].name", TYPE),
    ([USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "messages[2].role", VALUE),
    ([USER, {"role": "assistant"}], "messages[1].content", MISSING),
    ([USER, {"role": "assistant", "tool_calls": []}], "messages[1].content", MISSING),
    ([USER, {"role": "assistant", "tool_calls": 5}], "messages[1].tool_calls", TYPE),
    ([USER, {"role": "assistant", "tool_calls": [5]}], "messages[1].tool_calls[0]", TYPE),
    ([USER, {"role": "assistant", "tool_calls": [{"id": "a"}]}], "messages[1].tool_calls[0]", TYPE),
    ([USER, {"role": "assistant", "tool_calls": [{"type": ["a"]}]}], "messages[1].tool_calls[0].type", UNSUPPORTED),
    ([{"role": "user", "content": "a", "tool_calls": []}], "messages[0].tool_calls", VALUE),
    ([{"role": "assistant", "content": "a", "audio": {"id": "a"}}], "messages[0].audio", UNSUPPORTED),
    ([{"role": "assistant", "content": "a", "function_call": {}}], "messages[0].function_call", UNSUPPORTED),
]


@pytest.mark.parametrize("messages, param, code", MESSAGES)
def test_messages(server: Any, messages: Any, param: str, code: str) -> None:
    refused(server.post(CHAT, {"messages": messages}), 400, param, code)
    refused(server.post(CHAT, {"messages": messages, "stream": True}), 400, param, code)
    if isinstance(messages, list) and messages:
        refused(server.post("/tokenize", {"messages": messages}), 400, param, code)


def test_messages_are_needed(server: Any) -> None:
    refused(server.post(CHAT, {}), 400, "messages", MISSING)
    refused(server.post("/v1/completions", {}), 400, "prompt", MISSING)
    refused(server.post("/v1/chunks", {}), 400, "text", MISSING)
    refused(server.post("/detokenize", {}), 400, "tokens", MISSING)
    refused(server.post("/tokenize", {}), 400, "prompt")
    refused(server.post("/v1/embeddings", {"input": "a"}), 400, None, "unsupported_endpoint")


TOGETHER: list[tuple[dict[str, Any], Any, Any]] = [
    ({"stream_options": {"include_usage": True}}, "stream_options", VALUE),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", TYPE),
    ({"stream": True, "stream_options": []}, "stream_options", TYPE),
    ({"stream": "yes"}, "stream", TYPE),
    ({"top_logprobs": 2}, "top_logprobs", VALUE),
    ({"top_logprobs": 2, "logprobs": False}, "top_logprobs", VALUE),
    ({"logprobs": 3}, "logprobs", TYPE),
    ({"tool_choice": "auto"}, "tool_choice", VALUE),
    ({"tool_choice": "required", "tools": []}, "tool_choice", VALUE),
    ({"tool_choice": "any", "tools": [TOOL]}, "tool_choice", VALUE),
    ({"tool_choice": 5, "tools": [TOOL]}, "tool_choice", TYPE),
    ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, "tool_choice.function.name", MISSING),
    (
        {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
        "tool_choice.function.name",
        VALUE,
    ),
    ({"tools": 5}, "tools", TYPE),
    ({"tools": [5]}, "tools[0]", TYPE),
    ({"tools": [{}]}, "tools[0].type", MISSING),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", UNSUPPORTED),
    ({"tools": [{"type": "function"}]}, "tools[0].function", TYPE),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", MISSING),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", VALUE),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name", VALUE),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "tools[0].function.parameters",
        TYPE,
    ),
    ({"response_format": "json"}, "response_format", TYPE),
    ({"response_format": {}}, "response_format.type", MISSING),
    ({"response_format": {"type": "xml"}}, "response_format.type", VALUE),
    ({"response_format": {"type": ["text"]}}, "response_format.type", VALUE),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", MISSING),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name", VALUE),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
        TYPE,
    ),
    ({"structured_outputs": {}}, "structured_outputs", VALUE),
    ({"structured_outputs": {"json_object": True, "regex": "a"}}, "structured_outputs", VALUE),
    ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag", UNSUPPORTED),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", VALUE),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", VALUE),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", VALUE),
    ({"structured_outputs": {"choice": [5]}}, "structured_outputs.choice", VALUE),
    ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs.grammar", VALUE),
    ({"structured_outputs": {"regex": "a+"}, "ignore_eos": True}, "ignore_eos", VALUE),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", VALUE),
    ({"chunks": "a"}, "chunks", TYPE),
    ({"chunks": [5]}, "chunks[0]", TYPE),
    ({"chunks": [{}]}, "chunks[0].text", MISSING),
    ({"chunks": [{"text": ""}]}, "chunks[0].text", TYPE),
    ({"chunks": ["a"], "reuse": "maybe"}, "reuse", VALUE),
    ({"chunks": [{"text": "a b c d e f"}], "reuse": {"mode": "blend", "x": 1}}, "reuse.x", "unknown_parameter"),
    ({"chunks": [{"text": "a b c d e f"}], "reuse": {"mode": "blend", "ratio": 7}}, "reuse", VALUE),
    ({"reuse": 5}, "reuse", TYPE),
    ({"user": 5}, "user", TYPE),
    ({"user": "x" * 513}, "user", VALUE),
    ({"metadata": {"a": 1}}, "metadata", TYPE),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", VALUE),
    ({"timeout_s": 0}, "timeout_s", VALUE),
    ({"timeout_s": "1"}, "timeout_s", TYPE),
    ({"cache_salt": ""}, "cache_salt", VALUE),
]


@pytest.mark.parametrize("fields, param, code", TOGETHER)
def test_fields(server: Any, fields: dict[str, Any], param: str, code: str) -> None:
    refused(server.chat(**fields), 400, param, code)


def test_an_unknown_chunk(server: Any) -> None:
    refused(server.chat(chunks=["chunk-nowhere"]), 404, "chunks[0]", "chunk_not_found")


def _schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


def _tools(schema: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": schema, "strict": True}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
BOMBS: dict[str, Any] = {
    "regex": {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}, "required": ["a"]},
    "nested quantifiers": {"type": "string", "pattern": "((((a{1,1000}){1,1000}){1,1000}){1,1000})"},
    "properties": {
        "type": "object",
        "properties": {f"property_{i}": {"type": "integer", "enum": [i]} for i in range(10_000)},
    },
    "ref loop": LOOP,
    "self": {"$ref": "#"},
    "any of all": {"allOf": [{"anyOf": [{"type": "string"}, {"type": "integer"}]} for _ in range(64)]},
    "enum": {"enum": [str(i) * 10 for i in range(100_000)]},
    "remote": {"$ref": "https://example.com/schema.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "lengths": {"type": "string", "minLength": 10**9, "maxLength": 10**9},
    "items": {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
    "wrong": {"type": "nothing"},
    "not a schema": {"type": "object", "properties": 5},
    "doubling": {
        "$defs": {
            **{
                f"d{i}": {"type": "object", "properties": {n: {"$ref": f"#/$defs/d{i + 1}"} for n in "ab"}}
                for i in range(40)
            },
            "d40": {"type": "integer"},
        },
        "$ref": "#/$defs/d0",
    },
}


FOLLOWED = ("nested quantifiers", "any of all", "doubling", "properties", "enum", "lengths", "items")


@pytest.mark.parametrize("make", [_schema, _tools])
@pytest.mark.parametrize("name", BOMBS)
def test_schemas_that_are_bombs(server: Any, name: str, make: Any) -> None:
    times = []
    for _ in range(2):  # the machine may be busy with something else
        begin = time.monotonic()
        response = server.chat(**make(BOMBS[name]), max_tokens=1)
        times.append(time.monotonic() - begin)
        if times[-1] < 1.0:
            break
    seconds = min(times)
    assert seconds < 1.0, f"{seconds:.2f} s: {response.text[:300]}"
    if response.status_code != 200:  # a schema that can be followed may be
        error = refused(response, 400)
        # Tools are part of the prompt, so a schema may be too long for the context as well.
        is_long = make is _tools and error["code"] == "context_length_exceeded"
        assert is_long or error["param"].startswith(("response_format", "tools"))
        assert "etc/passwd" not in error["message"] or name == "file"
    assert response.status_code == 400 or name in FOLLOWED


def test_unknown_fields(server: Any, serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    body = {"messages": [USER], "max_tokens": 1, "flavour": "salt"}
    with caplog.at_level(logging.DEBUG, logger="nanobraid"):
        assert server.post(CHAT, body).status_code == 200
    assert any("flavour" in record.getMessage() for record in caplog.records)
    with serve(Settings(strict=True)) as strict:
        refused(strict.post(CHAT, body), 400, "flavour", "unknown_parameter")
        options = {"include_usage": True, "flavour": 1}
        body = {"messages": [USER], "max_tokens": 1, "stream": True, "stream_options": options}
        refused(strict.post(CHAT, body), 400, "stream_options.flavour", "unknown_parameter")
        assert strict.chat(max_tokens=1, top_k=3).status_code == 200


@pytest.mark.parametrize(
    "given, kept", [("abc-1", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("", False)]
)
def test_request_ids_are_kept_if_they_are_ones(server: Any, given: str, kept: bool) -> None:
    for path in ("/health", "/nowhere"):
        answer = server.client.get(path, headers={"x-request-id": given}).headers["x-request-id"]
        assert (answer == given) == kept
        assert kept or answer.startswith("req-")


@pytest.mark.parametrize("path", ["/v1/chunks", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("value", [None, 5, [], {}, [None], -1, True, "", "\0", [1.5], [-1], [2**40], [True]])
def test_other_routes(server: Any, path: str, value: Any) -> None:
    field = {"/v1/chunks": "text", "/tokenize": "prompt", "/detokenize": "tokens"}[path]
    if path == "/v1/chunks" and value == "\0":
        pytest.skip("is a text, which would be kept")
    response = server.post(path, {field: value})
    is_fine = (path == "/detokenize" and value == []) or (path == "/tokenize" and isinstance(value, str))
    if is_fine:
        assert response.status_code == 200
    else:
        error = refused(response, 400, ANY)
        assert error["param"].startswith(field)
