"""Pieces on the short way from the engine to the socket: the bytes are those of the long way, slow clients included."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from nanobraid.outputs import StreamPiece

pytest.importorskip("uvicorn")

from nanobraid.server import protocol
from nanobraid.server.errors import ApiError
from nanobraid.server.generation import Generation
from nanobraid.server.sse import _MAX_UNREAD, _Writer

TEXTS = [" a", '"', "\\", "\n", "\x00", "é", "\u2028", "😀", "</script>", "x" * 5000, " ", "\x7f", "end"]
PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
}


class Scripted:
    """A request of which every step is written down."""

    def __init__(self, pieces: list[StreamPiece]) -> None:
        self._pieces = pieces
        self.num_short = 0

    def listen(
        self, take: Callable[[StreamPiece], None], take_text: Callable[[str, list[int]], None] | None = None
    ) -> None:
        for piece in self._pieces:
            is_plain = piece.index == 0 and piece.finish_reason is None
            if take_text is not None and is_plain:
                self.num_short += 1
                take_text(piece.text, piece.token_ids)
            else:
                take(piece)

    def abort(self) -> None:
        pass


def _script(texts: list[str], n: int) -> list[StreamPiece]:
    pieces = [StreamPiece(text, [7], None, index=index) for text in texts for index in range(n)]
    return pieces + [StreamPiece("", [], "length", index=index) for index in range(n)]


def _play(server: Any, patch: pytest.MonkeyPatch, pieces: list[StreamPiece]) -> Scripted:
    request = Scripted(pieces)

    async def start(*_: Any, **__: Any) -> Scripted:
        return request

    patch.setattr(server.engine, "start", start)
    return request


def _connected(server: Any, path: str, **fields: Any) -> socket.socket:
    body = json.dumps({**PATHS[path], "stream": True, "max_tokens": 500, **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nx-request-id: r\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def _all(connection: socket.socket) -> bytes:
    """What comes until the end, but for numbers that no two answers share."""
    with connection:
        data = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    data = re.sub(rb'("id":"[a-z]+-)[0-9a-f]{24}', rb"\g<1>" + 24 * b"0", data)
    return re.sub(rb"(?m)^date: [^\r]*", b"date", re.sub(rb'"created":\d{10}', b'"created":0000000000', data))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("path", PATHS)
def test_the_short_way_gives_the_same_bytes(server: Any, monkeypatch: pytest.MonkeyPatch, path: str, n: int) -> None:
    pieces = _script(TEXTS, n)
    fields = {"n": n, "temperature": 1.0, "stream_options": {"include_usage": True}}
    request = _play(server, monkeypatch, pieces)
    short = _all(_connected(server, path, **fields))
    assert request.num_short == len(TEXTS)

    run = Generation.run
    monkeypatch.setattr(Generation, "run", lambda self, take, take_text=None: run(self, take))
    monkeypatch.setattr(protocol, "chunk_writer", lambda cycle: lambda data: False)
    request = _play(server, monkeypatch, pieces)
    long = _all(_connected(server, path, **fields))
    assert request.num_short == 0
    # The long way puts events that wait into one chunk.
    assert _content(short) == _content(long)
    assert b"[DONE]" in short
    assert short.count(b"\r\ndata: ") >= n * len(TEXTS)


def _content(answer: bytes) -> bytes:
    head, _, body = answer.partition(b"\r\n\r\n")
    content = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        content += body[: int(size, 16)]
        assert body[int(size, 16) :][:2] == b"\r\n"
        body = body[int(size, 16) + 2 :]
    return head + b"\r\n\r\n" + content


@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_reads_late_gets_everything(server: Any, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    texts = [f"{i:05d}" + "x" * 20000 for i in range(500)]  # more than sockets and transports take
    _play(server, monkeypatch, _script(texts, 1))
    connection = _connected(server, path)
    time.sleep(0.5)
    content = _content(_all(connection)).decode()
    assert re.findall(r"(\d{5})x", content) == [text[:5] for text in texts]
    assert content.endswith("data: [DONE]\n\n")


def test_a_client_that_does_not_read_is_refused(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["x" * (1 << 20)] * (2 * _MAX_UNREAD >> 20)
    _play(server, monkeypatch, _script(texts, 1))
    connection = _connected(server, "/v1/completions")
    time.sleep(0.5)
    assert b"the client reads too slowly" in _all(connection)


# ---- the two functions alone ----


class Wire:
    """A transport that keeps what it is given."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data

    def close(self) -> None:
        pass


def _cycle(**more: Any) -> tuple[protocol.RequestResponseCycle, Wire]:
    wire: Any = Wire()

    class Flow:
        write_paused = False

    made = protocol.RequestResponseCycle(
        scope={"method": "POST"},  # type: ignore[typeddict-item]
        transport=wire,
        flow=Flow(),  # type: ignore[arg-type]
        logger=None,  # type: ignore[arg-type]
        access_logger=None,  # type: ignore[arg-type]
        access_log=False,
        default_headers=[],
        message_event=asyncio.Event(),
        expect_100_continue=False,
        keep_alive=True,
        on_response=lambda: None,
    )
    for name, value in more.items():
        setattr(made, name, value)
    return made, wire


START = {"type": "http.response.start", "status": 200, "headers": []}


def test_a_chunk_has_the_bytes_that_uvicorn_sends() -> None:
    async def run() -> None:
        for data in (b"a", b"x" * 15, b"x" * 16, b"x" * 70000, bytes(range(256))):
            (one, expected), (other, written) = _cycle(), _cycle()
            await one.send(START)  # type: ignore[arg-type]
            await other.send(START)  # type: ignore[arg-type]
            await one.send({"type": "http.response.body", "body": data, "more_body": True})
            assert protocol.chunk_writer(other)(data)
            assert written.data == expected.data

    asyncio.run(run())


@pytest.mark.parametrize("state", [{"disconnected": True}, {"response_complete": True}, {"chunked_encoding": False}])
def test_what_is_no_chunk_is_left_to_uvicorn(state: dict[str, Any]) -> None:
    async def run() -> None:
        cycle, wire = _cycle()
        write = protocol.chunk_writer(cycle)
        assert not write(b"before the answer")
        await cycle.send(START)  # type: ignore[arg-type]
        wire.data = b""
        assert not write(b"")  # would be the end
        cycle.flow.write_paused = True
        assert not write(b"a")
        cycle.flow.write_paused = False
        for name, value in state.items():
            setattr(cycle, name, value)
        assert not write(b"a")
        assert wire.data == b""

    asyncio.run(run())


def test_pieces_stay_in_order_when_the_connection_stops_and_goes() -> None:
    async def run() -> None:
        sent: list[bytes] = []
        is_open = True
        gate = asyncio.Event()

        def write(data: bytes) -> bool:
            if is_open:
                sent.append(data)
            return is_open

        async def send(message: Any) -> None:
            await gate.wait()
            sent.append(message["body"])

        writer = _Writer(send, write)
        writer(b"1")
        is_open = False
        writer(b"2")
        await asyncio.sleep(0)
        is_open = True
        writer(b"3")  # the one before still waits
        gate.set()
        await writer.finish()
        writer(b"4")
        assert b"".join(sent) == b"1234"
        is_open = False
        with pytest.raises(ApiError, match="slowly"):
            writer(b"x" * (_MAX_UNREAD + 1))

    asyncio.run(run())
