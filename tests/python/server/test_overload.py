"""Too much work, too little time, and the end of the server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_threads import THREADS
from http_checks import check_envelope, refused

import nanobraid as nb
from conftest import running
from nanobraid.server.settings import Settings

httpx = pytest.importorskip("httpx")

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "max_tokens": 900,
    "ignore_eos": True,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def small(model_path: Path) -> Iterator[Any]:
    """A server whose engine runs one request and lets two wait."""
    options: dict[str, Any] = {"num_threads": THREADS, "max_model_len": 1024, "max_num_seqs": 1, "max_waiting": 2}
    with nb.LLM(model_path, **options) as llm, running(nb.AsyncEngine(llm), Settings()) as server:
        yield server


@contextmanager
def _busy(server: Any) -> Iterator[None]:
    """Meanwhile one request runs and two wait."""
    clients = [httpx.Client(base_url=server.url, timeout=60) for _ in range(3)]
    streams = []
    try:
        for i, client in enumerate(clients):
            stream = client.stream("POST", CHAT, json={**LONG, "stream": True})
            threading.Thread(target=lambda s=stream: streams.append((s, s.__enter__())), daemon=True).start()
            _await_stats(server, running=1, waiting=i)
        yield
    finally:
        for client in clients:
            client.close()
        server.wait_idle()


def _await_stats(server: Any, **wanted: int) -> None:
    end = time.monotonic() + 10
    while any(server.engine.stats()[name] != value for name, value in wanted.items()):
        assert time.monotonic() < end, (wanted, server.engine.stats())
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue(small: Any, stream: bool) -> None:
    with _busy(small):
        for path, body in (
            (CHAT, {**LONG, "stream": stream}),
            ("/v1/completions", {"prompt": "Once", "stream": stream}),
            (CHAT, {**LONG, "stream": stream, "chunks": [{"text": "a b c d e f g"}]}),
        ):
            begin = time.monotonic()
            refused(small.post(path, body), 503, None, "server_is_overloaded")
            assert time.monotonic() - begin < 2
        answer = small.post("/v1/messages", {**{k: LONG[k] for k in ("messages", "max_tokens")}, "stream": stream})
        assert answer.status_code == 503
        assert answer.json()["type"] == "error"
        assert int(answer.headers["retry-after"]) >= 1
        assert small.client.get("/health").status_code == small.client.get("/ready").status_code == 200
    assert small.chat(max_tokens=1).status_code == 200


def test_deadlines(small: Any) -> None:
    begin = time.monotonic()
    answer = small.post(CHAT, {**LONG, "timeout_s": 0.3})
    refused(answer, 504, None, None)
    assert answer.headers["x-should-retry"] == "false"
    assert 0.25 < time.monotonic() - begin < 2
    for path, body in ((CHAT, LONG), ("/v1/completions", {"prompt": "Once", "max_tokens": 900, "ignore_eos": True})):
        for timeout_s in (0.3, 0.6, 1.2, 2.4):  # longer where the machine is too busy for a token
            with small.client.stream("POST", path, json={**body, "timeout_s": timeout_s, "stream": True}) as response:
                assert response.status_code == 200
                lines = [line for line in response.iter_lines() if line]
            check_envelope(504, json.loads(lines[-1].removeprefix("data: ")))
            assert "[DONE]" not in lines[-1]
            if len(lines) > 2:
                break
        assert len(lines) > 2  # what was there came before
    small.wait_idle()


def test_deadlines_of_the_server_and_in_the_queue(model_path: Path) -> None:
    options: dict[str, Any] = {"num_threads": THREADS, "max_model_len": 1024, "max_num_seqs": 1}
    settings = Settings(request_timeout_s=0.4)
    with nb.LLM(model_path, **options) as llm, running(nb.AsyncEngine(llm), settings) as server:
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda: answers.append(httpx.post(server.url + CHAT, json=LONG, timeout=30)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for answer in answers:  # two of them have waited all the time
            refused(answer, 504)
        assert len(answers) == 3
        refused(server.post(CHAT, {**LONG, "timeout_s": 100}), 504)  # requests may ask for less, not for more
        server.wait_idle(1.0)
        assert server.chat(max_tokens=1).status_code == 200


# ---- the end ----


class Process:
    """``python -m nanobraid serve``."""

    def __init__(self, model: Path, *options: str) -> None:
        command = [sys.executable, "-m", "nanobraid", "serve", str(model), "--port", "0", "--max-model-len", "1024"]
        self.process = subprocess.Popen(
            [*command, "--threads", str(THREADS), *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"Ready at (http://[0-9.:]+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.lines))
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()), daemon=True)
        self._reader.start()

    def end(self) -> int:
        """Waits for the end; returns the exit code."""
        code = self.process.wait(20)
        self._reader.join(5)
        return code


class Stream(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._body = {**LONG, "max_tokens": max_tokens, "stream": True}
        self.lines: list[str] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url + CHAT, json=self._body, timeout=60) as response:
                self.lines += [f"{response.status_code}"]
                for line in response.iter_lines():
                    self.lines += [line] if line else []
        except Exception as error:
            self.error = error


def _begun(streams: list[Stream]) -> None:
    end = time.monotonic() + 20
    while any(len(stream.lines) < 4 for stream in streams):
        assert time.monotonic() < end, [(stream.lines[:2], stream.error) for stream in streams]
        time.sleep(0.01)


@pytest.mark.parametrize("finishes", [True, False])
def test_sigterm_with_eight_streams(model_path: Path, finishes: bool) -> None:
    server = Process(model_path, "--drain-timeout", "20" if finishes else "0.5")
    try:
        streams = [Stream(server.url, 40 if finishes else 900) for _ in range(8)]
        _begun(streams)
        with httpx.Client(base_url=server.url, timeout=20) as client:
            assert client.get("/ready").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            end = time.monotonic() + 2
            while client.get("/ready").status_code == 200:
                assert time.monotonic() < end
            refused(client.get("/ready"), 503, None, "server_is_overloaded")
            refused(client.post(CHAT, json=LONG), 503, None, "server_is_overloaded")
            assert client.get("/health").status_code == 200
        for stream in streams:
            stream.join(30)
            assert stream.error is None
            assert stream.lines[0] == "200"
            if finishes:
                assert stream.lines[-1] == "data: [DONE]"
                assert json.loads(stream.lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            else:
                error = check_envelope(503, json.loads(stream.lines[-1].removeprefix("data: ")))
                assert error["code"] == "server_is_overloaded"
        assert server.end() == 0, server.lines
    finally:
        server.process.kill()
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(model_path: Path, number: signal.Signals) -> None:
    server = Process(model_path, "--drain-timeout", "60")
    try:
        streams = [Stream(server.url, 900)]
        _begun(streams)
        server.process.send_signal(number)
        time.sleep(0.3)
        assert server.process.poll() is None
        begin = time.monotonic()
        server.process.send_signal(number)
        server.end()
        assert time.monotonic() - begin < 3
        streams[0].join(5)
        assert not streams[0].is_alive()
    finally:
        server.process.kill()


def test_an_idle_server_ends_at_once(model_path: Path) -> None:
    server = Process(model_path)
    try:
        with httpx.Client(base_url=server.url) as client:
            assert client.get("/health").status_code == 200
            begin = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.end() == 0  # although a connection is open
            assert time.monotonic() - begin < 4
    finally:
        server.process.kill()
