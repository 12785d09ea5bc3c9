"""How the tokens of a request are chosen and when it ends."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanobraid.errors import InvalidArgumentError

_MAX_SEED = 2**64 - 1
_MAX_INT = 2**31 - 1


def _refuse(field: str, value: object, allowed: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field} must be {allowed}, got {value!r}")


def require_int(field: str, value: object, low: int, high: int, allowed: str) -> int:
    """Returns `value` as an int.

    Args:
        field: Name used in the error message.
        value: What the user gave; numpy integers are accepted, bool and float are not.
        low: Smallest allowed value.
        high: Largest allowed value.
        allowed: The range in words, for the message.

    Raises:
        InvalidArgumentError: If it is not an integer or outside [low, high].
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise _refuse(field, value, allowed)
    return int(value)


def _require_float(field: str, value: object, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise _refuse(field, value, allowed)
    return float(value)


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request. Names and defaults follow vLLM.

    The stages run in this order: logit bias, repetition penalty, temperature, min-p, top-k, top-p, draw.

    Attributes:
        temperature: 0 takes the most likely token (greedy); otherwise logits are divided by it. Finite, >= 0.
        top_k: Keep only the k most likely tokens; -1 or 0 is off.
        top_p: Keep the smallest set of tokens whose probability reaches this. In (0, 1]; 1 is off.
        min_p: Drop tokens less likely than this share of the most likely one. In [0, 1]; 0 is off.
        repetition_penalty: Above 1 makes tokens of the prompt and the answer less likely. > 0; 1 is off.
        max_tokens: Most tokens to generate, >= 1. None: as many as the context (`max_model_len`) has room for. A
            request never exceeds the context; what is cut short by it finishes with ``length``.
        seed: 0 .. 2**64 - 1 for repeatable draws; None or -1 for random ones. Equal seed, prompt and parameters give
            equal tokens, alone or in any batch.
        ignore_eos: Go on after an end-of-sequence token (for measuring speed).
        stop_token_ids: Further tokens that end the text; like the end-of-sequence token they are not returned.
        logit_bias: Added to the logits of the given token ids, at any temperature. Values in [-100, 100].

    Raises:
        InvalidArgumentError: On construction, naming the field, the value and what is allowed.
    """

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 16
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        def put(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        allowed = "a finite number >= 0"
        put("temperature", _require_float("temperature", self.temperature, allowed))
        if self.temperature < 0:
            raise _refuse("temperature", self.temperature, allowed)
        put("top_k", require_int("top_k", self.top_k, -1, _MAX_INT, "an integer >= 1, or -1 or 0 to turn it off"))
        allowed = "a number in (0, 1]"
        put("top_p", _require_float("top_p", self.top_p, allowed))
        if not 0 < self.top_p <= 1:
            raise _refuse("top_p", self.top_p, allowed)
        allowed = "a number in [0, 1]"
        put("min_p", _require_float("min_p", self.min_p, allowed))
        if not 0 <= self.min_p <= 1:
            raise _refuse("min_p", self.min_p, allowed)
        allowed = "a finite number > 0"
        put("repetition_penalty", _require_float("repetition_penalty", self.repetition_penalty, allowed))
        if self.repetition_penalty <= 0:
            raise _refuse("repetition_penalty", self.repetition_penalty, allowed)
        if self.max_tokens is not None:
            allowed = "an integer >= 1, or None for as many as fit"
            put("max_tokens", require_int("max_tokens", self.max_tokens, 1, _MAX_INT, allowed))
        if self.seed is not None:
            allowed = "an integer in [0, 2**64 - 1], or None or -1 for a random one"
            put("seed", require_int("seed", self.seed, -1, _MAX_SEED, allowed))
        if not isinstance(self.ignore_eos, bool):
            raise _refuse("ignore_eos", self.ignore_eos, "True or False")
        put("stop_token_ids", self._checked_stop_token_ids())
        put("logit_bias", self._checked_logit_bias())

    def _checked_stop_token_ids(self) -> tuple[int, ...]:
        ids = self.stop_token_ids
        if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
            raise _refuse("stop_token_ids", ids, "a sequence of token ids")
        return tuple(require_int("stop_token_ids", i, 0, _MAX_INT, "a sequence of token ids >= 0") for i in ids)

    def _checked_logit_bias(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        if not isinstance(self.logit_bias, Mapping):
            raise _refuse("logit_bias", self.logit_bias, "a mapping from token id to a finite number")
        bias: dict[int, float] = {}
        for key, value in self.logit_bias.items():
            token_id = require_int("logit_bias", key, 0, _MAX_INT, "keyed by token ids >= 0")
            allowed = "a number in [-100, 100]"
            bias[token_id] = _require_float(f"logit_bias[{token_id}]", value, allowed)
            if abs(bias[token_id]) > 100:
                raise _refuse(f"logit_bias[{token_id}]", value, allowed)
        return bias
