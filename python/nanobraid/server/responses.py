"""OpenAI's Responses as a translation of chat completions: a request there and back.

Nothing is stored: ``store`` is answered with false, and whatever needs an earlier response is refused by name. What the
fields that both interfaces share mean, and which values they may have, is chat's to say.

`responses_stream` has the events of a streamed answer.
"""

from __future__ import annotations

import re
import time
from typing import Any

from nanobraid.server import errors, responses_input
from nanobraid.server.request_fields import EXTENSIONS, Fields, listed, typed
from nanobraid.server.request_shapes import (
    FLAG,
    NAME,
    OBJECT,
    PARAMETERS,
    TEXT,
    Entry,
    Shape,
    an_object,
    array_of,
    choice,
    integer,
    is_absent,
    is_given,
    objects,
    of_chat,
    one_of,
    served,
)

Json = dict[str, Any]

LOGPROBS = "message.output_text.logprobs"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

_STORED = "nothing is stored between requests"
_REFUSED = {
    "access_programs": "there are no access programs here",
    "background_options": "responses are computed while the client waits",
    "context_management": "the context is never shortened silently",
    "conversation": _STORED,
    "image": "the model reads text only",
    "max_tool_calls": "there are no built-in tools",
    "moderation": "there is no moderation",
    "previous_response_id": f"{_STORED}; send the items of the earlier response in the input",
    "prompt": "there are no stored prompts",
    "prompt_cache_options": "prefixes are cached automatically",
    "prompt_cache_retention": "prefixes are cached automatically, as long as there is room",
}
_SAME = ("metadata", "model", "prompt_cache_key", "safety_identifier", "temperature", "top_p", "user")

_FORMATS = {
    "text": Shape({}),
    "json_object": Shape({}),
    "json_schema": Shape({"name": NAME, "schema": OBJECT, "description": TEXT, "strict": FLAG}, ("name", "schema")),
}
_TEXT = Shape({"format": one_of(**_FORMATS)}, refused={"verbosity": "the model cannot be told how much to say"})
_WHOLE = "reasoning is returned whole"
_REASONING = Shape(
    {
        "effort": Entry({"type": "string", "enum": [*EFFORTS]}, of_chat="reasoning_effort"),
        "context": served("auto", reason="the model's chat template decides"),
        "mode": served("standard"),
    },
    refused={"summary": _WHOLE, "generate_summary": _WHOLE},
)
_TOOL = Shape(
    {
        "type": choice("function"),
        "name": NAME,
        "description": TEXT,
        "parameters": PARAMETERS,
        "strict": FLAG,
        "async": served(False),
        "allowed_callers": served(["direct"]),
        "defer_loading": served(False, reason="every tool is in the prompt"),
    },
    ("type", "name"),
    {"output_schema": "outputs are handed to the model as they come"},
)
_CHOICES = ("none", "auto", "required")
_NAMED = one_of(function=Shape({"name": TEXT}, ("name",)))
_STREAM_OPTIONS = Shape({"include_obfuscation": served(False, reason="events are not padded")})

#: A request. `to_chat` reads it by this table.
REQUEST = Shape(
    {
        **of_chat(*_SAME, *EXTENSIONS, "stop", "chat_template_kwargs"),
        **responses_input.FIELDS,
        "background": served(False, reason="responses are computed while the client waits"),
        "service_tier": served("auto", "default", reason="there is one tier"),
        "store": served(False, reason=_STORED),
        "truncation": served("disabled", reason="an input that is too long is refused"),
        "max_output_tokens": integer(1),
        "text": an_object(_TEXT),
        "reasoning": an_object(_REASONING),
        "include": array_of({"const": LOGPROBS}),
        "top_logprobs": integer(0),
        "tools": objects(only=_TOOL),
        "tool_choice": Entry({"anyOf": [{"enum": [*_CHOICES]}, _NAMED.document(strict=False)]}),
        "parallel_tool_calls": FLAG,
        "stream": FLAG,
        "stream_options": an_object(_STREAM_OPTIONS),
    },
    ("input",),
    _REFUSED,
    notes={
        "allOf": [
            {"anyOf": [is_absent("stream_options"), is_given("stream", {"const": True})]},
            {
                "anyOf": [
                    {"properties": {"tool_choice": {"enum": ["none", "auto", None]}}},
                    is_given("tools", {"type": "array", "minItems": 1}),
                ]
            },
        ]
    },
)

#: How chat's names of fields begin, and what those fields are called here; the first that fits counts.
_PARAMS = (
    ("messages", "input"),
    ("max_completion_tokens", "max_output_tokens"),
    ("response_format", "text.format"),
    ("reasoning_effort", "reasoning.effort"),
    ("logprobs", "include"),
)


def to_chat(body: Any, *, strict: bool = False) -> Json:
    """Translates a request.

    Args:
        body: The parsed JSON of the request.
        strict: Refuse fields that are in no interface, instead of ignoring them.

    Returns:
        The body of a request for chat completions; a streamed one asks for the usage.

    Raises:
        ApiError: A field has a wrong type or value, is missing, or is not served; `param` names it.
    """
    fields = Fields(body, an_object(REQUEST), strict=strict)
    fields.refuse()
    for name in ("background", "service_tier", "store", "truncation"):
        fields.serve(name)
    chat: Json = {name: fields.take(name) for name in (*_SAME, *EXTENSIONS, "stop")}
    chat["messages"] = responses_input.messages(fields)
    chat["max_completion_tokens"] = fields.integer("max_output_tokens")
    chat["response_format"] = _format(fields)
    chat["chat_template_kwargs"] = fields.take("chat_template_kwargs")
    chat["reasoning_effort"] = _reasoning(fields)
    chat.update(_logprobs(fields))
    chat.update(_tools(fields))
    chat.update(_stream(fields))
    fields.close()
    return {name: value for name, value in chat.items() if value is not None}


def param_from_chat(param: str | None) -> str | None:
    """The name of a field of a translated request, when chat found something wrong with it."""
    if param is None:
        return None
    for chat, ours in _PARAMS:
        if param == chat or param.startswith((f"{chat}.", f"{chat}[")):
            return ours
    return param.replace(".function.", ".") if param.startswith("tools[") else param


def error_from_chat(error: errors.ApiError) -> errors.ApiError:
    """An error of the translated request, in terms of the request that the client sent."""
    return renamed(error, param_from_chat(error.param))


def renamed(error: errors.ApiError, param: str | None) -> errors.ApiError:
    """A copy of an error that names another field, in its message too."""
    message = error.message
    if error.param and param and param != error.param:
        message = re.sub(rf"(?<!\w){re.escape(error.param)}(?!\w)", lambda _: param, message)
    return errors.ApiError(
        error.status, message, type=error.type, param=param, code=error.code, retry_after=error.retry_after
    )


def from_chat(completion: Json, request: Json) -> Json:
    """Translates a finished ``chat.completion``.

    Args:
        completion: The completion, with one choice.
        request: The body that `to_chat` translated.
    """
    choice = completion["choices"][0]
    message = choice["message"]
    cut = choice["finish_reason"] == "length"
    name = stem(completion["id"])
    output: list[Json] = []
    if message.get("reasoning_content"):
        output.append(reasoning_item(f"rs_{name}_0", message["reasoning_content"]))
    calls = message.get("tool_calls") or []
    if message.get("content"):
        found = choice.get("logprobs") or {}
        part = text_part(message["content"], found.get("content") or [])
        output.append(message_item(f"msg_{name}_{len(output)}", [part]))
    for call in calls:
        function = call["function"]
        output.append(call_item(f"fc_{name}_{len(output)}", call["id"], function["name"], function["arguments"]))
    if not output:
        output.append(message_item(f"msg_{name}_0", [text_part("", [])]))
    if cut:
        output[-1]["status"] = "incomplete"
    response = frame(request, completion["id"], completion["created"], completion["model"])
    if "nanobraid" in completion:
        response["nanobraid"] = completion["nanobraid"]
    return ended(response, output, choice["finish_reason"], completion.get("usage"))


def frame(request: Json, chat_id: str, created: int, model: str) -> Json:
    """A response in progress, with nothing in it but what its request said."""
    text = request.get("text") or {}
    reasoning = request.get("reasoning") or {}
    return {
        "id": f"resp_{stem(chat_id)}",
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.get("instructions"),
        "max_output_tokens": request.get("max_output_tokens"),
        "max_tool_calls": None,
        "metadata": request.get("metadata") or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": _given(request, "parallel_tool_calls", True),
        "previous_response_id": None,
        "prompt_cache_key": request.get("prompt_cache_key"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "safety_identifier": request.get("safety_identifier"),
        "service_tier": "default",
        "store": False,
        "temperature": _given(request, "temperature", 1.0),
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": _given(request, "tool_choice", "auto"),
        "tools": request.get("tools") or [],
        "top_logprobs": _given(request, "top_logprobs", 0),
        "top_p": _given(request, "top_p", 1.0),
        "truncation": "disabled",
        "usage": None,
        "user": request.get("user"),
    }


def ended(response: Json, output: list[Json], finish_reason: str, usage: Json | None) -> Json:
    """A response that has come to its end: complete, or cut by the limit of tokens."""
    cut = finish_reason == "length"
    return {
        **response,
        "status": "incomplete" if cut else "completed",
        "completed_at": None if cut else int(time.time()),
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": None if usage is None else _usage(usage),
    }


def stem(chat_id: str) -> str:
    """The part of a completion's id that the ids of its response and items share, so that one is found by the other."""
    return chat_id.removeprefix("chatcmpl-")


def message_item(item_id: str, content: list[Json], status: str = "completed") -> Json:
    """The item of an answer's text."""
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def text_part(text: str, logprobs: list[Json]) -> Json:
    """The only part of such an item; `logprobs` as chat has them."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [_logprob(one) for one in logprobs]}


def reasoning_item(item_id: str, text: str | None, status: str = "completed") -> Json:
    """The item of an answer's reasoning; without a text it has no content yet."""
    content = [] if text is None else [{"type": "reasoning_text", "text": text}]
    return {"id": item_id, "type": "reasoning", "summary": [], "content": content, "status": status}


def call_item(item_id: str, call_id: str, name: str, arguments: str, status: str = "completed") -> Json:
    """The item of a function call."""
    return {
        "id": item_id,
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def _given(request: Json, name: str, default: Any) -> Any:
    value = request.get(name)
    return default if value is None else value


def _logprob(found: Json) -> Json:
    """A token with its bytes, which chat leaves out where a token is plain text."""
    entry = {"token": found["token"], "bytes": _bytes(found), "logprob": found["logprob"]}
    top = [
        {"token": one["token"], "bytes": _bytes(one), "logprob": one["logprob"]}
        for one in found.get("top_logprobs") or []
    ]
    return {**entry, "top_logprobs": top}


def _bytes(found: Json) -> list[int]:
    data = found.get("bytes")
    return list(str(found["token"]).encode()) if data is None else list(data)


def _usage(usage: Json) -> Json:
    prompt = usage.get("prompt_tokens_details") or {}
    completion = usage.get("completion_tokens_details") or {}
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": prompt.get("cached_tokens") or 0,
            "cache_write_tokens": prompt.get("cache_write_tokens") or 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": completion.get("reasoning_tokens") or 0},
        "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
    }


def _format(fields: Fields) -> Json | None:
    text = fields.child("text")
    if text is None:
        return None
    text.refuse()
    chosen = text.child("format")
    text.close()
    if chosen is None:
        return None
    chosen.need("type")
    kind = chosen.choice("type") or ""
    chosen.narrow(kind)
    result: Json = {"type": kind}
    if kind == "json_schema":
        schema: Json = {"name": chosen.need_text("name")}
        chosen.need("schema")
        schema["schema"] = chosen.mapping("schema")
        schema["description"] = chosen.text("description")
        schema["strict"] = chosen.flag("strict")
        result["json_schema"] = {name: value for name, value in schema.items() if value is not None}
    chosen.close()
    return result


def _reasoning(fields: Fields) -> str | None:
    reasoning = fields.child("reasoning")
    if reasoning is None:
        return None
    reasoning.refuse()
    reasoning.serve("context")
    reasoning.serve("mode")
    effort = reasoning.choice("effort")
    reasoning.close()
    return effort


def _logprobs(fields: Fields) -> Json:
    wanted = False
    for index, name in enumerate(fields.array("include") or []):
        if name != LOGPROBS:
            raise errors.unsupported(f"include[{index}]", f"only {LOGPROBS!r} is served, not {name!r:.100}")
        wanted = True
    top = fields.integer("top_logprobs")
    if not wanted and not top:
        return {}
    return {"logprobs": True, "top_logprobs": top or 0}


def _tools(fields: Fields) -> Json:
    tools = [_tool(tool) for tool in fields.children("tools")]
    parallel = fields.flag("parallel_tool_calls")
    choice = fields.take("tool_choice")
    if isinstance(choice, dict):
        choice = _named_choice(Fields(choice, _NAMED, "tool_choice", strict=fields.strict))
    elif choice is not None and typed(choice, str, "tool_choice") not in _CHOICES:
        raise errors.invalid_value("tool_choice", f"tool_choice must be one of {listed(_CHOICES)}, not {choice!r:.100}")
    if tools:
        return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel}
    if choice not in (None, "none", "auto"):
        raise errors.invalid_value("tool_choice", "tool_choice asks for a call, but there are no tools")
    return {}  # without tools no call can be made, which is what both fields say then


def _tool(tool: Fields) -> Json:
    tool.need("type")
    kind = tool.text("type")
    if kind != "function":
        raise errors.unsupported(tool.at("type"), f"only tools of type 'function' are served, not {kind!r:.100}")
    for name in ("async", "allowed_callers", "defer_loading"):
        tool.serve(name)
    tool.refuse()
    function = {
        "name": tool.need_text("name"),
        "description": tool.text("description"),
        "parameters": tool.mapping("parameters"),
        "strict": tool.flag("strict"),
    }
    tool.close()
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _named_choice(choice: Fields) -> Json:
    choice.need("type")
    kind = choice.text("type")
    if kind != "function":
        raise errors.unsupported(choice.at("type"), f"only choices of type 'function' are served, not {kind!r:.100}")
    choice.narrow(kind)
    name = choice.need_text("name")
    choice.close()
    return {"type": "function", "function": {"name": name}}


def _stream(fields: Fields) -> Json:
    stream = fields.flag("stream")
    options = fields.child("stream_options")
    if options is not None:
        if not stream:
            raise errors.invalid_value("stream_options", "stream_options is only allowed when stream is true")
        options.serve("include_obfuscation")
        options.close()
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {"stream": stream}
