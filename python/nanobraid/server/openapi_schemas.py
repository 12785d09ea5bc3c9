"""What ``/openapi.json`` says of values that the models of requests leave open, and of answers."""

from __future__ import annotations

from typing import Any

from nanobraid.server.page import MAX_REQUESTS
from nanobraid.server.request_shapes import is_absent, is_given

REF = "#/components/schemas/"


def or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field that may be left out."""
    return {"anyOf": [schema, {"type": "null"}]}


_NAME = {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}
_TEXT = {"type": "string"}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "required": ["type", "text"],
}
_REFUSAL = {
    "type": "object",
    "properties": {"type": {"const": "refusal"}, "refusal": _TEXT},
    "required": ["type", "refusal"],
}
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": _PART, "minItems": 1}]}
_ANSWER = {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": [_PART, _REFUSAL]}, "minItems": 1}]}
_NULL = {"type": "null"}
_REFUSED = {"function_call": _NULL, "audio": _NULL}
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
PARAMETERS = {
    "type": "object",
    "description": "A JSON Schema, of an object.",
    "properties": {"type": {"const": "object"}},
}
_CALLS = {"type": "array", "items": _CALL}
_OTHERS = {  # of messages
    **_REFUSED,
    "name": or_null(_NAME),
    "reasoning_content": or_null(_TEXT),
    "reasoning": or_null(_TEXT),
    "tool_call_id": or_null(_TEXT),
}
MESSAGE = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                **_OTHERS,
                "role": {"enum": ["system", "developer", "user"]},
                "content": _CONTENT,
                "tool_calls": _NULL,
            },
            "required": ["role", "content"],
        },
        {
            "type": "object",
            "description": "Two of these do not follow one another.",
            "properties": {
                **_OTHERS,
                "role": {"const": "assistant"},
                "content": _ANSWER,
                "tool_calls": or_null(_CALLS),
            },
            "required": ["role", "content"],
        },
        {
            "type": "object",
            "properties": {
                **_OTHERS,
                "role": {"const": "assistant"},
                "content": _NULL,
                "refusal": or_null(_TEXT),
                "tool_calls": {**_CALLS, "minItems": 1},
            },
            "required": ["role", "tool_calls"],
        },
        {
            "type": "object",
            "properties": {
                **_OTHERS,
                "role": {"const": "tool"},
                "content": _CONTENT,
                "tool_call_id": _TEXT,
                "tool_calls": _NULL,
            },
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
                "parameters": PARAMETERS,
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


def _options(mode: str, **options: dict[str, Any]) -> dict[str, Any]:
    properties = {"mode": {"const": mode}, **{name: or_null(value) for name, value in options.items()}}
    return {"type": "object", "properties": properties, "required": ["mode"], "additionalProperties": False}


_CHUNKS = {
    "anyOf": [
        {
            "type": "array",
            "maxItems": 256,
            "items": {
                "anyOf": [
                    {"type": "string", "pattern": "^chunk-[0-9a-f]{24}$", "description": "Of a registered chunk."},
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
_SINK = {"enum": ["mask", "keep"]}
_REUSE = {
    "anyOf": [
        {"enum": ["exact", "isolated", "blend", None]},
        _options("exact"),
        _options("isolated", sink=_SINK),
        _options(
            "blend",
            ratio={"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            select={"enum": ["deviation", "first"]},
            sink=_SINK,
        ),
    ]
}
_OUTPUTS: dict[str, dict[str, Any]] = {
    "json": {"type": "object", "description": "A JSON Schema."},
    "json_object": {"const": True},
    "regex": {"type": "string", "format": "regex"},
    "choice": {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "uniqueItems": True},
    "grammar": {"type": "string", "pattern": "start[^:]*:", "description": "In Lark's notation."},
}
_STRUCTURED = {
    "anyOf": [
        *(
            {
                "type": "object",
                "properties": {name: _NULL for name in _OUTPUTS} | {kind: value},
                "required": [kind],
                "additionalProperties": False,
            }
            for kind, value in _OUTPUTS.items()
        ),
        _NULL,
    ]
}
_KWARGS = or_null({"type": "object", "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"}})
# What pydantic calls Any.
WRITTEN: dict[str, dict[str, Any]] = {
    "tool_choice": _TOOL_CHOICE,
    "response_format": _RESPONSE_FORMAT,
    "chunks": _CHUNKS,
    "reuse": _REUSE,
    "structured_outputs": _STRUCTURED,
    "chat_template_kwargs": _KWARGS,
    "modalities": {"enum": [["text"], None]},
    "store": {"enum": [False, None]},
    "best_of": {
        "type": "null",
        "description": "Allowed only if it is `n`: all answers are returned.",
    },
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

_SOME_TOOLS = {"type": "array", "minItems": 1}
_NO_TOOLS = {"tools": {"type": ["array", "null"], "maxItems": 0}}
_NO_CHUNKS = {"properties": {"chunks": {"type": ["array", "null"], "maxItems": 0}}}
_IS_STREAM = is_given("stream", {"const": True})
_FREE_TEXT = {
    "response_format": or_null({"type": "object", "properties": {"type": {"const": "text"}}, "required": ["type"]})
}


def _only(name: str, condition: dict[str, Any]) -> dict[str, Any]:
    """A field that is there only under a condition."""
    return {"anyOf": [is_absent(name), condition]}


_NOT = {"enum": [False, None]}
_STREAMS = [_only("stream_options", _IS_STREAM)]
_CHAT = [
    *_STREAMS,
    _only("top_logprobs", is_given("logprobs", {"const": True})),
    _only("max_tokens", is_absent("max_completion_tokens")),
    # Tools, or something that the answer must look like.
    {
        "anyOf": [
            {"properties": {**_NO_TOOLS, "tool_choice": _NULL, "parallel_tool_calls": _NULL, **_FREE_TEXT}},
            {
                "properties": {
                    **_NO_TOOLS,
                    "tool_choice": _NULL,
                    "parallel_tool_calls": _NULL,
                    "structured_outputs": _NULL,
                }
            },
            {
                "required": ["tools"],
                "properties": {"tools": _SOME_TOOLS, "structured_outputs": _NULL, **_FREE_TEXT},
            },
            {
                "required": ["tools", "tool_choice"],
                "properties": {"tools": _SOME_TOOLS, "tool_choice": {"const": "none"}, "structured_outputs": _NULL},
            },
            {
                "required": ["tools", "tool_choice"],
                "properties": {"tools": _SOME_TOOLS, "tool_choice": {"const": "none"}, **_FREE_TEXT},
            },
        ]
    },
]
#: Fields that need others, or do not go with them.
TOGETHER: dict[str, list[dict[str, Any]]] = {
    "ChatRequest": _CHAT,
    "RenderRequest": _CHAT,
    "CompletionRequest": [
        *_STREAMS,
        {"anyOf": [{"properties": {"echo": {"enum": [False, None]}}}, _NO_CHUNKS]},
        {
            "anyOf": [
                is_absent("max_tokens"),
                is_given("max_tokens", {"type": "integer", "minimum": 1}),
                is_given("echo", {"const": True}),
            ]
        },
    ],
    "TokenizeRequest": [
        {
            "anyOf": [
                {
                    "required": ["prompt"],
                    "properties": {
                        "prompt": _TEXT,
                        **{name: _NULL for name in ("messages", "chat_template_kwargs", "tools")},
                        "add_generation_prompt": _NOT,
                        "continue_final_message": _NOT,
                    },
                },
                {
                    "required": ["messages"],
                    "properties": {
                        "messages": {"type": "array"},
                        "prompt": _NULL,
                        "add_special_tokens": _NOT,
                        "parse_special": _NOT,
                    },
                },
            ]
        }
    ],
}
