"""The arithmetic of quality against its definitions: each figure can fail."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nanobraid.bench_kv import divergence
from nanobraid.errors import InternalError

ROWS, VOCABULARY = 150, 40  # more rows than are computed at once


def some_logits(seed: int) -> divergence.Logits:
    return np.random.default_rng(seed).normal(0, 3, (ROWS, VOCABULARY)).astype(np.float32)


def test_kl_is_zero_for_equal_predictions_and_that_of_the_definition_for_others() -> None:
    ours, theirs = some_logits(1), some_logits(2)
    assert divergence.mean_kl(ours, ours).tolist() == [0.0] * ROWS
    assert divergence.mean_kl(ours, ours + 5) == pytest.approx(0, abs=1e-6)  # a constant changes no probability
    p, q = (np.exp(x.astype(np.float64)) for x in (theirs, ours))
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    expected = (p * np.log(p / q)).sum(axis=1)
    assert divergence.mean_kl(theirs, ours) == pytest.approx(expected, rel=1e-9)
    assert abs(divergence.mean_kl(ours, theirs).mean() - expected.mean()) > 0.01  # the order of the two counts
    with pytest.raises(InternalError, match=r"\(150, 40\) and \(150, 39\)"):
        divergence.mean_kl(ours, theirs[:, 1:])


def test_likelihood_is_of_the_token_that_follows() -> None:
    logits = some_logits(3)
    ids = np.random.default_rng(4).integers(0, VOCABULARY, ROWS).tolist()
    expected = [
        math.log(np.exp(row.astype(np.float64)).sum()) - float(row[token])
        for row, token in zip(logits, ids[1:], strict=False)
    ]
    nll = divergence.negative_log_likelihood(logits, ids)
    assert nll == pytest.approx(expected, rel=1e-6)
    assert divergence.perplexity(nll) == pytest.approx(math.exp(sum(expected) / len(expected)))
    assert divergence.perplexity(np.full(7, math.log(12.0))) == pytest.approx(12)


def test_top1_counts_rows_whose_most_likely_token_is_the_same() -> None:
    ours = some_logits(5)
    other = ours.copy()
    other[3, ours[3].argmax()] -= 100
    assert divergence.same_top1(ours, ours).all()
    assert np.flatnonzero(~divergence.same_top1(ours, other)).tolist() == [3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    values = np.array([0.0, bad, 1.0])
    with pytest.raises(InternalError, match="KL of a text: 1 of 3 values are not finite"):
        divergence.require_finite("KL of a text", values)
    good = np.zeros(3)
    assert divergence.require_finite("KL", good) is good


def test_agreement_of_tokens_and_texts() -> None:
    assert divergence.token_agreement_rate([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert divergence.token_agreement_rate([1, 2, 3, 4], [1, 9, 3, 9]) == 0.5
    assert divergence.token_agreement_rate([1, 2, 3, 4], [2, 3, 4, 5]) == 0  # by place
    assert divergence.token_agreement_rate([1, 2, 3, 4], [1]) == 1
    assert divergence.token_agreement_rate([], [1]) == 0
    assert divergence.text_similarity("a rope", "a rope") == 1
    assert divergence.text_similarity("abcd", "bcde") == pytest.approx(0.75)
    assert divergence.text_similarity("abcd", "wxyz") == 0
    assert divergence.same_tokens([1, 2, 3], [1, 2, 4]) == 2
    assert divergence.same_tokens([1, 2], [1, 2, 3]) == 2
