"""The texts of the package, and documents with a code in them: repeatable, of their length, at their depth."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import nanobraid as nb
from nanobraid.bench_kv import documents
from nanobraid.errors import InvalidArgumentError


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> nb.Tokenizer:
    return nb.Tokenizer(model_path)


def test_the_package_has_texts_of_its_own(tokenizer: nb.Tokenizer) -> None:
    texts = documents.texts()
    assert len(texts) >= 4
    assert all(len(tokenizer.encode(text)) > 900 for text in texts.values())
    assert len({text[:100] for text in texts.values()}) == len(texts)
    assert Path(nb.__file__).parent in documents._FOLDER.parents  # what is in the package's folder is in its wheel


def test_prose_has_exactly_so_many_tokens(tokenizer: nb.Tokenizer) -> None:
    for length in (1, 15, 16, 300):
        assert len(documents.prose(tokenizer, length, random.Random(1))) == length
    draw = random.Random(1)
    first, second = (documents.prose(tokenizer, 64, draw) for _ in range(2))
    assert first != second
    assert first == documents.prose(tokenizer, 64, random.Random(1))


@pytest.mark.parametrize("length", [256, 512])
def test_a_needle_stands_at_its_depth(tokenizer: nb.Tokenizer, length: int) -> None:
    positions = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        found = documents.needle(tokenizer, length, depth, 3, seed=7)
        text = tokenizer.decode(found.prompt)
        code = tokenizer.decode(found.answer)
        assert text.count(code.strip()) == 1
        assert text.endswith(text[text.index("The access code") :].split(f" {code.strip()}")[0])  # asks for it
        assert length - 48 < len(found.prompt) + len(found.answer) <= length
        at = len(tokenizer.encode(text[: text.index("The access code")]))
        assert abs(at - found.position) <= 1
        positions.append(found.position)
    assert positions[-1] > length - 80  # behind it there is only the question
    first, *_, last = positions
    shares = [(position - first) / (last - first) for position in positions]
    assert 8 < first < 40
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.1)
    assert found == documents.needle(tokenizer, length, 1.0, 3, seed=7)
    assert found.answer != documents.needle(tokenizer, length, 1.0, 4, seed=7).answer


def test_a_document_without_room_is_refused(tokenizer: nb.Tokenizer) -> None:
    with pytest.raises(InvalidArgumentError, match="needle_lengths must leave room"):
        documents.needle(tokenizer, 48, 0.5, 0, seed=1)
