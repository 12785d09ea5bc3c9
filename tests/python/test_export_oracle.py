"""Exported folders against transformers in float32: what `save_pretrained` writes gives the same logits and tokens.

Needs torch and transformers (the extra `eval`), and skips without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_hf import vocabulary

import nanobraid as nb
from nanobraid.export import export_model, hf_folder

torch = pytest.importorskip("torch", reason="torch, the oracle's base, is not installed")
pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")

from seeded_models import FAMILIES, LONG_PROMPT, VOCAB_SIZE, Family, build_family  # noqa: E402

TOLERANCE = 1e-4
NUM_GREEDY = 64
PROMPTS = [
    [int(i) for i in np.random.default_rng(seed).integers(0, VOCAB_SIZE, count)]
    for seed, count in ((1, LONG_PROMPT), (2, 7))
]


def logits_of(model: Any, ids: list[int]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([ids])).logits[0].numpy())


def greedy(model: Any, ids: list[int]) -> list[int]:
    ids = list(ids)
    for _ in range(NUM_GREEDY):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    return ids[-NUM_GREEDY:]


def distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float((np.abs(ours - theirs).max(axis=-1) / np.abs(theirs).max(axis=-1)).max())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_saved_folder_gives_the_same_logits_and_tokens(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_folder, "_tokenizer", lambda _: vocabulary(VOCAB_SIZE))
    torch.set_num_threads(2)
    model = build_family(family)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path / "hf")
    out = tmp_path / "out.braid"
    export_model(tmp_path / "hf", out, "f32")
    params = nb.SamplingParams(temperature=0, max_tokens=NUM_GREEDY, ignore_eos=True)
    with nb.LLM(out, dtype="f32", kv_dtype="f32", num_threads=2) as llm:
        assert max(distance(llm.logits(ids), logits_of(model, ids)) for ids in PROMPTS) <= TOLERANCE
        answers = [answer.token_ids for answer in llm.generate(PROMPTS, params)]
    assert answers == [greedy(model, ids) for ids in PROMPTS]
