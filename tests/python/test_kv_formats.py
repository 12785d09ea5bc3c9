"""Formats of keys and values on real weights: the promises of every format, what they cost and what they save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_threads import THREADS
from paragraph import PARAGRAPH

import nanobraid as nb
from nanobraid.bench_kv.divergence import mean_kl

PROMPTS = [
    "The capital of France is",
    "x",
    PARAGRAPH + "He looked up when",
    PARAGRAPH * 3 + "In the evening",
    "Once upon a time there was a " * 12,
]
PARAMS = nb.SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
FORMATS = ["f16", "int8", "mixed", "int4"]
TEXT = Path(__file__).parents[2] / "eval" / "text" / "mixed.txt"


def open_llm(path: Path, kv_dtype: str, **options: Any) -> nb.LLM:
    return nb.LLM(path, kv_dtype=kv_dtype, num_threads=THREADS, max_model_len=1024, **options)


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_tokens_do_not_depend_on_batch_slices_or_hits(model_path: Path, kv_dtype: str) -> None:
    with open_llm(model_path, kv_dtype, enable_prefix_caching=False) as llm:
        assert llm.config["kv_dtype"] == kv_dtype
        alone = [llm.generate(prompt, PARAMS)[0].token_ids for prompt in PROMPTS]
        assert [out.token_ids for out in llm.generate(PROMPTS, PARAMS)] == alone
    with open_llm(model_path, kv_dtype, max_batch_tokens=7, max_num_seqs=3) as sliced:
        for _ in ("miss", "hit"):
            assert [out.token_ids for out in sliced.generate(PROMPTS, PARAMS)] == alone
        assert sliced.stats()["prefix_hit_tokens"] > 0


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_logits_of_slices_are_equal_to_the_last_bit(model_path: Path, kv_dtype: str) -> None:
    with open_llm(model_path, kv_dtype) as llm, open_llm(model_path, kv_dtype, max_batch_tokens=9) as sliced:
        assert llm.logits(PROMPTS[3]).tobytes() == sliced.logits(PROMPTS[3]).tobytes()


@pytest.mark.parametrize(
    ("kv_dtype", "bits"), [("bf16", 16), ("f16", 16), ("int8", 8.25), ("mixed", 6.6), ("int4", 5.0)]
)
def test_memory_is_what_the_format_promises(model_path: Path, kv_dtype: str, bits: float) -> None:
    with open_llm(model_path, kv_dtype) as llm:
        stats = llm.stats()
    numbers = 16 * 30 * 3 * 64 * 2  # in a block: tokens, layers, heads, dimensions, keys and values
    assert 8 * stats["kv_bytes"] / stats["blocks_total"] / numbers == pytest.approx(bits, rel=0.02)


@pytest.mark.parametrize(("kv_dtype", "most"), [("f16", 0.0002), ("int8", 0.0015), ("mixed", 0.009), ("int4", 0.025)])
def test_predictions_are_close_to_those_of_full_precision(model_path: Path, kv_dtype: str, most: float) -> None:
    """Mean KL in nats over 256 tokens, with float activations; a scale of another token is off by far more."""
    with open_llm(model_path, "f32", dtype="bf16") as exact, open_llm(model_path, kv_dtype, dtype="bf16") as llm:
        ids = exact.tokenizer.encode(TEXT.read_text())[:256]
        kl = mean_kl(exact.logits(ids), llm.logits(ids))
    assert np.isfinite(kl).all()
    assert (1e-9 if kv_dtype == "f16" else 1e-6) < kl.mean() <= most
