"""``/openapi.json``: what the server takes and answers, as an OpenAPI 3.1 document made from the models of requests."""

from __future__ import annotations

from typing import Any

from nanobraid import __version__
from nanobraid.server import schema
from nanobraid.server.schema import UNSUPPORTED, Request
from nanobraid.server.service import Service

_REF = "#/components/schemas/"
_NAME = {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}
_TEXT = {"type": "string"}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "required": ["type", "text"],
}
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": _PART, "minItems": 1}]}
_CALL = {
    "type": "object",
    "properties": {
        "id": _TEXT,
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": _NAME, "arguments": _TEXT},
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "type", "function"],
}
_MESSAGE = {
    "oneOf": [
        {
            "type": "object",
            "properties": {"role": {"enum": ["system", "developer", "user"]}, "content": _CONTENT, "name": _NAME},
            "required": ["role", "content"],
        },
        {
            "type": "object",
            "description": "Two of these do not follow one another.",
            "properties": {
                "role": {"const": "assistant"},
                "content": _CONTENT,
                "name": _NAME,
                "reasoning_content": _TEXT,
                "tool_calls": {"type": "array", "items": _CALL, "minItems": 1},
            },
            "required": ["role", "content"],
        },
        {
            "type": "object",
            "properties": {"role": {"const": "tool"}, "content": _CONTENT, "tool_call_id": _TEXT},
            "required": ["role", "content", "tool_call_id"],
        },
    ]
}
_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": _NAME,
                "description": _TEXT,
                "parameters": {"type": "object", "description": "A JSON Schema."},
                "strict": {"type": "boolean"},
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_TOOL_CHOICE = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "properties": {"name": _NAME}, "required": ["name"]},
            },
            "required": ["type", "function"],
        },
    ]
}
_RESPONSE_FORMAT = {
    "anyOf": [
        {"type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "properties": {
                        "name": _NAME,
                        "description": _TEXT,
                        "schema": {"type": "object", "description": "A JSON Schema."},
                        "strict": {"type": "boolean"},
                    },
                    "required": ["name", "schema"],
                },
            },
            "required": ["type", "json_schema"],
        },
        {"type": "null"},
    ]
}
_CHUNKS = {
    "anyOf": [
        {
            "type": "array",
            "maxItems": 256,
            "items": {
                "anyOf": [
                    {"type": "string", "description": "The id of a registered chunk."},
                    {
                        "type": "object",
                        "properties": {"text": {"type": "string", "minLength": 1}},
                        "required": ["text"],
                    },
                ]
            },
        },
        {"type": "null"},
    ]
}
_REUSE = {
    "anyOf": [
        {"enum": ["exact", "isolated", "blend", None]},
        {
            "type": "object",
            "properties": {"mode": {"enum": ["exact", "isolated", "blend"]}},
            "required": ["mode"],
            "description": "A mode and its options.",
        },
    ]
}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {
    "anyOf": [
        _TEXT,
        _TOKENS,
        {"type": "array", "items": _TEXT, "minItems": 1},
        {"type": "array", "items": _TOKENS, "minItems": 1},
    ]
}
# What pydantic calls Any.
_WRITTEN: dict[str, dict[str, Any]] = {
    "tool_choice": _TOOL_CHOICE,
    "response_format": _RESPONSE_FORMAT,
    "chunks": _CHUNKS,
    "reuse": _REUSE,
    "prompt": _PROMPT,
}

_USAGE = {
    "type": "object",
    "properties": {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": _TEXT,
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
    "additionalProperties": False,
}


def _answer(kind: str, **properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"object": {"const": kind}, **properties},
        "required": ["object", *properties],
    }


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


_LIST = {"type": "array", "items": {"type": "object"}}
_INTEGER = {"type": "integer"}
_CHUNK = _answer("chunk", id=_TEXT, text=_TEXT, tokens=_INTEGER, ready={"type": "boolean"}, pinned={"type": "boolean"})
_MODEL = _answer("model", id=_TEXT, created=_INTEGER, owned_by=_TEXT)
_ANSWERS: dict[str, dict[str, Any]] = {
    "ChatCompletion": _answer("chat.completion", id=_TEXT, model=_TEXT, choices=_LIST, usage=_USAGE),
    "Completion": _answer("text_completion", id=_TEXT, model=_TEXT, choices=_LIST, usage=_USAGE),
    "Rendered": _object(token_ids={"type": "array", "items": _INTEGER}, prompt=_TEXT, max_tokens=_INTEGER),
    "Model": _MODEL,
    "Models": _answer("list", data={"type": "array", "items": {"$ref": _REF + "Model"}}),
    "Chunk": _CHUNK,
    "Chunks": _answer("list", data={"type": "array", "items": {"$ref": _REF + "Chunk"}}),
    "Deleted": _answer("chunk", id=_TEXT, deleted={"const": True}),
    "Tokens": _object(count=_INTEGER, max_model_len=_INTEGER, tokens={"type": "array", "items": _INTEGER}),
    "Text": _object(prompt=_TEXT),
    "TokenizerInfo": _object(vocab_size=_INTEGER, model_max_length=_INTEGER),
    "Status": _object(status=_TEXT),
    "Error": _ERROR,
}
_MEANINGS = {
    400: "Something is wrong with the request; `param` says where.",
    401: "No API key, or a wrong one.",
    403: "The header `Host` names another machine.",
    404: "There is no such model, chunk or route.",
    408: "The request did not arrive in time.",
    413: "The request is too large.",
    415: "The body does not say that it is JSON.",
    500: "A defect of nanobraid.",
    503: "The queue is full, or the server is shutting down; see `Retry-After`.",
    504: "The request took longer than it may.",
}
_OF_BODIES = (400, 404, 408, 413, 415, 500, 503)
# Route, method, model of the body, answer, whether it streams, what it is for.
_ROUTES: list[tuple[str, str, type[Request] | None, str, bool, str]] = [
    ("/v1/chat/completions", "post", schema.ChatRequest, "ChatCompletion", True, "Answer a conversation"),
    ("/v1/chat/completions/render", "post", schema.RenderRequest, "Rendered", False, "The prompt of a conversation"),
    ("/v1/completions", "post", schema.CompletionRequest, "Completion", True, "Continue texts"),
    ("/v1/models", "get", None, "Models", False, "The model, under all its names"),
    ("/v1/models/{model}", "get", None, "Model", False, "The model"),
    ("/v1/chunks", "get", None, "Chunks", False, "The registered chunks"),
    ("/v1/chunks", "post", schema.ChunkRequest, "Chunk", False, "Compute a chunk and keep it"),
    ("/v1/chunks/{chunk}", "get", None, "Chunk", False, "A chunk"),
    ("/v1/chunks/{chunk}", "delete", None, "Deleted", False, "Forget a chunk"),
    ("/v1/chunks/{chunk}/pin", "post", schema.PinRequest, "Chunk", False, "Keep a chunk when memory is short"),
    ("/tokenize", "post", schema.TokenizeRequest, "Tokens", False, "The tokens of a text or conversation"),
    ("/detokenize", "post", schema.DetokenizeRequest, "Text", False, "The text of tokens"),
    ("/tokenizer_info", "get", None, "TokenizerInfo", False, "Facts of the tokenizer"),
    ("/health", "get", None, "Status", False, "Whether the process lives"),
    ("/ready", "get", None, "Status", False, "Whether new requests are taken"),
]


def document(service: Service) -> dict[str, Any]:
    """Returns the document of a server.

    Args:
        service: The model, whose limits are in it.
    """
    components: dict[str, Any] = dict(_ANSWERS)
    paths: dict[str, Any] = {}
    for path, method, body, answer, streams, summary in _ROUTES:
        if body is not None and body.__name__ not in components:
            components |= _request_schemas(body, service)
        paths.setdefault(path, {})[method] = _operation(path, body, answer, streams, summary)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nanobraid",
            "version": __version__,
            "description": "Not in this document: `/v1/responses` and `/v1/messages`, which follow the documents of "
            "OpenAI and Anthropic, `/metrics`, and the page at `/`.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if service.settings.api_keys else [],
    }


def _operation(path: str, body: type[Request] | None, answer: str, streams: bool, summary: str) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": _REF + answer}}}
    if streams:
        content["text/event-stream"] = {"schema": _TEXT}
    statuses: tuple[int, ...] = (500,) if body is None else _OF_BODIES
    if "{" in path:
        statuses += (404,)
    if path == "/ready":
        statuses += (503,)
    if streams:
        statuses += (504,)
    error = {"application/json": {"schema": {"$ref": _REF + "Error"}}}
    answers: dict[str, Any] = {"200": {"description": "As wanted.", "content": content}}
    for status in sorted({*statuses, 401, 403, 413}):
        answers[str(status)] = {"description": _MEANINGS[status], "content": error}
    operation: dict[str, Any] = {"summary": summary, "responses": answers, "parameters": _parameters(path, body)}
    if body is not None:
        reference = {"schema": {"$ref": _REF + body.__name__}}
        operation["requestBody"] = {"required": True, "content": {"application/json": reference}}
    return operation


def _parameters(path: str, body: type[Request] | None) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in names
    ]
    if path.startswith("/v1/chunks") and body is None:
        parameters.append({"name": "cache_salt", "in": "query", "schema": _TEXT})
    return parameters


def _request_schemas(kind: type[Request], service: Service) -> dict[str, Any]:
    """The schema of a body and those it refers to."""
    made = kind.model_json_schema(ref_template=_REF + "{model}")
    found: dict[str, Any] = made.pop("$defs", {})
    properties = made["properties"]
    for name, written in _WRITTEN.items():
        if name in properties and name != "prompt":
            properties[name] = written
    if kind is schema.CompletionRequest:
        properties["prompt"] = _PROMPT
        made["required"] = ["prompt"]
    if "messages" in properties:
        limits = {"minItems": 1, "maxItems": 65536}
        properties["messages"] = {"type": "array", "items": _MESSAGE, **limits}
    if "tools" in properties:
        properties["tools"] = {"anyOf": [{"type": "array", "items": _TOOL, "maxItems": 1024}, {"type": "null"}]}
    if "model" in properties:
        properties["model"] = {"enum": [*service.names, None]}
    for name in ("max_tokens", "max_completion_tokens"):
        for choice in properties.get(name, {}).get("anyOf", ()):
            if choice.get("type") == "integer":
                choice |= {"minimum": 1, "maximum": service.max_model_len}
    for name, reason in UNSUPPORTED.get(kind, {}).items():
        properties[name] = {"type": "null", "description": f"Not supported. {reason}".strip()}
    if service.settings.strict:
        made["additionalProperties"] = False
    return {**found, kind.__name__: made}
