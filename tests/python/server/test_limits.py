"""Clients that send too much, too slowly, or something else than HTTP; others are served meanwhile."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from http_checks import chat_bytes, connect, is_closed, post_head, read_answer, refused, refused_on

from nanobraid.server.settings import Settings

MAX_BODY = 1 << 20


@pytest.fixture(scope="module")
def limited_server(serve: Any) -> Iterator[Any]:
    """A server with small limits."""
    settings = Settings(header_timeout_s=0.6, body_timeout_s=0.8, max_body_bytes=MAX_BODY)
    with serve(settings) as server:
        yield server


@pytest.fixture
def server(limited_server: Any) -> Iterator[Any]:
    yield limited_server
    limited_server.wait_idle()
    assert limited_server.chat(max_tokens=1).status_code == 200  # it still serves
    assert limited_server.app.service.num_active == 0


def _send(connection: socket.socket, data: bytes) -> None:
    """Sends as far as the server lets it."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost\x00: a\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}}",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1e3\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        bytes(range(256)) * 8,
    ],
)
def test_what_is_not_http_is_answered_in_the_envelope(server: Any, data: bytes) -> None:
    with connect(server) as connection:
        _send(connection, data)
        refused_on(connection, 400)
        assert is_closed(connection)


@pytest.mark.parametrize("count", [101, 10_000])
def test_too_many_headers(server: Any, count: int) -> None:
    with connect(server) as connection:
        _send(connection, b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n" + b"x: y\r\n" * count + b"\r\n")
        refused_on(connection, 431)
        assert is_closed(connection)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 65_537 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"".join(b"x%d: " % i + b"a" * 2000 + b"\r\n" for i in range(60)) + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: " + b"a" * 100_000,
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1;" + b"a" * 1_000_000,
    ],
    ids=["1 MB in one", "one", "many", "url", "trailer", "chunk extension"],
)
def test_headers_that_are_too_long(server: Any, data: bytes) -> None:
    with connect(server) as connection:
        _send(connection, data)
        status, _, _ = read_answer(connection)
        # Behind the headers of a request there may be an answer already, that its content-type is wrong.
        assert status == 431 or (status == 415 and b"chunked" in data)
        assert is_closed(connection)


def test_a_long_header_in_small_pieces_is_cut_off(server: Any) -> None:
    with connect(server) as connection:
        _send(connection, b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx: ")
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 1_000_000:
                connection.sendall(b"a" * 1000)
                sent += 1000
        refused_on(connection, 431)
        assert is_closed(connection)


def test_headers_must_arrive_in_time(server: Any) -> None:
    begin = time.monotonic()
    with connect(server) as silent, connect(server) as slow:
        _send(slow, b"GET /health HTTP/1.1\r\n")
        for _ in range(4):  # every byte comes within the time, the whole does not
            time.sleep(0.1)
            _send(slow, b"a")
        refused_on(slow, 408)
        assert is_closed(slow)
        assert is_closed(silent)
    assert 0.5 < time.monotonic() - begin < 3


def test_a_body_must_arrive_in_time(server: Any) -> None:
    begin = time.monotonic()
    with connect(server) as connection:
        _send(connection, post_head(1000))
        for byte in b'{"mes':
            time.sleep(0.1)
            _send(connection, bytes([byte]))
        assert server.chat(max_tokens=1).status_code == 200
        refused_on(connection, 408)
        assert is_closed(connection)
    assert 0.5 < time.monotonic() - begin < 4


def test_the_rest_of_a_body_is_not_awaited_for_long(server: Any) -> None:
    with connect(server) as connection:
        _send(connection, post_head(1000, "/nowhere"))
        assert read_answer(connection)[0] == 404
        assert is_closed(connection, 3)


def test_the_rest_of_a_body_is_read_so_that_the_connection_can_be_kept(server: Any) -> None:
    with connect(server) as connection:
        _send(connection, post_head(1000, "/nowhere"))
        assert read_answer(connection)[0] == 404
        _send(connection, b" " * 1000 + chat_bytes())
        assert read_answer(connection)[0] == 200


def test_a_body_beyond_the_limit_is_refused_without_reading_it(server: Any) -> None:
    with connect(server) as connection:
        _send(connection, post_head(100_000_000))
        _, headers, _ = read_answer(connection, 2)  # although nothing of the body was sent
        assert headers["connection"] == "close"
        assert is_closed(connection)
    with connect(server) as connection:
        begin = time.monotonic()
        _send(connection, post_head(100_000_000, "/v1/chat/completions", "expect: 100-continue"))
        refused_on(connection, 413, 2)
        assert time.monotonic() - begin < 1


def test_a_hundred_megabytes_do_not_stay_in_memory(server: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    piece = b" " * (1 << 20)
    with connect(server) as connection:
        _send(connection, post_head(100_000_000))
        for _ in range(95):
            _send(connection, piece)
        refused_on(connection, 413)  # readable although the client was still sending
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("most", [MAX_BODY - 1, 8 * MAX_BODY])
def test_chunked_bodies_have_the_same_limit(server: Any, most: int) -> None:
    head = post_head(0).replace(b"content-length: 0", b"transfer-encoding: chunked")
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with connect(server) as connection:
        _send(connection, head + piece * (most // 0x10000) + b"0\r\n\r\n")
        error = refused_on(connection, 413 if most > MAX_BODY else 400)
    assert error["code"] == ("request_too_large" if most > MAX_BODY else "invalid_json")


def test_a_body_of_the_limit_and_one_more(server: Any) -> None:
    for size, status in ((MAX_BODY, 400), (MAX_BODY + 1, 413)):
        body = b'{"messages": []' + b" " * (size - 16) + b"}"
        assert len(body) == size
        refused(
            server.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"}),
            status,
        )


def test_a_half_closed_connection_ends_its_request(server: Any) -> None:
    for data in (b"", b"GET /hea", post_head(100) + b"{", chat_bytes(max_tokens=500, ignore_eos=True)):
        with connect(server) as connection:
            _send(connection, data)
            connection.shutdown(socket.SHUT_WR)
            assert is_closed(connection)
        server.wait_idle(1.0)


def test_a_thousand_idle_connections_disturb_nobody(serve: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2400:
        if hard != resource.RLIM_INFINITY and hard < 2400:
            pytest.skip(f"only {hard} open files are allowed here, and the test needs 2400")
        resource.setrlimit(resource.RLIMIT_NOFILE, (2400, hard))
    with serve(Settings(header_timeout_s=60)) as server, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(server)) for _ in range(1000)]
        for connection in idle[::2]:
            connection.sendall(b"GET /health HT")
        alone = min(_seconds(server) for _ in range(3))
        assert server.chat(max_tokens=4).status_code == 200
        assert alone < 0.5
        idle[0].sendall(b"TP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert read_answer(idle[0])[0] == 200  # and they are not dead


def _seconds(server: Any) -> float:
    begin = time.perf_counter()
    assert server.client.get("/health").status_code == 200
    return time.perf_counter() - begin


def test_pipelined_requests_are_answered_in_turn(server: Any) -> None:
    with connect(server) as connection:
        _send(connection, chat_bytes() + chat_bytes(temperature=9) + chat_bytes())
        data = b""
        end = time.monotonic() + 20
        while data.count(b"HTTP/1.1 ") < 3 and time.monotonic() < end:
            data += connection.recv(65536)
    assert [part[:3] for part in data.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400", b"200"]
