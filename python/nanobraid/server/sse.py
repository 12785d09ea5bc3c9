"""Answers that end early when the client has gone: streams of server-sent events, and others.

Starlette cancels streams only. Here both kinds run in a task that is cancelled when the client disconnects or the
request's time is over; the generator inside then stops its request, and its blocks are free within one step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from contextlib import suppress
from typing import Any, TypeVar

from nanobraid._logging import logger
from nanobraid.errors import NanobraidError
from nanobraid.server import errors
from nanobraid.server.errors import ApiError
from nanobraid.server.parsing import to_json

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"
_MAX_UNREAD = 16 << 20  # bytes that wait for a client that does not read


class ClientGone(Exception):
    """The client has disconnected; nobody reads an answer."""


def event(data: Any) -> bytes:
    """An event without a name."""
    return b"data: " + to_json(data) + b"\n\n"


def named_event(name: str, data: Any) -> bytes:
    """An event with a name."""
    return b"event: " + name.encode() + b"\n" + event(data)


def named_events(events: Iterable[tuple[str, Any]]) -> bytes:
    """Events with their names, in order."""
    return b"".join(named_event(name, data) for name, data in events)


def error_of(error: BaseException) -> ApiError:
    """What the client is told of an error; what nobody foresaw goes to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NanobraidError):
        answer = errors.of(error)
        if answer.status == 500:
            logger.error("%s: %s", type(error).__name__, error)
        return answer
    logger.error("unexpected error", exc_info=error)
    return errors.internal()


class Guard:
    """Cancels the task that it is made in when the client disconnects or the time is over.

    Args:
        receive: The request's, read to its end.
        timeout_s: Seconds that are left, or None.
    """

    def __init__(self, receive: Receive, timeout_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._gone = False
        self._late = False
        self._watcher = loop.create_task(self._watch(receive))
        self._timer = None if timeout_s is None else loop.call_later(timeout_s, self._expire)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()

    def _expire(self) -> None:
        self._late = True
        self._task.cancel()

    def close(self) -> None:
        """Ends the watch."""
        self._watcher.cancel()
        if self._timer is not None:
            self._timer.cancel()

    def reason(self) -> Exception | None:
        """Why this has cancelled the task; None if it has not."""
        if self._gone:
            return ClientGone()
        return errors.timed_out() if self._late else None


async def guarded(receive: Receive, timeout_s: float | None, work: Coroutine[Any, Any, T]) -> T:
    """Awaits work unless the client goes or the time is over before.

    Raises:
        ClientGone: The client has gone.
        ApiError: The time is over.
    """
    guard = Guard(receive, timeout_s)
    try:
        return await work
    except asyncio.CancelledError:
        if (reason := guard.reason()) is None:
            raise
        raise reason from None
    finally:
        guard.close()


class _Writer:
    """Sends pieces of a body from functions that do not wait.

    Args:
        send: Of the connection.
        write: Writes a piece at once if the connection takes it, and says whether it did (`protocol.chunk_writer`);
            None if there is no such function.

    Attributes:
        last: When something was sent last, by the clock of the event loop.
    """

    __slots__ = ("_loop", "_num_waiting", "_send", "_task", "_time", "_waiting", "_write", "last")

    def __init__(self, send: Send, write: Callable[[bytes], bool] | None) -> None:
        self._send = send
        self._write = write
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time
        self._waiting: list[bytes] = []
        self._num_waiting = 0
        self._task: asyncio.Task[None] | None = None
        self.last = self._loop.time()

    def __call__(self, data: bytes) -> None:
        """Sends a piece, at once or when the client has read what came before.

        Raises:
            ApiError: The client reads too slowly.
        """
        self.last = self._time()
        if self._task is None and self._write is not None and self._write(data):
            return
        self._waiting.append(data)
        self._num_waiting += len(data)
        if self._num_waiting > _MAX_UNREAD:
            raise ApiError(408, "the client reads too slowly")
        if self._task is None:
            self._task = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            while self._waiting:
                data = b"".join(self._waiting)
                self._waiting.clear()
                self._num_waiting = 0
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            self._task = None

    async def finish(self) -> None:
        """Waits until all is sent."""
        if self._task is not None:
            await self._task


class _Pinger:
    """Sends a comment whenever a stream has been quiet for long."""

    def __init__(self, writer: _Writer, interval_s: float) -> None:
        self._writer = writer
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(interval_s, self._look)

    def _look(self) -> None:
        if self._loop.time() - self._writer.last >= self._interval_s:
            with suppress(ApiError):
                self._writer(_PING)
        self._timer = self._loop.call_later(self._interval_s, self._look)

    def close(self) -> None:
        self._timer.cancel()


class EventStream:
    """An ASGI answer of server-sent events.

    Args:
        pump: Gives the events to the function that it is called with, until there are no more.
        on_error: The events for an error that comes up while the answer runs.
        timeout_s: Seconds it may take, or None.
        ping_interval_s: Comments are sent when nothing has been for so long.
    """

    def __init__(
        self,
        pump: Callable[[Callable[[bytes], None]], Coroutine[Any, Any, None]],
        *,
        on_error: Callable[[ApiError], bytes] = lambda error: event(error.envelope()),
        timeout_s: float | None,
        ping_interval_s: float,
    ) -> None:
        self._pump = pump
        self._on_error = on_error
        self._timeout_s = timeout_s
        self._ping_interval_s = ping_interval_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer."""
        guard = Guard(receive, self._timeout_s)
        # The layers between here and the socket look at the beginning of an answer only, and each costs every token.
        writer = _Writer(scope.get("nanobraid.send", send), scope.get("nanobraid.write"))
        pinger = _Pinger(writer, self._ping_interval_s)
        try:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            headers.append((b"x-accel-buffering", b"no"))
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            last = b""
            try:
                await self._pump(writer)
                await writer.finish()
            except asyncio.CancelledError:
                reason = guard.reason()
                if reason is None:
                    raise
                if isinstance(reason, ApiError):
                    last = self._on_error(reason)
            except Exception as error:
                last = self._on_error(error_of(error))
                await writer.finish()
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            pinger.close()
            guard.close()
