"""The second model of speculation: found and loaded as a model is, and its tokens compared with the model's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanobraid import _core
from nanobraid._model_file import ensure_file
from nanobraid.errors import InvalidArgumentError
from nanobraid.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanobraid.speculative import SpeculativeConfig


def load(
    config: SpeculativeConfig | None,
    tokenizer: Tokenizer,
    *,
    backend: str,
    dtype: str,
    threads: int,
    deterministic: bool,
    fusion: str,
) -> _core.Model | None:
    """Loads the draft model, if the config has one.

    Args:
        config: Of the `LLM`.
        tokenizer: The model's own.
        backend: Where the model runs.
        dtype: Its activations.
        threads: Of its team; 0 for all. They load the draft model and then sleep: it runs on the model's own.
        deterministic: As the model.
        fusion: As the model.

    Raises:
        InvalidArgumentError: Its tokens are others.
        CoreError: It cannot be loaded.
    """
    if config is None or config.draft_model is None:
        return None
    path = ensure_file(config.draft_model)
    require_same_tokens(tokenizer, Tokenizer(path), path.name)
    return _core.Model(str(path), backend, dtype, threads, deterministic, fusion=fusion)


def require_same_tokens(tokenizer: Tokenizer, other: Tokenizer, name: str) -> None:
    """Checks that ids mean the same in both vocabularies, as far as both go: some are padded with unused ids.

    Raises:
        InvalidArgumentError: Naming the first id that does not.
    """
    own, others = tokenizer.core.token_bytes(), other.core.token_bytes()
    for token, (mine, theirs) in enumerate(zip(own, others, strict=False)):
        if mine != theirs and mine is not None and theirs is not None:
            raise InvalidArgumentError(
                f"draft_model {name} has another vocabulary: token {token} is {theirs!r} there and {mine!r} here"
            )
    longer = own if len(own) > len(others) else others
    shorter = min(len(own), len(others))
    if any(longer[shorter:]):
        first = next(token for token in range(shorter, len(longer)) if longer[token])
        raise InvalidArgumentError(
            f"draft_model {name} has another vocabulary: {len(others)} tokens there and {len(own)} here, "
            f"of which {first} is {longer[first]!r}"
        )
