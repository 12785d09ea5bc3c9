"""How models write tool calls: a table of formats, each with a parser for streams and a grammar.

The names are those of vLLM's ``--tool-call-parser``. A server uses a format like this: `detect_format` once per model;
per request `ToolFormat.grammar` as `SamplingParams.guided` (in a thread: it may take a second) and
`ToolFormat.keep_special_token_ids` as the option of that name, so that control tokens that mark calls are in the text;
`ToolFormat.parser` for each answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nanobraid._schema_limits import MAX_PROPERTIES, MAX_SCHEMA_BYTES, check_schema
from nanobraid.errors import InvalidArgumentError
from nanobraid.guided import Guided
from nanobraid.server.tool_stream import HermesParser, Llama3Parser, MistralParser, ToolParser
from nanobraid.server.tool_xml import TERMINALS, Qwen3CoderParser, function_rules
from nanobraid.tokenizer import Tokenizer

_MAX_TOOLS = 128
_MAX_CALLS = 16  # of one answer: a model that repeats itself comes to an end
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_KNOWS_TOOLS = re.compile(r"{[{%][^}]*\btools\b")
_WHITESPACE = r"[ \n]{1,12}"  # one line, or indented


@dataclass(frozen=True)
class _Function:
    name: str
    schema: str
    where: str


@dataclass(frozen=True)
class _Marks:
    """Finds the tokens that mark calls: control tokens by id, others as text.

    Attributes:
        ids: Text to id of the model's control tokens.
    """

    ids: Mapping[str, int]

    def term(self, text: str) -> str:
        """What stands for a mark in a grammar."""
        return f"<[{self.ids[text]}]>" if text in self.ids else json.dumps(text)

    def after_text(self, text: str) -> str:
        """The rule ``mark``: any text, up to and with a mark, at which the grammar goes on at once."""
        if text in self.ids:
            return f"mark: TEXT {self.term(text)}\n"
        return f"mark[lazy]: TEXT {json.dumps(text)}\n"


ToolChoice = Literal["auto", "required"] | Mapping[str, Any]
"""OpenAI's ``tool_choice`` but for ``none``: ``{"type": "function", "function": {"name": ...}}`` names a function."""


@dataclass(frozen=True)
class ToolFormat:
    """One way to write tool calls.

    Attributes:
        name: As in vLLM.
        marks: The texts that mark calls. Where they are control tokens, the answer's text must have them.
        parser: Makes a parser for one answer, of the tools of the request.
    """

    name: str
    marks: tuple[str, ...]
    parser: Callable[..., ToolParser]
    _rules: Callable[[_Marks, Sequence[_Function], bool, int], str]

    def keep_special_token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The control tokens to be kept in the text for the parser (`SamplingParams.keep_special_token_ids`)."""
        return [tokenizer.special_tokens[mark] for mark in self.marks if mark in tokenizer.special_tokens]

    def grammar(
        self, tools: Sequence[Mapping[str, Any]], choice: ToolChoice, parallel: bool, tokenizer: Tokenizer
    ) -> Guided:
        """Returns what answers must look like, so that every call in them is valid.

        The arguments of a call fit the JSON schema of its function, whether the tool is ``strict`` or not. To be called
        off the event loop.

        Args:
            tools: OpenAI's tool objects. A function without ``parameters`` takes none.
            choice: ``auto``: free text, in which calls may come. ``required``: one call or more and nothing else; with
                ``{"type": "function", "function": {"name": ...}}`` just one, of that function.
            parallel: Whether there may be several calls; at most 16 then.
            tokenizer: The model's.

        Raises:
            InvalidArgumentError: A tool is wrong or its schema refused, naming ``tools[i].function.parameters``; or the
                choice names no tool.
            UnsupportedError: The package ``llguidance`` is not installed.
        """
        functions = _checked_functions(tools)
        is_named = isinstance(choice, Mapping)
        if isinstance(choice, Mapping):
            functions = [_named_function(functions, choice)]
        elif choice not in ("auto", "required"):
            raise InvalidArgumentError(
                f"tool_choice must be 'auto', 'required' or a function's name in its object, got {choice!r}"
            )
        marks = _Marks(
            {mark: tokenizer.special_tokens[mark] for mark in self.marks if mark in tokenizer.special_tokens}
        )
        lark = self._rules(marks, functions, choice == "auto", _MAX_CALLS if parallel and not is_named else 1)
        lark += "TEXT: /(?s:.*)/\n" if "TEXT" in lark and "TEXT:" not in lark else ""
        used = [token_id for token_id in marks.ids.values() if f"<[{token_id}]>" in lark]
        return Guided.grammar(lark, control_tokens=used)


def _checked_functions(tools: Sequence[Mapping[str, Any]]) -> list[_Function]:
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence) or not tools:
        raise InvalidArgumentError("tools must be a list of one or more tools")
    if len(tools) > _MAX_TOOLS:
        raise InvalidArgumentError(f"tools has {len(tools)} entries; at most {_MAX_TOOLS} are allowed")
    functions: list[_Function] = []
    properties = size = 0
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise InvalidArgumentError(f"tools[{i}].function must be a mapping with name, got {function!r}")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.match(name):
            raise InvalidArgumentError(
                f"tools[{i}].function.name must be 1 to 64 letters, digits, '_', '-' or '.', got {name!r}"
            )
        if any(name == other.name for other in functions):
            raise InvalidArgumentError(f"tools[{i}].function.name {name!r} is the name of an earlier tool too")
        where = f"tools[{i}].function.parameters"
        schema, count = _checked_schema(function.get("parameters"), where)
        properties += count
        size += len(schema)
        if properties > MAX_PROPERTIES or size > MAX_SCHEMA_BYTES:
            raise InvalidArgumentError(
                f"{where}: the tools up to this one have {properties} properties and {size} bytes; at most "
                f"{MAX_PROPERTIES} and {MAX_SCHEMA_BYTES} are allowed together"
            )
        functions.append(_Function(name, schema, where))
    return functions


def _checked_schema(parameters: object, where: str) -> tuple[str, int]:
    """The schema of arguments as JSON text, which are an object; and how many properties it describes."""
    if parameters is None:
        parameters = {"properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise InvalidArgumentError(f"{where} must be a JSON schema, got {type(parameters).__name__}")
    kind = parameters.get("type", "object")
    if kind != "object":
        raise InvalidArgumentError(f"{where}.type must be 'object', got {kind!r}")
    try:
        text = json.dumps(
            {**parameters, "type": "object", "x-guidance": {"whitespace_pattern": _WHITESPACE}}, allow_nan=False
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{where} is not JSON: {error}") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise InvalidArgumentError(f"{where} has {len(text)} bytes; at most {MAX_SCHEMA_BYTES} are allowed")
    count = check_schema(json.loads(text), where)
    try:
        Guided.json_schema(text)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{where}: {str(error).removeprefix('guided: ')}") from None
    return text, count


def _named_function(functions: Sequence[_Function], choice: Mapping[str, Any]) -> _Function:
    inner = choice.get("function")
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise InvalidArgumentError(
            f'tool_choice must be \'auto\', \'required\' or {{"type": "function", "function": {{"name": ...}}}}, '
            f"got {choice!r}"
        )
    for function in functions:
        if function.name == name:
            return function
    known = ", ".join(repr(function.name) for function in functions[:8])
    raise InvalidArgumentError(f"tool_choice.function.name must be the name of a tool ({known}), got {name!r}")


# --- grammars, in llguidance's variant of Lark's notation -----------------------------------------------------------


def _call_rules(functions: Sequence[_Function], key: str) -> str:
    """The rule ``call``: ``{"name": ..., KEY: {...}}`` for one of the functions."""
    rules = f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}\n"
    for i, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function.name)}, "{key}": '
        rules += f'call_{i}: {json.dumps(head)} %json {function.schema} "}}"\n'
    return rules


def _more(separator: str, what: str, most: int) -> str:
    return f" ({separator}{what}){{0,{most - 1}}}" if most > 1 else ""


def _hermes_rules(marks: _Marks, functions: Sequence[_Function], is_auto: bool, most: int) -> str:
    return _tagged_rules(marks, _call_rules(functions, "arguments"), is_auto, most)


def _tagged_rules(marks: _Marks, rules: str, is_auto: bool, most: int) -> str:
    """Calls between tags; the rules have one called ``call``."""
    begin, end = marks.term("<tool_call>"), marks.term("</tool_call>")
    rules += f'body: "\\n" call "\\n" {end}\n'
    if is_auto:
        after = "TEXT" if most > 1 else ""  # behind its last call an answer may go on only if there may be another
        segments = f"(mark body){{1,{most}}}" if most > 1 else "mark body"
        return f"start: TEXT | {segments} {after}\n" + rules + marks.after_text("<tool_call>")
    separator = '"\\n" '
    return f"start: one{_more(separator, 'one', most)}\none: {begin} body\n" + rules


def _qwen3_coder_rules(marks: _Marks, functions: Sequence[_Function], is_auto: bool, most: int) -> str:
    rules = f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}\n" + TERMINALS
    for i, function in enumerate(functions):
        rules += function_rules(f"call_{i}", function.name, json.loads(function.schema), function.where)
    return _tagged_rules(marks, rules, is_auto, most)


def _llama3_rules(marks: _Marks, functions: Sequence[_Function], is_auto: bool, most: int) -> str:
    separator = '"; " '
    rules = _call_rules(functions, "parameters") + f"calls: call{_more(separator, 'call', most)}\n"
    if not is_auto:
        return "start: calls\n" + rules
    # An answer that begins with a brace is a call; the mark may come anywhere, if the model has it.
    tagged = f" | TEXT {marks.term('<|python_tag|>')} calls" if marks.ids else ""
    return f"start: TEXT | calls{tagged}\nTEXT: /(?s:[ \\t\\r\\n]*([^{{ \\t\\r\\n].*)?)/\n" + rules


def _mistral_rules(marks: _Marks, functions: Sequence[_Function], is_auto: bool, most: int) -> str:
    begin = marks.term("[TOOL_CALLS]")
    if "[ARGS]" in marks.ids:
        rules = f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}\n"
        for i, function in enumerate(functions):
            rules += f"call_{i}: {json.dumps(function.name)} {marks.term('[ARGS]')} %json {function.schema}\n"
        calls = f"call{_more(begin + ' ', 'call', most)}"
    else:
        rules = _call_rules(functions, "arguments")
        separator = '", " '
        calls = f'"[" call{_more(separator, "call", most)} "]"'
    if is_auto:
        return f"start: TEXT | mark {calls}\n" + rules + marks.after_text("[TOOL_CALLS]")
    return f"start: {begin} {calls}\n" + rules


FORMATS: Mapping[str, ToolFormat] = {
    tool_format.name: tool_format
    for tool_format in (
        ToolFormat("hermes", ("<tool_call>", "</tool_call>"), HermesParser, _hermes_rules),
        ToolFormat("qwen3_coder", ("<tool_call>", "</tool_call>"), Qwen3CoderParser, _qwen3_coder_rules),
        ToolFormat("llama3_json", ("<|python_tag|>",), Llama3Parser, _llama3_rules),
        ToolFormat("mistral", ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), MistralParser, _mistral_rules),
    )
}


# --- which format, and what a model is told -------------------------------------------------------------------------


def detect_format(tokenizer: Tokenizer) -> str:
    """Returns the name of the format that a model's chat template writes calls in; ``hermes`` if it shows none."""
    template = tokenizer.chat_template or ""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<function=" in template and "<parameter=" in template:
        return "qwen3_coder"
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_tag|>" in template or "ipython" in template:
        return "llama3_json"
    return "hermes"


def needs_tools_prompt(tokenizer: Tokenizer) -> bool:
    """Whether the model's chat template never looks at ``tools``, so that only `tools_prompt` tells it of them."""
    return not _KNOWS_TOOLS.search(tokenizer.chat_template or "")


def tools_prompt(tools: Sequence[Mapping[str, Any]]) -> str:
    """Returns a text for the system message that describes tools and how to call them, in the format ``hermes``.

    To be used where `needs_tools_prompt` says so, and only there: before the text of the conversation's own system
    message, with an empty line between. Templates that know tools write their own.
    """
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        "You can call functions. These are available, one JSON object per line:\n"
        f"{functions}\n\n"
        "To call one, answer with a JSON object inside tool_call tags, like this:\n"
        '<tool_call>\n{"name": "function name", "arguments": {"argument name": "value"}}\n</tool_call>\n'
        "Call a function only if it helps to answer; otherwise answer in plain text."
    )
