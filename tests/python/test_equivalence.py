"""The first promise, on real weights: a greedy answer has the same tokens however it is computed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from engine_threads import OTHER_THREADS, THREADS
from paragraph import PARAGRAPH

import nanobraid as nb
from nanobraid import _core

PROMPTS = [
    "The capital of France is",
    "x",
    PARAGRAPH + "He looked up when",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "日本の首都は",
    PARAGRAPH * 4 + "In the evening",
    "1 2 3 4 5 6 7 8 9 10 11",
    "Once upon a time there was a " * 12,
]
PARAMS = nb.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def alone(llm: nb.LLM) -> list[list[int]]:
    """Each prompt by itself, in slices of up to 512 tokens."""
    return [llm.generate(prompt, PARAMS)[0].token_ids for prompt in PROMPTS]


def test_in_a_batch_of_eight(llm: nb.LLM, alone: list[list[int]]) -> None:
    assert [out.token_ids for out in llm.generate(PROMPTS, PARAMS)] == alone
    reverse = [out.token_ids for out in llm.generate(PROMPTS[::-1], PARAMS)]
    assert reverse[::-1] == alone


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64, 512])
def test_with_the_prompt_in_slices(model_path: Path, alone: list[list[int]], max_batch_tokens: int) -> None:
    with nb.LLM(model_path, num_threads=THREADS, max_model_len=1024, max_batch_tokens=max_batch_tokens) as sliced:
        for i in (0, 2, 5):
            assert sliced.generate(PROMPTS[i], PARAMS)[0].token_ids == alone[i]
        assert [out.token_ids for out in sliced.generate(PROMPTS, PARAMS)] == alone


def test_logits_are_equal_to_the_last_bit(model_path: Path, llm: nb.LLM) -> None:
    expected = llm.logits(PROMPTS[2])
    with nb.LLM(model_path, num_threads=OTHER_THREADS, max_model_len=1024, max_batch_tokens=7) as sliced:
        assert sliced.logits(PROMPTS[2]).tobytes() == expected.tobytes()


def test_with_another_number_of_threads(model_path: Path, alone: list[list[int]]) -> None:
    with nb.LLM(model_path, num_threads=OTHER_THREADS, max_model_len=1024) as other:
        assert [out.token_ids for out in other.generate(PROMPTS, PARAMS)] == alone


def test_sampled_tokens_depend_on_seed_and_position_only(model_path: Path, llm: nb.LLM) -> None:
    params = [nb.SamplingParams(temperature=0.9, top_p=0.95, max_tokens=16, seed=i, ignore_eos=True) for i in range(8)]
    together = [out.token_ids for out in llm.generate(PROMPTS, params)]
    single = [llm.generate(prompt, p)[0].token_ids for prompt, p in zip(PROMPTS, params, strict=True)]
    assert together == single
    with nb.LLM(
        model_path, num_threads=OTHER_THREADS, max_model_len=1024, max_batch_tokens=7, max_num_seqs=3
    ) as sliced:
        assert [out.token_ids for out in sliced.generate(PROMPTS, params)] == single


def _random_requests(
    seed: int, ids: list[int], count: int, longest: int, max_tokens: int
) -> tuple[list[list[int]], list[nb.SamplingParams]]:
    """Prompts of which many begin alike; greedy and sampled, some with several answers, all with logprobs."""
    draw = random.Random(seed)
    prompts, params = [], []
    for i in range(count):
        begin = draw.choice((0, 0, 40))
        tail = [draw.randrange(1000, 20000) for _ in range(draw.randrange(4))]
        prompts.append(ids[begin : begin + draw.choice((16, 32, draw.randint(1, longest)))] + tail)
        params.append(
            nb.SamplingParams(
                temperature=draw.choice((0.0, 0.0, 0.9)),
                top_p=draw.choice((1.0, 0.9)),
                repetition_penalty=draw.choice((1.0, 1.2)),
                frequency_penalty=draw.choice((0.0, 0.3)),
                max_tokens=draw.randint(max_tokens // 2, max_tokens),
                ignore_eos=True,
                logprobs=2,
                n=draw.choice((1, 1, 2)),
                seed=seed + i,
            )
        )
    return prompts, params


@pytest.mark.parametrize("device", _core.available_backends())
def test_random_requests_are_answered_as_if_alone(model_path: Path, device: str) -> None:
    slow = device in ("reference", "scalar")
    with nb.LLM(model_path) as llm:
        ids = llm.tokenizer.encode(PARAGRAPH * 3)
    prompts, params = _random_requests(7, ids, *((3, 20, 4) if slow else (8, 60, 60)))

    with nb.LLM(model_path, device=device, num_threads=THREADS, max_model_len=256, enable_prefix_caching=False) as llm:
        alone = [llm.generate([prompt], p)[0].outputs for prompt, p in zip(prompts, params, strict=True)]
        stats = llm.stats()
        assert stats["prefix_hit_tokens"] == 0

    needed = [-(-(len(prompt) + p.max_tokens) // 16) for prompt, p in zip(prompts, params, strict=True)]
    blocks = max(2 * sum(need * p.n for need, p in zip(needed, params, strict=True)) // 5, *needed)
    with nb.LLM(
        model_path,
        device=device,
        num_threads=OTHER_THREADS,
        max_model_len=256,
        max_batch_tokens=23,
        kv_cache_bytes=blocks * stats["kv_bytes"] // stats["blocks_total"],
    ) as llm:
        for attempt in ("empty cache", "full cache"):
            cancelled = llm.stream(prompts[0], nb.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
            next(cancelled)
            cancelled.close()
            together = [out.outputs for out in llm.generate(prompts, params)]
            assert together == alone, attempt
        stats = llm.stats()
        assert stats["prefix_hit_tokens"] > 0
        assert stats["blocks_owned"] == 0
        if not slow:
            assert stats["preemptions"] > 0
