"""Quality under a cache, over the engine: nothing lost gives no divergence, what is lost shows in every figure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_threads import THREADS

import nanobraid as nb
from nanobraid import bench_kv
from nanobraid.bench_kv import QualityConfig, documents, quality
from nanobraid.bench_kv.methods import Case, make_case
from nanobraid.errors import InternalError, InvalidArgumentError

TOKENS = 112
SETTINGS: dict[str, Any] = {
    "dtype": "bf16",
    "num_threads": THREADS,
    "max_model_len": 256,
    "enable_prefix_caching": False,
}
NEEDLES = QualityConfig(needle_lengths=[160], needle_depths=[0.0, 1.0], needle_draws=1)


@pytest.fixture(scope="module")
def exact(model_path: Path) -> Iterator[nb.LLM]:
    with nb.LLM(model_path, kv_dtype="f32", **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def tokens(exact: nb.LLM) -> dict[str, list[int]]:
    return {name: exact.tokenizer.encode(text)[:TOKENS] for name, text in list(documents.texts().items())[:2]}


def test_the_same_cache_has_no_divergence(exact: nb.LLM, tokens: dict[str, list[int]]) -> None:
    found = quality.predictions(exact, exact, tokens)
    assert found["kl"] == found["kl_max"] == found["kl_p99"] == found["kl_second_half"] == 0
    assert found["top1_agreement"] == 1
    assert found["perplexity"] == found["reference_perplexity"]
    assert 5 < found["perplexity"] < 200
    agreed = quality.agreement(exact, exact, make_case("paged_attention"), tokens, 6)
    assert (agreed["token_agreement"], agreed["text_similarity"], agreed["first_difference"]) == (1, 1, 6)
    again = quality.agreement(exact, exact, make_case("no_cache"), tokens, 3)  # by computing all again
    assert (again["token_agreement"], again["first_difference"]) == (1, 3)
    for row in quality.needles(exact, exact, NEEDLES, seed=1):
        assert row["retrieved"] == row["of"] > 0, row
        assert row["gold_logprob_minus_reference"] == 0
        assert row["gold_logprob"] < 0


def test_fewer_bits_are_off_by_more(exact: nb.LLM, tokens: dict[str, list[int]], model_path: Path) -> None:
    kl = {"f32": 0.0}
    for kv_dtype in ("int8", "mixed"):
        with nb.LLM(model_path, kv_dtype=kv_dtype, **SETTINGS) as llm:
            found = quality.predictions(exact, llm, tokens)
        kl[kv_dtype] = found["kl"]
        assert found["kl"] == pytest.approx(np.mean([row["kl"] for row in found["texts"].values()]))
        assert found["kl"] < found["kl_p99"] <= found["kl_max"]
        assert found["worst_text"] in tokens
        assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=0.05)
    assert 0 < kl["int8"] < kl["mixed"] < 0.03


class Broken:
    """An engine whose predictions are wrong in one way; of the rest it is `llm`."""

    def __init__(self, llm: nb.LLM, defect: str) -> None:
        self._llm, self._defect = llm, defect
        self.tokenizer = llm.tokenizer

    def logits(self, ids: list[int]) -> Any:
        logits = self._llm.logits(ids).copy()
        if self._defect == "nan":
            logits[7, 3] = np.nan
            return logits
        return np.roll(logits, 1, axis=0)  # each row predicts what stood one token before

    def generate(self, prompts: list[list[int]], params: nb.SamplingParams) -> Any:
        return self._llm.generate([[*prompt[:-12], *prompt[-1:]] for prompt in prompts], params)


def test_wrong_predictions_show_and_nan_is_refused(exact: nb.LLM, tokens: dict[str, list[int]]) -> None:
    shifted: Any = Broken(exact, "shifted")
    found = quality.predictions(exact, shifted, tokens)
    assert found["kl"] > 1
    assert found["top1_agreement"] < 0.5
    assert found["perplexity"] > 3 * found["reference_perplexity"]
    agreed = quality.agreement(exact, shifted, make_case("paged_attention"), tokens, 6)
    assert agreed["token_agreement"] < 1 and agreed["text_similarity"] < 1 and agreed["first_difference"] < 6
    broken: Any = Broken(exact, "nan")
    with pytest.raises(InternalError, match="logits of allotments are not finite"):
        quality.predictions(exact, broken, {"allotments": next(iter(tokens.values()))})


def job(model_path: Path, case: Case, **changes: Any) -> quality.QualityJob:
    config = dataclasses.replace(NEEDLES, text_tokens=TOKENS, agreement_tokens=4)
    return quality.QualityJob(str(model_path), {"num_threads": THREADS}, "f32", case, config, 1, **changes)


@pytest.mark.parametrize("name", ["sliding_window", "budget_cache", "chunked_cache"])
def test_what_a_policy_forgets_is_missing(
    exact: nb.LLM, tokens: dict[str, list[int]], model_path: Path, name: str
) -> None:
    sizes = {"sliding_window": {"window_size": 32, "sinks": 0}, "chunked_cache": {"keep_last": 32, "chunk_size": 16}}
    case = make_case(name, **sizes.get(name, {"window_size": 32, "old_budget": 16, "prefix_len": 0}))
    with nb.LLM(model_path, kv_dtype="f32", kv_policy=case.policy, **SETTINGS) as llm:
        found = quality.predictions(exact, llm, tokens)
        needles = quality.needles(exact, llm, NEEDLES, seed=1)
    assert found["kl"] > 0.05
    assert found["kl_second_half"] > found["kl"]  # nothing is forgotten before the window is full
    assert found["top1_agreement"] < 0.95
    assert found["perplexity"] > found["reference_perplexity"]
    assert needles[0]["depth"] == 0 and needles[0]["retrieved"] < needles[0]["of"]
    assert needles[0]["gold_logprob_minus_reference"] < -1


def test_a_window_that_nothing_leaves_forgets_nothing(
    exact: nb.LLM, tokens: dict[str, list[int]], model_path: Path
) -> None:
    with nb.LLM(model_path, kv_dtype="f32", kv_policy="sliding_window(256, sinks=4)", **SETTINGS) as llm:
        assert quality.predictions(exact, llm, tokens)["kl_max"] == 0


def test_perplexity_of_texts_is_that_of_their_predictions(exact: nb.LLM, tokens: dict[str, list[int]]) -> None:
    texts = {name: exact.tokenizer.decode(ids) for name, ids in tokens.items()}
    nll, perplexity = bench_kv.compute_perplexity(exact, list(texts.values()))
    found = quality.predictions(exact, exact, {name: exact.tokenizer.encode(text) for name, text in texts.items()})
    assert perplexity == pytest.approx(found["perplexity"], rel=1e-4)
    assert nll == pytest.approx(math.log(perplexity))
    (text, *_) = texts.values()
    whole = bench_kv.compute_perplexity(exact, [text])
    assert bench_kv.compute_sliding_window_nll(exact, text, 200) == whole
    assert bench_kv.compute_sliding_window_nll(exact, text, 16, sinks=0)[1] > 1.2 * whole[1]
    assert bench_kv.compute_perplexity(exact, [text], 40)[1] != whole[1]
    with pytest.raises(InvalidArgumentError, match="at least two tokens"):
        bench_kv.compute_perplexity(exact, [])


def test_a_text_that_is_too_short_is_refused(model_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="text 'note' must have at least 8 tokens, got 1"):
        quality.measure(job(model_path, make_case("paged_attention"), texts={"note": "Hi"}, only_texts=True))


def test_a_size_among_several_has_predictions_alone(model_path: Path, tokens: dict[str, list[int]]) -> None:
    text = {"text": next(iter(documents.texts().values()))}
    found = quality.measure(job(model_path, make_case("quant_int8"), texts=text, only_texts=True))
    assert "needles" not in found and "token_agreement" not in found
    assert found["quality_dtype"] == "bf16"
    assert math.isfinite(found["kl"]) and found["kl"] > 0


def test_the_rate_counts_what_the_reference_finds() -> None:
    rows = [{"retrieved": 1, "of": 2}, {"retrieved": 2, "of": 2}, {"retrieved": 0, "of": 0}]
    assert quality.needle_rate(rows) == 0.75
    assert quality.needle_rate([{"retrieved": 0, "of": 0}]) is None
