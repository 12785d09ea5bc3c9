"""Runs the server: sockets, signals, logs and what is printed when it starts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from nanobraid.errors import InvalidArgumentError
from nanobraid.server.edge import Edge, access_log
from nanobraid.server.protocol import limited
from nanobraid.server.service import Service

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class _JsonLines(logging.Formatter):
    """A line of JSON for every record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        access = getattr(record, "access", None)
        line |= access if access is not None else {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _AccessLines(logging.Formatter):
    """A line for every request; what clients sent is in quotes."""

    def format(self, record: logging.LogRecord) -> str:
        access: dict[str, Any] = dict(getattr(record, "access", {}))
        first = [access.pop(name, "") for name in ("client", "method", "path", "status", "ms")]
        rest = " ".join(f"{name}={json.dumps(value)}" for name, value in access.items())
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{clock} {first[0]} {first[1]} {json.dumps(first[2])} {first[3]} {first[4]} ms {rest}"


def set_up_logs(*, as_json: bool) -> None:
    """Sends the access log to stderr, and with `as_json` all lines as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if as_json else _AccessLines())
    access_log.handlers[:] = [handler]
    access_log.propagate = False
    access_log.setLevel(logging.INFO)
    if as_json:
        for shown in logging.getLogger("nanobraid").handlers:
            if isinstance(shown, logging.StreamHandler):
                shown.setFormatter(_JsonLines())


class Server(uvicorn.Server):
    """uvicorn that ends as promised: on SIGTERM or Ctrl-C running requests are finished, and the exit code is 0.

    Args:
        config: uvicorn's.
        service: The model.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def _serve(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super()._serve(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handles SIGINT and SIGTERM while the server runs."""
        kept = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to end; the second time ends at once."""
        if self._loop is None or self._drain is not None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_to_end)

    def _begin_to_end(self) -> None:
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        active = self._service.num_active
        if active:
            seconds = self._service.settings.drain_timeout_s
            print(f"Finishing {active} requests, at most {seconds:g} s; Ctrl-C ends at once.", file=sys.stderr)
        await self._service.drain()
        self.should_exit = True


def bound_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that nobody else can take; connections are refused until it is served.

    Args:
        host: Address or name of this machine.
        port: Port; 0 for any free one.

    Raises:
        InvalidArgumentError: The address is not this machine's, or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except BaseException:
            made.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidArgumentError(f"cannot listen at {host}, port {port}: {reason}") from None
    return made


def serve(app: Edge, listener: socket.socket, *, started: Callable[[int], None] | None = None) -> None:
    """Serves until a signal comes.

    Args:
        app: From `create_app`.
        listener: From `bound_socket`; closed at the end.
        started: Called with the port once requests are taken.
    """
    settings = app.service.settings
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=limited(settings),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        backlog=2048,
    )
    server = Server(config, app.service)

    async def run() -> None:
        task = asyncio.ensure_future(server.serve([listener]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        if server.started and started is not None:
            started(listener.getsockname()[1])
        await task

    uvloop.run(run())
