"""Speed and memory, each method in a process of its own: equal work, memory that is read, refusals by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_threads import THREADS
from paragraph import PARAGRAPH

import nanobraid as nb
from nanobraid.bench_kv import BenchmarkConfig, Config, QualityConfig, speed, worker
from nanobraid.bench_kv.methods import DEFAULTS, NAMES, make_case
from nanobraid.errors import InternalError, InvalidArgumentError, OutOfMemoryError, UnsupportedError

MIXED = [PARAGRAPH, "The capital of France is", "One, two,", PARAGRAPH * 3]
NEW = 3


@pytest.fixture(scope="module")
def bench(model_path: Path) -> Iterator[nb.KVCacheBenchmarker]:
    options: dict[str, Any] = {"batch_size": 4, "num_threads": THREADS, "kv_dtype": "f32", "max_model_len": 384}
    with nb.KVCacheBenchmarker(model_path, **options) as bench:
        yield bench


@pytest.fixture(scope="module")
def rows(bench: nb.KVCacheBenchmarker) -> dict[str, dict[str, Any]]:
    methods = ("no_cache", "full_cache", "paged_attention", "quant_int8")
    return {method: bench.benchmark_method(MIXED, method, NEW) for method in methods}


def test_all_methods_do_the_same_work(rows: dict[str, dict[str, Any]]) -> None:
    for row in rows.values():
        assert row["total_new_tokens"] == len(MIXED) * NEW
        assert [len(ids) for ids in row["token_ids"]] == [NEW] * len(MIXED)
        assert row["tokens_per_sec"] == pytest.approx(row["total_new_tokens"] / row["elapsed_sec"])
        assert 0 < row["ttft_ms"] <= row["latency_ms"] <= 1e3 * row["elapsed_sec"]
        assert row["gpu_peak_mb"] is None or row["backend"].startswith("cuda")
        assert {"cpu_mem_used_mb", "peak_rss_mb", "memory_source", "kv_policy", "num_threads", *DEFAULTS} <= set(row)
        assert row["max_model_len"] % 16 == 0
    same = [rows[method]["token_ids"] for method in ("no_cache", "full_cache", "paged_attention")]
    assert same[0] == same[1] == same[2]


def test_bytes_of_the_cache_are_those_of_the_blocks(rows: dict[str, dict[str, Any]], model_path: Path) -> None:
    tokenizer = nb.Tokenizer(model_path)
    per_block = 16 * 30 * 3 * 64 * 2 * 4
    stored = [len(tokenizer.encode(prompt)) + NEW - 1 for prompt in MIXED]
    blocks = sum(-(-tokens // 16) for tokens in stored)
    assert rows["paged_attention"]["kv_cache_bytes"] == blocks * per_block  # no prompt fills its last block
    assert rows["paged_attention"]["est_kv_cache_mb_avg"] == pytest.approx(blocks * per_block / 4 / 2**20)
    assert rows["no_cache"]["kv_cache_bytes"] == 0
    full = rows["full_cache"]
    assert full["kv_cache_bytes"] == full["kv_pool_bytes"] == 4 * full["max_model_len"] * per_block // 16
    ratio = rows["quant_int8"]["kv_cache_bytes"] / rows["paged_attention"]["kv_cache_bytes"]
    assert ratio == pytest.approx(8.25 / 32, rel=0.02)


def test_memory_that_is_reserved_is_touched_and_blocks_are_not_before_they_are_needed(
    rows: dict[str, dict[str, Any]],
) -> None:
    full, paged = rows["full_cache"], rows["paged_attention"]
    assert full["kv_pool_bytes"] > 60 << 20  # far more than what else grows
    more = (full["kv_cache_bytes"] - paged["kv_cache_bytes"]) / 2**20
    if full["memory_source"].startswith("VmHWM since"):
        assert full["cpu_mem_used_mb"] - paged["cpu_mem_used_mb"] > 0.7 * more
        assert paged["cpu_mem_used_mb"] < 0.65 * full["cpu_mem_used_mb"]
    assert full["peak_rss_mb"] - paged["peak_rss_mb"] > 0.7 * more


def test_methods_that_are_not_there_are_refused_by_name(bench: nb.KVCacheBenchmarker) -> None:
    config = BenchmarkConfig(methods=["quant_int8", "paged_attention"])
    broken = nb.KVCacheBenchmarker(bench.model, kv_dtype="int3", num_threads=THREADS)
    found = broken.run(MIXED[:2], config, max_new_tokens=1)
    assert [row["status"] for row in found["rows"]] == ["ok", "refused"]
    assert "int3" in found["rows"][1]["message"]
    with pytest.raises(InvalidArgumentError, match="int3"):
        broken.benchmark_method(MIXED[:1], "paged_attention", 1)


def test_every_method_runs_or_says_why_not(bench: nb.KVCacheBenchmarker) -> None:
    sizes = BenchmarkConfig(NAMES, [64], [64], [64])
    quality = QualityConfig(text_tokens=32, agreement_tokens=0, needle_lengths=(), needle_depths=())
    told: list[str] = []
    found = bench.run(MIXED[1:3], sizes, max_new_tokens=2, quality=quality, progress=told.append)
    assert told == [row["label"] for row in found["rows"]]
    assert [row["method"] for row in found["rows"]] == list(NAMES)
    for row in found["rows"]:
        assert row["status"] == "ok", row
        assert row["total_new_tokens"] == 4
        assert row["quality"]["kl"] < 0.05


def test_the_stop_rule_is_one_for_all(model_path: Path) -> None:
    """A prompt whose answer ends early: with the rule on, in every method at the same place."""
    ids = nb.ChatTemplate.of(nb.Tokenizer(model_path)).encode(
        [{"role": "user", "content": "What is 2+2?"}], nb.Tokenizer(model_path)
    )
    with nb.KVCacheBenchmarker(model_path, stop_at_eos=True, num_threads=THREADS, max_model_len=128) as stopping:
        with nb.LLM(model_path, num_threads=THREADS, max_model_len=128) as llm:
            natural = llm.generate([ids], nb.SamplingParams(temperature=0, max_tokens=64))[0]
            assert natural.finish_reason == "stop"
        case = make_case("no_cache")
        llm = stopping._llm(case)
        again = speed.recompute(llm, [ids, ids[:4]], 64, True, lambda: None)
        assert again[0].token_ids == natural.token_ids
        assert len(again[1].token_ids) <= 64
        longer = speed.recompute(llm, [ids], len(natural.token_ids) + 2, False, lambda: None)
        assert len(longer[0].token_ids) == len(natural.token_ids) + 2


def test_generating_in_this_process(bench: nb.KVCacheBenchmarker) -> None:
    prompt = "The capital of France is"
    text, count = bench.generate_with_cache(prompt, 4)
    assert text.startswith(prompt + " Paris") and count == 4
    assert bench.generate_no_cache(prompt, 4) == (text, count)
    paged, same, taken, used, blocks = bench.generate_with_paged_attention(PARAGRAPH, 4)
    assert paged.startswith(PARAGRAPH) and same == 4
    tokens = len(bench.tokenizer.encode(PARAGRAPH)) + 3
    assert blocks == -(-tokens // 16)
    assert used == pytest.approx(taken * tokens / (16 * blocks))
    quantized, count, cache_mb = bench.generate_with_quantized_kv(PARAGRAPH, 4, "int8")
    assert quantized.startswith(PARAGRAPH) and count == 4
    assert cache_mb == pytest.approx(taken * 8.25 / 32, rel=0.02)
    with pytest.raises(InvalidArgumentError, match="mode must be one of int8, int4, mixed, got 'fp8'"):
        bench.generate_with_quantized_kv(prompt, 4, "fp8")
    with pytest.raises(UnsupportedError, match="block_size=64: blocks of this engine have 16 tokens"):
        bench.generate_with_paged_attention(prompt, 4, block_size=64)
    with pytest.raises(InvalidArgumentError, match="max_new_tokens must be"):
        bench.generate_with_cache(prompt, 0)


def test_generating_under_policies(bench: nb.KVCacheBenchmarker) -> None:
    long = PARAGRAPH * 3
    exact = bench.generate_with_cache(long, 6)
    assert bench.generate_with_sliding_window(long, 6, 1024) == exact
    assert bench.generate_with_prefix_window(long, 6, 1024, 16) == exact
    assert bench.generate_with_strided_cache(long, 6, 16, 1) == exact  # every block stays
    assert bench.generate_with_block_cache(long, 6, 16, 64, 64) == exact
    assert bench.generate_with_budget_cache(long, 6, 16, 1024) == exact
    assert bench.generate_with_chunked_cache(long, 6, 64, 1024)[:2] == exact
    short = bench.generate_with_sliding_window(long, 6, 16, sinks=0)
    assert short[1] == 6 and short[0] != exact[0]
    _, _, taken, _, _ = bench.generate_with_paged_attention(long, 6)
    assert bench.generate_with_chunked_cache(long, 6, 16, 32)[2] < taken


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"rounds": 0}, "rounds must be"),
        ({"seed": -1}, "seed must be"),
        ({"max_model_len": 8}, "max_model_len must be"),
        ({"stop_at_eos": 1.5}, "stop_at_eos must be"),
        ({"tokenizer": "gpt2"}, "tokenizer must be a nanobraid.Tokenizer or None, got str"),
    ],
)
def test_wrong_arguments_are_refused(model_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgumentError, match=says):
        nb.KVCacheBenchmarker(model_path, **options)


def test_prompts_and_limits_are_checked_before_anything_runs(bench: nb.KVCacheBenchmarker, model_path: Path) -> None:
    for prompts in ([], "a text", [[]], [""]):
        with pytest.raises(InvalidArgumentError, match="prompt"):
            bench.benchmark_method(prompts)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="method must be one of"):
        bench.benchmark_method(MIXED, "magic_cache")
    with pytest.raises(InvalidArgumentError, match="window_size=64 has no effect on full_cache"):
        bench.benchmark_method(MIXED, "full_cache", window_size=64)
    small = nb.KVCacheBenchmarker(model_path, max_model_len=32)
    with pytest.raises(InvalidArgumentError, match=r"max_model_len must be at least \d+ for these prompts, got 32"):
        small.benchmark_method(MIXED, "full_cache")
    with pytest.raises(InvalidArgumentError, match="are those of the Config"):
        nb.KVCacheBenchmarker(Config(str(model_path)), batch_size=2)
    assert nb.KVCacheBenchmarker(Config(str(model_path), batch_size=3)).batch_size == 3


def test_an_engine_gives_its_file(llm: nb.LLM) -> None:
    assert nb.KVCacheBenchmarker(llm).model == Path(llm.config["path"])
    assert nb.KVCacheBenchmarker(llm, llm.tokenizer).tokenizer is llm.tokenizer


def a_job(model_path: Path, **changes: Any) -> speed.SpeedJob:
    options = {"device": "auto", "dtype": "auto", "num_threads": THREADS, "max_batch_tokens": 512}
    job = speed.SpeedJob(
        str(model_path), options, "auto", make_case("full_cache"), [[5, 6, 7]], 2, 2, 32, 1, False, 1
    )  # fmt: skip
    return dataclasses.replace(job, **changes)


def test_a_reservation_that_does_not_fit_is_said(model_path: Path, llm: nb.LLM) -> None:
    job = a_job(model_path, batch_size=1 + llm.stats()["blocks_total"])
    with pytest.raises(OutOfMemoryError, match=r"full_cache reserves \d+ contexts of 32 tokens, 2 blocks each"):
        speed.touch_all(llm, job)


def test_timed_prompts_must_not_come_from_the_cache(model_path: Path) -> None:
    job = a_job(model_path)
    with speed.open_llm(job) as llm:
        ids = list(range(100, 120))
        speed.run_batch(llm, job, [ids], 2, "round 0")
        speed.run_batch(llm, job, [ids], 2, "round 1")
        with pytest.raises(InternalError, match="full_cache: 16 tokens of timed prompts came from the prefix cache"):
            speed.run_batch(llm, job, [ids], 2, "round 1")


def test_a_process_that_dies_is_an_error_with_what_it_said(model_path: Path) -> None:
    with pytest.raises(InternalError, match=r"the process of full_cache ended with exit code 1: .*TypeError"):
        worker.run(a_job(model_path, options={"no_such_option": 1}))
    with pytest.raises(nb.NanobraidError, match="nowhere"):
        worker.run(a_job(Path("nowhere.gguf")))
