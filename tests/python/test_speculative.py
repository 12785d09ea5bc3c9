"""Speculation changes no token, log probability or end, and says what it did.

NANOBRAID_TEST_FULL=1 compares greedy texts for every number of drafts up to 8 of every method, alone and in a batch.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

import nanobraid as nb
from nanobraid import _draft_model, cli

TABLE = "| name | year | city |\n|---|---|---|\n" + "\n".join(
    f"| Person {i} | {1900 + 7 * i} | City {chr(65 + i)} |" for i in range(8)
)
PROMPTS = [
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a, b):\n",
    f"Copy this table twice.\n\n{TABLE}\n\n| name | year | city |\n",
    "The capital of France is",
    "Once upon a time there was a",
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "Question: What is water made of?\nAnswer:",
    "The cat sat on the mat. The cat sat on the mat. The cat",
    "In the year 1969,",
]


GREEDY = nb.SamplingParams(temperature=0.0, max_tokens=240)


def same(outputs: list[nb.RequestOutput], wanted: list[nb.RequestOutput]) -> None:
    for output, other in zip(outputs, wanted, strict=True):
        assert output.token_ids == other.token_ids
        assert output.text == other.text
        assert output.finish_reason == other.finish_reason
        assert output.stop_reason == other.stop_reason
        assert output.logprobs == other.logprobs
        assert [one.token_ids for one in output.outputs] == [one.token_ids for one in other.outputs]


@pytest.fixture(scope="module")
def greedy(llm: nb.LLM) -> list[nb.RequestOutput]:
    return llm.generate(PROMPTS, GREEDY)


FULL = os.environ.get("NANOBRAID_TEST_FULL") == "1"
ALL = [(method, k) for method in ("ngram", "suffix", "draft") for k in range(1, 9)]
IN_A_BATCH = ALL if FULL else [("ngram", 1), ("ngram", 3), ("ngram", 8), ("suffix", 5), ("draft", 4)]
ALONE = [*ALL, ("suffix", 20)] if FULL else [("ngram", 4), ("suffix", 20), ("draft", 8)]


def guesses(method: str, k: int, model_path: Path) -> nb.SpeculativeConfig:
    """Of the model itself, where a model guesses."""
    draft_model = model_path if method == "draft" else None
    return nb.SpeculativeConfig(method, k, draft_model=draft_model, adaptive=False)


@pytest.mark.parametrize(("method", "k"), IN_A_BATCH)
def test_greedy_text_is_the_same_in_a_batch(
    model_path: Path, greedy: list[nb.RequestOutput], method: str, k: int
) -> None:
    config = guesses(method, k, model_path)
    assert sum(len(output.token_ids) for output in greedy) >= 1000
    with nb.LLM(model_path, max_model_len=1024, speculative_config=config) as guessing:
        same(guessing.generate(PROMPTS, GREEDY), greedy)
        stats = guessing.stats()
    assert stats["accepted_draft_tokens"] > 100
    assert (stats["accepted_draft_tokens"] == stats["draft_tokens"]) == (method == "draft")
    assert (stats["draft_model_tokens"] > 0) == (method == "draft")
    assert stats["draft_acceptance"] == stats["accepted_draft_tokens"] / stats["draft_tokens"]
    assert 1.1 < stats["tokens_per_decode"] <= 1 + k


@pytest.mark.parametrize(("method", "k"), ALONE)
def test_greedy_text_is_the_same_alone(model_path: Path, greedy: list[nb.RequestOutput], method: str, k: int) -> None:
    config = guesses(method, k, model_path)
    with nb.LLM(model_path, max_model_len=1024, speculative_config=config) as guessing:
        for prompt, wanted in zip(PROMPTS, greedy, strict=True):
            same(guessing.generate(prompt, GREEDY), [wanted])


@pytest.mark.parametrize(("method", "adaptive"), [("ngram", False), ("ngram", True), ("draft", False)])
def test_options_of_requests_mean_the_same(model_path: Path, llm: nb.LLM, method: str, adaptive: bool) -> None:
    params = [
        nb.SamplingParams(temperature=0.8, seed=3, max_tokens=60),
        nb.SamplingParams(temperature=0.0, max_tokens=80, logprobs=2),
        nb.SamplingParams(temperature=1.0, seed=4, max_tokens=60, top_k=20, top_p=0.9, n=3),
        nb.SamplingParams(temperature=0.0, max_tokens=60, repetition_penalty=1.2, logprobs=0),
        nb.SamplingParams(temperature=0.0, max_tokens=80, stop=[" 12", "15,"]),
        nb.SamplingParams(temperature=0.7, seed=1, max_tokens=60, presence_penalty=0.5, frequency_penalty=0.3),
        nb.SamplingParams(temperature=0.0, max_tokens=60, stop="mat. The", min_tokens=20),
        nb.SamplingParams(temperature=0.0, max_tokens=60, kv_policy="sliding_window(32)"),
    ]
    wanted = llm.generate(PROMPTS, params)
    config = dataclasses.replace(guesses(method, 5, model_path), adaptive=adaptive)
    with nb.LLM(model_path, max_model_len=1024, speculative_config=config) as guessing:
        outputs = guessing.generate(PROMPTS, params)
        same(outputs, wanted)
        assert sum(output.metrics.num_accepted_tokens for output in outputs) > 0
        streamed = list(guessing.stream(PROMPTS[4], params[4]))
    assert "".join(piece.text for piece in streamed) == wanted[4].text
    assert streamed[-1].stop_reason == wanted[4].stop_reason


def test_a_grammar_takes_drafts_one_by_one(model_path: Path, llm: nb.LLM) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        },
        "maxItems": 5,
    }
    prompt = 'People as JSON: [{"name": "Ann", "age": 31}, {"name": "Bob", "age": 32}]\nPeople as JSON: '
    params = [
        nb.SamplingParams(temperature=t, seed=5, max_tokens=120, guided=nb.Guided.json_schema(json.dumps(schema)))
        for t in (0.0, 0.9)
    ]
    wanted = llm.generate([prompt] * 2, params)
    config = nb.SpeculativeConfig(num_draft_tokens=6, adaptive=False)
    with nb.LLM(model_path, max_model_len=1024, speculative_config=config) as guessing:
        outputs = guessing.generate([prompt] * 2, params)
    same(outputs, wanted)
    assert outputs[0].metrics.num_accepted_tokens > 5
    if outputs[0].finish_reason == "stop":
        json.loads(outputs[0].text)


@pytest.mark.parametrize(("method", "kv_dtype"), [("ngram", "int8"), ("ngram", "int4"), ("draft", "int4")])
def test_formats_of_keys_and_values(model_path: Path, method: str, kv_dtype: str) -> None:
    params = nb.SamplingParams(temperature=0.0, max_tokens=100)
    config = guesses(method, 8, model_path)
    with nb.LLM(model_path, max_model_len=1024, kv_dtype=kv_dtype, force_kv_dtype=True) as guessing:
        wanted = guessing.generate(PROMPTS[:3], params)
    with nb.LLM(
        model_path, max_model_len=1024, kv_dtype=kv_dtype, force_kv_dtype=True, speculative_config=config
    ) as guessing:
        outputs = guessing.generate(PROMPTS[:3], params)
    same(outputs, wanted)
    assert outputs[0].metrics.num_accepted_tokens > 10


def test_a_request_may_go_without_and_cannot_ask_for_what_is_not_there(model_path: Path, llm: nb.LLM) -> None:
    config = nb.SpeculativeConfig()
    with nb.LLM(model_path, max_model_len=1024, speculative_config=config) as guessing:
        assert guessing.config["speculative_config"]["num_draft_tokens"] == 4
        output = guessing.generate(PROMPTS[6], nb.SamplingParams(temperature=0.0, max_tokens=40, speculative=False))[0]
        assert output.metrics.num_draft_tokens == 0
        assert guessing.stats()["draft_tokens"] == 0
        output = guessing.generate(PROMPTS[6], nb.SamplingParams(temperature=0.0, max_tokens=40, speculative=True))[0]
        assert 0 < output.metrics.num_accepted_tokens <= output.metrics.num_draft_tokens
        with pytest.raises(nb.UnsupportedError, match="kv_policy none"):
            guessing.generate("a", nb.SamplingParams(speculative=True, kv_policy="none"))
    assert llm.config["speculative_config"] is None
    with pytest.raises(nb.InvalidArgumentError, match="does not speculate"):
        llm.generate("a", nb.SamplingParams(speculative=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "magic"}, "method must be one of ngram, suffix, draft, got 'magic'"),
        ({"method": "draft"}, "method='draft' needs a draft_model"),
        ({"method": "draft", "draft_model": 3}, "draft_model must name a model, got 3"),
        ({"method": "suffix", "draft_model": "smollm2-135m"}, "draft_model is of method='draft' alone"),
        ({"num_draft_tokens": 0}, r"num_draft_tokens must be an integer in \[1, 64\], got 0"),
        ({"num_draft_tokens": 65}, "num_draft_tokens"),
        ({"num_draft_tokens": True}, "num_draft_tokens"),
        ({"prompt_lookup_min": 0}, "prompt_lookup_min"),
        ({"prompt_lookup_min": 3, "prompt_lookup_max": 2}, "prompt_lookup_max must be .*got 2"),
        ({"adaptive": "yes"}, "adaptive must be True or False, got 'yes'"),
    ],
)
def test_impossible_options_are_refused_by_name(given: dict[str, object], message: str) -> None:
    with pytest.raises(nb.InvalidArgumentError, match=message):
        nb.SpeculativeConfig(**given)  # type: ignore[arg-type]


def test_other_types_are_refused_by_name() -> None:
    with pytest.raises(nb.InvalidArgumentError, match="speculative_config must be a SpeculativeConfig or None"):
        nb.LLM(speculative_config={"method": "ngram"})  # type: ignore[arg-type]
    with pytest.raises(nb.InvalidArgumentError, match="speculative must be True, False or None, got 2"):
        nb.SamplingParams(speculative=2)  # type: ignore[arg-type]


def test_a_draft_model_must_know_the_same_tokens(model_path: Path, tmp_path: Path) -> None:
    def copy(name: str, change: Callable[[list[str]], None]) -> Path:
        reader = gguf.GGUFReader(model_path)
        tokens = reader.fields["tokenizer.ggml.tokens"].contents()
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for field in reader.fields.values():
            if field.name.startswith("tokenizer."):
                value = field.contents()
                if field.name == "tokenizer.ggml.tokens":
                    change(tokens)
                    value = tokens
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, value, field.types[0], sub_type=inner)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return tmp_path / name

    def swap(tokens: list[str]) -> None:
        first, second = tokens.index("Ġriver"), tokens.index("Ġmountain")
        tokens[first], tokens[second] = tokens[second], tokens[first]

    own = nb.Tokenizer(model_path)
    _draft_model.require_same_tokens(own, nb.Tokenizer(copy("same.gguf", lambda _: None)), "same.gguf")
    with pytest.raises(nb.InvalidArgumentError, match=r"swapped\.gguf has another vocabulary: token [0-9]+ is b' "):
        _draft_model.require_same_tokens(own, nb.Tokenizer(copy("swapped.gguf", swap)), "swapped.gguf")


def test_chat_shows_what_guesses_did(
    model_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Say: red, red, red, red, red, red.\n/stats\n"))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    options = ["--model", str(model_path), "--max-model-len", "512", "--max-tokens", "30", "--temperature", "0"]
    assert cli.main(["chat", *options, "--speculative", "suffix"]) == 0
    shown = capsys.readouterr()
    assert re.search(r"\[\d+ of \d+ guessed tokens were right\]", shown.err)
    assert "Guessed tokens" in shown.out + shown.err and "seconds saved (estimate)" in shown.out + shown.err


def test_the_command_line_has_it(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", str(model_path), "--max-model-len", "512", "--max-tokens", "40", PROMPTS[6]]
    assert cli.main(arguments) == 0
    wanted = capsys.readouterr().out
    assert cli.main([*arguments, "--speculative", "ngram", "--num-draft-tokens", "6"]) == 0
    assert capsys.readouterr().out == wanted
    assert cli.main([*arguments, "--speculative", "draft", "--draft-model", str(model_path)]) == 0
    assert capsys.readouterr().out == wanted
    assert cli.main([*arguments, "--speculative", "draft"]) == 2
    assert "needs a draft_model" in capsys.readouterr().err
    assert cli.main([*arguments, "--num-draft-tokens", "6"]) == 2
    assert "--num-draft-tokens is given without --speculative" in capsys.readouterr().err
    assert cli.main([*arguments, "--speculative", "magic"]) == 2
    assert "magic" in capsys.readouterr().err
