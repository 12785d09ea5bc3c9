"""What users give to `LLM` as what the engine takes: prompts as token ids, parameters as checked options."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nanobraid.errors import InvalidArgumentError
from nanobraid.guided import plan_for
from nanobraid.kv_policy import KvPolicy, parse
from nanobraid.sampling_params import SamplingParams
from nanobraid.tokenizer import Tokenizer

Prompts = str | Sequence[str] | Sequence[Sequence[int]]
"""One text, several texts, or several lists of token ids."""


def is_list_like(value: object) -> bool:
    """Whether a value is a sequence or a numpy array."""
    numpy = sys.modules.get("numpy")  # not imported for this: without it nobody has an array
    return isinstance(value, Sequence) or (numpy is not None and isinstance(value, numpy.ndarray))


def encode_prompts(tokenizer: Tokenizer, prompts: Prompts) -> tuple[list[str | None], list[list[int]]]:
    """Returns the prompts as texts (None for those given as ids) and as token ids.

    Raises:
        InvalidArgumentError: One is neither a text nor a list of token ids of the vocabulary.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, bytes | Mapping) or not is_list_like(prompts):
        raise InvalidArgumentError(
            f"prompts must be a string, a list of strings or a list of token id lists, got {type(prompts).__name__}"
        )
    texts: list[str | None] = []
    all_ids: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            texts.append(prompt)
            all_ids.append(tokenizer.encode(prompt))
        elif is_list_like(prompt) and not isinstance(prompt, bytes):
            texts.append(None)
            all_ids.append(tokenizer.check_token_ids(prompt, f"prompt {i}: token_ids"))
        else:
            raise InvalidArgumentError(
                f"prompt {i} must be a string or a list of token ids, got {type(prompt).__name__}; "
                "for one prompt of token ids write [[...]]"
            )
    return texts, all_ids


def params_for(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """Returns the parameters of each of `count` prompts.

    Raises:
        InvalidArgumentError: There are more or fewer than prompts, or something else than parameters.
    """
    if params is None:
        params = SamplingParams()
    many = list(params) if isinstance(params, Sequence) else [params] * count
    if len(many) != count:
        raise InvalidArgumentError(f"sampling_params has {len(many)} entries for {count} prompts")
    for p in many:
        if not isinstance(p, SamplingParams):
            raise InvalidArgumentError(f"sampling_params must be SamplingParams, got {type(p).__name__}")
    return many


def request_options(
    tokenizer: Tokenizer,
    ids: list[int],
    params: SamplingParams,
    *,
    where: str,
    room: int,
    max_model_len: int,
    default_seed: int | None,
    default_policy: KvPolicy,
) -> dict[str, Any]:
    """Returns what the engine needs to know about a request.

    Args:
        tokenizer: The model's.
        ids: The prompt.
        params: What the user wants.
        where: What messages call the prompt.
        room: The least number of new tokens.
        max_model_len: Tokens of the context.
        default_seed: For parameters without one.
        default_policy: For parameters without one.

    Raises:
        InvalidArgumentError: The prompt is empty or too long, or a parameter names a token that does not exist.
    """
    if not ids:
        raise InvalidArgumentError(f"{where} is empty: at least one token is needed to begin with")
    if len(ids) + room > max_model_len:
        new = f" and {room} new token" if room else ""
        raise InvalidArgumentError(
            f"{where} is too long: {len(ids)} tokens{new} exceed the context of {max_model_len} (max_model_len)"
        )
    last = tokenizer.vocab_size - 1
    words = params.bad_words_token_ids
    for field, token_ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("keep_special_token_ids", params.keep_special_token_ids),
        ("logit_bias", params.logit_bias or ()),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("bad_words_token_ids", [token_id for word in words for token_id in word]),
    ):
        for token_id in token_ids:
            if token_id > last:
                raise InvalidArgumentError(f"{field} must hold token ids in [0, {last}], got {token_id}")
    space = max_model_len - len(ids)
    seed = default_seed if params.seed is None else params.seed  # -1 asks for a random one
    policy = default_policy if params.kv_policy is None else parse(params.kv_policy)
    max_tokens = space if params.max_tokens is None else min(params.max_tokens, space)
    return {
        "max_tokens": max_tokens,
        "min_tokens": min(params.min_tokens, max_tokens),  # the end of the context comes first
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "seed": None if seed == -1 else seed,
        "ignore_eos": params.ignore_eos,
        "stop_token_ids": list(params.stop_token_ids),
        "logit_bias": dict(params.logit_bias or {}),
        "bad_words_token_ids": [list(word) for word in words],
        "allowed_token_ids": None if params.allowed_token_ids is None else list(params.allowed_token_ids),
        "logprobs": params.logprobs,
        "prompt_logprobs": params.prompt_logprobs,
        "n": params.n,
        "key_policy": policy.key_rule,
        "speculative": params.speculative,
        "stop": list(params.stop),
        "stop_tokenizer": tokenizer.core,
        "guided": None if params.guided is None else plan_for(params.guided, tokenizer),
    }


def call_options(cache_salt: str, timeout_s: float | None, *, streams: bool) -> dict[str, Any]:
    """Returns what a call says about all of its requests, as options for the engine.

    Raises:
        InvalidArgumentError: `cache_salt` is not a string, or `timeout_s` not a positive number.
    """
    if not isinstance(cache_salt, str):
        raise InvalidArgumentError(f"cache_salt must be a string, got {cache_salt!r}")
    if timeout_s is None:
        return {"cache_salt": cache_salt, "streams": streams}
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not timeout_s > 0:
        raise InvalidArgumentError(f"timeout_s must be a number of seconds > 0, or None, got {timeout_s!r}")
    return {"cache_salt": cache_salt, "streams": streams, "timeout_seconds": float(min(timeout_s, 1e300))}
