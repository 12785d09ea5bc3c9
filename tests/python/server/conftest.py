"""A running server for tests: uvicorn in a thread, with a real engine and the default model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_threads import THREADS

import nanobraid as nb

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

import uvicorn  # noqa: E402

from nanobraid.server.app import create_app  # noqa: E402
from nanobraid.server.edge import Edge  # noqa: E402
from nanobraid.server.protocol import limited  # noqa: E402
from nanobraid.server.settings import Settings  # noqa: E402


class Running:
    """A server in a thread.

    Attributes:
        url: Where it is.
        app: What it serves.
        engine: Its engine.
        client: For requests.
    """

    def __init__(self, app: Edge, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.app = app
        self.engine = app.service.engine
        self.port = port
        self.loop = loop
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60, verify=False)  # reading certificates takes time

    def post(self, path: str, body: Any = None, **more: Any) -> Any:
        """Sends JSON."""
        return self.client.post(path, json=body, **more)

    def chat(self, text: str = "Say hello.", **fields: Any) -> Any:
        """A short chat; greedy unless said otherwise."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}
        return self.post("/v1/chat/completions", body)

    def is_idle(self) -> bool:
        """Whether every block has been given back and nobody waits."""
        stats = self.engine.stats()
        return stats["running"] == 0 and stats["waiting"] == 0 and stats["blocks_owned"] == 0

    def wait_idle(self, seconds: float = 5.0) -> None:
        """Fails unless everything ends in time."""
        end = time.monotonic() + seconds
        while not self.is_idle():
            assert time.monotonic() < end, self.engine.stats()
            time.sleep(0.01)


@contextmanager
def running(engine: nb.AsyncEngine, settings: Settings | None = None, **more: Any) -> Iterator[Running]:
    """Serves an engine while the context lasts; does not close it."""
    app = create_app(engine, settings or Settings(), **more)
    options = app.service.settings
    config = uvicorn.Config(
        app,
        port=0,
        loop="uvloop",
        http=limited(options),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)  # which leaves signals alone outside the main thread
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    import uvloop

    thread = threading.Thread(target=lambda: uvloop.run(run()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(app, port, loops[0])
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def served_llm(model_path: Path) -> Iterator[nb.LLM]:
    """The engine of the shared server."""
    with nb.LLM(model_path, num_threads=THREADS, max_model_len=1024, max_num_seqs=16, max_waiting=64) as llm:
        yield llm


@pytest.fixture(scope="session")
def serve(served_llm: nb.LLM) -> Callable[..., Any]:
    """Starts further servers of the same engine: ``with serve(Settings(...)) as server``."""

    def start(settings: Settings | None = None, **more: Any) -> Any:
        return running(nb.AsyncEngine(served_llm), settings, **more)

    return start


@pytest.fixture(scope="session")
def shared_server(served_llm: nb.LLM) -> Iterator[Running]:
    """One server for all tests that leave it as they found it."""
    with running(nb.AsyncEngine(served_llm)) as server:
        yield server


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    """The shared server; after the test nothing of it is left in the engine."""
    yield shared_server
    shared_server.wait_idle()
