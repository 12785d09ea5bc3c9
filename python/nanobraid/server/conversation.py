"""The messages of a chat request: checked, and as the chat template wants them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nanobraid._schema_limits import MAX_SCHEMA_BYTES
from nanobraid.server.errors import invalid_type, invalid_value, missing, unsupported

_ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
# Fields of messages that are strings, and what templates call them.
_STRINGS = {
    "name": "name",
    "reasoning_content": "reasoning_content",
    "reasoning": "reasoning_content",
    "tool_call_id": "tool_call_id",
}
_TEXT_PARTS = ("text", "refusal")


def checked_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """Returns a conversation with every content as one string and ``developer`` as ``system``.

    Raises:
        ApiError: 400, naming the place.
    """
    checked: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise invalid_type(where, f"{where} must be an object")
        role = message.get("role")
        if role is None:
            raise missing(f"{where}.role")
        if not isinstance(role, str):
            raise invalid_type(f"{where}.role", f"{where}.role must be a string")
        if role not in _ROLES:
            raise invalid_value(f"{where}.role", f"{where}.role must be one of {', '.join(_ROLES)}, got {role[:40]!r}")
        if role == "assistant" and checked and checked[-1]["role"] == "assistant":
            raise invalid_value(f"{where}.role", f"{where} and the message before it are both the assistant's")
        checked.append(_checked(message, role, where))
    return checked


def _checked(message: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    for refused in ("function_call", "audio"):
        if message.get(refused) is not None:
            raise unsupported(f"{where}.{refused}")
    result: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = message.get("tool_calls")
    content = message.get("content")
    if content is None and message.get("refusal") is not None:
        content = message["refusal"]
    if content is None and (role != "assistant" or not calls):
        raise missing(f"{where}.content")
    result["content"] = None if content is None else _text(content, role, f"{where}.content")
    for field, key in _STRINGS.items():
        text = message.get(field)
        if text is not None:
            if not isinstance(text, str):
                raise invalid_type(f"{where}.{field}", f"{where}.{field} must be a string")
            result[key] = text
    if "name" in result and not _NAME.match(result["name"]):
        raise invalid_value(f"{where}.name", f"{where}.name must have 1 to 64 letters, digits, '_', '-' or '.'")
    if role == "tool" and "tool_call_id" not in result:
        raise missing(f"{where}.tool_call_id")
    if calls is not None:
        if role != "assistant":
            raise invalid_value(f"{where}.tool_calls", f"{where}.tool_calls belong to the assistant's messages")
        result["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    return result


def _text(content: Any, role: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid_type(where, f"{where} must be a string or a list of parts")
    if not content:
        raise invalid_value(where, f"{where} must have at least one part")
    texts = []
    for i, part in enumerate(content):
        place = f"{where}[{i}]"
        if not isinstance(part, Mapping):
            raise invalid_type(place, f"{place} must be an object")
        kind = part.get("type")
        if kind is None:
            raise missing(f"{place}.type")
        if kind not in _TEXT_PARTS or (kind == "refusal" and role != "assistant"):
            if kind in ("image_url", "input_audio", "file"):
                raise unsupported(f"{place}.type", f"parts of type {kind} need a model that takes them")
            raise invalid_value(f"{place}.type", f"{place}.type must be 'text', got {str(kind)[:40]!r}")
        text = part.get(kind)
        if text is None:
            raise missing(f"{place}.{kind}")
        if not isinstance(text, str):
            raise invalid_type(f"{place}.{kind}", f"{place}.{kind} must be a string")
        texts.append(text)
    return "\n".join(texts)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise invalid_type(where, f"{where} must be a list")
    result = []
    for i, call in enumerate(calls):
        place = f"{where}[{i}]"
        if not isinstance(call, Mapping):
            raise invalid_type(place, f"{place} must be an object")
        if call.get("type", "function") != "function":
            raise unsupported(f"{place}.type", "only functions are")
        call_id = call.get("id")
        if call_id is None:
            raise missing(f"{place}.id")
        function = call.get("function")
        if not isinstance(call_id, str) or not isinstance(function, Mapping):
            raise invalid_type(place, f"{place} must have an id and a function")
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise invalid_type(f"{place}.function", f"{place}.function must have a name and arguments, both strings")
        result.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
    return result


def checked_tools(tools: list[Any] | None) -> list[dict[str, Any]]:
    """Returns the tools of a request; none is an empty list.

    Raises:
        ApiError: 400, naming the place.
    """
    checked: list[dict[str, Any]] = []
    names: set[str] = set()
    for i, tool in enumerate(tools or ()):
        where = f"tools[{i}]"
        if not isinstance(tool, Mapping):
            raise invalid_type(where, f"{where} must be an object")
        if tool.get("type") is None:
            raise missing(f"{where}.type")
        if tool["type"] != "function":
            raise unsupported(f"{where}.type", "only functions are")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise invalid_type(f"{where}.function", f"{where}.function must be an object")
        name = function.get("name")
        if name is None:
            raise missing(f"{where}.function.name")
        if not isinstance(name, str) or not _NAME.match(name):
            raise invalid_value(
                f"{where}.function.name", f"{where}.function.name must have 1 to 64 letters, digits, '_', '-' or '.'"
            )
        if name in names:
            raise invalid_value(f"{where}.function.name", f"{where}.function.name: there are two tools called {name}")
        names.add(name)
        for field, kind in (("description", str), ("parameters", Mapping), ("strict", bool)):
            value = function.get(field)
            if value is not None and not isinstance(value, kind):
                raise invalid_type(f"{where}.function.{field}", f"{where}.function.{field} has the wrong type")
        # Before the prompt is made of it, which takes long.
        if (size := len(json.dumps(function.get("parameters"), ensure_ascii=False))) > MAX_SCHEMA_BYTES:
            place = f"{where}.function.parameters"
            raise invalid_value(place, f"{place} has {size} characters; at most {MAX_SCHEMA_BYTES} are allowed")
        checked.append({"type": "function", "function": {k: v for k, v in function.items() if v is not None}})
    return checked


def checked_tool_choice(choice: Any, tools: list[dict[str, Any]]) -> str:
    """Returns ``none``, ``auto``, ``required`` or, behind a colon, the name of a function: ``:get_weather``.

    Raises:
        ApiError: 400; also if it asks for a tool that is not there.
    """
    if choice is None:
        return "auto" if tools else "none"
    if not tools:
        raise invalid_value("tool_choice", "tool_choice is only allowed together with tools")
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise invalid_value("tool_choice", "tool_choice must be none, auto, required or a function")
        return choice
    if not isinstance(choice, Mapping):
        raise invalid_type("tool_choice", "tool_choice must be a string or an object")
    if choice.get("type") != "function":
        raise unsupported("tool_choice.type", "only functions are")
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise missing("tool_choice.function.name")
    if name not in {tool["function"]["name"] for tool in tools}:
        raise invalid_value("tool_choice.function.name", f"tool_choice names {name[:64]!r}, which is not in tools")
    return f":{name}"


def checked_stream_options(request: Any) -> bool:
    """Whether a stream ends with its usage.

    Raises:
        ApiError: There are options without a stream.
    """
    options = request.stream_options
    if options is None:
        return False
    if not request.stream:
        raise invalid_value("stream_options", "stream_options is only allowed together with stream")
    return bool(options.include_usage)


def prompt_field(error: Exception) -> str:
    """The field of a request that made a conversation no prompt."""
    text = str(error)
    if text.startswith("template_kwargs"):
        return "chat_template_kwargs"
    return "continue_final_message" if text.startswith("continue_final_message") else "messages"


def response_schema(response_format: Mapping[str, Any] | None) -> tuple[str, Any]:
    """What ``response_format`` asks for: ``text``, ``json_object``, or ``json_schema`` and the schema.

    Raises:
        ApiError: 400, naming the place.
    """
    if response_format is None:
        return "text", None
    kind = response_format.get("type")
    if kind is None:
        raise missing("response_format.type")
    if kind in ("text", "json_object"):
        return str(kind), None
    if kind != "json_schema":
        raise invalid_value("response_format.type", "response_format.type must be text, json_object or json_schema")
    given = response_format.get("json_schema")
    if given is None:
        raise missing("response_format.json_schema")
    if not isinstance(given, Mapping):
        raise invalid_type("response_format.json_schema", "response_format.json_schema must be an object")
    name = given.get("name")
    if not isinstance(name, str) or not _NAME.match(name):
        raise invalid_value(
            "response_format.json_schema.name",
            "response_format.json_schema.name must have 1 to 64 letters, digits, '_', '-' or '.'",
        )
    for field, wanted in (("description", str), ("strict", bool)):
        if given.get(field) is not None and not isinstance(given[field], wanted):
            place = f"response_format.json_schema.{field}"
            raise invalid_type(place, f"{place} has the wrong type")
    schema = given.get("schema")
    if not isinstance(schema, Mapping):
        raise invalid_type("response_format.json_schema.schema", "response_format.json_schema.schema must be an object")
    return "json_schema", schema
