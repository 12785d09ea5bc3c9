"""Clients that leave: whatever the server was doing for them ends, and everything is given back.

NANOBRAID_TEST_FULL=1 makes the random part a thousand clients and the soak a minute.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_threads import THREADS
from http_checks import chat_bytes, connect, post_head

import nanobraid as nb
from nanobraid.server.settings import Settings

FULL = os.environ.get("NANOBRAID_TEST_FULL") == "1"
DOCUMENT = "The library opens at nine and closes at six, on Sundays it stays shut all day. " * 4
LONG = {"max_tokens": 600, "ignore_eos": True}


@pytest.fixture(scope="module")
def shared_server(model_path: Path, serve: Any) -> Iterator[Any]:
    """A server whose engine runs two requests at a time."""
    from conftest import running

    options: dict[str, Any] = {"num_threads": THREADS, "max_model_len": 1024, "max_num_seqs": 2, "max_waiting": 64}
    with nb.LLM(model_path, **options) as llm:
        # Every block is used once, since memory touched for the first time would look like a leak.
        num_tokens = 16 * llm.stats()["blocks_total"]
        prompts = [[100 + i, *range(1000, 2000)] for i in range(num_tokens // 1000 + 1)]
        llm.generate(prompts, nb.SamplingParams(max_tokens=1))
        with running(nb.AsyncEngine(llm), Settings()) as server:
            yield server


@pytest.fixture(autouse=True)
def no_errors_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """That a client leaves is nothing to complain about."""
    yield
    wrong = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not wrong


def _leave(connection: socket.socket, abruptly: bool = False) -> None:
    if abruptly:  # RST instead of FIN
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _await(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def _completion(prompt: str, **fields: Any) -> bytes:
    data = json.dumps({"prompt": prompt, "temperature": 0, **LONG, **fields}).encode()
    return post_head(len(data), "/v1/completions") + data


@pytest.mark.parametrize("data", [b"", b"POST /v1/comp", post_head(100), post_head(100) + b'{"messages"'])
def test_before_the_request_is_there(server: Any, data: bytes) -> None:
    connection = connect(server)
    connection.sendall(data)
    time.sleep(0.02)
    _leave(connection)
    server.wait_idle(1.0)
    _await(lambda: server.app.service.num_active == 0, 1.0)


def _requests(stream: bool) -> list[tuple[str, bytes]]:
    """Requests of all kinds that would take many seconds."""
    chunks = [{"text": DOCUMENT}, {"text": DOCUMENT[::-1]}]
    return [
        ("chat", chat_bytes(**LONG, stream=stream)),
        ("completion", _completion("Once", stream=stream)),
        ("several answers", chat_bytes(**{**LONG, "temperature": 1}, n=2, stream=stream)),
        ("several prompts", _completion(["Once", "upon", "a", "time"], stream=stream)),  # type: ignore[arg-type]
        ("grammar", chat_bytes(max_tokens=600, stream=stream, structured_outputs={"regex": "[a-z ]{3000}"})),
        ("exact chunks", chat_bytes(**LONG, stream=stream, chunks=chunks)),
        ("isolated chunks", chat_bytes(**LONG, stream=stream, chunks=chunks, reuse="isolated")),
        ("blended chunks", chat_bytes(**LONG, stream=stream, chunks=chunks, reuse={"mode": "blend", "ratio": 0.3})),
        ("chunks of a completion", _completion("Once", stream=stream, chunks=chunks, reuse="isolated")),
    ]


def _forget_chunks(server: Any) -> None:
    """Drops what chunks that nobody registered hold, which is a cache."""
    for info in server.engine.llm.chunks.list():
        server.engine.llm.chunks.remove(info.id)


@pytest.mark.parametrize("abruptly", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", range(9))
def test_while_it_decodes(server: Any, kind: int, stream: bool, abruptly: bool) -> None:
    name, data = _requests(stream)[kind]
    connection = connect(server)
    connection.sendall(data)
    if stream:
        got = b""
        while got.count(b"data: ") < 3:
            piece = connection.recv(65536)
            assert piece, (name, got)
            got += piece
        assert b"200 OK" in got
    else:
        before = server.engine.stats()["generated_tokens"]
        _await(lambda: server.engine.stats()["generated_tokens"] > before + 2, 20.0)
    assert server.engine.stats()["running"] > 0, name
    _leave(connection, abruptly)
    begin = time.monotonic()
    _await(lambda: server.engine.stats()["running"] == server.engine.stats()["waiting"] == 0, 1.0)
    _forget_chunks(server)
    server.wait_idle(max(0.01, 1.0 - (time.monotonic() - begin)))
    _await(lambda: server.app.service.num_active == 0, 1.0)


@pytest.mark.parametrize("stream", [False, True])
def test_while_its_prompt_is_computed(server: Any, stream: bool) -> None:
    def prompt() -> str:
        return f"{random.random()} " + "word " * 700

    begin = time.monotonic()
    server.post("/v1/completions", {"prompt": prompt(), "max_tokens": 1})
    seconds = time.monotonic() - begin
    connection = connect(server)
    connection.sendall(_completion(prompt(), stream=stream, max_tokens=300))
    _await(lambda: server.engine.stats()["running"] > 0)
    before = server.engine.stats()["generated_tokens"]
    _leave(connection)
    server.wait_idle(max(1.0, 1.5 * seconds))  # a step that has begun is finished
    assert server.engine.stats()["generated_tokens"] <= before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_while_it_waits(server: Any, stream: bool) -> None:
    running = [connect(server) for _ in range(2)]
    for connection in running:
        connection.sendall(chat_bytes(**LONG, stream=True))
    _await(lambda: server.engine.stats()["running"] == 2)
    waiting = connect(server)
    waiting.sendall(chat_bytes(**LONG, stream=stream))
    _await(lambda: server.engine.stats()["waiting"] == 1)
    _leave(waiting)
    _await(lambda: server.engine.stats()["waiting"] == 0, 1.0)
    assert server.engine.stats()["running"] == 2  # nobody else was disturbed
    for connection in running:
        _leave(connection)
    server.wait_idle(1.0)


@pytest.mark.parametrize("stream", [False, True])
def test_behind_the_last_token(server: Any, stream: bool) -> None:
    for delay in (0.0, 0.005, 0.02):
        connection = connect(server)
        before = server.engine.stats()["generated_tokens"]
        connection.sendall(chat_bytes(stream=stream, max_tokens=1))
        _await(lambda before=before: server.engine.stats()["generated_tokens"] > before)  # type: ignore[misc]
        time.sleep(delay)
        _leave(connection, abruptly=True)
        server.wait_idle(1.0)
    _await(lambda: server.app.service.num_active == 0, 1.0)


def _resident_kib() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def _num_tasks(server: Any) -> int:
    import asyncio

    async def count() -> int:
        return len(asyncio.all_tasks()) - 1

    return asyncio.run_coroutine_threadsafe(count(), server.loop).result(5)


def _state(server: Any) -> dict[str, int]:
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tasks": _num_tasks(server),
        "blocks": server.engine.stats()["blocks_owned"],
        "requests": len(server.engine._routes.requests),
    }


def _one_client(server: Any, rng: random.Random, *, stays: bool = False) -> None:
    stream = rng.random() < 0.6
    words = " ".join(rng.choice(("sea", "why", "Paris", "été")) for _ in range(rng.choice((1, 5, 200))))
    kinds = [
        chat_bytes(messages=[{"role": "user", "content": words}], stream=stream, max_tokens=rng.choice((1, 6, 200))),
        _completion(words, stream=stream, n=rng.choice((1, 1, 2)), max_tokens=rng.choice((1, 6, 200))),
        chat_bytes(stream=stream, chunks=[{"text": DOCUMENT}], reuse=rng.choice(("exact", "isolated"))),
        chat_bytes(temperature=9),
        post_head(10_000) + b"{" * rng.randrange(100),
    ]
    with connect(server) as connection:
        connection.sendall(rng.choice(kinds))
        try:
            end = time.monotonic() + (10 if stays else rng.choice((0.0, 0.002, 0.01, 0.03, 0.1)))
            while (left := end - time.monotonic()) > 0:
                connection.settimeout(left)
                data = connection.recv(4096)
                if not data or b"[DONE]" in data or b'"usage"' in data or b"400 Bad" in data:
                    break
        except (TimeoutError, ConnectionResetError):
            pass
        if rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _settled(server: Any) -> dict[str, int]:
    _await(lambda: server.engine.stats()["running"] == server.engine.stats()["waiting"] == 0, 5.0)
    _await(lambda: server.app.service.num_active == 0, 5.0)
    _forget_chunks(server)
    server.wait_idle(1.0)
    time.sleep(0.05)  # the last sockets are closed
    return _state(server)


def test_random_disconnects_leave_nothing(server: Any) -> None:
    rng = random.Random(11)
    server.client.close()  # its idle connections would end at some time in between
    count = 1000 if FULL else 150
    for _ in range(40):  # threads of the pool are made, caches are filled
        _one_client(server, rng)
    before, kib = _settled(server), _resident_kib()
    for _ in range(count):
        _one_client(server, rng)
    after = _settled(server)
    assert after["threads"] <= before["threads"] + 4, (before, after)  # asyncio's pool grows up to its limit
    for name in ("files", "tasks", "blocks", "requests"):
        assert after[name] <= before[name], (name, before, after)
    assert _resident_kib() - kib < 16 << 10


def test_soak(server: Any) -> None:
    seconds = 60.0 if FULL else 6.0
    stop = threading.Event()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            _one_client(server, rng, stays=rng.random() < 0.3)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
    before = _settled(server)
    for thread in threads:
        thread.start()
    sizes = []
    try:
        for _ in range(24):
            assert all(thread.is_alive() for thread in threads)
            time.sleep(seconds / 24)
            sizes.append(_resident_kib())
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    after = _settled(server)
    for name in ("files", "tasks", "blocks", "requests"):
        assert after[name] <= before[name] + (2 if name == "files" else 0), (name, before, after)
    half = len(sizes) // 2
    assert min(sizes[half:]) - min(sizes[4:half]) < 12 << 10, sizes  # KiB that the second half has more
