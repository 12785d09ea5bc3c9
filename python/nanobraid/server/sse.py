"""Answers that end early when the client has gone: streams of server-sent events, and others.

Starlette cancels streams only. Here both kinds run in a task that is cancelled when the client disconnects or the
request's time is over; the generator inside then stops its request, and its blocks are free within one step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, MutableMapping
from contextlib import aclosing
from typing import Any, TypeVar

import orjson

from nanobraid._logging import logger
from nanobraid.errors import NanobraidError
from nanobraid.server import errors
from nanobraid.server.errors import ApiError

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"


class ClientGone(Exception):
    """The client has disconnected; nobody reads an answer."""


def event(data: Any) -> bytes:
    """An event without a name."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


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


class _Pinger:
    """Sends a comment whenever a stream has been quiet for long.

    Attributes:
        last: When the stream has last sent something.
    """

    def __init__(self, send: Send, interval_s: float) -> None:
        self._send = send
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.last = self._loop.time()
        self._timer = self._loop.call_later(interval_s, self._look)

    def _look(self) -> None:
        if self._loop.time() - self.last >= self._interval_s:
            task = self._loop.create_task(self._ping())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._timer = self._loop.call_later(self._interval_s, self._look)

    async def _ping(self) -> None:
        await self._send({"type": "http.response.body", "body": _PING, "more_body": True})

    def close(self) -> None:
        self._timer.cancel()


class EventStream:
    """An ASGI answer of server-sent events.

    Args:
        events: What is sent, in pieces; closed at the end, whatever the end is.
        on_error: The events for an error that comes up while the answer runs.
        timeout_s: Seconds it may take, or None.
        ping_interval_s: Comments are sent when nothing has been for so long.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        on_error: Callable[[ApiError], bytes] = lambda error: event(error.envelope()),
        timeout_s: float | None,
        ping_interval_s: float,
    ) -> None:
        self._events = events
        self._on_error = on_error
        self._timeout_s = timeout_s
        self._ping_interval_s = ping_interval_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer."""
        guard = Guard(receive, self._timeout_s)
        # The layers between here and the socket look at the beginning of an answer only, and each costs every token.
        direct: Send = scope.get("nanobraid.send", send)
        pinger = _Pinger(direct, self._ping_interval_s)
        now = asyncio.get_running_loop().time
        try:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            headers.append((b"x-accel-buffering", b"no"))
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async with aclosing(self._events) as events:
                    async for data in events:
                        pinger.last = now()
                        await direct({"type": "http.response.body", "body": data, "more_body": True})
            except asyncio.CancelledError:
                reason = guard.reason()
                if reason is None:
                    raise
                if isinstance(reason, ApiError):
                    await send({"type": "http.response.body", "body": self._on_error(reason), "more_body": True})
            except Exception as error:
                data = self._on_error(error_of(error))
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            pinger.close()
            guard.close()
