"""What uvicorn's HTTP protocol lacks: limits on headers and on silence, and our envelope for what is not HTTP."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nanobraid.server.errors import ApiError

HEADER_TIMEOUT_S = 20.0


class LimitedProtocol(HttpToolsProtocol):
    """HTTP/1.1 with limits; a subclass made by `limited` has their values."""

    max_header_bytes = 64 << 10
    max_headers = 100

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._head_bytes = 0
        self._in_head = True
        self._refused = False
        self._silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected. It has so long to say what it wants."""
        super().connection_made(transport)
        self._silence = self.loop.call_later(HEADER_TIMEOUT_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        if self._silence is not None:
            self._silence.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self._in_head and not self.transport.is_closing():
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self._refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        # What came with the last piece of the headers is counted too, so the check is for headers that go on.
        if self._in_head and self._head_bytes > self.max_header_bytes:
            self._refuse()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        if self._silence is not None:
            self._silence.cancel()
        self._silence = self.loop.call_later(HEADER_TIMEOUT_S, self._give_up)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header has come."""
        super().on_header(name, value)
        if (
            len(self.headers) > self.max_headers
            or sum(len(n) + len(v) for n, v in self.headers[-1:]) > self.max_header_bytes
        ):
            self._refuse()
            raise ValueError("too many headers")  # ends the parser

    def on_headers_complete(self) -> None:
        """The headers have come."""
        self._in_head = False
        if self._silence is not None:
            self._silence.cancel()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request has come."""
        super().on_message_complete()
        self._in_head = True
        self._head_bytes = 0

    def _refuse(self) -> None:
        if not self._refused:
            self._refused = True
            self._answer(ApiError(431, "the request has too many headers, or they are too long"))

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are not HTTP."""
        if not self._refused:
            self._refused = True
            self._answer(ApiError(400, "this is not an HTTP request"))

    def _answer(self, error: ApiError) -> None:
        if self.transport.is_closing():
            return
        body = orjson.dumps(error.envelope())
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def limited(max_header_bytes: int, max_headers: int) -> type[LimitedProtocol]:
    """The protocol with these limits."""
    limits = {"max_header_bytes": max_header_bytes, "max_headers": max_headers}
    return type("LimitedProtocol", (LimitedProtocol,), limits)
