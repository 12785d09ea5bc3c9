"""Names and options of KV policies: what is taken, how it is written again, what is refused and how."""

from __future__ import annotations

import pytest

import nanobraid as nb
from nanobraid import kv_policy
from nanobraid.errors import InvalidArgumentError

EVERY = [
    kv_policy.full(),
    kv_policy.none(),
    kv_policy.sliding_window(192),
    kv_policy.prefix_window(32, 192),
    kv_policy.strided(4),
    kv_policy.block(64, 16),
    kv_policy.budget(64),
    kv_policy.chunk_summary(),
]


@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_is_read_as_it_is_written(policy: kv_policy.KvPolicy) -> None:
    assert kv_policy.parse(str(policy)) == policy
    assert kv_policy.parse(policy) is policy


def test_every_name_has_a_function_and_a_rule() -> None:
    assert sorted(policy.name for policy in EVERY) == sorted(kv_policy.NAMES)
    rules = {policy.name: policy.key_rule for policy in EVERY}
    assert rules == {
        "full": ("full", 0, 1, 0, 0),
        "none": ("none", 0, 1, 0, 0),
        "sliding_window": ("window", 4, 192, 0, 0),
        "prefix_window": ("window", 32, 192, 0, 0),
        "strided": ("strided", 0, 256, 4, 0),
        "block": ("block", 0, 256, 64, 16),
        "budget": ("budget", 0, 256, 0, 4),
        "chunk_summary": ("summary", 0, 256, 64, 0),
    }


def test_options_by_place_and_by_name() -> None:
    assert kv_policy.parse(" sliding_window( 192 , sinks = 0 ) ") == kv_policy.sliding_window(192, sinks=0)
    assert kv_policy.parse("chunk_summary") == kv_policy.chunk_summary(window=256, group=64)
    assert str(kv_policy.parse("sliding_window(window=192)")) == "sliding_window(192, sinks=4)"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sliding", "must be one of full, none, sliding_window"),
        ("", "must be one of"),
        ("sliding_window", "needs the option window"),
        ("sliding_window(0)", r"kv_policy sliding_window: window must be an integer in \[1, 2\*\*30\], got 0"),
        ("sliding_window(192, sinks=-1)", "kv_policy sliding_window: sinks"),
        ("sliding_window(192, sinks=True)", "whole numbers in brackets"),
        ("sliding_window(192, 4, 4)", "has 2 options"),
        ("sliding_window(192, window=4)", "an option twice"),
        ("sliding_window(192, keep=4)", "no option 'keep': window, sinks"),
        ("sliding_window(1.5)", "whole numbers in brackets"),
        ("sliding_window(192", "whole numbers in brackets"),
        ("sliding_window(192)(4)", "whole numbers in brackets|whole"),
        ("sliding_window(*[1])", "whole numbers in brackets"),
        ("sliding_window(**{})", "whole numbers in brackets"),
        ("full(1)", "has 0 options"),
        ("block(64, 8)", r"kv_policy block: keep must be a multiple of 16"),
        ("block(32, 64)", r"kv_policy block: keep must not exceed block_size \(32\), got 64"),
        ("budget(100)", "kv_policy budget: tokens must be a multiple of 16"),
        ("chunk_summary(group=2147483648)", "kv_policy chunk_summary: group"),
        (7, "must be a KvPolicy or its name, got 7"),
    ],
)
def test_what_is_wrong_is_named(text: str, says: str) -> None:
    with pytest.raises(InvalidArgumentError, match=says):
        nb.SamplingParams(kv_policy=text)


def test_sampling_params_hold_a_policy() -> None:
    assert nb.SamplingParams().kv_policy is None
    assert nb.SamplingParams(kv_policy="budget(64)").kv_policy == kv_policy.budget(64)
