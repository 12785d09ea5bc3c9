"""The memory of keys and values as stats and the chat show it: of a token, of running requests, of the process."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from engine_threads import THREADS

import nanobraid as nb
from nanobraid.commands._chunk_view import memory_figures

GREEDY = nb.SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
NUMBERS = 2 * 30 * 3 * 64  # of a token: keys and values, layers, heads, dimensions


def opened(path: Path, **options: Any) -> nb.LLM:
    return nb.LLM(path, num_threads=THREADS, max_model_len=512, force_kv_dtype=True, **options)


def kind(stats: dict[str, Any], policy: str) -> dict[str, Any]:
    (row,) = [row for row in stats["kv_requests"] if row["kv_policy"] == policy]
    return dict(row)


@pytest.mark.parametrize(("kv_dtype", "bits"), [("f32", 32), ("bf16", 16), ("int8", 8.25), ("mixed", 6.625)])
def test_bytes_of_a_token_are_those_of_the_storage(model_path: Path, kv_dtype: str, bits: float) -> None:
    with opened(model_path, kv_dtype=kv_dtype) as llm:
        stats = llm.stats()
        assert stats["kv_block_bytes"] * stats["blocks_total"] == stats["kv_bytes"]
        assert stats["kv_bytes_per_token"] * 16 == stats["kv_block_bytes"] == llm.chunks.bytes_for(1)
        assert stats["kv_bytes_per_token"] == bits / 8 * NUMBERS
        assert kind(stats, "full")["kv_dtype"] == kv_dtype
        assert nb.AsyncEngine(llm).stats().keys() == stats.keys()


def test_running_requests_own_what_their_tokens_take(model_path: Path) -> None:
    with opened(model_path, kv_dtype="bf16") as llm:
        with closing(llm.stream(list(range(100, 150)), GREEDY)) as pieces:
            next(pieces)
            stats = llm.stats()
        row = kind(stats, "full")
        assert row["running"] == 1
        assert row["blocks"] in range(4, 9)  # of 51 to 114 tokens: the engine goes on while we look
        assert row["bytes"] == row["largest_bytes"] == row["blocks"] * stats["kv_block_bytes"]
        assert kind(llm.stats(), "full") == {**row, "running": 0, "blocks": 0, "bytes": 0, "largest_bytes": 0}


def test_a_policy_is_a_kind_of_its_own_and_owns_less(model_path: Path) -> None:
    with opened(model_path) as llm:
        prompt = list(range(100, 400))
        windowed = nb.SamplingParams(
            temperature=0, max_tokens=64, ignore_eos=True, kv_policy="sliding_window(32, sinks=4)"
        )
        with closing(llm.stream(prompt, GREEDY)) as full, closing(llm.stream(prompt, windowed)) as window:
            next(full)
            next(window)
            next(window)
            stats = llm.stats()
        assert kind(stats, "window")["running"] == 1
        assert 0 < kind(stats, "window")["blocks"] <= 6
        assert kind(stats, "full")["blocks"] >= 300 // 16


def test_peak_memory_is_that_of_the_process(llm: nb.LLM) -> None:
    stats = llm.stats()
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]
    assert 0 < stats["rss_bytes"] <= stats["peak_rss_bytes"] <= peak
    assert stats["peak_rss_bytes"] == pytest.approx(peak, rel=0.05)


def test_the_chat_shows_memory(llm: nb.LLM) -> None:
    figures = memory_figures(llm)
    assert figures["kv_dtype"] == "bf16"
    assert figures["KV of a token"] == "23.0 kB"
    assert figures["KV of 1024 tokens"] == "23.6 MB"
    assert figures["peak memory of the process"].endswith(" MB")
