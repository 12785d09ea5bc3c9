"""Every family against transformers in float32: logits, greedy tokens, and that each fact of the family matters.

Needs torch and transformers (the extra `eval`), and skips without them. Set NANOBRAID_TEST_REPORT to a file to have the
numbers reached appended to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import nanobraid as nb
from nanobraid._core import available_backends

torch = pytest.importorskip("torch", reason="torch, the oracle's base, is not installed")
pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")
pytest.importorskip("gguf", reason="the `gguf` package, which writes the test files, is not installed")

from hf_to_gguf import write_gguf  # noqa: E402
from seeded_models import FAMILIES, LONG_PROMPT, VOCAB_SIZE, Family, build, build_family  # noqa: E402

TOLERANCE = 1e-4
NUM_GREEDY = 64


def random_ids(count: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, VOCAB_SIZE, count)]


PROMPTS = [random_ids(LONG_PROMPT, 1), random_ids(7, 2), random_ids(130, 3)]


def logits_of(model: Any, ids: list[int]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([ids])).logits[0].numpy())


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The most likely tokens one after another, each from a forward pass over everything before it."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    return ids[-count:]


def distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """The largest difference of a row, relative to the row's largest logit."""
    return float((np.abs(ours - theirs).max(axis=-1) / np.abs(theirs).max(axis=-1)).max())


class Subject:
    """A family's model, its file, and what transformers says about it."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family = family
        self.model = build_family(family)
        self.path = write_gguf(self.model, folder / f"{family.name}.gguf", **family.file)
        self.logits = [logits_of(self.model, ids) for ids in PROMPTS]
        self.tokens = [greedy(self.model, ids, NUM_GREEDY) for ids in PROMPTS]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    torch.set_num_threads(2)
    yield Subject(request.param, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("backend", available_backends())
def test_logits_and_greedy_tokens(subject: Subject, backend: str) -> None:
    params = nb.SamplingParams(temperature=0, max_tokens=NUM_GREEDY, ignore_eos=True)
    with nb.LLM(subject.path, device=backend, dtype="f32", kv_dtype="f32", num_threads=2) as llm:
        assert llm.config["dtype"] == "f32"
        worst = max(distance(llm.logits(ids), logits) for ids, logits in zip(PROMPTS, subject.logits, strict=True))
        together = [out.token_ids for out in llm.generate(PROMPTS, params)]
        alone = [llm.generate([ids], params)[0].token_ids for ids in PROMPTS]
    with nb.LLM(subject.path, device=backend, kv_dtype="f32", num_threads=1, max_batch_tokens=33) as sliced:
        in_slices = [out.token_ids for out in sliced.generate(PROMPTS, params)]
    if report := os.environ.get("NANOBRAID_TEST_REPORT"):
        with open(report, "a") as file:
            file.write(f"{subject.family.name:18} {backend:10} {worst:.1e}\n")
    assert worst <= TOLERANCE
    assert together == subject.tokens
    assert alone == subject.tokens
    assert in_slices == subject.tokens


def test_the_facts_matter(subject: Subject) -> None:
    """A model without the scaling, window, bias or norm of its family answers differently."""
    for forget in subject.family.without:
        assert distance(logits_of(forget(subject.model), PROMPTS[0]), subject.logits[0]) > 1e-2, forget.__name__


def test_bias_on_the_output_projection_is_refused(tmp_path: Path) -> None:
    path = write_gguf(build("llama", attention_bias=True), tmp_path / "bias.gguf")
    with pytest.raises(nb.UnsupportedError, match=r"blk\.0\.attn_output\.bias"):
        nb.LLM(path)
