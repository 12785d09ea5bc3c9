"""Requests of `AsyncEngine`, and how what the engine's thread says comes to them through their event loops."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from nanobraid import _core
from nanobraid._draft import Prepared
from nanobraid._driver import Call, Driver
from nanobraid.errors import NanobraidError
from nanobraid.outputs import RequestOutput, StreamPiece

if TYPE_CHECKING:
    from typing_extensions import Self

#: What a step did for one answer; if that is nothing but tokens of the first one, only these.
_Output = _core.StepOutput | list[int]
_Addressed = tuple[int, _Output]  # with the number of the request


class AsyncRequest:
    """A submitted request: iterate over it for its pieces, `listen` to them, or await `result`. Of one event loop.

    Leaving the iteration early does not stop the request; `abort` does, and so does `AsyncEngine.stream`, which wraps
    both.
    """

    __slots__ = (
        *("_arrived", "_draft", "_driver", "_id", "_loop", "_num_unread", "_outputs", "_pieces", "_prepared"),
        *("_take", "_take_text", "__weakref__"),
    )

    def __init__(self, driver: Driver, prepared: Prepared) -> None:
        self._driver = driver
        self._prepared = prepared
        self._draft = prepared.draft
        self._loop = asyncio.get_running_loop()
        self._outputs: deque[_Output] = deque()
        self._pieces: deque[StreamPiece] = deque()
        self._arrived = asyncio.Event()
        self._id = 0
        self._num_unread = prepared.options["n"]  # answers whose end the reader has not seen
        self._take: Callable[[StreamPiece | Exception], None] | None = None
        self._take_text: Callable[[str, list[int]], None] | None = None

    @property
    def request_id(self) -> int:
        """Number of the request within its engine."""
        return self._id

    def abort(self) -> None:
        """Stops the request within one step; its last piece has the finish reason ``abort``. May be repeated."""
        if not self._draft.finished:
            self._driver.cancel_request(self._id)

    def listen(
        self,
        take: Callable[[StreamPiece | Exception], None],
        take_text: Callable[[str, list[int]], None] | None = None,
    ) -> None:
        """Calls a function with every piece, in the event loop as they come, instead of an iteration.

        To be called before the first is read. This spares each piece the way through a task.

        Args:
            take: Gets the pieces; an error that an iteration would raise comes last. It must not raise.
            take_text: Gets the text and the tokens of pieces of the first answer that have nothing else to say, which
                are most; `take` does not get those. It must not raise. None: all go to `take`.
        """
        self._take, self._take_text = take, take_text
        while self._outputs:
            self._hand_on(self._outputs.popleft())

    def _hand_on(self, output: _Output) -> None:
        take = self._take
        assert take is not None
        draft = self._draft
        try:
            if isinstance(output, list):
                take_text = self._take_text
                if take_text is not None:
                    text, token_ids = draft.add_tokens(output)
                    if text:
                        take_text(text, token_ids)
                    return
            for piece in draft.pieces(self._checked(output)):
                take(piece)
        except Exception as error:  # it must not reach the requests that the same step brought something for
            take(error)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamPiece:
        """Returns the next piece.

        Raises:
            InvalidArgumentError: The options left no token to choose, or the engine was closed.
            NanobraidError: A step of the engine failed.
        """
        while not self._pieces:
            if self._draft.finished:
                raise StopAsyncIteration
            self._pieces.extend(self._draft.pieces(await self._next_output()))
        return self._pieces.popleft()

    async def result(self) -> RequestOutput:
        """Waits for the end and returns all of the request. Pieces not read yet are passed over.

        Raises:
            InvalidArgumentError: The engine was closed.
            NanobraidError: A step of the engine failed.
        """
        draft = self._draft
        while not draft.finished:
            output = await self._next_output()
            if isinstance(output, list):
                draft.add_tokens(output)
            else:
                draft.add(output)
        return draft.result(self._prepared.text, self._prepared.ids)

    async def _next_output(self) -> _Output:
        while not self._outputs:
            self._arrived.clear()
            await self._arrived.wait()
        return self._checked(self._outputs.popleft())

    def _checked(self, output: _Output) -> _Output:
        if not isinstance(output, list):
            try:
                self._driver.check(output)
            except NanobraidError:
                self._draft.add(output)  # it has ended all the same
                raise
        return output

    def _deliver(self, output: _Output) -> None:
        if self._take is not None:
            self._hand_on(output)
            return
        self._outputs.append(output)
        self._arrived.set()


class Routes:
    """Who waits for what. Outputs go to their event loop together; the loop itself finds their requests."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests: dict[int, AsyncRequest] = {}  # until the last of its answers has ended
        self.loops: list[asyncio.AbstractEventLoop] = []

    def use(self, loop: asyncio.AbstractEventLoop) -> list[int]:
        """A request of this loop is submitted; returns those of closed loops. To be called with the lock."""
        if loop in self.loops:
            return []
        self.loops = [*(known for known in self.loops if not known.is_closed()), loop]
        # Copied, because other loops take out what has ended.
        gone = [number for number, request in list(self.requests.items()) if request._loop not in self.loops]
        self.forget(gone)
        return gone

    def forget(self, numbers: list[int]) -> None:
        """Nobody waits for these any more. To be called with the lock."""
        for number in numbers:
            self.requests.pop(number, None)

    def parcels(self, outputs: list[_Addressed]) -> list[tuple[asyncio.AbstractEventLoop, list[_Addressed]]]:
        """What each loop is to be given."""
        with self.lock:
            if len(self.loops) == 1:
                return [(self.loops[0], outputs)]
            parcels: dict[asyncio.AbstractEventLoop, list[_Addressed]] = {}
            for addressed in outputs:
                if (request := self.requests.get(addressed[0])) is not None:
                    parcels.setdefault(request._loop, []).append(addressed)
            return list(parcels.items())

    def hand_out(self, parcel: list[_Addressed]) -> None:
        """Gives the requests their outputs. To be called in the loop of all of them."""
        find = self.requests.get
        for number, output in parcel:
            request = find(number)
            if request is None:
                continue
            if not isinstance(output, list) and output.finish_reason is not None:
                request._num_unread -= 1
                if request._num_unread == 0:
                    self.requests.pop(number, None)
            request._deliver(output)


def read_outputs(driver: Driver, call: Call, routes: Routes) -> None:
    """Hands out what comes until the outbox is closed. For a thread of its own."""
    while True:
        closed = call.outbox.closed  # before the last look, so that nothing that came before it is missed
        for loop, parcel in routes.parcels(call.outbox.wait_brief(math.inf)):
            try:
                loop.call_soon_threadsafe(routes.hand_out, parcel)
            except RuntimeError:  # the loop is closed: nobody will read these
                numbers = [number for number, _ in parcel]
                with routes.lock:
                    routes.forget(numbers)
                for number in numbers:
                    driver.cancel_request(number)
        if closed:
            return
