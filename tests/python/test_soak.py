"""Random load: requests of all kinds come, end, fail and are left, and nothing of them stays behind.

NANOBRAID_SOAK_SECONDS changes how long it takes (20, with NANOBRAID_TEST_FULL=1 a minute). It goes on until every kind
of end has come.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from contextlib import aclosing
from pathlib import Path

import pytest

import nanobraid as nb

FULL = os.environ.get("NANOBRAID_TEST_FULL") == "1"
SECONDS = float(os.environ.get("NANOBRAID_SOAK_SECONDS", "60" if FULL else "20"))
WARM_SHARE = 0.4  # of the time, after which memory must not grow
ALLOWED_GROWTH = int(SECONDS * (200 << 10))  # by the second, so that a short run sees the same leak
ENDS = ("left", "cancelled", "abort", "timeout", "error", "length", "stop", "overloaded", "blocking")
SYSTEM = "You are a patient teacher who explains things in short and simple sentences. " * 6
TASKS = 10


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> set[str]:
    return {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()}


def random_params(rng: random.Random, **changes: object) -> nb.SamplingParams:
    options: dict[str, object] = {
        "temperature": rng.choice([0.0, 0.8, 1.5]),
        "top_k": rng.choice([0, 1, 40]),
        "top_p": rng.choice([1.0, 0.9]),
        "repetition_penalty": rng.choice([1.0, 1.2]),
        "max_tokens": rng.randrange(1, 40),
        "n": rng.choice([1, 1, 1, 3]),
        "logprobs": rng.choice([None, None, 2]),
        "stop": rng.choice([(), (".", "\n\n")]),
        "seed": rng.randrange(1000),
        "ignore_eos": rng.random() < 0.3,
    }
    return nb.SamplingParams(**{**options, **changes})  # type: ignore[arg-type]


def random_prompt(rng: random.Random) -> str:
    words = " ".join(
        rng.choice(("sea", "bread", "why", "seven", "Paris", "été", "日本")) for _ in range(rng.randrange(60))
    )
    return rng.choice((SYSTEM, "", SYSTEM[:200])) + "Question: " + words


class Load:
    """What the tasks have seen."""

    def __init__(self, engine: nb.AsyncEngine) -> None:
        self.engine = engine
        self.ends: dict[str, int] = {}
        self.greedy: dict[str, list[int]] = {}

    def count(self, what: str | None) -> None:
        self.ends[str(what)] = self.ends.get(str(what), 0) + 1

    def saw_everything(self) -> bool:
        """Whether requests have ended in every way, and the engine has done what it does under pressure."""
        stats = self.engine.stats()
        done = all(stats[name] > 0 for name in ("preemptions", "prefix_hit_tokens", "forked_tokens"))
        return done and set(ENDS) <= self.ends.keys()

    async def one(self, rng: random.Random) -> None:
        prompt, params = random_prompt(rng), random_params(rng)
        kind = rng.randrange(8)
        if kind == 0:
            async with aclosing(self.engine.stream(prompt, params)) as pieces:
                async for _ in pieces:
                    if rng.random() < 0.2:
                        self.count("left")
                        break
        elif kind == 1:
            request = self.engine.submit(prompt, params)
            await asyncio.sleep(rng.random() * 0.2)
            request.abort()
            self.count((await request.result()).finish_reason)
        elif kind == 2:
            self.count((await self.engine.generate(prompt, params, timeout_s=rng.uniform(1e-6, 0.3))).finish_reason)
        elif kind == 3:
            task = asyncio.create_task(self.engine.generate(prompt, params))
            await asyncio.sleep(rng.random() * 0.1)
            task.cancel()
            self.count(
                "cancelled"
                if isinstance((await asyncio.gather(task, return_exceptions=True))[0], BaseException)
                else "ended"
            )
        elif kind == 4:
            words = nb.SamplingParams(allowed_token_ids=[5], bad_words_token_ids=[[5, 5]], max_tokens=4)
            self.count((await self.engine.generate(prompt, words)).finish_reason)
        elif kind == 5:
            greedy = nb.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            out = await self.engine.generate(prompt, greedy, cache_salt=rng.choice(("", "a")))
            assert self.greedy.setdefault(prompt, out.token_ids) == out.token_ids
            self.count(out.finish_reason)
        elif kind == 6:
            out = await self.engine.generate(prompt, random_params(rng, prompt_logprobs=1, n=1))
            assert out.prompt_logprobs is not None and len(out.prompt_logprobs) == len(out.prompt_token_ids)
            self.count(out.finish_reason)
        else:
            await asyncio.to_thread(self.engine.llm.generate, [prompt, prompt], params)
            self.count("blocking")

    async def task(self, seed: int, until: float) -> None:
        rng = random.Random(seed)
        while time.monotonic() < until:
            try:
                await self.one(rng)
            except nb.OverloadedError:
                self.count("overloaded")
                await asyncio.sleep(0.05)


async def run(engine: nb.AsyncEngine, load: Load, until: float, seed: int) -> None:
    await asyncio.gather(*(load.task(seed + i, until) for i in range(TASKS)))
    for _ in range(500):
        if engine.stats()["running"] + engine.stats()["waiting"] == 0:
            return
        await asyncio.sleep(0.01)


def test_nothing_stays_behind(model_path: Path) -> None:
    files, threads = open_files(), threading.active_count()
    engine = nb.AsyncEngine(
        model_path, max_model_len=512, max_num_seqs=6, max_waiting=6, max_batch_tokens=128, kv_cache_bytes=8 << 20
    )
    load = Load(engine)
    begin = time.monotonic()
    asyncio.run(run(engine, load, begin + WARM_SHARE * SECONDS, seed=0))
    stats, warm, warm_threads = engine.stats(), resident_bytes(), threading.active_count()
    assert stats["blocks_owned"] == 0
    asyncio.run(run(engine, load, begin + SECONDS, seed=1000))
    while not load.saw_everything() and time.monotonic() < begin + 4 * SECONDS:  # a busy machine
        asyncio.run(run(engine, load, time.monotonic() + 0.1 * SECONDS, seed=random.randrange(2000, 10**9)))
    later, grown = engine.stats(), resident_bytes() - warm
    assert (later["running"], later["waiting"], later["blocks_owned"]) == (0, 0, 0)
    assert later["blocks_free"] + later["blocks_cached"] == later["blocks_total"]
    assert threading.active_count() <= warm_threads
    assert grown < ALLOWED_GROWTH, f"resident memory grew by {grown >> 10} KiB after {WARM_SHARE * SECONDS:.0f} s"
    print(
        f"{later['generated_tokens']} tokens, {later['preemptions']} preemptions, {grown >> 10} KiB grown, {load.ends}"
    )
    assert load.saw_everything(), (later, load.ends)
    asyncio.run(engine.shutdown())
    del engine, load
    gc.collect()
    assert threading.active_count() <= threads
    assert open_files() <= files


@pytest.mark.parametrize("count", [20])
def test_engines_come_and_go(model_path: Path, count: int) -> None:
    def cycle() -> None:
        with nb.LLM(model_path, max_model_len=128, kv_cache_bytes=4 << 20) as llm:
            llm.generate("x", nb.SamplingParams(max_tokens=2))

    for _ in range(4):
        cycle()
    tasks, files, memory = len(os.listdir("/proc/self/task")), open_files(), resident_bytes()
    for _ in range(count):
        cycle()
    assert len(os.listdir("/proc/self/task")) <= tasks
    assert open_files() <= files
    assert resident_bytes() - memory < 12 << 20
