"""Runs the engine on behalf of calls: several threads and open streams share one continuous batch.

The core's engine is not thread-safe and reports what a step did for all requests at once. Here every step is made under
one lock by whichever call needs a result next, and its outputs are put into the mailboxes of the calls they belong to.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nanobraid import _core
from nanobraid.errors import InternalError, InvalidArgumentError, core_errors


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Holds Ctrl-C back until the block has ended, so that outputs of a step cannot get lost half-way.

    Only the main thread receives signals; elsewhere, and where the program ignores SIGINT or leaves it to the system,
    this does nothing.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    pending: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending:
            previous(*pending[-1])


class Call:
    """The requests of one call of the user, and the outputs that wait for it.

    Attributes:
        outputs: (index of the request within the call, output) in the order the engine reported them.
        active: Ids of requests whose end has not been reported yet.
    """

    def __init__(self) -> None:
        self.outputs: deque[tuple[int, _core.StepOutput]] = deque()
        self.active: set[int] = set()


class Driver:
    """Owns an engine. Every method may be called from any thread."""

    def __init__(self, engine: _core.Engine) -> None:
        self._engine: _core.Engine | None = engine
        self._lock = threading.RLock()
        self._stepping_thread = 0
        self._owners: dict[int, tuple[Call, int]] = {}
        self._unfinished: dict[int, int] = {}  # answers of a request that have not ended
        self._to_cancel: deque[int] = deque()

    @property
    def engine(self) -> _core.Engine:
        """The engine.

        Raises:
            InvalidArgumentError: It has been closed.
        """
        if self._engine is None:
            raise InvalidArgumentError("this LLM is closed")
        return self._engine

    def stats(self) -> dict[str, Any]:
        """The engine's counters."""
        with deferred_interrupt(), self._lock, core_errors():
            return dict(self.engine.stats())

    def submit(self, call: Call, index: int, prompt_token_ids: list[int], **options: Any) -> None:
        """Queues a request whose outputs go to `call` under `index`."""
        with deferred_interrupt(), self._lock, core_errors():
            request_id = self.engine.submit(prompt_token_ids, **options)
            self._owners[request_id] = (call, index)
            self._unfinished[request_id] = options.get("n", 1)
            call.active.add(request_id)

    def wait(self, call: Call) -> None:
        """Makes steps until `call` has an output to read or no active request."""
        while not call.outputs and call.active:
            with deferred_interrupt(), self._lock:
                if not call.outputs and call.active:  # another thread's step may have brought it meanwhile
                    self._step(call)

    def cancel(self, call: Call) -> None:
        """Stops all active requests of `call` and gives their memory back before it returns."""
        self._to_cancel.extend(call.active)
        # A generator may be closed by the garbage collector in the middle of a step of this very thread (a log handler
        # runs Python code there). Then the next step does the work.
        if self._stepping_thread == threading.get_ident():
            return
        with deferred_interrupt(), self._lock:
            if self._engine is None:
                return
            while call.active:
                self._step(call)
            call.outputs.clear()

    def close(self) -> None:
        """Drops the engine. Calls in progress end with an error at their next step."""
        with deferred_interrupt(), self._lock:
            self._engine = None
            self._owners.clear()
            self._unfinished.clear()

    def _step(self, call: Call) -> None:
        engine = self.engine
        self._stepping_thread = threading.get_ident()
        try:
            with core_errors():
                while self._to_cancel:
                    engine.cancel(self._to_cancel.popleft())
                if not engine.has_work():
                    call.active.clear()
                    raise InternalError("the engine has no work left but did not report the end of every request")
                outputs = engine.step()
        finally:
            self._stepping_thread = 0
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is None:
                continue
            owner[0].outputs.append((owner[1], output))
            if output.finish_reason is None:
                continue
            self._unfinished[output.request_id] -= 1
            if self._unfinished[output.request_id] == 0:
                del self._owners[output.request_id], self._unfinished[output.request_id]
                owner[0].active.discard(output.request_id)
