"""The Python side of the tokenizer; what it computes is compared with others in test_tokenizer_oracle.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import nanobraid as nb


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> nb.Tokenizer:
    return nb.Tokenizer(model_path)


def test_it_opens_names_and_files(tokenizer: nb.Tokenizer, model_path: Path) -> None:
    assert nb.Tokenizer("smollm2-135m").encode("Hello") == tokenizer.encode("Hello")
    assert tokenizer.vocab_size == 49152
    assert str(model_path) in repr(tokenizer)
    with pytest.raises(nb.ModelNotFoundError):
        nb.Tokenizer("no such model")


def test_round_trips(tokenizer: nb.Tokenizer) -> None:
    for text in ("", " ", "Hello, world!\n", "日本語 🙂", "a\0b", "x" * 10_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_are_parsed_only_on_request(tokenizer: nb.Tokenizer) -> None:
    end = tokenizer.special_tokens["<|im_end|>"]
    assert end in tokenizer.eos_token_ids
    assert end not in tokenizer.encode("a<|im_end|>")
    ids = tokenizer.encode("a<|im_end|>", parse_special=True)
    assert ids[-1] == end
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|>"
    assert tokenizer.find_token("<|im_end|>") == end
    assert tokenizer.token_text(end) == "<|im_end|>"
    assert tokenizer.find_token("no such token at all") is None


def test_streams_hold_incomplete_characters(tokenizer: nb.Tokenizer) -> None:
    text = "🙂日本語"
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces


def test_wrong_arguments(tokenizer: nb.Tokenizer) -> None:
    wrong: Any = 5
    with pytest.raises(nb.InvalidArgumentError, match="must be a string"):
        tokenizer.encode(wrong)
    with pytest.raises(nb.InvalidArgumentError, match="surrogate"):
        tokenizer.encode("a\udc80")
    with pytest.raises(nb.InvalidArgumentError, match=r"token_ids\[1\]"):
        tokenizer.decode([0, 10**9])
