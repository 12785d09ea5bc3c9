"""The input of OpenAI's Responses as messages of chat completions.

Items of one turn of the assistant (its reasoning, its text, its function calls) become one message, because that is how
chat templates know a turn. Nothing is stored between requests: a client sends the items of earlier answers again.
"""

from __future__ import annotations

from typing import Any

from nanobraid.server import errors
from nanobraid.server.request_fields import Fields, listed, typed
from nanobraid.server.request_shapes import (
    ANYTHING,
    TEXT,
    Entry,
    Shape,
    an_object,
    choice,
    objects,
    served,
    text_or,
)

Message = dict[str, Any]

_IDS = {"id": ANYTHING, "status": ANYTHING}  # what the answer that made an item said of it; not part of the prompt
_CALLER = an_object(Shape({"type": served("direct")}))
_NO_BREAKPOINTS = {"prompt_cache_breakpoint": "prefixes are cached automatically"}
_INPUT_TEXT = Shape({"text": TEXT}, ("text",), _NO_BREAKPOINTS)
_OUTPUT_TEXT = Shape(
    # The log-probabilities are of an earlier answer; not part of the prompt.
    {"text": TEXT, "logprobs": ANYTHING, "annotations": Entry({"type": "array", "maxItems": 0})},
    ("text",),
    _NO_BREAKPOINTS,
)
_INPUT = text_or(input_text=_INPUT_TEXT)
_TEXT_PART = Shape({"text": TEXT}, ("text",))


def _message_of(role: Entry, content: Entry) -> Shape:
    refused = {"phase": "the model's messages have no phases"}
    return Shape({"role": role, "content": content, **_IDS}, ("role", "content"), refused, told=False)


_ROLES = ("user", "system", "developer")
_CALL = Shape(
    {"call_id": TEXT, "name": TEXT, "arguments": TEXT, "caller": _CALLER, "async": served(False), **_IDS},
    ("call_id", "name", "arguments"),
    {"namespace": "functions have no namespaces"},
)
_OUTPUT = Shape(
    {"call_id": TEXT, "output": _INPUT, "caller": _CALLER, **_IDS},
    ("call_id", "output"),
    {"namespace": "functions have no namespaces", "name": "call_id says which call it answers"},
)
_REASONING = Shape(
    {"content": objects(reasoning_text=_TEXT_PART), "summary": objects(summary_text=_TEXT_PART), **_IDS},
    refused={"encrypted_content": "send the item's content instead"},
)
_ITEMS: dict[str, Shape] = {
    "message": _message_of(choice(*_ROLES), _INPUT),
    # A client that keeps a conversation as text writes input_text for either side.
    "message assistant": _message_of(choice("assistant"), text_or(output_text=_OUTPUT_TEXT, input_text=_INPUT_TEXT)),
    "function_call": _CALL,
    "function_call_output": _OUTPUT,
    "reasoning": _REASONING,
}

#: ``instructions`` and ``input`` of a request.
FIELDS = {"instructions": TEXT, "input": text_or(least=1, **_ITEMS)}


def messages(fields: Fields) -> list[Message]:
    """Reads ``instructions`` and ``input`` of a request.

    The instructions and system or developer messages right behind them become one system message: many chat templates
    know only one, at the beginning.

    Raises:
        ApiError: Something is missing, of a wrong type, or of a kind that is not served; it names the path.
    """
    turns = _Turns()
    instructions = fields.text("instructions")
    if instructions is not None:
        turns.system(instructions)
    value = fields.need("input")
    if isinstance(value, str):
        turns.add({"role": "user", "content": value})
        return turns.messages
    if not typed(value, list, "input"):
        raise errors.invalid_value("input", "input must not be empty")
    for item in fields.children("input"):
        _item(item, turns)
        item.close()
    return turns.messages


class _Turns:
    """Collects messages; one of the assistant stays open until somebody else speaks."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def add(self, message: Message) -> None:
        self.messages.append(message)

    def system(self, content: str | list[Message]) -> None:
        if len(self.messages) == 1 and self.messages[0]["role"] == "system":
            self.messages[0]["content"] = _joined(self.messages[0]["content"]) + "\n\n" + _joined(content)
        else:
            self.add({"role": "system", "content": content})

    def assistant(self) -> Message:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.add({"role": "assistant", "content": ""})
        return self.messages[-1]


def _item(item: Fields, turns: _Turns) -> None:
    kind = item.text("type")
    if kind is None and item.peek("role") is not None:
        kind = "message"
    if kind in _ITEMS:
        item.narrow("message assistant" if kind == "message" and item.peek("role") == "assistant" else kind)
    match kind:
        case "message":
            _message(item, turns)
        case "function_call":
            _function_call(item, turns)
        case "function_call_output":
            _function_call_output(item, turns)
        case "reasoning":
            _reasoning(item, turns)
        case None:
            raise errors.missing(item.at("type"))
        case _:
            raise errors.unsupported(item.at("type"), f"input items of type {kind!r:.100} are not served")


def _message(item: Fields, turns: _Turns) -> None:
    role = _role(item)
    for name in _IDS:
        item.take(name)
    item.refuse()
    content = _content(item, "content")
    if role == "assistant":
        message = turns.assistant()
        message["content"] = _appended(message["content"], content)
    elif role == "user":
        turns.add({"role": "user", "content": content})
    else:
        turns.system(content)


def _role(item: Fields) -> str:
    role: str = typed(item.need("role"), str, item.at("role"))
    if role not in (*_ROLES, "assistant"):
        allowed = listed((*_ROLES, "assistant"))
        raise errors.invalid_value(item.at("role"), f"{item.at('role')} must be one of {allowed}, not {role!r:.100}")
    return role


def _function_call(item: Fields, turns: _Turns) -> None:
    for name in _IDS:
        item.take(name)
    item.serve("async")
    item.refuse()
    _direct_caller(item)
    function = {"name": item.need_text("name"), "arguments": item.need_text("arguments")}
    call = {"id": item.need_text("call_id"), "type": "function", "function": function}
    turns.assistant().setdefault("tool_calls", []).append(call)


def _function_call_output(item: Fields, turns: _Turns) -> None:
    for name in _IDS:
        item.take(name)
    item.refuse()
    _direct_caller(item)
    call_id = item.need_text("call_id")
    turns.add({"role": "tool", "tool_call_id": call_id, "content": _content(item, "output")})


def _reasoning(item: Fields, turns: _Turns) -> None:
    for name in _IDS:
        item.take(name)
    item.refuse()
    texts = _part_texts(item, "content")
    summaries = _part_texts(item, "summary")
    message = turns.assistant()
    text = "".join(texts or summaries)  # of one item, whichever is there: a summary stands for what it sums up
    message["reasoning_content"] = message.get("reasoning_content", "") + text


def _part_texts(item: Fields, name: str) -> list[str]:
    texts = []
    for part in item.children(name):
        _part_kind(part)
        texts.append(part.need_text("text"))
        part.close()
    return texts


def _part_kind(part: Fields) -> str:
    kind: str = typed(part.need("type"), str, part.at("type"))
    if kind not in part.kinds:
        ours = " or ".join(repr(one) for one in part.kinds)
        raise errors.unsupported(part.at("type"), f"only {ours} is served here, not {kind!r:.100}")
    part.narrow(kind)
    return kind


def _content(item: Fields, name: str) -> str | list[Message]:
    value = item.need(name)
    if isinstance(value, str):
        return value
    parts: list[Message] = []
    for part in item.children(name):
        if _part_kind(part) == "output_text":
            part.take("logprobs")
            if part.array("annotations"):
                raise errors.unsupported(part.at("annotations"), "the model has no sources to cite")
        part.refuse()
        parts.append({"type": "text", "text": part.need_text("text")})
        part.close()
    return parts if len(parts) > 1 else _joined(parts)


def _direct_caller(item: Fields) -> None:
    caller = item.child("caller")
    if caller is not None:
        caller.serve("type")
        caller.close()


def _joined(content: str | list[Message]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _appended(before: str | list[Message], more: str | list[Message]) -> str | list[Message]:
    if not before:
        return more
    return [*_parts(before), *_parts(more)]


def _parts(content: str | list[Message]) -> list[Message]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
