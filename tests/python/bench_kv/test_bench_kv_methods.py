"""Methods and configurations: names, defaults, and that every parameter is used or refused."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import nanobraid as nb
from nanobraid import kv_policy
from nanobraid.bench_kv import BenchmarkConfig, CacheConfig, Config, QualityConfig, QuantizationConfig
from nanobraid.bench_kv.methods import DEFAULTS, METHODS, NAMES, make_case, sweep
from nanobraid.errors import InvalidArgumentError, UnsupportedError

EXPECTED = {
    "no_cache": None,
    "full_cache": None,
    "sliding_window": kv_policy.sliding_window(256, sinks=4),
    "prefix_window": kv_policy.prefix_window(32, 256),
    "strided_cache": kv_policy.strided(4, 256, 32),
    "block_cache": kv_policy.block(64, 16, 256, 32),
    "budget_cache": kv_policy.budget(64, 256, 32),
    "quant_int8": None,
    "quant_int4": None,
    "quant_mixed": None,
    "paged_attention": None,
    "chunked_cache": kv_policy.chunk_summary(256, 64),
}


def test_the_methods_and_what_they_are() -> None:
    assert set(NAMES) == set(EXPECTED)
    for name, policy in EXPECTED.items():
        case = make_case(name)
        assert (None if case.policy is None else kv_policy.parse(case.policy)) == policy
        assert case.kv_dtype == (name.removeprefix("quant_") if name.startswith("quant") else None)
    assert {name: make_case(name).kind for name in ("no_cache", "full_cache")} == {
        "no_cache": "recomputed",
        "full_cache": "reserved",
    }
    assert make_case("strided_cache", stride=7, prefix_len=0).policy == "strided(7, window=256, prefix=0)"
    assert make_case("sliding_window", window_size=64).label == "sliding_window(window_size=64, sinks=4)"


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_changes_its_method_or_is_refused(name: str) -> None:
    for parameter, default in DEFAULTS.items():
        other = "mixed" if parameter == "mode" else 2 * default
        if parameter in METHODS[name].uses:
            assert make_case(name, **{parameter: other}).policy != make_case(name).policy
        elif (name, parameter) != ("quant_mixed", "mode"):
            with pytest.raises(InvalidArgumentError, match=f"{parameter}=.* has no effect on {name}"):
                make_case(name, **{parameter: other})
        assert make_case(name, **{parameter: default}) == make_case(name)


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("paged", {}, "method must be one of no_cache, full_cache, .*, got 'paged'"),
        ("block_cache", {"keep_per_block": 8}, "kv_policy block: keep must be a multiple of 16"),
        ("block_cache", {"keep_per_block": 128}, "kv_policy block: keep must not exceed"),
        ("budget_cache", {"old_budget": 60}, "kv_policy budget: tokens must be a multiple of 16"),
        ("chunked_cache", {"chunk_size": 40}, "kv_policy chunk_summary: group must be a multiple of 16"),
        ("sliding_window", {"window_size": 0}, "window_size must be"),
        ("sliding_window", {"window_size": 64.5}, "window_size must be"),
        ("paged_attention", {"block_size": 32}, "no effect on paged_attention; its blocks have 16 tokens"),
        ("quant_int8", {"mode": "int4"}, "mode='int4' has no effect on quant_int8"),
        ("full_cache", {"windows": 3}, "'windows' is no parameter"),
    ],
)
def test_wrong_parameters_are_refused_by_name(name: str, params: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgumentError, match=says):
        make_case(name, **params)


def test_what_is_true_anyway_is_accepted() -> None:
    assert make_case("paged_attention", block_size=16) == make_case("paged_attention")
    assert make_case("quant_int4", mode="int4") == make_case("quant_int4")


def test_a_sweep_has_every_size_of_its_methods() -> None:
    cases = sweep(["full_cache", "sliding_window", "block_cache", "chunked_cache"], [64, 128], [32, 64], [32])
    assert [case.label for case in cases] == [
        "full_cache",
        "sliding_window(window_size=64, sinks=4)",
        "sliding_window(window_size=128, sinks=4)",
        "block_cache(window_size=256, prefix_len=32, block_size=32, keep_per_block=16)",
        "block_cache(window_size=256, prefix_len=32, block_size=64, keep_per_block=16)",
        "chunked_cache(chunk_size=32, keep_last=256)",
    ]
    for names, windows, says in (
        ([], [64], "got none"),
        (["no_cache", "no_cache"], [64], "none of them twice"),
        (["sliding_window"], [], "window_sizes must not be empty"),
        (["sliding_window"], [64, 64], "window_sizes has a value twice"),
    ):
        with pytest.raises(InvalidArgumentError, match=says):
            sweep(names, windows, [64], [64])


def test_configurations_have_the_known_fields_and_defaults() -> None:
    assert dataclasses.asdict(Config()) == {
        "model_name": "smollm2-135m",
        "device": "auto",
        "dtype": "auto",
        "seed": 42,
        "max_new_tokens": 64,
        "batch_size": 1,
    }
    assert dataclasses.asdict(QuantizationConfig()) == {"mode": "int8", "eps": 1e-8}
    assert dataclasses.asdict(CacheConfig()) == {
        "window_size": 256,
        "block_size": 64,
        "chunk_size": 64,
        "keep_last": 256,
    }
    config = BenchmarkConfig()
    assert config.methods == ["no_cache", "full_cache", "sliding_window"]
    assert (config.window_sizes, config.block_sizes, config.chunk_sizes) == (
        [64, 128, 256, 512],
        [32, 64, 128],
        [32, 64, 128],
    )
    given = inspect.signature(nb.KVCacheBenchmarker.benchmark_method).parameters
    assert list(given)[1:13] == [
        "prompts", "method", "max_new_tokens", "window_size", "block_size", "chunk_size", "keep_last", "mode",
        "prefix_len", "stride", "keep_per_block", "old_budget",
    ]  # fmt: skip
    assert given["method"].default == "no_cache"
    assert given["max_new_tokens"].default == 32
    assert all(given[name].default == default for name, default in DEFAULTS.items())


def test_configurations_refuse_what_has_no_effect_or_is_wrong() -> None:
    with pytest.raises(UnsupportedError, match=r"eps=1e-06 has no effect"):
        QuantizationConfig("int8", eps=1e-6)
    with pytest.raises(InvalidArgumentError, match="mode must be one of int8, int4, mixed, got 'int2'"):
        QuantizationConfig("int2")
    assert QuantizationConfig("mixed").method == "quant_mixed"
    for bad in ({"block_size": 40}, {"chunk_size": 8}, {"window_size": 0}, {"keep_last": 0}):
        with pytest.raises(InvalidArgumentError, match="must be"):
            CacheConfig(**bad)
    assert CacheConfig(window_size=64).params("budget_cache") == {"window_size": 64}
    assert CacheConfig().params("no_cache") == {}
    for wrong in ({"dtype": "fp16"}, {"seed": -1}, {"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(InvalidArgumentError, match=f"{next(iter(wrong))} must be"):
            Config(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="method must be one of"):
        BenchmarkConfig(methods=["fast_cache"])
    for odd in (
        {"text_tokens": 1},
        {"needle_depths": [1.5]},
        {"needle_lengths": [8]},
        {"needle_lengths": []},
        {"agreement_tokens": -1},
        {"dtype": "fp16"},
    ):
        with pytest.raises(InvalidArgumentError, match="must"):
            QualityConfig(**odd)  # type: ignore[arg-type]
