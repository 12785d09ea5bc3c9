"""Requests that the engine has taken, read by a function that is called with every piece.

A stream of tokens is what a server does most. On the way from the engine's thread to the socket a piece passes no task
that waits for it and no chain of generators: each would cost more than what is done with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from nanobraid.outputs import StreamPiece
from nanobraid.server.watch import Watch

if TYPE_CHECKING:
    from nanobraid._async_request import AsyncRequest

#: Takes the next piece.
Take = Callable[[StreamPiece], None]
#: Takes the text and the tokens of a piece of the first answer that says nothing else.
TakeText = Callable[[str, list[int]], None]


class Generation:
    """A request for one prompt.

    Args:
        request: The engine's; nobody reads it but this.
        watch: Told of every piece.
        num_answers: How many ends there will be.
    """

    def __init__(self, request: AsyncRequest, watch: Watch, num_answers: int) -> None:
        self._request = request
        self._watch = watch
        self._num_open = num_answers

    async def run(self, take: Take, take_text: TakeText | None = None) -> None:
        """Calls a function with every piece until the last answer has ended.

        Args:
            take: The function.
            take_text: Called instead for pieces of which it can say all. None: there is no such function.

        Raises:
            NanobraidError: The request failed.
            Exception: What a function raises; none is called any more then.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        look, count = self._watch.piece, self._watch.tokens
        is_done = done.done

        def hear(item: StreamPiece | Exception) -> None:
            if done.done():
                return
            try:
                if isinstance(item, Exception):
                    raise item
                look(item)
                take(item)
            except Exception as error:
                done.set_exception(error)
                return
            if item.finish_reason is not None:
                self._num_open -= 1
                if self._num_open == 0:
                    done.set_result(None)

        def hear_text(text: str, token_ids: list[int]) -> None:
            assert take_text is not None
            if is_done():
                return
            try:
                count(0, len(token_ids))
                take_text(text, token_ids)
            except Exception as error:
                done.set_exception(error)

        self._request.listen(hear, None if take_text is None else hear_text)
        await done

    async def close(self) -> None:
        """Stops the request if it has not ended."""
        self._request.abort()
        self._watch.close()


class ComposedGeneration:
    """A request for a prompt with chunks, which may take a second attempt.

    Args:
        pieces: The engine's.
        first: The first of them, taken already; None if there is none.
        watch: Told of every piece.
    """

    def __init__(self, pieces: AsyncGenerator[StreamPiece, None], first: StreamPiece | None, watch: Watch) -> None:
        self._pieces = pieces
        self._first = first
        self._watch = watch

    async def run(self, take: Take, take_text: TakeText | None = None) -> None:
        """As `Generation.run`.

        Raises:
            NanobraidError, Exception: As that.
        """

        def hear(piece: StreamPiece) -> None:
            self._watch.piece(piece)
            if take_text is None or piece.index or piece.finish_reason is not None or piece.logprobs is not None:
                take(piece)
            else:
                take_text(piece.text, piece.token_ids)

        if self._first is not None:
            hear(self._first)
        async with aclosing(self._pieces) as pieces:
            async for piece in pieces:
                hear(piece)

    async def close(self) -> None:
        """Stops the request if it has not ended."""
        await self._pieces.aclose()
        self._watch.close()
