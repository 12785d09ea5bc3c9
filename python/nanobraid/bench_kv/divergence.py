"""How far predictions are from others: log-softmax and KL in float64, perplexity, agreement of tokens and texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

from nanobraid.errors import InternalError

Logits = NDArray[np.float32]
Values = NDArray[np.float64]
_ROWS = 64  # at once: a text times a vocabulary in float64 is gigabytes


def log_softmax(logits: Logits) -> Values:
    """Row-wise, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def mean_kl(reference: Logits, other: Logits) -> Values:
    """KL(reference || other) of each row in nats, float64[T]: the mean over the vocabulary of one prediction."""
    if reference.shape != other.shape:
        raise InternalError(f"no divergence between logits of shapes {reference.shape} and {other.shape}")
    out = np.empty(len(reference), np.float64)
    for begin in range(0, len(reference), _ROWS):
        rows = slice(begin, begin + _ROWS)
        p, q = log_softmax(reference[rows]), log_softmax(other[rows])
        out[rows] = (np.exp(p) * (p - q)).sum(axis=-1)
    return out


def negative_log_likelihood(logits: Logits, token_ids: Sequence[int]) -> Values:
    """Of every token but the first, given those before it, in nats: float64[T - 1]."""
    out = np.empty(len(token_ids) - 1, np.float64)
    for begin in range(0, len(out), _ROWS):
        rows = log_softmax(logits[begin : min(begin + _ROWS, len(out))])
        out[begin : begin + len(rows)] = -rows[np.arange(len(rows)), token_ids[begin + 1 : begin + 1 + len(rows)]]
    return out


def same_top1(reference: Logits, other: Logits) -> NDArray[np.bool_]:
    """Of each row, whether the most likely token is the same; ties go to the lower id."""
    return np.asarray(reference.argmax(axis=-1) == other.argmax(axis=-1))


def require_finite(name: str, values: Values) -> Values:
    """Returns the values.

    Raises:
        InternalError: One is NaN or infinite: a mean over it would say nothing, and hide everything else.
    """
    if not np.isfinite(values).all():
        raise InternalError(f"{name}: {int((~np.isfinite(values)).sum())} of {values.size} values are not finite")
    return values


def perplexity(nll: Values) -> float:
    """exp of the mean."""
    return math.exp(float(nll.mean()))


def token_agreement_rate(tok_a: Sequence[int], tok_b: Sequence[int]) -> float:
    """Share of the places, up to the length of the shorter one, where both have the same token; 0 without any."""
    pairs = list(zip(tok_a, tok_b, strict=False))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0


def text_similarity(a: str, b: str) -> float:
    """Twice the characters that both have in the same order, over the characters of both (difflib's ratio), 0 to 1."""
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


def same_tokens(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens agree before the first that does not."""
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
