"""What uvicorn's HTTP protocol lacks: limits on headers and on silence, and our envelope for what is not HTTP."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from nanobraid.server.errors import ApiError
from nanobraid.server.settings import Settings

_LINGER_S = 2.0
_MAX_READ = 1 << 18  # bytes that event loops read at once; there may be several requests in them
_MAX_FRAMING = 16  # bytes of chunk sizes and extensions a byte of a body may come with


class _Transport:
    """A transport that the protocol closes in its own way."""

    def __init__(self, transport: Any, close: Any) -> None:
        self._transport = transport
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


def chunk_writer(cycle: RequestResponseCycle) -> Callable[[bytes], bool]:
    """A function that writes a piece of an answer in chunks as `send` of its cycle would, without what that costs.

    It returns False, and has written nothing, where `send` would do something else: before the answer has begun, when
    it has ended or has no chunks, when the client has gone, and while it reads too slowly.
    """
    flow, write = cycle.flow, cycle.transport.write

    def write_chunk(data: bytes) -> bool:
        if flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding or not data:
            return False
        write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    return write_chunk


class LimitedProtocol(HttpToolsProtocol):
    """HTTP/1.1 with limits; a subclass made by `limited` has their values."""

    settings = Settings()

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._head_bytes = 0  # that have come of the headers that are being read
        self._field_bytes = 0  # of what the parser has found in them
        self._body_bytes = 0
        self._other_bytes = 0  # framing and trailers
        self._unread_bytes = 0  # of a body whose request is answered already
        self._is_new = True
        self._in_head = True
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._answers: Any = None

    # ---- the connection ----

    def connection_made(self, transport: Any) -> None:
        """A client has connected. It has so long to say what it wants."""
        super().connection_made(transport)
        self._answers = _Transport(transport, self._close)
        self._set_timer(self.settings.header_timeout_s, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._set_timer(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self._refused:
            return  # so that the client can read why before the connection is reset
        self._is_new = False
        before = 0 if self._in_head else self._body_bytes
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head:
            # What came with the last piece of the headers is counted too, so the check is for headers that go on.
            if self._head_bytes > self.settings.max_header_bytes:
                self._refuse()
            return
        self._other_bytes += len(data) - (self._body_bytes - before)
        if self._other_bytes > self.settings.max_header_bytes + _MAX_READ + _MAX_FRAMING * self._body_bytes:
            self._refuse()
        elif self.cycle is not None and self.cycle.response_complete:
            self._unread_bytes += len(data)
            if self._unread_bytes > self.settings.max_body_bytes:
                self.transport.close()

    def _set_timer(self, seconds: float | None, then: Any = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, then)

    def _give_up(self) -> None:
        """The headers, or the rest of a body that nobody needs, did not come in time."""
        if self._is_new or not self._in_head:
            self.transport.close()
        else:
            self._answer(ApiError(408, f"the headers did not arrive within {self.settings.header_timeout_s:g} s"))

    def _close(self) -> None:
        """Closes the connection; if the client is still sending, only after it could read the answer."""
        if self.transport.is_closing():
            return
        if self._in_head and not self._refused:
            self.transport.close()
            return
        self._refused = True
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._set_timer(_LINGER_S, self.transport.close)

    # ---- the parser's callbacks ----

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = self._field_bytes = 0
        self._set_timer(self.settings.header_timeout_s, self._give_up)

    def on_url(self, url: bytes) -> None:
        """A piece of the address has come."""
        super().on_url(url)
        self._add_to_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header has come, or a trailer behind a body."""
        super().on_header(name, value)
        if len(self.headers) > self.settings.max_headers:
            self._refuse()
            raise ValueError("too many headers")  # ends the parser
        self._add_to_head(len(name) + len(value))

    def _add_to_head(self, size: int) -> None:
        self._field_bytes += size
        if self._field_bytes > self.settings.max_header_bytes:
            self._refuse()
            raise ValueError("headers are too long")  # ends the parser

    def on_headers_complete(self) -> None:
        """The headers have come."""
        self._in_head = False
        self._body_bytes = self._other_bytes = self._unread_bytes = 0
        self._set_timer(None)
        super().on_headers_complete()
        self.cycle.transport = self._answers
        self.scope["nanobraid.write"] = chunk_writer(self.cycle)  # type: ignore[typeddict-unknown-key]  # see sse

    def on_body(self, body: bytes) -> None:
        """A piece of the body has come."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request has come."""
        super().on_message_complete()
        self._in_head = True
        self._head_bytes = 0
        self._set_timer(None)

    def on_response_complete(self) -> None:
        """The answer is sent, maybe before the request was there."""
        super().on_response_complete()
        if not self._in_head and not self._refused:
            self._set_timer(self.settings.body_timeout_s, self._give_up)

    # ---- refusals ----

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
        self._refused = True
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not (self.cycle.response_started or self.pipeline):
            if self.cycle is not None:  # whose request, if it waits for its body, will have no other answer
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            body = orjson.dumps(error.envelope())
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nx-request-id: req-{secrets.token_hex(12)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self._close()
        else:  # an answer under way cannot be broken into
            self.transport.close()


def limited(settings: Settings) -> type[LimitedProtocol]:
    """The protocol with the limits of a server."""
    return type("LimitedProtocol", (LimitedProtocol,), {"settings": settings})
