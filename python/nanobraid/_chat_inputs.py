"""What users give to a chat template, checked and copied: messages, tools and further variables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

from nanobraid.errors import InvalidArgumentError, UnsupportedError

Message = Mapping[str, Any]
"""One turn of a conversation: at least ``role``, and ``content`` as a string or a list of text parts."""


class ChatOptions(TypedDict, total=False):
    """How a conversation becomes a prompt; what each means stands at `ChatTemplate.render`."""

    add_generation_prompt: bool
    tools: Sequence[Mapping[str, Any]] | None
    template_kwargs: Mapping[str, Any] | None
    continue_final_message: bool


_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")
# What a rendering sets by itself, what the environment offers, and what jinja2's render() does not take.
_TAKEN = frozenset(
    (
        *("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"),
        *("bos_token", "eos_token", "pad_token", "unk_token", "raise_exception", "strftime_now"),
        *("range", "dict", "namespace", "cycler", "joiner", "lipsum", "self"),
    )
)


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns a plain copy of a conversation.

    Args:
        messages: Turns with ``role`` and ``content``. Content given as a list of ``{"type": "text", "text": ...}``
            parts becomes one string, joined by newlines. Other keys go to the template; in ``tool_calls``,
            ``function.arguments`` given as the JSON text of an object becomes that object, as in transformers.

    Raises:
        InvalidArgumentError: Not a list of such messages; the message says where.
        UnsupportedError: A part of another type than text.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidArgumentError(f"messages must be a list of messages, got {type(messages).__name__}")
    if not messages:
        raise InvalidArgumentError("messages is empty: a conversation needs at least one message")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidArgumentError(f"messages[{i}] must be a mapping with role and content, got {message!r}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not _ROLE.match(role):
            raise InvalidArgumentError(f"messages[{i}].role must be a name such as 'user', got {role!r}")
        if isinstance(content, Sequence) and not isinstance(content, str | bytes):
            content = "\n".join(_text_of_part(part, f"messages[{i}].content[{j}]") for j, part in enumerate(content))
        elif not isinstance(content, str) and not (content is None and role == "assistant"):
            raise InvalidArgumentError(f"messages[{i}].content must be a string, got {content!r}")
        plain = {**message, "content": content}
        if plain.get("tool_calls") is not None:
            plain["tool_calls"] = _checked_calls(plain["tool_calls"], f"messages[{i}].tool_calls")
        checked.append(plain)
    copy: list[dict[str, Any]] = _json_copy("messages", checked)
    return copy


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Returns a plain copy of the tools that a template is to describe; None where there are none.

    Args:
        tools: OpenAI's tool objects: ``{"type": "function", "function": {"name": ..., "description": ...,
            "parameters": <JSON schema>}}``.

    Raises:
        InvalidArgumentError: Not a list of such mappings; the message says where.
    """
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise InvalidArgumentError(f"tools must be a list of tools, got {type(tools).__name__}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidArgumentError(f"tools[{i}] must be a mapping with type and function, got {tool!r}")
        if tool.get("type") != "function":
            raise InvalidArgumentError(f"tools[{i}].type must be 'function', got {tool.get('type')!r}")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise InvalidArgumentError(f"tools[{i}].function must be a mapping with name, got {function!r}")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise InvalidArgumentError(f"tools[{i}].function.name must be a name, got {function.get('name')!r}")
    copy: list[dict[str, Any]] = _json_copy("tools", list(tools))
    return copy or None


def check_template_kwargs(template_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns a plain copy of the further variables of a template, such as ``enable_thinking``.

    Raises:
        InvalidArgumentError: Not a mapping, a name that is not one or that is set otherwise, or a value that is not
            JSON.
    """
    if template_kwargs is None:
        return {}
    if not isinstance(template_kwargs, Mapping):
        raise InvalidArgumentError(f"template_kwargs must be a mapping, got {type(template_kwargs).__name__}")
    for name in template_kwargs:
        if not isinstance(name, str) or not _VARIABLE.match(name):
            raise InvalidArgumentError(f"template_kwargs must be keyed by names of variables, got {name!r}")
        if name in _TAKEN:
            raise InvalidArgumentError(
                f"template_kwargs.{name} cannot be given: the template gets {name} from elsewhere"
            )
    copy: dict[str, Any] = _json_copy("template_kwargs", dict(template_kwargs))
    return copy


def _json_copy(what: str, value: Any) -> Any:
    try:
        copy = json.loads(json.dumps(value, allow_nan=False, default=_plain_mapping))
        json.dumps(copy, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"{what} contain a lone surrogate, which is not Unicode text") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{what} must be made of strings, numbers, lists and mappings: {error}") from None
    return copy


def _plain_mapping(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is none of them")


def _checked_calls(calls: object, where: str) -> list[Any]:
    """Calls of an earlier answer. Clients send their arguments as JSON text, templates want them as mappings."""
    if isinstance(calls, str | bytes | Mapping) or not isinstance(calls, Sequence):
        raise InvalidArgumentError(f"{where} must be a list of tool calls, got {calls!r}")
    checked = []
    for i, call in enumerate(calls):
        if not isinstance(call, Mapping):
            raise InvalidArgumentError(f"{where}[{i}] must be a mapping with function, got {call!r}")
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidArgumentError(f"{where}[{i}].function must be a mapping with name and arguments")
        arguments = function.get("arguments")
        checked.append({**call, "function": {**function, "arguments": _parsed_arguments(arguments)}})
    return checked


def _parsed_arguments(arguments: object) -> object:
    """A mapping where the arguments are one, or JSON text of one; otherwise what was given, for the template."""
    if arguments is None or arguments == "":
        return {}  # a function without parameters
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _text_of_part(part: object, where: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise InvalidArgumentError(f"{where} must be a mapping with type and text, got {part!r}")
    if part["type"] != "text":
        raise UnsupportedError(f"{where}: parts of type {part['type']!r} are not supported, only text")
    if not isinstance(part.get("text"), str):
        raise InvalidArgumentError(f"{where}.text must be a string, got {part.get('text')!r}")
    return str(part["text"])


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): map_strings(item, change) for key, item in value.items()}
    return value


def strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_of(item)
