"""Shares the engine among calls: each call has an outbox that the engine's own thread fills.

Waiting is done in pieces, because a thread that waits inside the core does not see Ctrl-C.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nanobraid import _core
from nanobraid.errors import InvalidArgumentError, UnsupportedError, core_errors, error_of

_PIECE_SECONDS = 0.1


class Call:
    """The requests of one call of the user.

    Args:
        streams: Wake up for every token; otherwise when a request has ended, and every 0.1 s.

    Attributes:
        outbox: Where the engine puts their outputs.
        indices: Request ids to what `Driver.submit` was given.
    """

    def __init__(self, *, streams: bool) -> None:
        self.outbox = _core.Outbox(wake_each_step=streams)
        self.indices: dict[int, int] = {}


class Driver:
    """Owns an engine. Every method may be called from any thread."""

    def __init__(self, engine: _core.Engine) -> None:
        self._engine = engine
        self._pid = os.getpid()
        self._closed = False
        # Also when the interpreter ends: the engine's thread must not outlive it.
        self._closer = weakref.finalize(self, _close, engine, self._pid)

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._closed

    def check_open(self) -> None:
        """Raises if there is no engine to ask.

        Raises:
            InvalidArgumentError: It has been closed.
            UnsupportedError: This process was forked from the one that made it; threads do not survive that.
        """
        if self._closed:
            raise InvalidArgumentError("this LLM is closed")
        if os.getpid() != self._pid:
            raise UnsupportedError("this LLM was made before the process was forked; make it after the fork")

    def stats(self) -> dict[str, Any]:
        """The engine's counters, and the memory of the process."""
        self.check_open()
        with core_errors():
            memory = _core.memory_status()
            return {**self._engine.stats(), **{key: memory[key] for key in ("rss_bytes", "peak_rss_bytes")}}

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is submitted inside enters one step together."""
        self.check_open()
        self._engine.hold()
        try:
            yield
        finally:
            self._engine.release()

    def submit(self, call: Call, index: int, prompt_token_ids: list[int], **options: Any) -> int:
        """Queues a request whose outputs go to `call` under `index`; returns its id."""
        self.check_open()
        with core_errors():
            request_id = self._engine.submit(call.outbox, prompt_token_ids, **options)
        call.indices[request_id] = index
        return request_id

    def compute_chunk(
        self, call: Call, index: int, tokens: list[int], anchor: list[int], *, pin: bool, cache_salt: str
    ) -> None:
        """Queues a request for nothing but a chunk."""
        what: dict[str, Any] = {
            "max_tokens": 0,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        rest: dict[str, Any] = {
            "seed": None,
            "ignore_eos": False,
            "stop_token_ids": [],
            "logit_bias": {},
            "streams": False,
        }
        chunks = [(0, len(tokens), anchor)]
        self.submit(
            call, index, tokens, **what, **rest, chunks=chunks, only_chunks=True, pin_chunks=pin, cache_salt=cache_salt
        )

    def num_cached(self, tokens: list[int], cache_salt: str) -> int:
        """How many of the first tokens the prefix cache could give now."""
        self.check_open()
        with core_errors():
            return self._engine.num_cached(tokens, cache_salt)

    def find_chunk(self, tokens: list[int], anchor: list[int], cache_salt: str) -> int:
        """The id of the chunk with this content, or 0."""
        self.check_open()
        with core_errors():
            return self._engine.find_chunk(tokens, anchor, cache_salt)

    def list_chunks(self, cache_salt: str) -> list[dict[str, Any]]:
        """What the engine knows of the chunks of a namespace."""
        self.check_open()
        with core_errors():
            return self._engine.list_chunks(cache_salt)

    def remove_chunk(self, chunk_id: int) -> bool:
        """Whether there was such a chunk, which cannot be found any more."""
        self.check_open()
        with core_errors():
            return self._engine.remove_chunk(chunk_id)

    def pin_chunk(self, chunk_id: int, pinned: bool) -> bool:
        """Whether there is such a chunk."""
        self.check_open()
        with core_errors():
            return self._engine.pin_chunk(chunk_id, pinned)

    def block_bytes(self) -> int:
        """Memory of the keys and values of one block."""
        return int(self.stats()["kv_block_bytes"])

    def wait(self, call: Call) -> list[tuple[int, _core.StepOutput]]:
        """Waits for outputs and returns them with their indices; none when every request has ended and been read.

        Raises:
            InvalidArgumentError: The engine was closed.
            NanobraidError: A step failed.
        """
        while True:
            ended = call.outbox.num_unfinished == 0  # asked first: what it counts has been put in
            outputs = call.outbox.wait(0.0 if ended else _PIECE_SECONDS)
            for output in outputs:
                self.check(output)
            if outputs or ended:
                return [(call.indices[output.request_id], output) for output in outputs]

    def check(self, output: _core.StepOutput) -> None:
        """Raises if a request was ended by something else than its user.

        Raises:
            InvalidArgumentError: The engine was closed.
            NanobraidError: A step failed.
        """
        if output.finish_reason != "abort":
            return
        if output.error is not None:
            raise error_of(*output.error)
        if self._closed:
            raise InvalidArgumentError("this LLM was closed during the call")

    def cancel(self, call: Call) -> None:
        """Stops all active requests of `call`; their memory has been given back when it returns."""
        if call.outbox.num_unfinished == 0 or os.getpid() != self._pid:
            return
        self._engine.cancel_all(call.outbox)
        # The garbage collector may close a generator in Python code that the engine's own thread runs. Then the next
        # step does the work.
        while not self._engine.is_this_thread and not call.outbox.wait_for_ends(_PIECE_SECONDS):
            pass

    def cancel_request(self, request_id: int) -> None:
        """Stops one request; its last output says so."""
        self._engine.cancel(request_id)

    def drain(self, seconds: float) -> bool:
        """Refuses new requests and waits at most so long until those there have ended; whether they have."""
        return self._engine.drain(seconds)

    def close(self) -> None:
        """Ends what runs and stops the engine. Calls in progress raise."""
        self._closed = True
        self._closer()


def _close(engine: _core.Engine, pid: int) -> None:
    if os.getpid() == pid:
        engine.close()
