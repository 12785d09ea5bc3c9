"""Tool calls: every format, read in pieces of any size, and grammars that let nothing but valid calls through."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from marked_model import marked_model

import nanobraid as nb
from nanobraid.guided import plan_for
from nanobraid.server.json_scanner import JsonScanner
from nanobraid.server.tool_formats import FORMATS, detect_format, needs_tools_prompt, tools_prompt
from nanobraid.server.tool_stream import ArgumentsDelta, CallStart, ContentDelta, Delta, ToolParser, collect

FORMAT_NAMES = ["hermes", "qwen3_coder", "llama3_json", "mistral"]


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    function = {"name": name, "description": f"What {name} does"}
    return {"type": "function", "function": function if parameters is None else {**function, "parameters": parameters}}


WEATHER = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 12},
        "days": {"$ref": "#/$defs/count"},
        "unit": {"enum": ["°C", "°F"]},
    },
    "required": ["place", "days"],
    "additionalProperties": False,
    "$defs": {"count": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS = [tool("weather", WEATHER), tool("now")]
SCHEMAS = {"weather": WEATHER, "now": {"type": "object", "maxProperties": 0}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def plain(deltas: list[Delta]) -> tuple[Any, ...]:
    """What the deltas say, without the random ids and however they were cut."""
    content, calls = collect(deltas)
    order = [type(delta).__name__ for delta in deltas]
    runs = [kind for i, kind in enumerate(order) if i == 0 or kind != order[i - 1]]
    return content, [(call.name, call.arguments) for call in calls], runs


def read(format_name: str, text: str, cuts: list[int] | None = None) -> list[Delta]:
    parser = FORMATS[format_name].parser()
    deltas: list[Delta] = []
    begin = 0
    for end in [*sorted(cuts or ()), len(text)]:
        deltas += parser.feed(text[begin:end])
        begin = end
    return deltas + parser.finish()


def said(format_name: str, text: str) -> tuple[str, list[tuple[str, str]]]:
    content, calls, _ = plain(read(format_name, text))
    return content, calls


# --- parsers -----------------------------------------------------------------------------------------------------

HERMES_F = '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}"}]}}\n</tool_call>'
HERMES_G = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
F = ("f", '{"a": [1, {"b": "}"}]}')
G = ("g", "{}")
CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", HERMES_F, "", [F]),
    ("hermes", f"{HERMES_F}\n{HERMES_G}", "", [F, G]),
    ("hermes", HERMES_F + HERMES_G + "\n", "", [F, G]),
    ("hermes", f"I look.\n{HERMES_F} Done. {HERMES_G}.", "I look.\n Done. .", [F, G]),
    ("hermes", "no calls, only a < b and <tool_", "no calls, only a < b and <tool_", []),
    ("hermes", "", "", []),
    ("hermes", '<tool_call>{"name":"g","arguments":{}}', "", [G]),  # the end was not written
    ("hermes", '<tool_call>{"arguments": {"x": 1.5e3}, "name": "h"}</tool_call>', "", [("h", '{"x": 1500.0}')]),
    ("hermes", '<tool_call>{"name": "g", "arguments": "{}"}</tool_call>', "", [G]),
    ("hermes", '<tool_call>{"id": 7, "name": "g", "arguments": {}, "more": [0]}</tool_call>', "", [G]),
    ("hermes", r'<tool_call>{"name": "f", "arguments": {"q": "\"\\é\n\ud83d\ude42 é🙂"}}</tool_call>', "", [
        ("f", r'{"q": "\"\\é\n\ud83d\ude42 é🙂"}')
    ]),
    ("llama3_json", '{"name": "f", "parameters": {"a": [1, {"b": "}"}]}}', "", [F]),
    ("llama3_json", ' {"name": "g", "parameters": {}} ; {"name": "g", "arguments": {}}', "", [G, G]),
    ("llama3_json", '<|python_tag|>{"type": "function", "name": "g", "parameters": {}}', "", [G]),
    ("llama3_json", 'Well <|python_tag|>{"name": "g", "parameters": {}}; {"name": "g", "parameters": {}}', "Well ", [
        G, G
    ]),
    ("llama3_json", 'An object: {"name": "g", "parameters": {}}', 'An object: {"name": "g", "parameters": {}}', []),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", '{"name": "g", "parameters": {}} and text', " and text", [G]),
    ("llama3_json", '{"name": "g", "parameters": {}}; {"b": 1}', '; {"b": 1}', [G]),
    ("llama3_json", "  \n", "  \n", []),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": [1, {"b": "}"}]}, "id": "x"}]', "", [F]),
    ("mistral", 'So [TOOL_CALLS] [{"name":"g","arguments":{}} , {"name":"g","arguments":{}}] end', "So  end", [G, G]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": [1, {"b": "}"}]}[TOOL_CALLS]g[CALL_ID]abc123[ARGS]{}', "", [F, G]),
    ("mistral", "[TOOL_CALLS]g{}", "", [G]),
    ("mistral", "an [INST] and [TOOL_CALL", "an [INST] and [TOOL_CALL", []),
]  # fmt: skip
# What is no call comes out as it is, all of it.
NO_CALLS = [
    ("hermes", "<tool_call>not json</tool_call>"),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"x": 1e999}, "name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"x": ' + "1" * 5000 + '}, "name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "argu'),
    ("hermes", '<tool_call>{"arguments": {"a": "\n"}, "name": "f"}</tool_call>'),  # a raw newline is no JSON
    ("hermes", '<tool_call>{"nom": 1, "name": "f", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": ' + "[" * 500),
    ("hermes", "<tool_call>\n"),
    ("hermes", "<tool_call><tool_call"),
    ("llama3_json", '{"name": "f", "parameters": 5}'),
    ("llama3_json", '<|python_tag|>search(query="x")'),
    ("llama3_json", '{"name": "f"'),
    ("mistral", "[TOOL_CALLS][1, 2]"),
    ("mistral", '[TOOL_CALLS][{"nome": "f"}]'),
    ("mistral", "[TOOL_CALLS]f[ARGS]x"),
    ("mistral", "[TOOL_CALLS]" + "f" * 99 + "{}"),
    ("mistral", "[TOOL_CALLS]"),
]


@pytest.mark.parametrize(("format_name", "text", "content", "calls"), CASES)
def test_calls_are_found(format_name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert said(format_name, text) == (content, calls)


@pytest.mark.parametrize(("format_name", "text"), NO_CALLS)
def test_what_is_no_call_is_content_and_nothing_is_lost(format_name: str, text: str) -> None:
    assert said(format_name, text) == (text, [])


def test_a_call_behind_one_that_was_none_is_found() -> None:
    assert said("hermes", "<tool_call>oops " + HERMES_G) == ("<tool_call>oops ", [G])
    bad = '[TOOL_CALLS][{"name": "g", "arguments": {}}, {"x": 1}]'
    assert said("mistral", bad) == (', {"x": 1}]', [G])


ALL_TEXTS = [(case[0], case[1]) for case in CASES] + NO_CALLS


@pytest.mark.parametrize(("format_name", "text"), [(name, text) for name, text in ALL_TEXTS if len(text) < 300])
def test_every_split_in_two_gives_the_same(format_name: str, text: str) -> None:
    expected = plain(read(format_name, text))
    for cut in range(len(text) + 1):
        assert plain(read(format_name, text, [cut])) == expected
    assert plain(read(format_name, text, list(range(len(text))))) == expected


PARTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "[", "]", ";", ",", "{}"),
        *('{"name": "f", ', '"arguments": {', '"parameters": {"a": 1', '"x": "\\u00e9}"', "}", "}}", "\n", " ", "é🙂"),
        *('{"name": "g", "arguments": {}}', '{"name": "h", "parameters": {"k": [true, null]}}', "text", '"', "\\"),
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FORMAT_NAMES), st.lists(PARTS, max_size=14), st.data())
def test_any_chunking_gives_the_same(format_name: str, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    deltas = read(format_name, text, cuts)
    assert plain(deltas) == plain(read(format_name, text))
    if not any(isinstance(delta, CallStart) for delta in deltas):
        assert collect(deltas)[0] == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([name for name in FORMAT_NAMES if name != "qwen3_coder"]),  # which has no JSON around its values
    st.dictionaries(st.text(max_size=4), JSON, max_size=3),
    st.booleans(),
    st.sampled_from([None, 2]),
    st.integers(1, 9),
)
def test_arguments_come_as_they_are(name: str, arguments: Any, ascii_only: bool, indent: int | None, size: int) -> None:
    text = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    if name == "hermes":
        answer = f'<tool_call>\n{{"name": "f", "arguments": {text}}}\n</tool_call>'
    elif name == "llama3_json":
        answer = f'{{"name": "f", "parameters": {text}}}'
    else:
        answer = f"[TOOL_CALLS]f[ARGS]{text}"
    content, calls, _ = plain(read(name, answer, list(range(0, len(answer), size))))
    assert (content, calls) == ("", [("f", text)])
    assert json.loads(calls[0][1]) == arguments


def test_text_and_arguments_are_not_held_back() -> None:
    parser = FORMATS["hermes"].parser()
    assert parser.feed("Hello <") == [ContentDelta("Hello ")]
    assert parser.feed("b> <tool") == [ContentDelta("<b> ")]
    assert parser.feed('_call>{"name": "f", "arguments": ') == []
    start, arguments = parser.feed('{"a": "x')
    assert isinstance(start, CallStart)
    assert (start.index, start.name) == (0, "f")
    assert re.fullmatch(r"call_[0-9a-f]{24}", start.id)
    assert arguments == ArgumentsDelta(0, '{"a": "x')
    assert parser.feed("yz") == [ArgumentsDelta(0, "yz")]
    assert parser.feed('"}') == [ArgumentsDelta(0, '"}')]
    assert parser.feed("}</tool_call>") == []
    assert parser.finish() == []
    parser = FORMATS["llama3_json"].parser()
    assert parser.feed(' {"answer') == []
    assert parser.feed('": 42') == [ContentDelta(' {"answer": 42')]
    ids = {delta.id for delta in read("hermes", HERMES_G * 50) if isinstance(delta, CallStart)}
    assert len(ids) == 50


def test_a_call_cut_short_says_so() -> None:
    def cut(text: str) -> ToolParser:
        parser = FORMATS["hermes"].parser()
        deltas = parser.feed(text) + parser.finish()
        assert collect(deltas)[1][0].arguments == '{"a": tr'
        return parser

    assert cut('<tool_call>{"name": "f", "arguments": {"a": tr').incomplete == [0]
    assert cut('<tool_call>{"name": "f", "arguments": {"a": trx').incomplete == [0]
    assert said("hermes", '<tool_call>{"name": "f", "arguments": {"a": trx}}')[0] == "x}}"
    parser = FORMATS["hermes"].parser()
    parser.feed(HERMES_F)
    assert (parser.num_calls, parser.incomplete) == (1, [])


def test_long_answers_are_read_in_linear_time() -> None:
    text = "x < y <tool" * 20_000
    start = time.monotonic()
    parser = FORMATS["hermes"].parser()
    deltas = [delta for i in range(0, len(text), 3) for delta in parser.feed(text[i : i + 3])] + parser.finish()
    assert collect(deltas)[0] == text
    long = f'<tool_call>{{"name": "f", "arguments": {{"a": "{"z" * 200_000}"}}}}</tool_call>'
    content, calls = said("hermes", long)
    assert (content, len(calls[0][1])) == ("", 200_009)
    assert time.monotonic() - start < 10


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([*'{}[]":,\\ue0129.-+ \n\t', "true", "null", "fals", '"a"', '{"k":', "\x01", '"\n"}']),
        max_size=12,
    )
)
@example(['{"k":', '"\n"', "}"])
@example(['"k":', '"\n"', "}"])
@example(['"k":', '"\t"', ', "l": "\\u00e9 \\n"', "}"])
@example(['"k":', "-0.5e+3", "}"])
@example(['"k":', "01", "}"])
@example(['"k":', "[1,]", "}"])
def test_the_scanner_takes_exactly_json_objects(parts: list[str]) -> None:
    text = "{" + "".join(parts)
    scanner = JsonScanner()
    taken = sum(1 for _ in iter_steps(scanner, text))
    try:
        json.loads(text)
        valid = text.rstrip(" \t\r\n") == text  # the scanner ends with the brace
    except ValueError:
        valid = False
    assert (scanner.done and taken == len(text)) == valid


def iter_steps(scanner: JsonScanner, text: str) -> Iterator[None]:
    for char in text:
        if not scanner.step(char):
            return
        yield


# --- grammars ----------------------------------------------------------------------------------------------------


def check_calls(deltas: list[Delta]) -> list[str]:
    """The names of the calls, which must be known and their arguments valid."""
    _, calls = collect(deltas)
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    return [call.name for call in calls]


def ask(llm: nb.LLM, format_name: str, choice: Any, *, parallel: bool = False, **fields: Any) -> list[Delta]:
    tool_format = FORMATS[format_name]
    params = nb.SamplingParams(
        guided=tool_format.grammar(TOOLS, choice, parallel, llm.tokenizer),
        keep_special_token_ids=tool_format.keep_special_token_ids(llm.tokenizer),
        **{"max_tokens": 200, **fields},
    )
    talk = [
        {"role": "system", "content": tools_prompt(TOOLS)},
        {"role": "user", "content": "How is the weather in Paris?"},
    ]
    parser = tool_format.parser(TOOLS)
    deltas: list[Delta] = []
    reason = None
    for piece in llm.chat(talk, params, stream=True):
        deltas += parser.feed(piece.text)
        reason = piece.finish_reason
    if not parallel and choice != "auto":
        assert reason == "stop"
    return deltas + parser.finish()


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
def test_required_calls_are_valid(llm: nb.LLM, format_name: str) -> None:
    for fields in ({"temperature": 0}, *({"temperature": 1.3, "seed": seed} for seed in range(2))):
        deltas = ask(llm, format_name, "required", **fields)
        assert len(check_calls(deltas)) == 1
        assert collect(deltas)[0] == ""
        if not fields["temperature"]:
            assert check_calls(ask(llm, format_name, named("now"), **fields)) == ["now"]
        assert check_calls(ask(llm, format_name, named("weather"), **fields)) == ["weather"]


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
def test_without_need_of_a_tool_there_is_text(llm: nb.LLM, format_name: str) -> None:
    tool_format = FORMATS[format_name]
    prompt = "Once upon a time there was a king who"
    free = llm.generate(prompt, nb.SamplingParams(temperature=0, max_tokens=24))[0]
    guided = tool_format.grammar(TOOLS, "auto", True, llm.tokenizer)
    out = llm.generate(prompt, nb.SamplingParams(temperature=0, max_tokens=24, guided=guided))[0]
    assert out.token_ids == free.token_ids
    content, calls, _ = plain(read(format_name, out.text))
    assert (content, calls) == (out.text, [])


CALL = '{"name": "weather", "arguments": {"place": "Rom", "days": 2}}'
TWO = f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>"
LLAMA_CALL = CALL.replace("arguments", "parameters")


@pytest.mark.parametrize(
    ("format_name", "choice", "parallel", "text", "allowed"),
    [
        ("hermes", "auto", True, "Well.\n" + TWO + "\nSo <b>.", True),
        ("hermes", "auto", True, "Well.\n" + TWO.replace("2", "10"), False),
        ("hermes", "auto", False, TWO[: len(TWO) // 2], True),
        ("hermes", "auto", False, TWO, False),
        ("hermes", "auto", True, "<tool_call>\n{}", False),
        ("hermes", "required", True, TWO, True),
        ("hermes", "required", False, TWO, False),
        ("hermes", "required", True, "Well.\n" + TWO, False),
        ("hermes", named("now"), True, TWO, False),
        ("hermes", "required", True, TWO.replace("weather", "nothing"), False),
        ("llama3_json", "auto", True, f"{LLAMA_CALL}; {LLAMA_CALL}", True),
        ("llama3_json", "auto", False, f"{LLAMA_CALL}; {LLAMA_CALL}", False),
        ("llama3_json", "auto", True, "Well, " + LLAMA_CALL, True),  # text, for the model has no <|python_tag|>
        ("llama3_json", "auto", True, '{"answer": 1}', False),
        ("llama3_json", "required", True, f"{LLAMA_CALL}; {LLAMA_CALL}", True),
        ("mistral", "auto", True, f"Well [TOOL_CALLS][{CALL}, {CALL}]", True),
        ("mistral", "auto", False, f"[TOOL_CALLS][{CALL}, {CALL}]", False),
        ("mistral", "required", False, f"[TOOL_CALLS][{CALL}]", True),
    ],
)
def test_grammars_follow_the_formats(
    llm: nb.LLM, format_name: str, choice: Any, *, parallel: bool, text: str, allowed: bool
) -> None:
    tokenizer = llm.tokenizer
    matcher = plan_for(FORMATS[format_name].grammar(TOOLS, choice, parallel, tokenizer), tokenizer).matcher()

    def follow() -> bool:
        try:
            for token_id in tokenizer.encode(text, add_special_tokens=False):
                matcher.accept(token_id)
            return matcher.fill()
        except nb.InvalidArgumentError:
            return False

    assert follow() == allowed


# --- marks that are control tokens ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def marked_llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nb.LLM]:
    marks = ["[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<tool_call>", "</tool_call>"]
    path = marked_model(tmp_path_factory.mktemp("marked"), marks, "{{ messages[-1].content }} [TOOL_CALLS]")
    with nb.LLM(path, num_threads=1) as llm:
        yield llm


@pytest.mark.parametrize(
    ("format_name", "mark"),
    [
        ("hermes", "<tool_call>"),
        ("qwen3_coder", "<tool_call>"),
        ("llama3_json", "<|python_tag|>"),
        ("mistral", "[TOOL_CALLS]"),
    ],
)
def test_control_tokens_begin_calls(marked_llm: nb.LLM, format_name: str, mark: str) -> None:
    mark_id = marked_llm.tokenizer.special_tokens[mark]
    for seed in range(3):
        fields: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 400, "logit_bias": {mark_id: 100.0}}
        deltas = ask(marked_llm, format_name, "auto", **fields)
        assert len(check_calls(deltas)) == 1
        assert collect(deltas)[0] == ""
        if format_name != "llama3_json":  # which calls without its mark too
            fields["logit_bias"] = {}
            assert len(check_calls(ask(marked_llm, format_name, "required", **fields))) == 1
        fields["logit_bias"] = {mark_id: -100.0}
        content, calls = collect(ask(marked_llm, format_name, "auto", **fields))
        assert (bool(content), calls) == (True, [])


def test_control_tokens_are_text_only_if_they_are_to_be_kept(marked_llm: nb.LLM) -> None:
    tokenizer = marked_llm.tokenizer
    mark = tokenizer.special_tokens["[TOOL_CALLS]"]
    guided = nb.Guided.grammar(f'start: "aé" <[{mark}]> "STOPb" <[{mark}]> "x"\n', control_tokens=[mark])
    for kept, expected in (([], "aéSTOPbx"), ([mark], "aé[TOOL_CALLS]STOPb[TOOL_CALLS]x"), ([97], "aéSTOPbx")):
        params = nb.SamplingParams(guided=guided, max_tokens=32, keep_special_token_ids=kept)
        out = marked_llm.generate("x", params)[0]
        assert out.text == expected
        assert "".join(piece.text for piece in marked_llm.stream("x", params)) == expected
        assert out.token_ids.count(mark) == 2
    for stop, include, expected in (
        ("éS", False, "a"),  # the mark is in what is cut off
        ("éS", True, "aé[TOOL_CALLS]S"),
        ("STOP", False, "aé[TOOL_CALLS]"),
        ("STOPb", True, "aé[TOOL_CALLS]STOPb"),
        ("éST-", False, "aé[TOOL_CALLS]STOPb[TOOL_CALLS]x"),  # what was held back comes before the mark
        ("x-", False, "aé[TOOL_CALLS]STOPb[TOOL_CALLS]x"),
    ):
        params = nb.SamplingParams(
            guided=guided,
            max_tokens=32,
            keep_special_token_ids=[mark],
            stop=stop,
            include_stop_str_in_output=include,
        )
        out = marked_llm.generate("x", params)[0]
        assert out.text == expected
        assert out.stop_reason == (None if stop.endswith("-") else stop)
        assert "".join(piece.text for piece in marked_llm.stream("x", params)) == expected
    with pytest.raises(nb.InvalidArgumentError, match="keep_special_token_ids"):
        marked_llm.generate("x", nb.SamplingParams(keep_special_token_ids=[10**6]))


def test_the_grammar_names_no_more_control_tokens_than_it_needs(marked_llm: nb.LLM) -> None:
    tokenizer = marked_llm.tokenizer
    for tool_format in FORMATS.values():
        guided = tool_format.grammar(TOOLS, "auto", True, tokenizer)
        assert guided.control_tokens
        assert {tokenizer.token_text(i) for i in guided.control_tokens} <= set(tool_format.marks)
    assert FORMATS["llama3_json"].grammar(TOOLS, "required", True, tokenizer).control_tokens == ()


# --- what is refused -------------------------------------------------------------------------------------------------

DEEP: dict[str, Any] = {"type": "string"}
for _ in range(200):
    DEEP = {"type": "array", "items": DEEP}
LOOP = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"type": "array"}, r"\.type must be 'object', got 'array'"),
        ([1], "must be a JSON schema"),
        ({"properties": {"a": {"type": "text"}}}, "Invalid type: text"),
        ({"properties": {"a": {"type": "string", "pattern": "("}}}, "unclosed group"),
        ({"properties": {"a": {"not": {}}}}, "Unimplemented"),
        ({"properties": {f"p{i}": {} for i in range(10_000)}}, "10000 properties; at most 1000"),
        ({"properties": {"a": {"enum": list(range(20_000))}}}, "20000 values in enum"),
        ({"properties": {"a": {"const": "x" * 300_000}}}, "bytes; at most"),
        ({"properties": {"a": DEEP}}, "nested deeper"),
        ({"$ref": "#"}, "no finite value"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"], "$defs": LOOP}, "no finite value"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no finite value"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "does not exist"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}, "required": ["a"]}, "leads nowhere"),
        ({"properties": {"a": {"$ref": "http://x.org/y"}}}, "does not fetch"),
        ({"properties": {"a": {"allOf": [{"pattern": f".*a{i}.*"} for i in range(30)]}}}, "30 patterns and allOf"),
        ({"properties": {"a": float("nan")}}, "is not JSON"),
    ],
)
def test_schemas_are_refused_at_once_and_by_name(llm: nb.LLM, parameters: Any, says: str) -> None:
    start = time.monotonic()
    with pytest.raises(nb.InvalidArgumentError, match=rf"tools\[1\]\.function\.parameters.*{says}"):
        FORMATS["hermes"].grammar([tool("f"), tool("g", parameters)], "auto", True, llm.tokenizer)
    assert time.monotonic() - start < 1


def test_large_and_recursive_schemas_work(llm: nb.LLM) -> None:
    tree = {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": {"$ref": "#"}},
        "required": ["value"],
    }
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}}
    for parameters in (tree, wide):
        start = time.monotonic()
        guided = FORMATS["hermes"].grammar([tool("f", parameters)], "required", False, llm.tokenizer)
        out = llm.generate("x", nb.SamplingParams(guided=guided, max_tokens=24, temperature=0))[0]
        assert out.finish_reason in ("stop", "length")
        assert time.monotonic() - start < 5
    with pytest.raises(nb.InvalidArgumentError, match=r"tools\[1\].*1800 properties.*together"):
        FORMATS["hermes"].grammar([tool("f", wide), tool("g", wide)], "auto", True, llm.tokenizer)


@pytest.mark.parametrize(
    ("tools", "choice", "says"),
    [
        ([], "auto", "tools must be"),
        ([{"type": "function"}], "auto", r"tools\[0\].function must be"),
        ([tool("a b")], "auto", r"tools\[0\].function.name must be"),
        ([tool("f"), tool("f")], "auto", r"tools\[1\].function.name 'f' is the name of an earlier"),
        ([tool(f"f{i}") for i in range(129)], "auto", "129 entries"),
        ([tool("f")], "none", "tool_choice must be"),
        ([tool("f")], named("g"), r"tool_choice.function.name must be the name of a tool \('f'\), got 'g'"),
        ([tool("f")], {"type": "function"}, "tool_choice must be"),
    ],
)
def test_wrong_tools_and_choices_are_refused(llm: nb.LLM, tools: Any, choice: Any, says: str) -> None:
    with pytest.raises(nb.InvalidArgumentError, match=says):
        FORMATS["hermes"].grammar(tools, choice, True, llm.tokenizer)


# --- detection -------------------------------------------------------------------------------------------------------


class Stub:
    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template


@pytest.mark.parametrize(
    ("template", "name", "needs_prompt"),
    [
        ("{%- if tools %}<tool_call>{% endif %}", "hermes", False),
        ("{%- if tools %}<tool_call>\n<function=a>\n<parameter=b>{% endif %}", "qwen3_coder", False),
        ("{% if tools is not none %}[TOOL_CALLS]{% endif %}", "mistral", False),
        ("{{ tools }}Environment: ipython<|python_tag|>", "llama3_json", False),
        ("{{ messages[0].content }}", "hermes", True),
        (None, "hermes", True),
    ],
)
def test_formats_are_detected(template: str | None, name: str, needs_prompt: bool) -> None:
    stub: Any = Stub(template)
    assert detect_format(stub) == name
    assert needs_tools_prompt(stub) == needs_prompt


def test_the_default_model_is_told_of_tools(llm: nb.LLM) -> None:
    assert detect_format(llm.tokenizer) == "hermes"
    assert needs_tools_prompt(llm.tokenizer)
    text = tools_prompt(TOOLS)
    assert json.dumps(TOOLS[0]["function"], ensure_ascii=False) in text
    assert "<tool_call>" in text
