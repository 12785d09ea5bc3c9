"""Tool calls of Qwen3-Coder: values between tags become JSON by the schema, wherever the stream is cut."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nanobraid as nb
from nanobraid.guided import plan_for
from nanobraid.server.settings import Settings
from nanobraid.server.tool_formats import FORMATS
from nanobraid.server.tool_stream import ArgumentsDelta, CallStart, ContentDelta, Delta, collect

FORMAT = FORMATS["qwen3_coder"]
PROPERTIES: dict[str, Any] = {
    "s": {"type": "string"},
    "n": {"type": "number"},
    "i": {"$ref": "#/$defs/count"},
    "b": {"type": "boolean"},
    "o": {"type": "object"},
    "a": {"type": "array", "items": {"type": "string"}},
    "e": {"enum": ["red", "dark blue"]},
    "m": {"type": ["string", "null"]},
    "u": {"anyOf": [{"type": "integer", "maximum": 9}, {"type": "string"}]},
    "x": {},
}
SCHEMA = {
    "type": "object",
    "properties": PROPERTIES,
    "additionalProperties": False,
    "$defs": {"count": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]


def call(name: str, *values: tuple[str, str]) -> str:
    """As the chat template of the model writes it."""
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values)
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def read(text: str, cuts: list[int] | None = None) -> tuple[str, list[tuple[str, str]], list[int]]:
    parser = FORMAT.parser(TOOLS)
    deltas: list[Delta] = []
    begin = 0
    for end in [*sorted(cuts or ()), len(text)]:
        deltas += parser.feed(text[begin:end])
        begin = end
    content, calls = collect(deltas + parser.finish())
    return content, [(one.name, one.arguments) for one in calls], parser.incomplete


NOW = call("now")
VALUES: list[tuple[str, str, Any]] = [
    ("s", "plain", "plain"),
    ("s", "12", "12"),  # a string stays one
    ("s", "true", "true"),
    ("s", '{"a": 1}', '{"a": 1}'),
    ("s", "", ""),
    ("s", "a\nb\n", "a\nb\n"),
    ("s", "\n", "\n"),
    ("s", 'say "hi" \\ <b> </param é🙂\t', 'say "hi" \\ <b> </param é🙂\t'),
    ("n", "12", 12),
    ("n", "-1.5e3", -1500.0),
    ("i", "3", 3),
    ("b", "true", True),
    ("o", '{"k": ["</parameter>", {"l": null}]}', {"k": ["</parameter>", {"l": None}]}),
    ("o", '{"k": "a\\"\\n</parameter>"}', {"k": 'a"\n</parameter>'}),
    ("a", '[\n  "x"\n]', ["x"]),
    ("e", "dark blue", "dark blue"),
    ("m", "null", None),
    ("m", "nullable", "nullable"),
    ("m", "12", "12"),  # no number is allowed there
    ("u", "7", 7),
    ("u", "seven", "seven"),
    ("x", "[1]", [1]),
    ("x", "text", "text"),
    ("x", '"quoted"', '"quoted"'),
    ("n", "many", "many"),  # wrong, but nothing is lost
    ("n", "NaN", "NaN"),
    ("unknown", "5", 5),
]


@pytest.mark.parametrize(("key", "text", "value"), VALUES)
def test_values_become_json_by_the_schema(key: str, text: str, value: Any) -> None:
    content, calls, incomplete = read(call("f", (key, text)))
    assert (content, incomplete, calls[0][0]) == ("", [], "f")
    found = json.loads(calls[0][1])
    assert found == {key: value} and type(found[key]) is type(value)


TEXTS = [
    ("", ""),
    (call("f", ("s", "a\nb"), ("n", "1"), ("x", "[]")), ""),
    (f"I look.\n{NOW} Done. {NOW}.", "I look.\n Done. ."),
    (f"{NOW}\n{NOW}\n", ""),
    ("<tool_call><function=now></function></tool_call>", ""),
    ("<tool_call><function=f><parameter=s>x</parameter></function></tool_call>", ""),
    ("<tool_call>\n<function=now>\n</function>", ""),  # the end was not written
    *((call("f", (key, text)), "") for key, text, _ in VALUES),
]
NO_CALLS = [
    "<tool_call>text</tool_call>",
    "<tool_call>\n<function",
    "<tool_call>\n<function=>\n</function>\n</tool_call>",
    "<tool_call>\n<function=a b>\n</function>\n</tool_call>",
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    "<function=now>\n</function>",
    "<tool_call><tool_call",
]
# Cut short: what there is of the arguments, and what is content.
BROKEN = [
    ("<tool_call>\n<function=f>\n", "{", "\n"),
    ("<tool_call>\n<function=f>\n<parameter=s", "{", "\n<parameter=s"),
    ("<tool_call>\n<function=f>\n<parameter=s>\nab\n</para", '{"s": "ab\\n</para', ""),
    ("<tool_call>\n<function=f>\n<parameter=n>\n12", '{"n": 12', ""),
    ("<tool_call>\n<function=f>\noops</function>", "{", "\noops</function>"),
    ("<tool_call>\n<function=f>\n<parameter=n>\n1\n</parameter>\n</tool_call>", '{"n": 1', "\n</tool_call>"),
]


@pytest.mark.parametrize(("text", "content"), TEXTS)
def test_content_is_what_stands_around_calls(text: str, content: str) -> None:
    found, calls, incomplete = read(text)
    assert (found, incomplete) == (content, [])
    assert len(calls) == text.count("<tool_call>")
    for _, arguments in calls:
        json.loads(arguments)


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_is_content(text: str) -> None:
    assert read(text) == (text, [], [])


@pytest.mark.parametrize(("text", "arguments", "content"), BROKEN)
def test_a_call_cut_short_says_so(text: str, arguments: str, content: str) -> None:
    assert read(text) == (content, [("f", arguments)], [0])


ALL = [text for text, _ in TEXTS] + NO_CALLS + [text for text, *_ in BROKEN]


@pytest.mark.parametrize("text", ALL)
def test_every_split_gives_the_same(text: str) -> None:
    expected = read(text)
    for cut in range(len(text) + 1):
        assert read(text, [cut]) == expected
    assert read(text, list(range(len(text)))) == expected


PARTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<function=f>", "<function=now>", "</function>", "<parameter=s>"),
        *(
            "<parameter=o>",
            "<parameter=x>",
            "</parameter>",
            "\n",
            "</param",
            "text",
            '{"a": "',
            "}",
            "1",
            " ",
            "é🙂",
            '"',
            "\\",
        ),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PARTS, max_size=16), st.data())
def test_any_chunking_gives_the_same(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    assert read(text, data.draw(st.lists(st.integers(0, len(text)), max_size=8))) == read(text)


def test_a_string_is_not_held_back() -> None:
    parser = FORMAT.parser(TOOLS)
    start, begin = parser.feed("<tool_call>\n<function=f>\n<parameter=n>")[:2]
    assert isinstance(start, CallStart) and begin == ArgumentsDelta(0, '{"n": ')
    assert parser.feed("\n12") == []
    assert parser.feed("\n</parameter>\n<parameter=s>\nab") == [ArgumentsDelta(0, '12, "s": "ab')]
    assert parser.feed("\nc") == [ArgumentsDelta(0, "\\nc")]
    assert parser.feed("\n</parameter>\n</function>\n</tool_call>") == [ArgumentsDelta(0, '"}')]
    assert parser.feed("bye") == [ContentDelta("bye")]


# --- grammars ----------------------------------------------------------------------------------------------------


def follows(llm: nb.LLM, text: str, choice: Any = "required", *, parallel: bool = False) -> bool:
    """Whether the grammar lets an answer be just this."""
    matcher = plan_for(FORMAT.grammar(TOOLS, choice, parallel, llm.tokenizer), llm.tokenizer).matcher()
    try:
        for token_id in llm.tokenizer.encode(text, add_special_tokens=False):
            matcher.accept(token_id)
        return matcher.fill()
    except nb.InvalidArgumentError:
        return False


@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        ([("s", "any\ntext <b>\n"), ("n", "-1.5"), ("i", "9"), ("b", "false"), ("o", '{"a": 1}')], True),
        ([("a", '["x"]'), ("e", "dark blue"), ("m", "null"), ("u", "7"), ("x", "[1, 2]")], True),
        ([("m", "text"), ("u", "seven"), ("x", "text")], True),
        ([("s", "")], True),
        ([], True),
        ([("i", "10")], False),
        ([("b", "True")], False),
        ([("n", '"1"')], False),
        ([("e", "green")], False),
        ([("u", "10")], False),  # would be read as a number, which is too large
        ([("m", "null ")], False),
        ([("n", "1"), ("s", "order")], False),  # parameters come in the order of the schema
        ([("unknown", "1")], False),
    ],
)
def test_the_grammar_follows_the_schema(llm: nb.LLM, values: list[tuple[str, str]], *, allowed: bool) -> None:
    text = call("f", *values)
    assert follows(llm, text) == allowed
    if allowed:
        jsonschema.validate(json.loads(read(text)[1][0][1]), SCHEMA)


def test_choices_say_how_many_calls_there_may_be(llm: nb.LLM) -> None:
    one, two = call("f", ("n", "1")), NOW + "\n" + NOW
    named = {"type": "function", "function": {"name": "now"}}
    assert follows(llm, two, parallel=True) and not follows(llm, two)
    assert follows(llm, NOW, named) and not follows(llm, one, named)
    assert follows(llm, "Well, <b>.", "auto") and follows(llm, "Well. " + one, "auto")
    assert not follows(llm, "Well. " + one) and not follows(llm, call("g"), "auto")


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, r"properties\.a\.pattern of a string"),
        ({"properties": {"a": {"type": "string", "maxLength": 20_000}}}, "lengths of strings"),
        ({"properties": {"a>b": {}}}, "no place in a tag"),
        ({"properties": {"a": {"$ref": "#/properties/b"}, "b": {"type": "string"}}}, r"must point into \$defs"),
        ({"anyOf": [{"required": ["a"]}]}, "anyOf is not supported"),
        ({"properties": {"a": {"enum": ["1", None]}}}, "cannot be told"),
    ],
)
def test_what_the_format_cannot_promise_is_refused(llm: nb.LLM, parameters: Any, says: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    with pytest.raises(nb.InvalidArgumentError, match=rf"tools\[0\]\.function\.parameters.*{says}"):
        FORMAT.grammar(tools, "auto", True, llm.tokenizer)


@pytest.mark.parametrize("stream", [False, True])
def test_the_server_reads_values_by_the_tools_of_the_request(serve: Any, stream: bool) -> None:
    """Which without them would be numbers."""
    parameters = {
        "type": "object",
        "properties": {"digit": {"enum": ["1", "2"]}, "number": {"type": "integer", "minimum": 3, "maximum": 9}},
        "required": ["digit", "number"],
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    body = {"messages": [{"role": "user", "content": "Go."}], "tools": tools, "tool_choice": "required"}
    body |= {"max_tokens": 120, "temperature": 0, "parallel_tool_calls": False, "stream": stream}
    with serve(Settings(tool_call_parser="qwen3_coder")) as server:
        answer = server.post("/v1/chat/completions", body)
    if stream:
        lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: {")]
        deltas = [choice["delta"] for line in lines for choice in json.loads(line)["choices"]]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        text = "".join(call["function"].get("arguments", "") for call in calls)
        assert len(calls) > 2
    else:
        text = answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
    found = json.loads(text)
    assert found["digit"] in ("1", "2") and 3 <= found["number"] <= 9
    jsonschema.validate(found, parameters)
