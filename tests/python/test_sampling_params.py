"""SamplingParams: defaults, and the refusal of every value outside its range."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

import nanobraid as nb


def test_defaults_are_those_of_the_documents() -> None:
    params = nb.SamplingParams()
    assert params.temperature == 1.0
    assert params.top_k == -1
    assert params.top_p == 1.0
    assert params.min_p == 0.0
    assert params.repetition_penalty == 1.0
    assert params.max_tokens == 16
    assert params.seed is None
    assert params.ignore_eos is False
    assert params.stop_token_ids == ()
    assert params.logit_bias is None
    assert params.presence_penalty == params.frequency_penalty == 0.0
    assert params.bad_words_token_ids == ()
    assert params.allowed_token_ids is None
    assert params.min_tokens == 0
    assert params.logprobs is None
    assert params.prompt_logprobs is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "0"),
        ("temperature", None),
        ("temperature", True),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", 2**31),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", "1"),
        ("bad_words_token_ids", "ab"),
        ("bad_words_token_ids", (1, 2)),
        ("bad_words_token_ids", ((1,), ())),
        ("bad_words_token_ids", ((-1,),)),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (True,)),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", 21),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 2.0),
        ("max_tokens", 2**63),
        ("seed", -2),
        ("seed", 2**64),
        ("seed", 1.5),
        ("ignore_eos", 1),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", "12"),
        ("stop_token_ids", 5),
        ("stop_token_ids", [1.0]),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: -101}),
        ("logit_bias", [1]),
    ],
)
def test_refusals_name_field_and_value(field: str, value: object) -> None:
    arguments: dict[str, Any] = {field: value}
    with pytest.raises(nb.InvalidArgumentError) as caught:
        nb.SamplingParams(**arguments)
    message = str(caught.value)
    assert message.startswith(field)
    assert "must be" in message
    assert "got" in message
    assert isinstance(caught.value, ValueError)


def test_a_field_that_does_not_exist_is_refused() -> None:
    unknown: dict[str, Any] = {"beam_width": 4}
    with pytest.raises(TypeError, match="beam_width"):
        nb.SamplingParams(**unknown)


def test_edges_are_accepted() -> None:
    assert nb.SamplingParams(temperature=0).temperature == 0.0
    assert nb.SamplingParams(top_k=0).top_k == 0
    assert nb.SamplingParams(top_p=1, min_p=1).min_p == 1.0
    assert nb.SamplingParams(seed=-1).seed == -1
    assert nb.SamplingParams(seed=2**64 - 1).seed == 2**64 - 1
    assert nb.SamplingParams(max_tokens=None).max_tokens is None


def test_numpy_numbers_become_plain_ones() -> None:
    params = nb.SamplingParams(top_k=np.int64(5), temperature=np.float32(0.5), stop_token_ids=[np.int32(3)])
    assert type(params.top_k) is int
    assert type(params.temperature) is float
    assert params.stop_token_ids == (3,)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        nb.SamplingParams().temperature = 0.5  # type: ignore[misc]


def test_later_changes_of_the_arguments_have_no_effect() -> None:
    bias = {1: 1.0}
    stops = [1, 2]
    params = nb.SamplingParams(logit_bias=bias, stop_token_ids=stops)
    bias[2] = 5.0
    stops.append(3)
    assert params.logit_bias == {1: 1.0}
    assert params.stop_token_ids == (1, 2)


def test_best_of_is_refused_by_name() -> None:
    with pytest.raises(nb.UnsupportedError, match="best_of"):
        nb.SamplingParams(best_of=2)


def test_masks_and_penalties_are_kept_as_given() -> None:
    params = nb.SamplingParams(
        presence_penalty=-2,
        frequency_penalty=np.float32(0.5),  # type: ignore[arg-type]
        bad_words_token_ids=[[1, 2], (3,)],
        allowed_token_ids=[4, 4],
        min_tokens=16,
        logprobs=20,
        prompt_logprobs=0,
    )
    assert params.presence_penalty == -2.0
    assert params.frequency_penalty == 0.5
    assert params.bad_words_token_ids == ((1, 2), (3,))
    assert params.allowed_token_ids == (4, 4)
    assert nb.SamplingParams(min_tokens=100, max_tokens=None).min_tokens == 100
