"""Anthropic's Messages as a translation of chat completions: a request there and back, and errors in their shape.

What the fields that both interfaces share mean, and which values they may have, is chat's to say.

`messages_stream` has the events of a streamed answer.
"""

from __future__ import annotations

import json
from typing import Any

from nanobraid.server import errors, messages_input
from nanobraid.server.request_fields import EXTENSIONS, Fields, listed, template_kwargs
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
from nanobraid.server.responses import renamed, stem

Json = dict[str, Any]

_STORED = "nothing is stored between requests"
_REFUSED = {  # those of the beta interface too
    "betas": "beta features are not served",
    "billing_policy": "nothing is billed",
    "compaction": "the context is never shortened silently",
    "container": "there are no containers here",
    "context_management": "the context is never shortened silently",
    "diagnostics": _STORED,
    "fallback_credit_token": "there is one model",
    "fallbacks": "there is one model",
    "inference_geo": "the model runs where the server runs",
    "mcp_servers": "the server calls no tools",
    "output_format": "it is output_config.format now",
    "thread": _STORED,
    "user_profile_id": "there are no user profiles here",
    "workspace_id": "there are no workspaces here",
}
_DISPLAY = choice("summarized", "omitted")
_THINKING = one_of(
    enabled=Shape({"budget_tokens": integer(1), "display": _DISPLAY}, ("budget_tokens",)),
    disabled=Shape({}),
    adaptive=Shape({"display": _DISPLAY}),
)
_OUTPUT = Shape(
    {
        "effort": choice("low", "medium", "high", "xhigh", "max"),
        "format": one_of(json_schema=Shape({"schema": OBJECT}, ("schema",))),
    },
    refused={"task_budget": "the model does not know of budgets"},
)
_TOOL = Shape(
    {
        "type": choice("custom"),
        "name": NAME,
        "description": TEXT,
        "input_schema": PARAMETERS,
        "strict": FLAG,
        "cache_control": messages_input.CACHE_CONTROL,
        "allowed_callers": served(["direct"]),
        "defer_loading": served(False, reason="every tool is in the prompt"),
        "eager_input_streaming": served(True, reason="the input of a call is always streamed as it is written"),
    },
    ("name", "input_schema"),
    {"input_examples": "say in the description how the tool is used"},
)
_PARALLEL = {"disable_parallel_tool_use": FLAG}
_CHOICE = one_of(
    auto=Shape(_PARALLEL), any=Shape(_PARALLEL), tool=Shape({"name": TEXT, **_PARALLEL}, ("name",)), none=Shape({})
)
_COUNTED = {
    **of_chat("model"),
    "chat_template_kwargs": Entry({"type": "object"}, of_chat="chat_template_kwargs"),
    **messages_input.FIELDS,
    "speed": served("standard"),
    "cache_control": messages_input.CACHE_CONTROL,
    "tools": objects(only=_TOOL),
    "tool_choice": _CHOICE,
    "output_config": an_object(_OUTPUT),
    "thinking": _THINKING,
}
_WITH_TOOLS = is_given("tools", {"type": "array", "minItems": 1})
_NOTES = {"allOf": [{"anyOf": [is_absent("tool_choice"), _WITH_TOOLS]}]}

#: A request to count tokens. `to_count` reads it by this table.
COUNT = Shape(_COUNTED, ("messages",), _REFUSED, notes=_NOTES)
#: A request. `to_chat` reads it by this table.
REQUEST = Shape(
    {
        **_COUNTED,
        **of_chat("temperature", "top_p", *EXTENSIONS),
        "max_tokens": integer(1),
        "service_tier": served("auto", "standard_only"),
        "stop_sequences": array_of({"type": "string", "minLength": 1}),
        "metadata": an_object(Shape({"user_id": TEXT})),
        "stream": FLAG,
    },
    ("messages", "max_tokens"),
    _REFUSED,
    notes=_NOTES,
)

_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

#: How chat's names of fields begin, and what those fields are called here; the first that fits counts.
_PARAMS = (
    ("max_completion_tokens", "max_tokens"),
    ("response_format", "output_config.format"),
    ("chat_template_kwargs.thinking_budget", "thinking.budget_tokens"),
    ("reasoning_effort", "thinking"),
    ("stop", "stop_sequences"),
    ("user", "metadata.user_id"),
    ("parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
    ("continue_final_message", "messages"),
    ("add_generation_prompt", "messages"),
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
    fields.need("max_tokens")
    fields.serve("service_tier")
    chat = _prompt(fields)
    extensions = (name for name in EXTENSIONS if name != "top_k")
    chat |= {name: fields.take(name) for name in ("temperature", "top_k", "top_p", *extensions)}
    chat["max_completion_tokens"] = fields.integer("max_tokens")
    chat["stop"] = _stop(fields)
    chat["user"] = _user(fields)
    if fields.flag("stream"):
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    elif fields.take("stream") is False:
        chat["stream"] = False
    fields.close()
    return {name: value for name, value in chat.items() if value is not None}


def to_count(body: Any, *, strict: bool = False) -> Json:
    """Translates a request to count the tokens of a prompt.

    Args:
        body: The parsed JSON of the request.
        strict: Refuse fields that are in no interface, instead of ignoring them.

    Returns:
        The body of a request for chat completions whose prompt is the one to be counted.

    Raises:
        ApiError: A field has a wrong type or value, is missing, or is not served; `param` names it.
    """
    fields = Fields(body, an_object(COUNT), strict=strict)
    chat = _prompt(fields)
    fields.close()
    return {name: value for name, value in chat.items() if value is not None}


def from_count(num_tokens: int) -> Json:
    """The answer to a request to count."""
    return {"input_tokens": num_tokens}


def param_from_chat(param: str | None) -> str | None:
    """The name of a field of a translated request, when chat found something wrong with it."""
    if param is None:
        return None
    for chat, ours in _PARAMS:
        if param == chat or param.startswith((f"{chat}.", f"{chat}[")):
            return ours
    if param.startswith("messages"):  # the turns are numbered otherwise there
        return "messages"
    if param.startswith("tools["):
        return param.replace(".function.parameters", ".input_schema").replace(".function.", ".")
    return param


def error_from_chat(error: errors.ApiError) -> errors.ApiError:
    """An error of the translated request, in terms of the request that the client sent."""
    return renamed(error, param_from_chat(error.param))


def anthropic_error(error: errors.ApiError) -> Json:
    """The envelope of an error; it has no room for the field's name, so the message begins with it."""
    kind = _ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    message = error.message
    if error.param and error.param not in message:
        message = f"{error.param}: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}}


def from_chat(completion: Json, request: Json) -> Json:
    """Translates a finished ``chat.completion``.

    Args:
        completion: The completion, with one choice.
        request: The body that `to_chat` translated.

    Raises:
        ApiError: The model called a tool with something that is not a JSON object.
    """
    choice = completion["choices"][0]
    message = choice["message"]
    content: list[Json] = []
    if message.get("reasoning_content"):
        content.append(thinking_block("" if omits_thinking(request) else message["reasoning_content"]))
    if message.get("content"):
        content.append({"type": "text", "text": message["content"]})
    calls = message.get("tool_calls") or []
    for call in calls:
        function = call["function"]
        arguments = parsed_arguments(function["arguments"])
        if arguments is not None:
            content.append(tool_block(call["id"], function["name"], arguments))
        elif choice["finish_reason"] != "length" or call is not calls[-1]:
            raise malformed_call(function["name"])  # one that is cut off is left out: nobody should run it
    result = frame(completion["id"], completion["model"])
    result["content"] = content
    result |= stop(choice, bool(calls))
    result["usage"] |= usage_from_chat(completion.get("usage") or {})
    if "nanobraid" in completion:
        result["nanobraid"] = completion["nanobraid"]
    return result


def frame(chat_id: str, model: str) -> Json:
    """A message of the model's with nothing in it."""
    return {
        "id": f"msg_{stem(chat_id)}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**usage_from_chat({}), "service_tier": "standard"},
    }


def stop(choice: Json, called: bool) -> Json:
    """Why an answer ended.

    Args:
        choice: The choice that has the reason, and the stop string under ``stop_reason`` if one matched.
        called: Whether the model called a tool; chat says "stop" even so if the tool was prescribed.
    """
    matched = choice.get("stop_reason")
    if choice["finish_reason"] == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if called or choice["finish_reason"] == "tool_calls":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if isinstance(matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": matched}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def usage_from_chat(usage: Json) -> Json:
    """Counts of tokens; unlike chat's, those of the input are without what came from the cache."""
    prompt = usage.get("prompt_tokens_details") or {}
    completion = usage.get("completion_tokens_details") or {}
    cached = prompt.get("cached_tokens") or 0
    return {
        "input_tokens": usage.get("prompt_tokens", 0) - cached,
        "cache_creation_input_tokens": 0,  # nobody pays for it
        "cache_read_input_tokens": cached,
        "output_tokens": usage.get("completion_tokens", 0),
        "output_tokens_details": {"thinking_tokens": completion.get("reasoning_tokens") or 0},
    }


def thinking_block(text: str) -> Json:
    """A block of thinking; there is nothing to sign."""
    return {"type": "thinking", "thinking": text, "signature": ""}


def tool_block(call_id: str, name: str, arguments: Json) -> Json:
    """A block that calls a tool."""
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def parsed_arguments(text: str) -> Json | None:
    """The arguments of a call, {} if the model wrote none; None if they are no JSON object."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def malformed_call(name: str) -> errors.ApiError:
    """The model wrote arguments that this interface cannot carry."""
    what = errors.cut(repr(name), 200)
    return errors.ApiError(
        500, f"the model called the tool {what} with something that is not a JSON object", type=errors.SERVER_ERROR
    )


def omits_thinking(request: Json) -> bool:
    """Whether the client wants blocks of thinking without their text."""
    return (request.get("thinking") or {}).get("display") == "omitted"


def _prompt(fields: Fields) -> Json:
    """The fields that a request for an answer and one to count tokens have in common."""
    fields.refuse()
    fields.serve("speed")
    messages_input.cache_control(fields)
    chat: Json = {"model": fields.take("model"), "messages": messages_input.messages(fields)}
    if chat["messages"][-1]["role"] == "assistant":  # the beginning of the answer
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    chat |= _tools(fields)
    effort = None
    output = fields.child("output_config")
    if output is not None:
        effort = output.choice("effort")
        chat["response_format"] = _format(output)
        output.refuse()
        output.close()
    chat |= _thinking(fields, effort)
    return chat


def _thinking(fields: Fields, effort: str | None) -> Json:
    """Whether to think, and how much: chat has one field for both, and refuses it where a model cannot."""
    thinking = fields.child("thinking")
    budget = None
    if thinking is not None:
        kind = _type(thinking)
        if kind == "enabled":
            thinking.need("budget_tokens")
            budget = thinking.integer("budget_tokens")
        if kind == "disabled":
            if effort is not None:
                raise errors.unsupported("output_config.effort", "it is about thinking here, which is disabled")
            effort = "none"
        else:
            thinking.choice("display")
            effort = effort or "high"  # the interface's default
        thinking.close()
    kwargs = template_kwargs(fields, {} if budget is None else {"thinking_budget": budget})
    return {"reasoning_effort": effort, "chat_template_kwargs": kwargs or None}


def _type(fields: Fields) -> str:
    kind = fields.need_text("type")
    if kind not in fields.kinds:
        raise errors.unsupported(fields.at("type"), f"only {listed(fields.kinds)} is served, not {kind!r:.100}")
    fields.narrow(kind)
    return kind


def _format(output: Fields) -> Json | None:
    chosen = output.child("format")
    if chosen is None:
        return None
    _type(chosen)
    chosen.need("schema")
    schema = chosen.mapping("schema")
    chosen.close()
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": schema, "strict": True}}


def _tools(fields: Fields) -> Json:
    tools = [_tool(tool) for tool in fields.children("tools")]
    chosen = fields.child("tool_choice")
    if chosen is None:
        return {"tools": tools or None}
    if not tools:
        raise errors.invalid_value("tool_choice", "tool_choice is only allowed when there are tools")
    kind = _type(chosen)
    chat: Json = {"tools": tools, "tool_choice": {"any": "required"}.get(kind, kind)}
    if kind == "tool":
        chat["tool_choice"] = {"type": "function", "function": {"name": chosen.need_text("name")}}
    if kind != "none":
        alone = chosen.flag("disable_parallel_tool_use")
        chat["parallel_tool_calls"] = None if alone is None else not alone
    chosen.close()
    return chat


def _tool(tool: Fields) -> Json:
    kind = tool.text("type")
    if kind not in (None, "custom"):
        raise errors.unsupported(tool.at("type"), f"only tools of type 'custom' are served, not {kind!r:.100}")
    messages_input.cache_control(tool)
    for name in ("allowed_callers", "defer_loading", "eager_input_streaming"):
        tool.serve(name)
    tool.refuse()
    tool.need("input_schema")
    function = {
        "name": tool.need_text("name"),
        "description": tool.text("description"),
        "parameters": tool.mapping("input_schema"),
        "strict": tool.flag("strict"),
    }
    tool.close()
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _stop(fields: Fields) -> list[str] | None:
    sequences = fields.array("stop_sequences")
    for index, one in enumerate(sequences or []):
        path = f"stop_sequences[{index}]"
        if not isinstance(one, str):
            raise errors.invalid_type(path, f"{path} must be a string")
        if not one:
            raise errors.invalid_value(path, f"{path} must not be empty")
    return sequences or None


def _user(fields: Fields) -> str | None:
    metadata = fields.child("metadata")
    if metadata is None:
        return None
    user = metadata.text("user_id")
    metadata.close()
    return user
