"""Thoughts and answers: told apart in pieces of any size, counted, and allowed in front of a grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marked_model import marked_model

import nanobraid as nb
from nanobraid.guided import plan_for
from nanobraid.server.reasoning import (
    ThinkSplitter,
    detect_reasoning,
    keep_special_token_ids,
    prompt_opens_thinking,
    with_reasoning,
)
from nanobraid.server.tool_formats import FORMATS

TEMPLATE = "{{ messages[-1].content }}{% if add_generation_prompt %}<think>\n{% endif %}"


class Stub:
    """A tokenizer of which only the tags matter."""

    def __init__(self, template: str | None = None, tags: dict[str, int] | None = None) -> None:
        self.chat_template = template
        self._tags = tags or {}

    def find_token(self, text: str) -> int | None:
        return self._tags.get(text)

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(token_id) for token_id in token_ids)


NO_TAGS: Any = Stub()


def split(text: str, cuts: list[int] | None = None, *, opened: bool = False) -> tuple[str, str]:
    splitter = ThinkSplitter(NO_TAGS, opened=opened)
    parts = []
    begin = 0
    for end in [*sorted(cuts or ()), len(text)]:
        parts += splitter.feed(text[begin:end])
        begin = end
    parts += splitter.finish()
    kinds = [kind for kind, _ in parts]
    assert kinds == sorted(kinds, reverse=True)  # first all thoughts, then the answer
    return (
        "".join(text for kind, text in parts if kind == "reasoning"),
        "".join(text for kind, text in parts if kind == "content"),
    )


@pytest.mark.parametrize(
    ("opened", "text", "reasoning", "content"),
    [
        (False, "<think>\nhmm\n</think>\n\nyes\n", "hmm\n", "yes\n"),
        (False, "\n <think>a < b</think>c", "a < b", "c"),
        (False, "<think>\n\n</think>\n\nyes", "", "yes"),
        (False, "<think></think>", "", ""),
        (False, "plain <think>no</think>", "", "plain <think>no</think>"),
        (False, "  \n", "", "  \n"),
        (False, "<thinking>x", "", "<thinking>x"),
        (False, "<thi", "", "<thi"),
        (False, "<think>never closed </thin", "never closed </thin", ""),
        (False, "no thoughts</think>", "", "no thoughts</think>"),
        (True, "\nhmm</think>\nyes", "hmm", "yes"),
        (True, "hmm</think>yes</think><think>", "hmm", "yes</think><think>"),
        (True, "hmm", "hmm", ""),
        (True, "", "", ""),
        (True, "</think>\n\n", "", ""),
    ],
)
def test_thoughts_and_answers(opened: bool, text: str, reasoning: str, content: str) -> None:
    assert split(text, opened=opened) == (reasoning, content)
    for cut in range(len(text) + 1):
        assert split(text, [cut], opened=opened) == (reasoning, content)
    assert split(text, list(range(len(text))), opened=opened) == (reasoning, content)


PARTS = st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</", "think>", "<", "\n", " ", "é🙂", "text"])


@settings(max_examples=400, deadline=None)
@given(st.lists(PARTS, max_size=10), st.booleans(), st.data())
def test_any_chunking_gives_the_same(parts: list[str], opened: bool, data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert split(text, cuts, opened=opened) == split(text, opened=opened)


def test_text_is_not_held_back() -> None:
    splitter = ThinkSplitter(NO_TAGS)
    assert splitter.feed(" <thi") == []
    assert splitter.feed("nk>") == []
    assert splitter.feed("\n") == []
    assert splitter.feed("so <") == [("reasoning", "so ")]
    assert splitter.feed("b </think>\n") == [("reasoning", "<b ")]
    assert splitter.feed("\nyes") == [("content", "yes")]
    assert splitter.feed("<") == [("content", "<")]
    assert splitter.finish() == []


@pytest.mark.parametrize(
    ("opened", "ids", "count"),
    [
        (False, [1, 97, 98, 2, 99], 2),
        (False, [10, 1, 97, 2, 1, 98, 2], 1),  # whitespace first; only the first thoughts are any
        (False, [99, 1, 97, 2], 0),
        (True, [97, 98, 2, 99], 2),
        (True, [97, 98], 2),
        (True, [2, 97], 0),
    ],
)
def test_tokens_of_thoughts_are_counted(opened: bool, ids: list[int], count: int) -> None:
    tokenizer: Any = Stub(tags={"<think>": 1, "</think>": 2})
    one = ThinkSplitter(tokenizer, opened=opened)
    one.feed("", ids)
    many = ThinkSplitter(tokenizer, opened=opened)
    for token_id in ids:
        many.feed("", [token_id])
    assert (one.reasoning_tokens, many.reasoning_tokens) == (count, count)


def test_without_tokens_for_the_tags_pieces_are_counted() -> None:
    splitter = ThinkSplitter(NO_TAGS)
    for text in ("<thi", "nk>", "a", " b", "</think>", "c"):
        splitter.feed(text, [0])
    assert splitter.reasoning_tokens == 2


def test_models_that_think_are_known(llm: nb.LLM) -> None:
    some: list[Any] = [Stub("{{ x.split('</think>') }}"), Stub(tags={"</think>": 5}), Stub("{{ x }}"), Stub()]
    assert [detect_reasoning(stub) for stub in some] == [True, True, False, False]
    assert not detect_reasoning(llm.tokenizer)
    assert keep_special_token_ids(llm.tokenizer) == []


def test_prompts_that_open_thoughts_are_known(llm: nb.LLM) -> None:
    def opens(text: str) -> bool:
        return prompt_opens_thinking(llm.tokenizer, llm.tokenizer.encode(text, parse_special=True))

    assert opens("<|im_start|>assistant\n<think>\n")
    assert opens("<|im_start|>assistant\n<think>")
    assert not opens("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens("<|im_start|>user\nWhat does <think> mean?<|im_end|>\n<|im_start|>assistant\n")
    assert not opens("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n")
    assert not opens("")


# --- grammars ----------------------------------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/n"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def answers(tokenizer: nb.Tokenizer) -> list[tuple[nb.Guided, str, str]]:
    """Grammars with an answer that fits and one that does not."""
    tools = FORMATS["hermes"].grammar(TOOLS, "required", False, tokenizer)
    return [
        (nb.Guided.json_schema(SCHEMA), '{"a": 1}', '{"a": 10}'),
        (nb.Guided.json_object(), '{"b": []}', "[]"),
        (nb.Guided.regex("[0-9]{3}/x"), "123/x", "12/x"),
        (nb.Guided.choice(["yes", "no"]), "yes", "maybe"),
        (nb.Guided.grammar('start: "a" b\nb: "b"\n'), "ab", "ba"),
        (tools, CALL, CALL.replace("1", "10")),
    ]


def fits(guided: nb.Guided, tokenizer: nb.Tokenizer, text: str) -> bool:
    matcher = plan_for(guided, tokenizer).matcher()
    try:
        for token_id in tokenizer.encode(text, add_special_tokens=False, parse_special=True):
            matcher.accept(token_id)
        return matcher.fill()
    except nb.InvalidArgumentError:
        return False


def check_grammars(tokenizer: nb.Tokenizer) -> None:
    for guided, good, bad in answers(tokenizer):
        opened = with_reasoning(guided, tokenizer, opened=True)
        free = with_reasoning(guided, tokenizer, opened=False)
        assert fits(guided, tokenizer, good)
        for thoughts in ("I {wonder} <b>.\n</think>\n\n", "</think>"):
            assert fits(opened, tokenizer, thoughts + good)
            assert not fits(opened, tokenizer, thoughts + bad)
            assert fits(free, tokenizer, "<think>" + thoughts + good)
            assert not fits(free, tokenizer, "<think>" + thoughts + bad)
            assert not fits(free, tokenizer, thoughts + good)
        assert not fits(opened, tokenizer, good)
        assert fits(free, tokenizer, good)
        assert not fits(free, tokenizer, bad)


def test_grammars_let_the_model_think_first(llm: nb.LLM) -> None:
    check_grammars(llm.tokenizer)


@pytest.fixture(scope="module")
def thinking_llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nb.LLM]:
    """A model whose tags are control tokens."""
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    with nb.LLM(marked_model(tmp_path_factory.mktemp("thinking"), tags, TEMPLATE), num_threads=1) as llm:
        yield llm


def test_tags_may_be_control_tokens(thinking_llm: nb.LLM) -> None:
    tokenizer = thinking_llm.tokenizer
    check_grammars(tokenizer)
    assert detect_reasoning(tokenizer)
    prompt = thinking_llm.encode_chat([{"role": "user", "content": "x"}])
    assert prompt_opens_thinking(tokenizer, prompt)
    kept = keep_special_token_ids(tokenizer)
    assert [tokenizer.token_text(token_id) for token_id in kept] == ["<think>", "</think>"]
    for opened in (True, False):
        guided = with_reasoning(nb.Guided.json_schema(SCHEMA), tokenizer, opened=opened)
        for seed in range(3):
            # The model thinks as it likes, which is at random: the tag that ends it is made likely.
            params = nb.SamplingParams(
                guided=guided,
                keep_special_token_ids=kept,
                max_tokens=600,
                seed=seed,
                logit_bias={kept[1]: 7.0, kept[0]: 100.0},
            )
            splitter = ThinkSplitter(tokenizer, opened=opened)
            parts = []
            ids: list[int] = []
            for piece in thinking_llm.stream(prompt, params):
                ids += piece.token_ids
                parts += splitter.feed(piece.text, piece.token_ids)
            parts += splitter.finish()
            answer = "".join(text for kind, text in parts if kind == "content")
            assert set(json.loads(answer)) == {"a"}
            assert splitter.reasoning_tokens == ids.index(kept[1]) - (not opened)
