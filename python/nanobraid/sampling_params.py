"""How the tokens of a request are chosen and when it ends."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nanobraid.errors import InvalidArgumentError, UnsupportedError
from nanobraid.guided import Guided
from nanobraid.kv_policy import KvPolicy, parse

_MAX_SEED = 2**64 - 1
_MAX_INT = 2**31 - 1
_MAX_CHOICES = 128
_MAX_STOPS = 16
_MAX_STOP_BYTES = 4096
_MAX_LOGPROBS = 20


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
    if type(value) is int and low <= value <= high:
        return value  # nearly always; to ask an abstract class takes ten times as long
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise _refuse(field, value, allowed)
    return int(value)


def _require_float(field: str, value: object, allowed: str) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise _refuse(field, value, allowed)
    return float(value)


def _checked_ids(field: str, ids: object) -> tuple[int, ...]:
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
        raise _refuse(field, ids, "a sequence of token ids")
    return tuple(require_int(field, i, 0, _MAX_INT, "a sequence of token ids >= 0") for i in ids)


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request. Names and defaults follow vLLM.

    The stages run in this order: logit bias, bad words, allowed tokens, min_tokens, repetition penalty, presence and
    frequency penalty, temperature, min-p, top-k, top-p, draw. The first six apply at temperature 0 too. If they leave
    no token to choose, the request ends with the finish reason ``error``; others are not affected.

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
        presence_penalty: Taken from the logits of tokens that are in the answer already. In [-2, 2]; 0 is off.
        frequency_penalty: The same, times the number of occurrences. In [-2, 2]; 0 is off.
        bad_words_token_ids: Sequences of token ids that must not appear: a token that would complete one, reading
            prompt and answer as one text, is not chosen.
        allowed_token_ids: Choose among these tokens only; None allows all. The end-of-sequence token is not allowed
            unless it is listed.
        min_tokens: The end-of-sequence token and `stop_token_ids` are not chosen before the answer has so many
            tokens. At most `max_tokens`.
        logprobs: 0 .. 20: with each token its log-probability, and those of so many most likely tokens, before any
            of the stages. None is off.
        prompt_logprobs: The same for the tokens of the prompt.
        best_of: Not supported: anything but None is refused.
        n: Number of answers to each prompt, in [1, 128]. The prompt is computed once; each answer has its own random
            numbers, which depend on `seed` and its index.
        stop: Strings, at most 16, that end the answer wherever they come up in its text, across tokens too.
        include_stop_str_in_output: Keep the stop string at the end of the text instead of cutting it off.
        keep_special_token_ids: Control tokens that are part of the text, spelled as `Tokenizer.token_text` says; the
            others are left out. Stop strings are found in the text without them.
        guided: What the answer must look like, see `Guided`. It ends when it is complete and nothing may follow, or
            with the end-of-sequence token or one of `stop_token_ids`, which are chosen only where it is complete.
            `max_tokens` and stop strings may end it before. Not together with `ignore_eos`.
        kv_policy: Which keys and values are kept and seen, see `nanobraid.kv_policy`: a policy, or its name with
            options as in ``"sliding_window(192, sinks=4)"``. None takes the engine's.
        speculative: Guess coming tokens, which changes no token. None: if the LLM has a `speculative_config`; True
            needs one, and a `kv_policy` other than ``none``.

    Raises:
        InvalidArgumentError: On construction, naming the field, the value and what is allowed.
        UnsupportedError: `best_of` was given.
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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    allowed_token_ids: Sequence[int] | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    best_of: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    include_stop_str_in_output: bool = False
    guided: Guided | None = None
    keep_special_token_ids: Sequence[int] = ()
    kv_policy: KvPolicy | str | None = None
    speculative: bool | None = None

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
        self._check_flags()
        put("stop_token_ids", _checked_ids("stop_token_ids", self.stop_token_ids))
        put("keep_special_token_ids", _checked_ids("keep_special_token_ids", self.keep_special_token_ids))
        put("logit_bias", self._checked_logit_bias())
        self._check_penalties_and_masks(put)
        for field in ("logprobs", "prompt_logprobs"):
            value = getattr(self, field)
            if value is not None:
                put(field, require_int(field, value, 0, _MAX_LOGPROBS, f"an integer in [0, {_MAX_LOGPROBS}], or None"))
        put("n", require_int("n", self.n, 1, _MAX_CHOICES, f"an integer in [1, {_MAX_CHOICES}]"))
        put("stop", self._checked_stop())
        self._check_guided()
        if self.kv_policy is not None:
            put("kv_policy", parse(self.kv_policy))
        if self.best_of is not None:
            raise UnsupportedError(f"best_of={self.best_of!r} is not supported; leave it out")

    def _check_flags(self) -> None:
        for field in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, field), bool):
                raise _refuse(field, getattr(self, field), "True or False")
        if not (self.speculative is None or isinstance(self.speculative, bool)):
            raise _refuse("speculative", self.speculative, "True, False or None")

    def _check_guided(self) -> None:
        if self.guided is None:
            return
        if not isinstance(self.guided, Guided):
            raise _refuse("guided", self.guided, "made by a method of Guided, as Guided.regex('[0-9]+'), or None")
        if self.ignore_eos:
            raise InvalidArgumentError("ignore_eos=True cannot be honoured with guided, which says where answers end")

    def _checked_stop(self) -> tuple[str, ...]:
        allowed = f"a string or a sequence of at most {_MAX_STOPS} strings, none of them empty"
        if not isinstance(self.stop, str) and (isinstance(self.stop, bytes) or not isinstance(self.stop, Sequence)):
            raise _refuse("stop", self.stop, allowed)
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > _MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
            raise _refuse("stop", self.stop, allowed)
        for stop in stops:
            try:
                size = len(stop.encode())
            except UnicodeEncodeError:
                raise _refuse("stop", stop, "Unicode text") from None
            if size > _MAX_STOP_BYTES:
                raise _refuse("stop", f"{stop[:20]}...", f"strings of at most {_MAX_STOP_BYTES} bytes")
        return stops

    def _check_penalties_and_masks(self, put: Callable[[str, object], None]) -> None:
        for field in ("presence_penalty", "frequency_penalty"):
            allowed = "a number in [-2, 2]"
            put(field, _require_float(field, getattr(self, field), allowed))
            if abs(getattr(self, field)) > 2:
                raise _refuse(field, getattr(self, field), allowed)
        words = self.bad_words_token_ids
        allowed = "a sequence of non-empty sequences of token ids"
        if isinstance(words, str | bytes) or not isinstance(words, Sequence):
            raise _refuse("bad_words_token_ids", words, allowed)
        checked = tuple(_checked_ids(f"bad_words_token_ids[{i}]", word) for i, word in enumerate(words))
        if not all(checked):
            raise _refuse("bad_words_token_ids", words, allowed)
        put("bad_words_token_ids", checked)
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _checked_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise _refuse("allowed_token_ids", self.allowed_token_ids, "a non-empty sequence of token ids, or None")
        most = _MAX_INT if self.max_tokens is None else self.max_tokens
        allowed = "an integer >= 0 and at most max_tokens"
        put("min_tokens", require_int("min_tokens", self.min_tokens, 0, most, allowed))

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
