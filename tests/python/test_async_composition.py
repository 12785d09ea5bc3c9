"""Composed prompts and kept chunks of an `AsyncEngine`: what `LLM` gives, side by side, stopped and refused alike."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import nanobraid as nb
from nanobraid import Segment

GREEDY = nb.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = nb.SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)
DOCUMENTS = [
    f"Note {i}: the code of the {name} room is {7919 * (i + 3)}.\n" * 2 for i, name in enumerate(("red", "blue", "old"))
]
SALT = "async"


@pytest.fixture
def engine(llm: nb.LLM) -> Iterator[nb.AsyncEngine]:
    """Shares the model of the other tests; its chunks are removed."""
    yield nb.AsyncEngine(llm)
    for chunk in llm.chunks.list(cache_salt=SALT):
        llm.chunks.remove(chunk.id)
    llm.generate("a", nb.SamplingParams(max_tokens=1))  # a step gives their blocks back


def segments(order: tuple[int, ...] = (0, 1, 2), query: str = "The code of the red room is") -> list[Segment | str]:
    return ["Read these notes.\n", *(Segment(DOCUMENTS[i], chunk=True) for i in order), query]


def facts(report: nb.ReuseReport | None) -> tuple[Any, ...]:
    assert report is not None
    return (report.mode_requested, report.mode_served, report.isolated, report.recomputed,
            report.exact_prefix + report.computed, report.downgrade_reason)  # fmt: skip


@pytest.mark.parametrize("reuse", ["exact", nb.Isolated(), nb.Blend(0.3)])
def test_tokens_and_reports_are_those_of_a_blocking_call(engine: nb.AsyncEngine, llm: nb.LLM, reuse: Any) -> None:
    async def work() -> tuple[nb.RequestOutput, list[nb.StreamPiece]]:
        out = await engine.compose(segments(), GREEDY, reuse=reuse, cache_salt=SALT)
        stream = engine.compose(segments(), GREEDY, reuse=reuse, cache_salt=SALT, stream=True)
        return out, [piece async for piece in stream]

    out, pieces = asyncio.run(work())
    expected = llm.compose(segments(), GREEDY, reuse=reuse, cache_salt=SALT)
    assert (out.text, out.token_ids, out.prompt_token_ids) == (
        expected.text, expected.token_ids, expected.prompt_token_ids,
    )  # fmt: skip
    assert facts(out.reuse) == facts(expected.reuse) == facts(pieces[-1].reuse)
    assert "".join(piece.text for piece in pieces) == expected.text
    assert [token for piece in pieces for token in piece.token_ids] == expected.token_ids
    assert [piece.finish_reason for piece in pieces][-1] == "length"


def test_requests_side_by_side_share_their_chunks(engine: nb.AsyncEngine, llm: nb.LLM) -> None:
    queries = [f"Question {i}: the code is" for i in range(10)]
    orders = [((0, 1, 2), (2, 0, 1), (1, 2, 0))[i % 3] for i in range(10)]
    before = llm.stats()["chunk_misses"]

    async def work() -> list[nb.RequestOutput]:
        return await asyncio.gather(
            *(
                engine.compose(segments(order, query), GREEDY, reuse="isolated", cache_salt=SALT)
                for order, query in zip(orders, queries, strict=True)
            )
        )

    outs = asyncio.run(work())
    assert llm.stats()["chunk_misses"] - before == 3
    assert sum(info.hits for info in llm.chunks.list(cache_salt=SALT)) == 3 * 10 - 3
    for out, order, query in zip(outs, orders, queries, strict=True):
        alone = llm.compose(segments(order, query), GREEDY, reuse="isolated", cache_salt=SALT)
        assert out.token_ids == alone.token_ids
        assert facts(out.reuse) == facts(alone.reuse)


@pytest.mark.parametrize("how", ["aclose", "cancel", "cancel the answer"])
def test_leaving_stops_the_request_and_lets_its_chunks_go(engine: nb.AsyncEngine, how: str) -> None:
    async def read(pieces: AsyncGenerator[nb.StreamPiece, None]) -> Any:
        async for _ in pieces:
            pass

    async def users() -> list[int]:
        return [info.users for info in await engine.chunks.list(cache_salt=SALT)]

    async def wait_for(wanted: list[int]) -> None:
        end = time.monotonic() + 10
        while await users() != wanted:
            assert time.monotonic() < end, engine.stats()
            await asyncio.sleep(0.005)

    async def work() -> None:
        await engine.chunks.compute(DOCUMENTS, cache_salt=SALT)
        options: dict[str, Any] = {"reuse": "isolated", "cache_salt": SALT}
        before = engine.stats()["generated_tokens"]
        if how == "aclose":
            async with aclosing(engine.compose(segments(), LONG, **options, stream=True)) as stream:
                await anext(stream)
                await wait_for([1, 1, 1])
        else:
            reads = how == "cancel"
            task = asyncio.create_task(
                read(engine.compose(segments(), LONG, **options, stream=True))
                if reads
                else engine.compose(segments(), LONG, **options)
            )
            await wait_for([1, 1, 1])
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await wait_for([0, 0, 0])
        assert engine.stats()["generated_tokens"] - before < 500  # of 600
        assert engine.stats()["running"] == 0

    asyncio.run(work())


def test_what_cannot_be_served_is_an_error_or_exact(engine: nb.AsyncEngine, llm: nb.LLM) -> None:
    scored = nb.SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0)

    async def work() -> tuple[nb.RequestOutput, list[nb.StreamPiece]]:
        with pytest.raises(nb.UnsupportedError, match="prompt_logprobs"):
            await engine.compose(segments(), scored, reuse="isolated", cache_salt=SALT)
        with pytest.raises(nb.UnsupportedError, match="prompt_logprobs"):
            await anext(engine.compose(segments(), scored, reuse="isolated", cache_salt=SALT, stream=True))
        options: dict[str, Any] = {"reuse": "isolated", "on_unsupported": "exact", "cache_salt": SALT}
        out = await engine.compose(segments(), scored, **options)
        return out, [piece async for piece in engine.compose(segments(), scored, **options, stream=True)]

    out, pieces = asyncio.run(work())
    exact = llm.compose(segments(), scored, cache_salt=SALT)
    assert out.token_ids == exact.token_ids == [t for piece in pieces for t in piece.token_ids]
    for report in (out.reuse, pieces[-1].reuse):
        assert report is not None
        assert (report.mode_requested, report.mode_served) == ("isolated", "exact")
        assert "prompt_logprobs" in str(report.downgrade_reason)


def test_no_room_for_chunks_is_an_error_or_exact(model_path: Path) -> None:
    """What is known only when the request is placed takes the same way as what is known at its submission."""

    async def work() -> None:
        options: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 1, "kv_cache_bytes": 24 << 20}
        async with nb.AsyncEngine(model_path, **options) as engine:
            texts = [f"{i} is a number that is not {i + 1}. " * 12 for i in range(12)]
            with pytest.raises(nb.OutOfMemoryError, match="no room for"):
                for text in texts:
                    await engine.chunks.compute([text], pin=True)
            parts: list[Segment | str] = [
                "First: ",
                Segment("Nobody has seen this. " * 4, chunk=True, anchor=[5] * 100),
                "and",
            ]
            with pytest.raises(nb.OutOfMemoryError, match="no room for"):
                await engine.compose(parts, GREEDY, reuse="isolated")
            out = await engine.compose(parts, GREEDY, reuse="isolated", on_unsupported="exact")
            assert out.reuse is not None
            assert out.reuse.mode_served == "exact"
            assert "no room for" in str(out.reuse.downgrade_reason)
            assert out.token_ids == (await engine.compose(parts, GREEDY)).token_ids

    asyncio.run(work())


def test_wrong_input_is_refused(engine: nb.AsyncEngine) -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "at least one"),
        (["a", Segment("")], {}, r"segments\[1\] is empty"),
        (segments(), {"reuse": "fast"}, "reuse must be"),
        (segments(), {"on_unsupported": "hope"}, "on_unsupported"),
        (segments(), {"cache_salt": 5}, "cache_salt"),
        (segments(), {"timeout_s": 0}, "timeout_s"),
        ([Segment([5] * 1000, chunk=True), Segment([6] * 30)], {"reuse": "isolated"}, "1024"),
    ]

    async def work() -> None:
        for given, options, says in wrong:
            with pytest.raises(nb.InvalidArgumentError, match=says):
                await engine.compose(given, GREEDY, **options)
            with pytest.raises(nb.InvalidArgumentError, match=says):
                await anext(engine.compose(given, GREEDY, **options, stream=True))
        with pytest.raises(nb.InvalidArgumentError, match="at least one"):
            await engine.chunks.compute([])
        with pytest.raises(nb.InvalidArgumentError, match="content"):
            await engine.chunks.find(5)  # type: ignore[arg-type]

    asyncio.run(work())


def test_chunks_are_computed_found_pinned_and_removed(engine: nb.AsyncEngine, llm: nb.LLM) -> None:
    async def work() -> None:
        chunks = engine.chunks
        ids = await chunks.compute(DOCUMENTS[:2], pin=True, cache_salt=SALT)
        infos = await chunks.list(cache_salt=SALT)
        assert [info.id for info in infos] == ids
        assert infos == llm.chunks.list(cache_salt=SALT)
        assert all(info.ready and info.pinned for info in infos)
        assert infos[0].kv_bytes == chunks.bytes_for(len(infos[0].token_ids))
        assert await chunks.find(DOCUMENTS[1], cache_salt=SALT) == ids[1]
        assert await chunks.find(DOCUMENTS[1], anchor=[5], cache_salt=SALT) is None
        assert await chunks.cached_prefix(infos[0].token_ids, cache_salt=SALT) == len(infos[0].token_ids) // 16 * 16
        assert await chunks.pin(ids[0], False)
        assert [info.pinned for info in await chunks.list(cache_salt=SALT)] == [False, True]
        assert await chunks.remove(ids[0])
        assert not await chunks.remove(ids[0])

    asyncio.run(work())


def test_the_event_loop_goes_on_while_chunks_are_computed(engine: nb.AsyncEngine) -> None:
    """Long chunks take many steps; a task that only sleeps is woken all the while. Cancelled, they are given up."""
    long = [[100 + i, *([7, 11, 13] * 150)] for i in range(3)]

    async def work() -> None:
        computing = asyncio.create_task(engine.chunks.compute(long, cache_salt=SALT))
        ticks = 0
        while not computing.done():
            await asyncio.sleep(0.002)
            ticks += 1
        assert len(await computing) == 3
        assert ticks > 20
        other = [[200 + i, *([7, 11, 13] * 300)] for i in range(3)]
        computing = asyncio.create_task(engine.chunks.compute(other, cache_salt=SALT))
        while engine.stats()["running"] == 0:
            await asyncio.sleep(0.001)
        computing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await computing
        end = time.monotonic() + 20
        while engine.stats()["running"] + engine.stats()["waiting"] > 0:
            assert time.monotonic() < end
            await asyncio.sleep(0.005)

    asyncio.run(work())
