"""Tools of a chat request: what the prompt says of them and what answers may look like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanobraid.errors import InvalidArgumentError
from nanobraid.guided import Guided
from nanobraid.server import tool_formats
from nanobraid.server.tool_formats import ToolFormat
from nanobraid.tokenizer import Tokenizer

Message = dict[str, Any]


@dataclass(frozen=True)
class ToolUse:
    """The tools of a model.

    Attributes:
        format: How it writes calls.
        in_template: Whether its chat template describes tools; otherwise a system message does.
    """

    format: ToolFormat
    in_template: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, name: str | None) -> ToolUse:
        """Returns those of a model.

        Args:
            tokenizer: The model's.
            name: Its format of calls; None: found from its chat template.

        Raises:
            InvalidArgumentError: There is no such format.
        """
        wanted = tool_formats.detect_format(tokenizer) if name is None else name
        if wanted not in tool_formats.FORMATS:
            raise InvalidArgumentError(
                f"tool_call_parser must be one of {', '.join(tool_formats.FORMATS)}, got {wanted!r}"
            )
        return cls(tool_formats.FORMATS[wanted], not tool_formats.needs_tools_prompt(tokenizer))

    def grammar(self, tools: Sequence[Message], choice: str, *, parallel: bool, tokenizer: Tokenizer) -> Guided:
        """What an answer may look like; to be called off the event loop.

        Args:
            tools: At least one.
            choice: As `conversation.checked_tool_choice` returns it, but not ``none``.
            parallel: Whether there may be several calls.
            tokenizer: The model's.

        Raises:
            InvalidArgumentError: A schema is refused; the message names the tool.
        """
        named: Any = choice
        if choice.startswith(":"):
            named = {"type": "function", "function": {"name": choice[1:]}}
        return self.format.grammar(tools, named, parallel, tokenizer)

    def messages(self, messages: Sequence[Message], tools: Sequence[Message]) -> list[Message]:
        """The conversation as the template gets it: as it is, if the template knows tools."""
        if self.in_template:
            return list(messages)
        plain = _without_tools(messages)
        if not tools:
            return plain
        text = tool_formats.tools_prompt(tools)
        if plain[0]["role"] == "system":
            return [{**plain[0], "content": f"{text}\n\n{plain[0]['content']}"}, *plain[1:]]
        return [{"role": "system", "content": text}, *plain]


def _without_tools(messages: Sequence[Message]) -> list[Message]:
    """Calls and their results as text, for templates that would leave them out."""
    plain: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if plain and plain[-1].get("is_result"):
                plain[-1]["content"] += "\n" + text
            else:
                plain.append({"role": "user", "content": text, "is_result": True})
        elif message.get("tool_calls"):
            texts = [message["content"]] if message["content"] else []
            texts += [f"<tool_call>\n{_call(call['function'])}\n</tool_call>" for call in message["tool_calls"]]
            rest = {name: value for name, value in message.items() if name != "tool_calls"}
            plain.append({**rest, "content": "\n".join(texts)})
        else:
            plain.append(dict(message))
    return [{name: value for name, value in message.items() if name != "is_result"} for message in plain]


def _call(function: Mapping[str, Any]) -> str:
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        arguments = function["arguments"]
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
