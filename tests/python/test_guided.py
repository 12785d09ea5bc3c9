"""Guided decoding: answers fit what was asked for, masks equal a search, other options keep their meaning."""

from __future__ import annotations

import json
import pickle
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
import tiny_hf
from engine_threads import THREADS

import nanobraid as nb
from nanobraid import guided as guided_module
from nanobraid.guided import GuidedMatcher, plan_for

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPT = "Here is a record: "
ANY_TEXT = nb.Guided.regex(r"(?s:.)*")


def one(llm: nb.LLM, guided: nb.Guided, prompt: str = PROMPT, **fields: Any) -> nb.RequestOutput:
    params = nb.SamplingParams(**{"guided": guided, "max_tokens": 64, "seed": 5, **fields})
    return llm.generate(prompt, params)[0]


# --- answers fit -------------------------------------------------------------------------------------------------


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:  # noqa: PLR0911 (one for each kind)
    """A schema whose values are short, so that most answers are complete."""
    kinds = ["string", "integer", "boolean", "null", "enum", "number", "pattern"]
    kind = rng.choice(kinds if depth >= 2 else [*kinds, "array", "object", "object", "anyOf"])
    if depth == 0:
        kind = rng.choice(["object", "array"])
    inner = depth + 1
    if kind == "string":
        return {"type": "string", "minLength": rng.randrange(3), "maxLength": rng.randrange(3, 12)}
    if kind == "integer":
        low = rng.randrange(-500, 500)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1000)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "exclusiveMaximum": rng.randrange(1, 50)}
    if kind == "enum":
        values: list[Any] = ["red", 'quo"te', "Größe", 17, -2.5, None, True, ["x"]]
        return {"enum": rng.sample(values, rng.randrange(1, 4))}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[A-Z]{3}-[0-9]{2}$", "^(yes|no|maybe)$", "^a+b?$"])}
    if kind == "array":
        count = rng.randrange(3)
        return {"type": "array", "items": random_schema(rng, inner), "minItems": count, "maxItems": count + 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, inner) for _ in range(2)]}
    if kind == "object":
        names = rng.sample(["id", "name", "size", "tags", "note", "ünï"], rng.randrange(1, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, inner) for name in names},
            "required": names[: rng.randrange(len(names) + 1)],
            "additionalProperties": False,
        }
    return {"type": kind}


def test_answers_fit_random_schemas(llm: nb.LLM) -> None:
    schemas = [random_schema(random.Random(seed)) for seed in range(40)]
    cases = [(schema, seed) for schema in schemas for seed in (1, 2)]
    params = [
        nb.SamplingParams(guided=nb.Guided.json_schema(schema), seed=seed, max_tokens=250) for schema, seed in cases
    ]
    outs = llm.generate([PROMPT] * len(cases), params)
    cut = []
    for i, ((schema, _), out) in enumerate(zip(cases, outs, strict=True)):
        assert out.error is None
        if out.finish_reason == "length":
            cut.append(i)
            continue
        assert out.finish_reason == "stop"
        jsonschema.validate(json.loads(out.text), schema)
        assert out.text == out.text.strip()
    assert len(cut) < 8, "too many answers were cut for the test to mean something"
    assert len({out.text for out in outs}) > 60


def test_an_answer_cut_short_begins_a_whole_one(llm: nb.LLM) -> None:
    guided = nb.Guided.json_schema(PERSON)
    whole = one(llm, guided)
    jsonschema.validate(json.loads(whole.text), PERSON)
    for max_tokens in range(1, len(whole.token_ids)):
        out = one(llm, guided, max_tokens=max_tokens)
        assert (out.finish_reason, out.token_ids) == ("length", whole.token_ids[:max_tokens])
    out = one(llm, guided, max_tokens=len(whole.token_ids))
    assert (out.finish_reason, out.token_ids) == ("stop", whole.token_ids)


def test_any_json_object(llm: nb.LLM) -> None:
    outs = llm.generate(
        [PROMPT] * 6, [nb.SamplingParams(guided=nb.Guided.json_object(), seed=s, max_tokens=300) for s in range(6)]
    )
    whole = [out for out in outs if out.finish_reason == "stop"]
    assert whole
    assert all(isinstance(json.loads(out.text), dict) for out in whole)


def test_whitespace_in_json_is_limited(llm: nb.LLM) -> None:
    spaces = [i for i, token in enumerate(llm.tokenizer.core.token_bytes()) if token and not token.strip(b" \t\r\n")]
    out = one(llm, nb.Guided.json_schema(PERSON), logit_bias=dict.fromkeys(spaces, 100.0), max_tokens=300)
    assert out.finish_reason == "stop"
    assert max(map(len, re.findall(r"[ \t\r\n]+", out.text))) == 40
    jsonschema.validate(json.loads(out.text), PERSON)


REGEXES = [
    r"[0-9]{3}-[0-9]{4}",
    r"(red|green|blue)( and (red|green|blue))*",
    r"[A-Z][a-z]{2,8}( [A-Z][a-z]{2,8})?",
    r"\d{1,3}(\.\d{1,3}){3}",
    r"(?i:yes|no)[!?]{0,2}",
    r"[äöüé😀-😎]{1,5}",
    r"a*",
    r"[^x]{5}\n?",
    r'\{"x": (true|false|null)\}',
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_match_regular_expressions(llm: nb.LLM, temperature: float) -> None:
    cases = [(pattern, seed) for pattern in REGEXES for seed in range(3)]
    params = [
        nb.SamplingParams(guided=nb.Guided.regex(pattern), temperature=temperature, seed=seed, max_tokens=24)
        for pattern, seed in cases
    ]
    outs = llm.generate([PROMPT] * len(cases), params)
    for (pattern, _), out in zip(cases, outs, strict=True):
        if out.finish_reason == "stop":
            assert re.fullmatch(pattern, out.text), (pattern, out.text)
        else:
            assert out.finish_reason == "length"
            assert regex.fullmatch(pattern, out.text, partial=True), (pattern, out.text)
    assert sum(out.finish_reason == "stop" for out in outs) > len(outs) * 2 / 3


@pytest.mark.parametrize(
    "choices",
    [["red", "blue"], ["a", "ab", "abc"], ['quo"te\\', "new\nline\t", "Größe 😀", "\x01", "/x/", "%json"], ["only"]],
)
def test_answers_are_one_of_the_choices(llm: nb.LLM, choices: list[str]) -> None:
    guided = nb.Guided.choice(choices)
    outs = llm.generate([PROMPT] * 8, [nb.SamplingParams(guided=guided, seed=s, temperature=50.0) for s in range(8)])
    assert {out.text for out in outs} <= set(choices)
    assert {out.finish_reason for out in outs} == {"stop"}
    assert len(choices) == 1 or len({out.text for out in outs}) > 1


def test_answers_of_a_grammar(llm: nb.LLM) -> None:
    guided = nb.Guided.grammar('start: "(" start ")" | /[a-z]{1,3}/')
    for seed in range(4):
        out = one(llm, guided, seed=seed)
        if out.finish_reason == "stop":
            assert re.fullmatch(r"\(*[a-z]{1,3}\)*", out.text)
            assert out.text.count("(") == out.text.count(")")


def test_the_greedy_answer_is_the_most_likely_choice(llm: nb.LLM) -> None:
    choices = [" London", " Paris", " Rome"]
    out = one(llm, nb.Guided.choice(choices), "The capital of France is", temperature=0)
    assert out.text == " Paris"


# --- masks -------------------------------------------------------------------------------------------------------


def bits_of(matcher: GuidedMatcher) -> list[int]:
    flags = np.unpackbits(matcher.mask.view(np.uint8), bitorder="little")
    return [int(i) for i in np.flatnonzero(flags)]


@pytest.mark.parametrize("pattern", [r"[0-9]{2,4}x?", r"(ab|cd)e*(f|gh)", r"[a-c ]+[!?]", r"([a-z]+,){2}[A-Z]?"])
def test_masks_equal_a_search_over_the_vocabulary(llm: nb.LLM, pattern: str) -> None:
    tokens = [None if token is None else token.decode("latin-1") for token in llm.tokenizer.core.token_bytes()]
    compiled = regex.compile(pattern, flags=regex.ASCII)
    rng = random.Random(pattern)
    for _ in range(3):
        matcher = plan_for(nb.Guided.regex(pattern), llm.tokenizer).matcher()
        text, finished = "", False
        for _ in range(8):
            may_end = matcher.fill()
            expected = [i for i, token in enumerate(tokens) if token and compiled.fullmatch(text + token, partial=True)]
            assert may_end == (compiled.fullmatch(text) is not None), text
            assert bits_of(matcher) == expected, text
            assert finished == (not expected), text
            if finished:
                break
            token_id = rng.choice(expected)
            text += str(tokens[token_id])
            finished = matcher.accept(token_id)


def test_forced_text_has_its_usual_tokens(llm: nb.LLM) -> None:
    text = "hello world, this is forced"
    matcher = plan_for(nb.Guided.regex(text + "[0-9]"), llm.tokenizer).matcher()
    for token_id in llm.tokenizer.encode(text)[:-1]:
        assert not matcher.fill()
        assert bits_of(matcher) == [token_id]
        assert not matcher.accept(token_id)


def test_no_grammar_makes_control_tokens(llm: nb.LLM) -> None:
    matcher = plan_for(ANY_TEXT, llm.tokenizer).matcher()
    assert matcher.fill()
    allowed = bits_of(matcher)
    assert len(allowed) > 40_000
    assert max(allowed) < llm.tokenizer.vocab_size
    controls = set(llm.tokenizer.special_tokens.values())
    assert not set(allowed) & controls
    out = one(llm, ANY_TEXT, logit_bias=dict.fromkeys(controls - set(llm.tokenizer.eos_token_ids), 100.0))
    assert not set(out.token_ids) & controls
    for lark in ("start: <|im_start|>", "start: <|im_end|>"):
        with pytest.raises(nb.InvalidArgumentError, match="special token"):
            plan_for(nb.Guided.grammar(lark), llm.tokenizer)
    out = one(llm, nb.Guided.grammar("start: <[1]>"))
    assert (out.finish_reason, out.error) == ("error", "guided leaves no token to draw")


# --- with other options ------------------------------------------------------------------------------------------


def test_a_grammar_may_name_control_tokens_if_it_says_which(llm: nb.LLM) -> None:
    first, second = (llm.tokenizer.special_tokens[text] for text in ("<file_sep>", "<filename>"))
    lark = f'start: "a" <[{first}]> "b" <[{second}]>\n'
    out = one(llm, nb.Guided.grammar(lark, control_tokens=[first, second]))
    a, b = (llm.tokenizer.encode(text, add_special_tokens=False) for text in "ab")
    assert (out.token_ids, out.text, out.finish_reason) == ([*a, first, *b, second], "ab", "stop")
    partly = one(llm, nb.Guided.grammar(lark, control_tokens=[first]))  # the other one stays out of reach
    assert (partly.token_ids, partly.finish_reason) == ([*a, first, *b], "error")
    assert nb.Guided.grammar(lark, control_tokens=[first]) != nb.Guided.grammar(lark)
    for token_id in (a[0], llm.tokenizer.eos_token_ids[0], 10**6):
        with pytest.raises(nb.InvalidArgumentError, match=f"end no answer, got {token_id}"):
            one(llm, nb.Guided.grammar(lark, control_tokens=[token_id]))


def test_a_grammar_may_come_before_another(llm: nb.LLM) -> None:
    control = llm.tokenizer.special_tokens["<file_sep>"]
    inner = nb.Guided.grammar(f'start: "x" <[{control}]>\n', control_tokens=[control])
    for guided, text in (
        (nb.Guided.choice(["yes"]), "so: yes"),
        (nb.Guided.regex("[0]{3}"), "so: 000"),
        (inner, "so: x"),
    ):
        out = one(llm, guided.preceded_by('start: "so: " @answer\n'))
        assert (out.text, out.finish_reason) == (text, "stop")
    twice = nb.Guided.choice(["yes"]).preceded_by('start: "a" @answer\n')
    assert twice == nb.Guided.choice(["yes"]).preceded_by('start: "a" @answer\n')
    assert twice != nb.Guided.choice(["no"]).preceded_by('start: "a" @answer\n')
    with pytest.raises(nb.InvalidArgumentError, match="already"):
        twice.preceded_by('start: "b" @answer\n')


def test_guided_and_free_requests_share_a_batch(llm: nb.LLM) -> None:
    kinds: list[nb.Guided | None] = [
        None,
        nb.Guided.json_schema(PERSON),
        nb.Guided.regex("[0-9 ]+"),
        nb.Guided.choice(["yes", "no"]),
    ]
    params = [nb.SamplingParams(guided=kinds[i % 4], temperature=i % 3, seed=i, max_tokens=40) for i in range(16)]
    prompts = [f"{PROMPT}{i} " for i in range(16)]
    together = llm.generate(prompts, params)
    for prompt, p, out in zip(prompts, params, together, strict=True):
        alone = llm.generate(prompt, p)[0]
        assert (out.token_ids, out.finish_reason) == (alone.token_ids, alone.finish_reason)


def test_each_answer_has_its_own_matcher(llm: nb.LLM) -> None:
    out = one(llm, nb.Guided.json_schema(PERSON), n=4)
    assert len({answer.text for answer in out.outputs}) > 1
    for answer in out.outputs:
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), PERSON)


def test_pieces_of_a_stream_are_the_answer(llm: nb.LLM) -> None:
    guided = nb.Guided.json_schema(PERSON)
    pieces = list(llm.stream(PROMPT, nb.SamplingParams(guided=guided, seed=5, max_tokens=64)))
    assert "".join(piece.text for piece in pieces) == one(llm, guided).text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "stop"


def test_min_tokens_keeps_it_from_ending(llm: nb.LLM) -> None:
    eos = dict.fromkeys(llm.tokenizer.eos_token_ids, 100.0)
    digits = nb.Guided.regex("[0-9]+")
    assert len(one(llm, digits, logit_bias=eos).token_ids) == 1
    assert len(one(llm, digits, logit_bias=eos, min_tokens=9).token_ids) == 9
    out = one(llm, nb.Guided.choice(["yes", "no"]), min_tokens=9)
    assert (out.finish_reason, out.error) == ("error", "guided and min_tokens together leave no token to draw")


def test_stop_tokens_are_chosen_only_where_the_answer_is_complete(llm: nb.LLM) -> None:
    (comma,) = llm.tokenizer.encode(",")
    guided = nb.Guided.regex("[0-9],[0-9],[0-9]*")
    out = one(llm, guided, stop_token_ids=[comma], logit_bias={comma: 100.0})
    assert out.finish_reason == "error"  # the grammar needs a comma as text
    (word,) = llm.tokenizer.encode(" the")
    out = one(llm, guided, stop_token_ids=[word], logit_bias={word: 100.0})
    assert (out.finish_reason, len(out.text)) == ("stop", 4)
    assert re.fullmatch("[0-9],[0-9],", out.text)


def test_stop_strings_may_end_it_before(llm: nb.LLM) -> None:
    out = one(llm, nb.Guided.json_schema(PERSON), stop='"age')
    assert (out.finish_reason, out.stop_reason) == ("stop", '"age')
    assert out.text.startswith("{")
    assert "name" in out.text


def test_other_masks_and_biases_choose_among_what_is_allowed(llm: nb.LLM) -> None:
    ids = {text: llm.tokenizer.encode(text)[0] for text in "0123456789"}
    digits = nb.Guided.regex("[0-9]{8}")
    assert one(llm, digits, logit_bias={ids["7"]: 100.0}).text == "77777777"
    assert set(one(llm, digits, allowed_token_ids=[ids["3"], ids["4"], 5000]).text) <= {"3", "4"}
    assert not set(one(llm, digits, bad_words_token_ids=[[ids[d]] for d in "0123"]).text) & set("0123")
    out = one(llm, digits, allowed_token_ids=[5000])
    assert out.error == "guided and allowed_token_ids together leave no token to draw"
    repeated = one(llm, digits, temperature=0, logit_bias={ids["7"]: 5.0}).text
    assert one(llm, digits, temperature=0, logit_bias={ids["7"]: 5.0}, repetition_penalty=3.0).text != repeated


def test_logprobs_are_those_of_the_model(llm: nb.LLM) -> None:
    free = llm.generate(PROMPT, nb.SamplingParams(temperature=0, max_tokens=1, logprobs=1))[0]
    out = one(llm, nb.Guided.regex("[0-9]{4}"), temperature=0, logprobs=1)
    assert free.logprobs is not None
    assert out.logprobs is not None
    assert len(out.logprobs) == len(out.token_ids)
    assert list(out.logprobs[0])[-1] == free.token_ids[0]
    assert out.logprobs[0][free.token_ids[0]] == free.logprobs[0][free.token_ids[0]]


def test_preempted_answers_go_on_where_they_were(model_path: Path, llm: nb.LLM) -> None:
    guided = nb.Guided.regex("([0-9]{3} ){30}")
    params = [nb.SamplingParams(guided=guided, seed=seed, max_tokens=150) for seed in range(8)]
    expected = llm.generate([PROMPT] * 8, params)
    stats = llm.stats()
    block_bytes = stats["kv_bytes"] // stats["blocks_total"]
    with nb.LLM(model_path, num_threads=THREADS, max_model_len=256, kv_cache_bytes=block_bytes * 30) as tight:
        outs = tight.generate([PROMPT] * 8, params)
        assert tight.stats()["preemptions"] > 0
    assert [out.token_ids for out in outs] == [out.token_ids for out in expected]


def test_several_threads(llm: nb.LLM) -> None:
    expected = one(llm, nb.Guided.json_schema(PERSON)).text
    texts: list[str] = []

    def work() -> None:
        texts.append(one(llm, nb.Guided.json_schema(PERSON)).text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert texts == [expected] * 4


# --- wrong input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nb.Guided.regex("("), "regular expression.*unclosed group"),
        (lambda: nb.Guided.regex("a(?=b)"), "look-around"),
        (lambda: nb.Guided.regex(r"(a)\1"), "backreferences"),
        (lambda: nb.Guided.regex(None), "must be a string, got NoneType"),  # type: ignore[arg-type]
        (lambda: nb.Guided.regex("\ud800"), "Unicode"),
        (lambda: nb.Guided.regex("a" * 2_000_000), "2000000 bytes; at most"),
        (lambda: nb.Guided.choice([]), "choices must be"),
        (lambda: nb.Guided.choice(["a", ""]), "choice 1 is empty"),
        (lambda: nb.Guided.choice("abc"), "choices must be"),
        (lambda: nb.Guided.choice(["a", 1]), "choice 1 must be a string, got int"),  # type: ignore[list-item]
        (lambda: nb.Guided.json_schema("{"), "not JSON"),
        (lambda: nb.Guided.json_schema("[" * 100_000), "not JSON"),
        (lambda: nb.Guided.json_schema({"x": object()}), "not JSON"),
        (lambda: nb.Guided.json_schema({"type": "foo"}), "JSON schema: Invalid type: foo"),
        (lambda: nb.Guided.json_schema({"not": {}}), 'Unimplemented keys: \\["not"\\]'),
        (lambda: nb.Guided.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
        (lambda: nb.Guided.json_schema("[1]"), "refuses the JSON schema: Expecting object"),
        (lambda: nb.Guided.json_schema(3), "got int"),  # type: ignore[arg-type]
        (lambda: nb.Guided.json_schema({"$ref": "http://example.com/x"}), "does not fetch"),
        (lambda: nb.Guided.grammar("start: nowhere"), "grammar.*nowhere"),
        (lambda: nb.Guided.grammar(""), "Empty grammar"),
        (lambda: nb.Guided.grammar('start: "a"', control_tokens="5"), "control_tokens must be a sequence"),
        (lambda: nb.Guided.grammar('start: "a"', control_tokens=[-1]), "control_tokens must be token ids"),
        (lambda: nb.Guided.regex("a").preceded_by("start: nowhere @answer"), "grammar.*nowhere"),
        (lambda: nb.Guided.json_schema({"$ref": "#"}), "no finite value"),
        (lambda: nb.Guided.json_schema({"properties": {f"p{i}": {} for i in range(10_000)}}), "10000 properties"),
        (lambda: nb.Guided.json_schema({"allOf": [{"pattern": f".*{i}.*"} for i in range(30)]}), "30 patterns"),
    ],
)
def test_what_cannot_be_is_refused_at_once(make: Callable[[], nb.Guided], says: str) -> None:
    with pytest.raises(nb.InvalidArgumentError, match=says) as caught:
        make()
    assert str(caught.value).startswith("guided: ")
    assert "\n" not in str(caught.value)


def test_parameters_refuse_what_cannot_be_honoured() -> None:
    with pytest.raises(nb.InvalidArgumentError, match="ignore_eos"):
        nb.SamplingParams(guided=ANY_TEXT, ignore_eos=True)
    with pytest.raises(nb.InvalidArgumentError, match="guided must be made by"):
        nb.SamplingParams(guided="[0-9]+")  # type: ignore[arg-type]


def test_deep_nesting_and_large_repetitions_end_in_an_answer_or_an_error(llm: nb.LLM) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(60):
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    out = one(llm, nb.Guided.json_schema(schema), max_tokens=200)
    assert out.finish_reason in ("stop", "length", "error")
    try:
        out = one(llm, nb.Guided.regex("((a|b){1,500}c){1,500}"))
        assert out.finish_reason in ("stop", "length", "error")
    except nb.InvalidArgumentError as error:
        assert str(error).startswith("guided: ")


def test_a_failing_matcher_ends_its_answer_only(llm: nb.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [PROMPT, PROMPT]
    params = [
        nb.SamplingParams(guided=ANY_TEXT, temperature=0, max_tokens=8),
        nb.SamplingParams(temperature=0, max_tokens=8),
    ]
    expected = llm.generate(prompts, params)

    def broken(*_: object) -> bool:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(GuidedMatcher, "fill", broken)
        bad, good = llm.generate(prompts, params)
        assert (bad.finish_reason, bad.error, bad.token_ids) == ("error", "out of order", [])
        assert good.token_ids == expected[1].token_ids
        with pytest.raises(nb.InvalidArgumentError, match="out of order"):
            list(llm.stream(PROMPT, params[0]))
    with monkeypatch.context() as patch:
        patch.setattr(GuidedMatcher, "accept", broken)
        bad, good = llm.generate(prompts, params)
        assert (bad.finish_reason, bad.error) == ("error", "out of order")
        assert bad.token_ids == expected[0].token_ids[:1]
        assert good.token_ids == expected[1].token_ids
    with monkeypatch.context() as patch:
        patch.setattr(guided_module.GuidedPlan, "matcher", broken)
        with pytest.raises(nb.InvalidArgumentError, match="out of order"):
            llm.generate(prompts, params)
    assert [out.token_ids for out in llm.generate(prompts, params)] == [out.token_ids for out in expected]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(nb.UnsupportedError, match=re.escape("pip install 'nanobraid[guided]'")):
        nb.Guided.regex("a")


# --- the object --------------------------------------------------------------------------------------------------


def test_equal_sources_are_equal_and_survive_copies(llm: nb.LLM) -> None:
    guided = nb.Guided.json_schema(PERSON)
    assert guided == nb.Guided.json_schema(json.dumps(PERSON))
    assert guided != nb.Guided.json_object()
    params = nb.SamplingParams(guided=guided, seed=5, max_tokens=64)
    copy = pickle.loads(pickle.dumps(params))
    assert copy == params == replace(params)
    assert llm.generate(PROMPT, copy)[0].text == one(llm, guided).text
    assert "grammar" not in repr(nb.Guided.regex("a"))


def test_plans_are_remembered_up_to_a_number(llm: nb.LLM) -> None:
    first = plan_for(nb.Guided.regex("x[0-9]"), llm.tokenizer)
    assert plan_for(nb.Guided.regex("x[0-9]"), llm.tokenizer) is first
    for i in range(70):
        plan_for(nb.Guided.choice([str(i)]), llm.tokenizer)
    assert plan_for(nb.Guided.regex("x[0-9]"), llm.tokenizer) is not first


# --- SentencePiece -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spm_llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nb.LLM]:
    """A random model whose tokenizer puts a space in front of texts and takes it away when it decodes."""
    import sentencepiece as spm

    folder = tmp_path_factory.mktemp("spm")
    text = (Path(__file__).resolve().parents[2] / "eval/text/mixed.txt").read_text()
    with open(folder / "tokenizer.model", "wb") as writer:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter([line for line in text.splitlines() if line][:2000]),
            model_writer=writer,
            model_type="bpe",
            vocab_size=1000,
            byte_fallback=True,
            normalization_rule_name="identity",
            minloglevel=2,
        )
    config = tiny_hf.config_of("llama", vocab_size=1024)  # more rows than tokens
    tiny_hf.write_folder(folder, config, tiny_hf.tensors_of(config))
    out = folder / "model.braid"
    subprocess.run(
        [sys.executable, "-m", "nanobraid", "export", str(folder), "-o", str(out), "--dtype", "f32"],
        check=True,
        capture_output=True,
    )
    with nb.LLM(out, num_threads=1) as llm:
        yield llm


def test_spaces_count_with_sentencepiece(spm_llm: nb.LLM) -> None:
    for pattern in (r"[a-z]{2,6} [a-z]{2,6}", r" [a-z]{3}", r"forced words [0-9]", r"[äöü😀]{2}", r"\n\n[0-9]{3}"):
        for seed in range(6):
            out = one(spm_llm, nb.Guided.regex(pattern), "a prompt", seed=seed)
            assert out.finish_reason == "stop"
            assert re.fullmatch(pattern, out.text), (pattern, out.text)
    out = one(spm_llm, ANY_TEXT, "a prompt", max_tokens=100)
    assert max(out.token_ids) < 1000
    out = one(spm_llm, nb.Guided.choice([" yes", " no"]), "a prompt", stop=" ")
    assert (out.text, out.stop_reason) == ("", " ")


# --- command line ------------------------------------------------------------------------------------------------


def generate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanobraid", "generate", PROMPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_line_takes_schemas_patterns_and_choices(model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "person.json"
    file.write_text(json.dumps(PERSON))
    for schema in (file, json.dumps(PERSON)):
        done = generate("--model", model_path, "--json-schema", schema)
        assert done.returncode == 0, done.stderr
        jsonschema.validate(json.loads(done.stdout), PERSON)
    done = generate("--model", model_path, "--choice", "red", "--choice", "green")
    assert done.stdout.strip() in ("red", "green")
    done = generate("--model", model_path, "--regex", "[0-9]{3}")
    assert re.fullmatch(r"[0-9]{3}\n", done.stdout)
    for arguments, says in (
        (("--regex", "("), "unclosed group"),
        (("--json-schema", tmp_path / "none.json"), "cannot read"),
        (("--regex", "a", "--ignore-eos"), "ignore_eos"),
        (("--regex", "a", "--choice", "b"), "not allowed with"),
    ):
        done = generate("--model", model_path, *arguments)
        assert done.returncode == 2
        assert says in done.stderr
