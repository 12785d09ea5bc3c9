"""Speculative decoding: coming tokens are guessed, and one step verifies several of them.

A guess is kept where it is the token that would have been drawn there anyway, with the random number of its place. So
text, log probabilities and the reason of the end are those of plain decoding, greedy or sampled, whoever guesses, and
only the time differs.

    llm = nb.LLM(speculative_config=nb.SpeculativeConfig(method="ngram"))
    llm.generate(prompt, nb.SamplingParams(max_tokens=200))
    llm.generate(prompt, nb.SamplingParams(max_tokens=200, speculative=False))  # the same text

    config = nb.SpeculativeConfig(method="draft", draft_model="smollm2-135m")  # a second model guesses
    llm = nb.LLM("model.gguf", speculative_config=config)
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from nanobraid.errors import InvalidArgumentError
from nanobraid.sampling_params import require_int

METHODS = ("ngram", "suffix", "draft")
_MOST_DRAFTS = 64
_MOST_LOOKUP = 1024


@dataclass(frozen=True)
class SpeculativeConfig:
    """How an `LLM` guesses coming tokens. Names follow vLLM where it has them.

    Attributes:
        method: ``ngram`` looks the latest tokens up in the request's own prompt and answer, and guesses that the text
            goes on as it did there the last time: for answers that copy, such as edits of code, tables, quotes.
            ``suffix`` finds the longest end of the text that occurred before, however long, and guesses what followed
            it most often; it guesses more the longer that is. ``draft`` has a second, smaller model draw the next
            tokens, with the same random numbers: for any text, where a step of the model takes much longer than one of
            the draft model.
        num_draft_tokens: Most tokens guessed for a request in a step. In [1, 64].
        prompt_lookup_min: Latest tokens that must have occurred before, at least 1. Not of ``draft``.
        prompt_lookup_max: Most of them that ``ngram`` compares, at least `prompt_lookup_min`: of two places the one
            counts where more agree.
        adaptive: Guess fewer tokens, or none, where verifying them takes longer than they save, judged by how often
            the request's guesses were right and what steps took. False: always as many as there are.
        draft_model: Of ``draft``: the model that guesses, named as `LLM` takes it. Its tokens must be those of the
            model, id for id. It runs on the same device with the same `dtype`, its weights stay in memory, and its
            keys and values take their part of `kv_cache_bytes`.

    Raises:
        InvalidArgumentError: On construction, naming the field, the value and what is allowed.
    """

    method: str = "ngram"
    num_draft_tokens: int = 4
    prompt_lookup_min: int = 1
    prompt_lookup_max: int = 4
    adaptive: bool = True
    draft_model: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        def check(field: str, low: int, high: int, allowed: str) -> None:
            object.__setattr__(self, field, require_int(field, getattr(self, field), low, high, allowed))

        if self.method not in METHODS:
            raise InvalidArgumentError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        check("num_draft_tokens", 1, _MOST_DRAFTS, f"an integer in [1, {_MOST_DRAFTS}]")
        check("prompt_lookup_min", 1, _MOST_LOOKUP, f"an integer in [1, {_MOST_LOOKUP}]")
        low = self.prompt_lookup_min
        check("prompt_lookup_max", low, _MOST_LOOKUP, f"an integer in [prompt_lookup_min, {_MOST_LOOKUP}]")
        if not isinstance(self.adaptive, bool):
            raise InvalidArgumentError(f"adaptive must be True or False, got {self.adaptive!r}")
        if isinstance(self.draft_model, os.PathLike):
            object.__setattr__(self, "draft_model", os.fspath(self.draft_model))
        if not isinstance(self.draft_model, (str, type(None))):
            raise InvalidArgumentError(f"draft_model must name a model, got {self.draft_model!r}")
        if self.method == "draft" and not self.draft_model:
            raise InvalidArgumentError("method='draft' needs a draft_model: the model that guesses")
        if self.method != "draft" and self.draft_model is not None:
            raise InvalidArgumentError(f"draft_model is of method='draft' alone, the method is {self.method!r}")


def core_options(config: SpeculativeConfig | None) -> tuple[str, int, int, int, bool] | None:
    """Returns what the core's engine takes.

    Raises:
        InvalidArgumentError: It is no `SpeculativeConfig`.
    """
    if config is None:
        return None
    if not isinstance(config, SpeculativeConfig):
        raise InvalidArgumentError(f"speculative_config must be a SpeculativeConfig or None, got {config!r}")
    return (
        config.method,
        config.num_draft_tokens,
        config.prompt_lookup_min,
        config.prompt_lookup_max,
        config.adaptive,
    )
