"""The turns of Anthropic's Messages as messages of chat completions.

``cache_control`` marks a prefix worth keeping. Every prefix is cached here as long as there is room, so such a mark is
fulfilled without further ado. Signatures of thinking blocks mean nothing here and are not checked.
"""

from __future__ import annotations

import json
from typing import Any

from nanobraid.server import errors
from nanobraid.server.request_fields import Fields, listed, typed
from nanobraid.server.request_shapes import (
    FLAG,
    OBJECT,
    TEXT,
    Entry,
    Shape,
    an_object,
    choice,
    served,
    text_or,
)

Message = dict[str, Any]
Content = str | list[Message]

#: A mark for the cache.
CACHE_CONTROL = an_object(Shape({"type": choice("ephemeral"), "ttl": choice("5m", "1h")}, ("type",)))
#: Who calls a tool.
CALLER = an_object(Shape({"type": served("direct")}))
_NO_TOOLSETS = {"toolset_name": "there are no toolsets here"}
_TEXT = Shape(
    {"text": TEXT, "citations": Entry({"type": "array", "maxItems": 0}), "cache_control": CACHE_CONTROL}, ("text",)
)
_THINKING = Shape({"thinking": TEXT, "signature": TEXT}, ("thinking",))
_TOOL_USE = Shape(
    {"id": TEXT, "name": TEXT, "input": OBJECT, "caller": CALLER, "cache_control": CACHE_CONTROL},
    ("id", "name", "input"),
    _NO_TOOLSETS,
)
_TEXTS = text_or(text=_TEXT)
_TOOL_RESULT = Shape(
    {"tool_use_id": TEXT, "content": _TEXTS, "is_error": FLAG, "cache_control": CACHE_CONTROL},
    ("tool_use_id",),
    _NO_TOOLSETS,
)
_TURNS: dict[str, Shape] = {
    "user": Shape({"content": text_or(text=_TEXT, tool_result=_TOOL_RESULT)}, ("content",)),
    "assistant": Shape({"content": text_or(text=_TEXT, thinking=_THINKING, tool_use=_TOOL_USE)}, ("content",)),
    "system": Shape({"content": _TEXTS}, ("content",)),
}

#: ``system`` and ``messages`` of a request.
FIELDS = {"system": _TEXTS, "messages": Entry({"type": "array", "minItems": 1}, _TURNS, "role")}


def messages(fields: Fields) -> list[Message]:
    """Reads ``system`` and ``messages`` of a request.

    Turns of one role in a row become one message, as the interface promises. A message of several texts keeps them
    apart as parts.

    Raises:
        ApiError: Something is missing, of a wrong type, or of a kind that is not served; it names the path.
    """
    result: list[Message] = []
    system = _system(fields)
    if system is not None:
        result.append({"role": "system", "content": system})
    if not typed(fields.need("messages"), list, "messages"):
        raise errors.invalid_value("messages", "messages must not be empty")
    for turn in fields.children("messages"):
        turn.need("role")
        role = turn.choice("role") or ""
        turn.narrow(role)
        if role == "user":
            _user(turn, result)
        elif role == "assistant":
            _assistant(turn, result)
        else:
            turn.need("content")
            result.append({"role": "system", "content": _texts(turn, "content")})
        turn.close()
    if result[-1]["role"] == "assistant" and "tool_calls" in result[-1]:
        last = f"messages[{len(fields.take('messages')) - 1}]"
        raise errors.invalid_value(last, f"{last}: a tool_use block must be followed by its tool_result")
    return result


def cache_control(fields: Fields) -> None:
    """Checks a mark for the cache.

    Raises:
        ApiError: It is none.
    """
    mark = fields.child("cache_control")
    if mark is not None:
        mark.need("type")
        mark.choice("type")
        mark.choice("ttl")
        mark.close()


def direct_caller(block: Fields) -> None:
    """Checks that a tool is called by the model itself.

    Raises:
        ApiError: By something else.
    """
    caller = block.child("caller")
    if caller is not None:
        caller.serve("type")
        caller.close()


def _system(fields: Fields) -> Content | None:
    return None if fields.take("system") is None else _texts(fields, "system")


def _user(turn: Fields, result: list[Message]) -> None:
    """The results of tools come first, each a message of its own; the rest is the user's."""
    if isinstance(turn.need("content"), str):
        _add(result, "user", turn.need_text("content"))
        return
    parts: list[Message] = []
    answered = False
    for block in turn.children("content"):
        kind = _kind(block)
        if kind == "text":
            parts.append(_text(block))
        elif parts:
            raise errors.invalid_value(block.path, f"{block.path}: tool_result blocks must come before text")
        else:
            result.append(_tool_result(block))
            answered = True
        block.close()
    if parts or not answered:
        _add(result, "user", _content(parts))


def _assistant(turn: Fields, result: list[Message]) -> None:
    message: Message = {"role": "assistant", "content": ""}
    if result and result[-1]["role"] == "assistant":
        message = result[-1]
    else:
        result.append(message)
    if isinstance(turn.need("content"), str):
        message["content"] = _joined(message["content"], turn.need_text("content"))
        return
    for block in turn.children("content"):
        match _kind(block):
            case "text":
                message["content"] = _joined(message["content"], _content([_text(block)]))
            case "thinking":
                block.text("signature")
                thinking = block.need_text("thinking")
                message["reasoning_content"] = message.get("reasoning_content", "") + thinking
            case _:
                message.setdefault("tool_calls", []).append(_tool_use(block))
        block.close()


def _kind(block: Fields) -> str:
    kind: str = typed(block.need("type"), str, block.at("type"))
    if kind not in block.kinds:
        ours = listed(block.kinds)
        raise errors.unsupported(block.at("type"), f"blocks of type {kind!r:.100} are not served here, only {ours}")
    block.narrow(kind)
    return kind


def _text(block: Fields) -> Message:
    cache_control(block)
    if block.array("citations"):
        raise errors.unsupported(block.at("citations"), "the model has no sources to cite")
    return {"type": "text", "text": block.need_text("text")}


def _texts(fields: Fields, name: str) -> Content:
    value = fields.take(name)
    if isinstance(value, str):
        return value
    parts: list[Message] = []
    for block in fields.children(name):
        _kind(block)
        parts.append(_text(block))
        block.close()
    return _content(parts)


def _tool_result(block: Fields) -> Message:
    """The interface says apart from the text whether a tool failed; chat has only the text to say it in."""
    cache_control(block)
    block.refuse()
    content = "" if block.take("content") is None else _texts(block, "content")
    if block.flag("is_error"):
        first, *rest = _parts(content)
        content = _content([{**first, "text": f"Error: {first['text']}"}, *rest])
    return {"role": "tool", "tool_call_id": block.need_text("tool_use_id"), "content": content}


def _tool_use(block: Fields) -> Message:
    cache_control(block)
    direct_caller(block)
    block.refuse()
    block.need("input")
    arguments = json.dumps(block.mapping("input"), ensure_ascii=False)
    function = {"name": block.need_text("name"), "arguments": arguments}
    return {"id": block.need_text("id"), "type": "function", "function": function}


def _add(result: list[Message], role: str, content: Content) -> None:
    if result and result[-1]["role"] == role:
        result[-1]["content"] = _joined(result[-1]["content"], content)
    else:
        result.append({"role": role, "content": content})


def _content(parts: list[Message]) -> Content:
    if len(parts) > 1:
        return parts
    return parts[0]["text"] if parts else ""


def _joined(before: Content, more: Content) -> Content:
    if not before:
        return more
    return [*_parts(before), *_parts(more)]


def _parts(content: Content) -> list[Message]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
