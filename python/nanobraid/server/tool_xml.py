"""Tool calls as Qwen3-Coder writes them: parameters between tags, strings as they are and everything else as JSON.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Whether a value is a string or JSON is not in it: the schema of the function says so. Where a schema allows both, what
is JSON of another type is that, and the grammar lets no string look like it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from nanobraid.errors import InvalidArgumentError
from nanobraid.server.tool_stream import ArgumentsDelta, Malformed, Steps, TaggedParser

_END = "</parameter>"
_MAX_KEY = 256
_KINDS = ("null", "boolean", "number", "array", "object", "string")
_KINDS_OF = {type(None): "null", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
_LIKE_JSON = re.compile(r"(?s:\s*([\[{\-0-9].*|(null|true|false)\s*))\Z")
_KEY = re.compile(r"[^\n<>]{1,256}\Z")
_REF = re.compile(r"#/(\$defs|definitions)/([^/~%]+)\Z")
_FOREIGN_REF = re.compile(r'"\$ref": "(?!#/(?:\$defs|definitions)/)')
_ABOUT = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment")
_OF_OBJECTS = {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "definitions",
    "$schema",
    "x-guidance",
}
_OF_STRINGS = {"type", "minLength", "maxLength"}
_MAX_LENGTH = 10_000  # of a string with a limit: longer ones make large automata

Schema = Mapping[str, Any]


def _resolved(schema: Any, root: Schema) -> Schema:
    """A schema, or the one it refers to; what cannot be found allows anything."""
    for _ in range(16):
        if not isinstance(schema, Mapping):
            return {}
        match = _REF.match(str(schema.get("$ref", "")))
        if match is None:
            return schema
        schema = (root.get(match[1]) or {}).get(match[2])
    return {}


def _kinds(schema: Any, root: Schema, depth: int = 8) -> set[str]:
    """The JSON types that values may have; an integer is a number."""
    schema = _resolved(schema, root)
    given = schema.get("type")
    if given is not None:
        return {"number" if kind == "integer" else str(kind) for kind in ([given] if isinstance(given, str) else given)}
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None:
        return {_KINDS_OF.get(type(value), "string") for value in values}
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices and depth:
        return set().union(*(_kinds(choice, root, depth - 1) for choice in choices))
    return {*_KINDS}


class Qwen3CoderParser(TaggedParser):
    """Reads one answer.

    Args:
        tools: OpenAI's tool objects, for the types of parameters. One that is in none may be anything.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._schemas: dict[str, Schema] = {}
        for tool in tools:
            self._schemas[tool["function"]["name"]] = tool["function"].get("parameters") or {}
        super().__init__(tools)

    def _call(self) -> Steps:
        yield from self._spaces()
        if not (yield from self._literal("<function=")):
            raise Malformed(started=False)
        name = yield from self._word()
        if not name or not (yield from self._literal(">")):
            raise Malformed(started=False)
        index = self._start(name)
        self._say(index, "{")
        first = True
        while True:
            self._mark = self._pos
            yield from self._spaces()
            if (yield from self._literal("</function>")):
                break
            key = yield from self._key(index)
            self._mark = None
            self._say(index, f"{'' if first else ', '}{json.dumps(key, ensure_ascii=False)}: ")
            first = False
            root = self._schemas.get(name, {})
            properties = root.get("properties")
            schema = properties.get(key, {}) if isinstance(properties, Mapping) else {}
            yield from self._value(index, _kinds(schema, root))
        self._say(index, "}")

    def _say(self, index: int, text: str) -> None:
        self._deltas.append(ArgumentsDelta(index, text))

    def _broken(self, index: int) -> Malformed:
        """What is from the mark on is content."""
        self.incomplete.append(index)
        return Malformed(started=True)

    def _key(self, index: int) -> Generator[None, None, str]:
        if not (yield from self._literal("<parameter=")):
            raise self._broken(index)
        key = ""
        while (char := (yield from self._peek())) != ">":
            if not char or char in "<\n" or len(key) == _MAX_KEY:
                raise self._broken(index)
            key += char
            self._pos += 1
        self._pos += 1
        if not key:
            raise self._broken(index)
        return key

    def _value(self, index: int, kinds: set[str]) -> Steps:
        """Reads a value and its end; a string is given out as it comes."""
        text: list[str] = []
        is_text = kinds == {"string"}
        if is_text:
            self._say(index, '"')
        if (yield from self._peek()) == "\n":
            self._pos += 1
        while True:
            char = yield from self._peek()
            if char and char in "\n<":
                self._mark = self._pos
                ended = yield from self._literal(_END if char == "<" else "\n" + _END)
                self._mark = None
                if ended and not (text and _is_inside_string("".join(text))):
                    break
                if ended:
                    text.append(_END if char == "<" else "\n" + _END)
                    continue
            if not char:
                self._say(index, "".join(text).lstrip())
                self._mark = self._pos
                raise self._broken(index)
            self._pos += 1
            if is_text:
                self._say(index, json.dumps(char, ensure_ascii=False)[1:-1])
            else:
                text.append(char)
        self._say(index, '"' if is_text else _json_of("".join(text), kinds))


def _json_of(text: str, kinds: set[str]) -> str:
    """JSON of a value that may be no string."""
    try:
        kind = _KINDS_OF.get(type(json.loads(text, parse_constant=_no_constant)), "string")
        if kind in kinds and kind != "string":
            return text.strip()
    except (ValueError, RecursionError):
        pass
    return json.dumps(text, ensure_ascii=False)


def _is_inside_string(text: str) -> bool:
    """Whether JSON that begins with this goes on in a string: the end of a value may stand there as text."""
    return text.lstrip()[:1] in ("{", "[") and len(re.sub(r"\\.", "", text).split('"')) % 2 == 0


def _no_constant(name: str) -> None:
    raise ValueError(name)


# --- the grammar, in llguidance's variant of Lark's notation ---------------------------------------------------------

#: Terminals that the rules of `function_rules` use. Strings that begin like other JSON are left out where there may be
#: such: the lexer of the grammar could not go back to tell ``null`` from ``nullable``.
TERMINALS = (
    "INSIDE: /(?s:.*)/ & ~/(?s:.*<\\/parameter>.*)/\nLIKE_JSON: /(?s:\\s*([\\[{\\-0-9].*|null.*|true.*|false.*))/\n"
)


def function_rules(rule: str, name: str, schema: Schema, where: str) -> str:
    """The rule of a call of one function, with the parameters in the order of the schema.

    Args:
        rule: What the rule is called; the names of further ones begin with it.
        name: The function's.
        schema: Of its parameters.
        where: What errors call that.

    Raises:
        InvalidArgumentError: The schema asks for something that this format cannot promise.
    """
    for keyword in schema:
        if keyword not in _OF_OBJECTS and keyword not in _ABOUT:
            raise InvalidArgumentError(f"{where}.{keyword} is not supported in the format qwen3_coder")
    if _FOREIGN_REF.search(json.dumps(schema)):
        raise InvalidArgumentError(f"{where}: in the format qwen3_coder a $ref must point into $defs")
    properties = dict(schema.get("properties") or {})
    required = list(schema.get("required") or ())
    properties |= {key: {} for key in required if key not in properties}
    rules = ""
    parts = []
    for i, (key, value) in enumerate(properties.items()):
        if not _KEY.match(key):
            raise InvalidArgumentError(f"{where}.properties has the name {key!r:.60}, which has no place in a tag")
        if value is False and key not in required:
            continue
        part = f"{rule}_p{i}"
        choices = _values(part.upper(), value, schema, f"{where}.properties.{key}")
        rules += "".join(line for line, _ in choices)
        rules += f'{part}: {json.dumps(f"<parameter={key}>", ensure_ascii=False)} "\\n" '
        rules += f'({" | ".join(term for _, term in choices)}) "\\n"\n'
        parts.append(part if key in required else f"{part}?")
    head = json.dumps(f"<function={name}>")
    return f'{rule}: {head} "\\n" {" ".join(parts)} "</function>"\n' + rules


def _values(
    name: str, schema: Any, root: Schema, where: str, *, mixed: bool = False, depth: int = 8
) -> list[tuple[str, str]]:
    """The ways to write a value with its end: for each the terminals it needs, and what stands for it in a rule."""
    found = _resolved(schema, root)
    kinds = _kinds(schema, root)
    others = [kind for kind in _KINDS if kind in kinds and kind != "string"]
    mixed = mixed or bool(others)
    defs = {key: root[key] for key in ("$defs", "definitions") if key in root}
    if "string" not in kinds:
        return [("", f'{_json_term({**found, **defs})} "\\n{_END}"')]
    if "const" in found or "enum" in found:
        return _listed([found["const"]] if "const" in found else found["enum"], where, mixed)
    choices = found.get("anyOf") or found.get("oneOf")
    if choices and depth and "type" not in found:
        if {*found} - {"anyOf", "oneOf", *_ABOUT}:
            raise InvalidArgumentError(f"{where}: anyOf must stand alone in the format qwen3_coder")
        return [
            way
            for i, choice in enumerate(choices)
            for way in _values(f"{name}_{i}", choice, root, where, mixed=mixed, depth=depth - 1)
        ]
    ways = [_string(name, found, where, mixed)] if others else [_string(name, found, where, mixed, _OF_STRINGS)]
    if others:
        ways.append(("", f'{_json_term({**found, "type": others, **defs})} "\\n{_END}"'))
    return ways


def _listed(values: Sequence[Any], where: str, mixed: bool) -> list[tuple[str, str]]:
    """One of a few values."""
    texts = []
    for value in values:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if isinstance(value, str) and (_END in value or (mixed and _LIKE_JSON.match(value))):
            raise InvalidArgumentError(f"{where}: {text!r:.60} cannot be told from something else in this format")
        texts.append(text)
    return [("", json.dumps(f"{text}\n{_END}", ensure_ascii=False)) for text in texts]


def _string(name: str, schema: Schema, where: str, mixed: bool, allowed: set[str] | None = None) -> tuple[str, str]:
    """A string; only of these keywords, if they are given."""
    for keyword in schema:
        if keyword in ("pattern", "format") or (allowed and keyword not in allowed and keyword not in _ABOUT):
            raise InvalidArgumentError(f"{where}.{keyword} of a string is not supported in the format qwen3_coder")
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    for limit in (least, most or 0):
        if type(limit) is not int or not 0 <= limit <= _MAX_LENGTH:
            raise InvalidArgumentError(f"{where}: lengths of strings must be at most {_MAX_LENGTH} in this format")
    size = f"{{{least},{'' if most is None else most}}}"
    unlike = " & ~LIKE_JSON" if mixed else ""
    return f'{name}_T: /(?s:.{size})/ & INSIDE{unlike}\n{name}: {name}_T "\\n{_END}"\n', name


def _json_term(schema: Schema) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': ' ?'}})}"
