"""Many streaming clients in one process that does as little as it can, for server_overhead.py and server_load.py.

It reads one JSON object from stdin, ``{"host", "port", "path", "clients": [[body, ...], ...]}``. Every client sends its
bodies one after the other, each over a connection of its own; all begin at the same moment. While it runs it only
notes when which bytes came; events are parsed when all is over. One JSON object goes to stdout, see `report`.
"""

from __future__ import annotations

import bisect
import json
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Body = dict[str, Any]


def load(port: int, path: str, clients: Sequence[Sequence[Body]], *, timeout_s: float = 500) -> dict[str, Any]:
    """Runs this file as a process of its own and returns its report."""
    job = {"host": "127.0.0.1", "port": port, "path": path, "clients": clients}
    process = subprocess.run(
        [sys.executable, str(Path(__file__))],
        input=json.dumps(job).encode(),
        stdout=subprocess.PIPE,
        timeout=timeout_s,
        check=True,
    )
    result: dict[str, Any] = json.loads(process.stdout)
    return result


@dataclass
class Exchange:
    """One request and the bytes that came for it, with the moments."""

    request: bytes
    begin: float = 0.0
    end: float = 0.0
    times: list[float] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    error: str | None = None


def exchange_all(host: str, port: int, clients: list[deque[Exchange]]) -> float:
    """Sends everything, reads until every server has closed; returns the seconds it took."""
    selector = selectors.DefaultSelector()
    now = time.perf_counter

    def begin(queue: deque[Exchange]) -> None:
        exchange = queue.popleft()
        exchange.begin = now()
        try:
            connection = socket.create_connection((host, port), timeout=30)
            connection.sendall(exchange.request)
        except OSError as error:
            exchange.error = f"{type(error).__name__}: {error}"
            exchange.end = now()
            if queue:
                begin(queue)
            return
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, (exchange, queue))

    start = now()
    for queue in clients:
        begin(queue)
    while selector.get_map():
        for key, _ in selector.select():
            exchange, queue = key.data
            connection: Any = key.fileobj
            try:
                data = connection.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError as error:
                exchange.error = f"{type(error).__name__}: {error}"
                data = b""
            moment = now()
            if data:
                exchange.times.append(moment)
                exchange.pieces.append(data)
                continue
            exchange.end = moment
            selector.unregister(connection)
            connection.close()
            if queue:
                begin(queue)
    return now() - start


def unchunked(body: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """The content of a body in chunked encoding, and where in the body the chunks end: (in the content, in the body).

    Raises:
        ValueError: It is not, or not all of it is there.
    """
    content, ends, at = bytearray(), [], 0
    while True:
        line_end = body.index(b"\r\n", at)
        size = int(body[at:line_end], 16)
        if size == 0:
            return bytes(content), ends
        at = line_end + 2 + size
        if len(body) < at + 2:
            raise ValueError("a chunk was cut off")
        content += body[line_end + 2 : at]
        at += 2
        ends.append((len(content), at))


def outcome(exchange: Exchange) -> dict[str, Any]:
    """What became of a request.

    Returns:
        ``error`` or None; ``tokens``, by the usage that the server reports; ``ttft_s``, to the first event with text;
        ``arrivals_s``, when events with text came; ``total_s``.
    """
    result: dict[str, Any] = {"error": exchange.error, "tokens": 0, "ttft_s": None, "arrivals_s": []}
    result["total_s"] = exchange.end - exchange.begin
    if exchange.error is not None:
        return result
    raw = b"".join(exchange.pieces)
    head, _, body = raw.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        result["error"] = (head.split(b"\r\n", 1)[0] + b" " + body[:300]).decode(errors="replace")
        return result
    try:
        content, ends = unchunked(body)
    except ValueError as error:
        result["error"] = f"the answer broke off: {error}"
        return result
    received: list[int] = []  # bytes that had come by each moment
    for piece in exchange.pieces:
        received.append(len(piece) + (received[-1] if received else 0))
    offset, done = 0, False
    for event in content.split(b"\n\n"):
        offset += len(event) + 2
        if not event.startswith(b"data: "):
            continue
        if event == b"data: [DONE]":
            done = True
            continue
        data = json.loads(event[6:])
        if "error" in data:
            result["error"] = str(data["error"])
        if data.get("usage"):
            result["tokens"] = data["usage"]["completion_tokens"]
        if any(choice.get("text") or choice.get("delta", {}).get("content") for choice in data.get("choices", ())):
            in_body = ends[bisect.bisect_left(ends, (min(offset, len(content)), 0))][1]
            moment = exchange.times[bisect.bisect_left(received, len(head) + 4 + in_body)]
            result["arrivals_s"].append(moment - exchange.begin)
    if not done and result["error"] is None:
        result["error"] = "no [DONE]"
    if result["arrivals_s"]:
        result["ttft_s"] = result["arrivals_s"][0]
    return result


def report(host: str, port: int, path: str, clients: list[list[Body]]) -> dict[str, Any]:
    """Runs a job.

    Returns:
        ``seconds`` from the first byte sent to the last received, ``client_cpu_s`` in that time, ``requests``: a list
        of `outcome`.
    """
    queues = []
    for bodies in clients:
        queue: deque[Exchange] = deque()
        for body in bodies:
            data = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            queue.append(Exchange(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data))
        queues.append(queue)
    exchanges = [exchange for queue in queues for exchange in queue]
    cpu = time.process_time()
    seconds = exchange_all(host, port, queues)
    cpu = time.process_time() - cpu
    return {"seconds": seconds, "client_cpu_s": cpu, "requests": [outcome(exchange) for exchange in exchanges]}


def main() -> int:
    job = json.load(sys.stdin)
    print(json.dumps(report(job["host"], job["port"], job["path"], job["clients"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
