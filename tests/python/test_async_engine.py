"""AsyncEngine on the real default model: same tokens as LLM, abort, errors, drain, event loops."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import nanobraid as nb

GREEDY = nb.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = nb.SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
PROMPTS = ["The capital of France is", "Once upon a time", "1 2 3 4 5", "x", "def f(n):", "日本の首都は"]


@pytest.fixture(scope="module")
def engine(llm: nb.LLM) -> Iterator[nb.AsyncEngine]:
    """Shares the model of the other tests, so it is not shut down."""
    yield nb.AsyncEngine(llm)


def idle(engine: nb.AsyncEngine) -> bool:
    stats = engine.stats()
    return bool(stats["running"] + stats["waiting"] + stats["blocks_owned"] == 0)


async def wait_until_idle(engine: nb.AsyncEngine) -> None:
    for _ in range(200):
        if idle(engine):
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"still busy: {engine.stats()}")


def test_tokens_are_those_of_a_blocking_call(engine: nb.AsyncEngine, llm: nb.LLM) -> None:
    async def work() -> list[nb.RequestOutput]:
        return await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in PROMPTS))

    expected = llm.generate(PROMPTS, GREEDY)
    outputs = asyncio.run(work())
    assert [out.token_ids for out in outputs] == [out.token_ids for out in expected]
    assert [out.text for out in outputs] == [out.text for out in expected]
    assert outputs[0].prompt == PROMPTS[0]
    assert outputs[0].metrics.ttft_ms > 0


def test_streams_together_and_in_order(engine: nb.AsyncEngine, llm: nb.LLM) -> None:
    async def read(prompt: str) -> tuple[str, list[int], list[str | None]]:
        pieces = [piece async for piece in engine.stream(prompt, GREEDY)]
        tokens = [token for piece in pieces for token in piece.token_ids]
        return "".join(piece.text for piece in pieces), tokens, [piece.finish_reason for piece in pieces]

    async def work() -> list[tuple[str, list[int], list[str | None]]]:
        return await asyncio.gather(*(read(prompt) for prompt in PROMPTS))

    for out, (text, tokens, reasons) in zip(llm.generate(PROMPTS, GREEDY), asyncio.run(work()), strict=True):
        assert (text, tokens) == (out.text, out.token_ids)
        assert reasons[-1] == "length" and set(reasons[:-1]) <= {None}


def test_several_answers(engine: nb.AsyncEngine, llm: nb.LLM) -> None:
    params = nb.SamplingParams(temperature=1, max_tokens=8, seed=3, n=3, ignore_eos=True)

    async def work() -> tuple[nb.RequestOutput, set[int]]:
        out = await engine.generate("Once", params)
        return out, {piece.index async for piece in engine.stream("Once", params)}

    out, indices = asyncio.run(work())
    expected = llm.generate("Once", params)[0]
    assert [answer.token_ids for answer in out.outputs] == [answer.token_ids for answer in expected.outputs]
    assert indices == {0, 1, 2}


def test_guided_answers(engine: nb.AsyncEngine) -> None:
    params = nb.SamplingParams(temperature=1, seed=1, max_tokens=8, guided=nb.Guided.choice(["yes", "no"]))

    async def work() -> list[str]:
        outputs = await asyncio.gather(*(engine.generate("Is the sea blue?", params) for _ in range(3)))
        streamed = "".join([piece.text async for piece in engine.stream("Is the sea blue?", params)])
        return [*(out.text for out in outputs), streamed]

    texts = asyncio.run(work())
    assert len(set(texts)) == 1 and texts[0] in ("yes", "no")


@pytest.mark.parametrize("how", ["aclose", "break", "cancel"])
def test_leaving_a_stream_gives_the_memory_back(engine: nb.AsyncEngine, how: str) -> None:
    async def read() -> None:
        async for _ in engine.stream("Once upon a time", LONG):
            if how == "break":
                break

    async def work() -> None:
        if how == "aclose":
            async with aclosing(engine.stream("Once upon a time", LONG)) as stream:
                await anext(stream)
                assert engine.stats()["running"] == 1
        elif how == "break":
            await read()
            gc.collect()
        else:
            task = asyncio.create_task(read())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await wait_until_idle(engine)

    asyncio.run(work())


def test_abort_and_result(engine: nb.AsyncEngine) -> None:
    async def work() -> None:
        request = engine.submit("Once upon a time", LONG)
        other = engine.submit("x", GREEDY)
        assert other.request_id > request.request_id
        await anext(request)
        request.abort()
        pieces = [piece async for piece in request]
        assert pieces[-1].finish_reason == "abort"
        request.abort()  # nothing happens
        out = await request.result()
        assert out.finish_reason == "abort" and 0 < len(out.token_ids) < 2000
        assert (await other.result()).finish_reason == "length"
        assert [piece async for piece in other] == []

    asyncio.run(work())


def test_a_timeout_ends_with_what_there_is(engine: nb.AsyncEngine, llm: nb.LLM) -> None:
    async def work() -> nb.RequestOutput:
        return await engine.generate("Once upon a time", LONG, timeout_s=0.2)

    out = asyncio.run(work())
    assert out.finish_reason == "timeout"
    assert 0 < len(out.token_ids) < 2000
    assert llm.generate("x", LONG, timeout_s=1e-9)[0].finish_reason == "timeout"
    assert list(llm.stream("x", LONG, timeout_s=0.1))[-1].finish_reason == "timeout"
    for bad in (0, -1, "1", True, float("nan")):
        with pytest.raises(nb.InvalidArgumentError, match="timeout_s"):
            llm.generate("x", timeout_s=bad)  # type: ignore[arg-type]


def test_wrong_input_is_said_at_once(engine: nb.AsyncEngine) -> None:
    async def work() -> None:
        with pytest.raises(nb.InvalidArgumentError, match="empty"):
            engine.submit("")
        with pytest.raises(nb.InvalidArgumentError, match="timeout_s"):
            engine.submit("x", timeout_s=0)
        with pytest.raises(nb.InvalidArgumentError, match="cache_salt"):
            await engine.generate("x", cache_salt=3)  # type: ignore[arg-type]
        masked = nb.SamplingParams(allowed_token_ids=[5], bad_words_token_ids=[[5, 5]])
        with pytest.raises(nb.InvalidArgumentError, match="allowed_token_ids"):
            async for _ in engine.stream("x", masked):
                pass
        assert (await engine.generate("x", masked)).finish_reason == "error"

    asyncio.run(work())
    with pytest.raises(RuntimeError, match="event loop"):
        engine.submit("x")


def test_one_event_loop_after_another_and_two_at_once(engine: nb.AsyncEngine, llm: nb.LLM) -> None:
    expected = llm.generate("x", GREEDY)[0].token_ids
    results: list[list[int]] = []

    async def work() -> None:
        for _ in range(3):
            results.append((await engine.generate("x", GREEDY)).token_ids)

    asyncio.run(work())
    threads = [threading.Thread(target=lambda: asyncio.run(work())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 12


def test_a_loop_that_ends_leaves_nothing_running(engine: nb.AsyncEngine) -> None:
    async def work() -> None:
        engine.submit("Once upon a time", LONG)

    asyncio.run(work())
    asyncio.run(wait_until_idle(engine))


def test_shutdown_drains_and_refuses(model_path: Path) -> None:
    async def work() -> None:
        engine = nb.AsyncEngine(model_path, max_model_len=512, num_threads=1)
        running = asyncio.create_task(engine.generate("Once", GREEDY))
        await asyncio.sleep(0.01)
        ending = asyncio.create_task(engine.shutdown())
        while not engine.llm._driver._engine.drain(0.0):  # as the shutdown does, in its own thread
            await asyncio.sleep(0.001)
        assert (await running).finish_reason == "length"
        await ending
        with pytest.raises(nb.InvalidArgumentError, match="closed"):
            engine.submit("x")
        await engine.shutdown()

    asyncio.run(work())


def test_shutdown_with_a_limit_ends_what_is_left(model_path: Path) -> None:
    async def work() -> float:
        async with nb.AsyncEngine(model_path, max_model_len=4096, num_threads=1) as engine:
            request = engine.submit("Once", LONG)
            waiting = asyncio.create_task(request.result())
            await anext(request)
            begin = time.monotonic()
            await engine.shutdown(timeout_s=0.1)
            seconds = time.monotonic() - begin
            with pytest.raises(nb.InvalidArgumentError, match="closed"):
                await waiting
            return seconds

    assert 0.09 < asyncio.run(work()) < 5


def test_while_draining_new_requests_are_refused(model_path: Path) -> None:
    async def work() -> None:
        async with nb.AsyncEngine(model_path, max_model_len=4096, num_threads=1) as engine:
            request = engine.submit("Once", LONG)
            await anext(request)
            ending = asyncio.create_task(engine.shutdown(timeout_s=0.3))
            await asyncio.sleep(0.1)
            with pytest.raises(nb.OverloadedError, match="shutting down"):
                engine.submit("x")
            await ending

    asyncio.run(work())


def test_options_belong_to_the_llm(llm: nb.LLM) -> None:
    with pytest.raises(nb.InvalidArgumentError, match="max_num_seqs"):
        nb.AsyncEngine(llm, max_num_seqs=3)


SCRIPT = """
import asyncio, os, sys
import nanobraid as nb
{body}
"""


def run_script(body: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT.format(body=body), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_interpreter_ends_with_requests_open(model_path: Path) -> None:
    body = """
engine = nb.AsyncEngine(sys.argv[1], max_model_len=4096)
async def work():
    await anext(engine.submit("Once", nb.SamplingParams(max_tokens=3000, ignore_eos=True)))
asyncio.run(work())
stream = engine.llm.stream("Once", nb.SamplingParams(max_tokens=3000, ignore_eos=True))
next(stream)
print("end")
"""
    done = run_script(body, str(model_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_a_forked_process_is_told(model_path: Path) -> None:
    body = """
import warnings
warnings.simplefilter("ignore")
llm = nb.LLM(sys.argv[1], max_model_len=256)
llm.generate("x", nb.SamplingParams(max_tokens=2))
child = os.fork()
if child == 0:
    try:
        llm.generate("x")
    except nb.UnsupportedError as error:
        print(error, flush=True)
        sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run_script(body, str(model_path))
    assert done.stdout.splitlines() == [
        "this LLM was made before the process was forked; make it after the fork",
        "7",
    ], done.stderr


def test_listening_gives_the_pieces_of_an_iteration(llm: nb.LLM) -> None:
    params = nb.SamplingParams(temperature=0, max_tokens=12, n=2, seed=1)

    async def run() -> None:
        engine = nb.AsyncEngine(llm)
        iterated = [piece async for piece in await engine.start("One two three", params)]
        heard: list[Any] = []
        ended = asyncio.Event()

        def take(item: Any) -> None:
            heard.append(item)
            if sum(piece.finish_reason is not None for piece in heard) == 2:
                ended.set()

        (await engine.start("One two three", params)).listen(take)
        await ended.wait()
        for index in (0, 1):
            texts = ["".join(p.text for p in pieces if p.index == index) for pieces in (iterated, heard)]
            assert texts[0] == texts[1] != ""

    asyncio.run(run())


def test_listeners_hear_of_errors_and_of_the_end(llm: nb.LLM) -> None:
    async def run() -> None:
        engine = nb.AsyncEngine(llm)
        heard: list[Any] = []
        end = llm.tokenizer.eos_token_ids[0]
        params = nb.SamplingParams(max_tokens=4, min_tokens=2, allowed_token_ids=[end])  # leaves no token
        (await engine.start("One", params)).listen(heard.append)
        request = await engine.start("One two three", nb.SamplingParams(max_tokens=200, ignore_eos=True))
        request.listen(heard.append)
        request.abort()
        while len(heard) < 2:
            await asyncio.sleep(0.01)
        assert any(isinstance(item, nb.InvalidArgumentError) for item in heard)
        assert heard[-1].finish_reason == "abort" or heard[0].finish_reason == "abort"

    asyncio.run(run())


def test_texts_and_pieces_are_heard_apart(llm: nb.LLM) -> None:
    async def heard(params: nb.SamplingParams) -> tuple[list[Any], list[tuple[str, list[int]]], str, list[int]]:
        engine = nb.AsyncEngine(llm)
        out = await engine.generate("One two three", params)
        pieces: list[Any] = []
        texts: list[tuple[str, list[int]]] = []
        ended = asyncio.Event()

        def take(piece: Any) -> None:
            pieces.append(piece)
            if sum(piece.finish_reason is not None for piece in pieces) == params.n:
                ended.set()

        (await engine.start("One two three", params)).listen(take, lambda *text: texts.append(text))
        await ended.wait()
        return pieces, texts, out.text, out.token_ids

    pieces, texts, text, token_ids = asyncio.run(heard(nb.SamplingParams(temperature=0, max_tokens=12)))
    (last,) = pieces
    assert "".join(part for part, _ in texts) + last.text == text
    assert [token for _, ids in texts for token in ids] + last.token_ids == token_ids
    assert all(part and ids for part, ids in texts)
    assert len(texts) > 5

    params = nb.SamplingParams(temperature=0, max_tokens=12, n=2)
    pieces, texts, text, _ = asyncio.run(heard(params))
    assert {piece.index for piece in pieces if piece.finish_reason is None} == {1}
    assert "".join(part for part, _ in texts) + "".join(piece.text for piece in pieces if piece.index == 0) == text

    pieces, texts, text, _ = asyncio.run(heard(nb.SamplingParams(temperature=0, max_tokens=12, logprobs=0)))
    assert texts == []
    assert "".join(piece.text for piece in pieces) == text


def test_requests_of_a_closed_loop_are_stopped(llm: nb.LLM) -> None:
    engine = nb.AsyncEngine(llm)
    params = nb.SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)

    async def leave() -> None:
        await anext(await engine.start("One two three", params))

    for _ in range(2):  # nobody hears of the second one's end but the loop after it
        asyncio.run(leave())
    asyncio.run(engine.generate("One", nb.SamplingParams(max_tokens=1)))
    wait_for_idle = time.monotonic() + 5
    while engine.stats()["running"]:
        assert time.monotonic() < wait_for_idle
        time.sleep(0.01)
    asyncio.run(engine.generate("One", nb.SamplingParams(max_tokens=1)))
    assert not engine._routes.requests
    assert not engine._call.indices
    assert len(engine._routes.loops) == 1
