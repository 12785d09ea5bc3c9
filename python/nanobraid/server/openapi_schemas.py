"""What ``/openapi.json`` says of values that the models of requests leave open, and of answers."""

from __future__ import annotations

from typing import Any

from nanobraid.server.page import MAX_REQUESTS

REF = "#/components/schemas/"
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
MESSAGE = {
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
TOOL = {
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
PROMPT = {
    "anyOf": [
        _TEXT,
        _TOKENS,
        {"type": "array", "items": _TEXT, "minItems": 1},
        {"type": "array", "items": _TOKENS, "minItems": 1},
    ]
}
# What pydantic calls Any.
WRITTEN: dict[str, dict[str, Any]] = {
    "tool_choice": _TOOL_CHOICE,
    "response_format": _RESPONSE_FORMAT,
    "chunks": _CHUNKS,
    "reuse": _REUSE,
    "prompt": PROMPT,
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
_NUMBER = {"type": "number"}
_COUNTS = {name: _INTEGER for name in ("input_tokens", "output_tokens", "total_tokens")}
_ANTHROPIC_ERROR = _object(type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT))
_CHUNK = _answer("chunk", id=_TEXT, text=_TEXT, tokens=_INTEGER, ready={"type": "boolean"}, pinned={"type": "boolean"})
_MODEL = _answer("model", id=_TEXT, created=_INTEGER, owned_by=_TEXT)
ANSWERS: dict[str, dict[str, Any]] = {
    "ChatCompletion": _answer("chat.completion", id=_TEXT, model=_TEXT, choices=_LIST, usage=_USAGE),
    "Completion": _answer("text_completion", id=_TEXT, model=_TEXT, choices=_LIST, usage=_USAGE),
    "Rendered": _object(token_ids={"type": "array", "items": _INTEGER}, prompt=_TEXT, max_tokens=_INTEGER),
    "Model": _MODEL,
    "Models": _answer("list", data={"type": "array", "items": {"$ref": REF + "Model"}}),
    "Chunk": _CHUNK,
    "Chunks": _answer("list", data={"type": "array", "items": {"$ref": REF + "Chunk"}}),
    "Deleted": _answer("chunk", id=_TEXT, deleted={"const": True}),
    "Tokens": _object(count=_INTEGER, max_model_len=_INTEGER, tokens={"type": "array", "items": _INTEGER}),
    "Text": _object(prompt=_TEXT),
    "TokenizerInfo": _object(vocab_size=_INTEGER, model_max_length=_INTEGER),
    "Status": _object(status=_TEXT),
    "Response": _answer("response", id=_TEXT, status=_TEXT, model=_TEXT, output=_LIST, usage=_object(**_COUNTS)),
    "Message": _object(
        type={"const": "message"},
        id=_TEXT,
        role={"const": "assistant"},
        model=_TEXT,
        content=_LIST,
        stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        usage=_object(
            input_tokens=_INTEGER,
            output_tokens=_INTEGER,
            cache_read_input_tokens=_INTEGER,
            cache_creation_input_tokens=_INTEGER,
        ),
    ),
    "InputTokens": _object(input_tokens=_INTEGER),
    "State": _object(
        model=_TEXT,
        uptime_s=_NUMBER,
        num_requests=_INTEGER,
        stats={"type": "object"},
        requests={
            "type": "array",
            "maxItems": MAX_REQUESTS,
            "items": _object(
                id=_TEXT,
                state={"enum": ["running", "waiting"]},
                prompt_tokens=_INTEGER,
                generated_tokens=_INTEGER,
                age_s=_NUMBER,
            ),
        },
    ),
    "Error": _ERROR,
    "AnthropicError": _ANTHROPIC_ERROR,
}
