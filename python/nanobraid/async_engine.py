"""`AsyncEngine`: an `LLM` for asyncio."""

from __future__ import annotations

import asyncio
import functools
import math
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, overload

from nanobraid._async_request import AsyncRequest, Routes, read_outputs
from nanobraid._compose import Attempts
from nanobraid._draft import Prepared
from nanobraid._driver import Call
from nanobraid.async_chunks import AsyncChunkCache
from nanobraid.chat_template import Message
from nanobraid.composition import Reuse, Segment
from nanobraid.errors import InvalidArgumentError, OutOfMemoryError, UnsupportedError
from nanobraid.llm import LLM
from nanobraid.outputs import RequestOutput, StreamPiece
from nanobraid.sampling_params import SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from nanobraid._chat_inputs import ChatOptions


class AsyncEngine:
    """A language model for asyncio: many tasks share one continuous batch, computed by the engine's own thread.

    Nothing here blocks the event loop but loading in the constructor. Tokens are those that `LLM` gives.

    Args:
        model: As for `LLM`, or an `LLM` to share with blocking callers.
        options: As for `LLM`; none if `model` is an `LLM`.

    Raises:
        InvalidArgumentError: Options were given together with an `LLM`.
        NanobraidError: As `LLM`.
    """

    def __init__(self, model: str | os.PathLike[str] | LLM = "smollm2-135m", **options: Any) -> None:
        if isinstance(model, LLM) and options:
            raise InvalidArgumentError(f"the LLM has its options already, got {', '.join(options)} besides")
        self._llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._driver = self._llm._driver
        self._chunks = AsyncChunkCache(self._llm.chunks)
        self._call = Call(streams=True)
        self._routes = Routes()
        # Reads what the engine says, wakes each event loop once a step. It must not keep this object alive.
        self._reader = threading.Thread(
            target=read_outputs,
            args=(self._driver, self._call, self._routes),
            name="nanobraid-outputs",
            daemon=True,
        )
        self._reader.start()
        weakref.finalize(self, _stop, self._call, self._reader)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self.shutdown(drain=kind is None)

    @property
    def llm(self) -> LLM:
        """The model, for its `tokenizer` and `config` and for blocking calls beside this."""
        return self._llm

    @property
    def chunks(self) -> AsyncChunkCache:
        """The chunks that are kept for `compose`."""
        return self._chunks

    def stats(self) -> dict[str, Any]:
        """As `LLM.stats`."""
        return self._llm.stats()

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> AsyncRequest:
        """Queues a request and returns at once. To be called in the event loop that will read it.

        The first request with `SamplingParams.guided` takes tenths of a second to prepare; `stream` and `generate` do
        that in a thread of its own.

        Args:
            prompt: A text or a list of token ids.
            sampling_params: None is ``SamplingParams()``.
            cache_salt: As for `LLM.generate`.
            timeout_s: As for `LLM.generate`.

        Raises:
            InvalidArgumentError: As `LLM.generate`.
            OverloadedError: Too many requests wait, or the engine is shutting down.
        """
        return self._submit(self._llm._prepare(prompt, sampling_params, cache_salt, timeout_s))

    async def start(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        timeout_s: float | None = None,
        streams: bool = True,
    ) -> AsyncRequest:
        """As `submit`, but the event loop goes on while a grammar is prepared.

        Args:
            prompt: As for `submit`, and so the following.
            sampling_params: None is ``SamplingParams()``.
            cache_salt: As for `LLM.generate`.
            timeout_s: As for `LLM.generate`.
            streams: Somebody reads the pieces as they come: while such a request decodes, steps are kept short.

        Raises:
            InvalidArgumentError, OverloadedError: As `submit`.
        """
        return self._submit(await self._prepare(prompt, sampling_params, cache_salt, timeout_s, streams=streams))

    async def score(
        self,
        prompt: str | Sequence[int],
        *,
        top_logprobs: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> RequestOutput:
        """Returns how likely the tokens of a prompt are, in `RequestOutput.prompt_logprobs`; nothing is generated.

        Args:
            prompt: A text or a list of token ids, at most `max_model_len` tokens.
            top_logprobs: With each token so many of the most likely ones.
            cache_salt: As for `LLM.generate`.
            timeout_s: As for `LLM.generate`.

        Raises:
            InvalidArgumentError, OverloadedError: As `submit`.
        """
        params = SamplingParams(temperature=0.0, prompt_logprobs=top_logprobs)
        request = self._submit(
            self._llm._prepare(prompt, params, cache_salt, timeout_s, streams=False, only_score=True)
        )
        try:
            return await request.result()
        finally:
            request.abort()

    async def _prepare(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None,
        cache_salt: str,
        timeout_s: float | None,
        *,
        streams: bool,
    ) -> Prepared:
        prepare = functools.partial(self._llm._prepare, prompt, sampling_params, cache_salt, timeout_s, streams=streams)
        if isinstance(sampling_params, SamplingParams) and sampling_params.guided is not None:
            return await asyncio.to_thread(prepare)  # the first grammar takes tenths of a second
        return prepare()

    def _submit(self, prepared: Prepared) -> AsyncRequest:
        request = AsyncRequest(self._driver, prepared)
        with self._routes.lock:  # so that the first output does not come before the request is known
            for number in self._routes.use(request._loop):
                self._driver.cancel_request(number)
            request._id = self._driver.submit(self._call, 0, prepared.ids, **prepared.options)
            del self._call.indices[request._id]  # which would grow for ever; the routes know whose it is
            self._routes.requests[request._id] = request
        return request

    async def stream(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[StreamPiece, None]:
        """Continues one prompt, piece by piece. Leaving the iteration, or cancelling its task, stops the request.

        After ``break``, call ``aclose()`` (or use `contextlib.aclosing`) to stop it at once; otherwise the event loop
        does when it collects the iterator.

        Raises:
            InvalidArgumentError, OverloadedError: As `submit`, by the first step of the iteration.
        """
        request = await self.start(prompt, sampling_params, cache_salt=cache_salt, timeout_s=timeout_s)
        try:
            async for piece in request:
                yield piece
        finally:
            request.abort()

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> RequestOutput:
        """Continues one prompt; for several, gather several calls. Cancelling the task stops the request.

        Raises:
            InvalidArgumentError, OverloadedError: As `submit`.
        """
        request = await self.start(prompt, sampling_params, cache_salt=cache_salt, timeout_s=timeout_s, streams=False)
        try:
            return await request.result()
        finally:
            request.abort()

    @overload
    def compose(
        self,
        segments: Sequence[Segment | str],
        sampling_params: SamplingParams | None = None,
        *,
        reuse: Reuse = "exact",
        on_unsupported: Literal["error", "exact"] = "error",
        cache_salt: str = "",
        timeout_s: float | None = None,
        stream: Literal[False] = False,
    ) -> Coroutine[Any, Any, RequestOutput]: ...
    @overload
    def compose(
        self,
        segments: Sequence[Segment | str],
        sampling_params: SamplingParams | None = None,
        *,
        reuse: Reuse = "exact",
        on_unsupported: Literal["error", "exact"] = "error",
        cache_salt: str = "",
        timeout_s: float | None = None,
        stream: Literal[True],
    ) -> AsyncGenerator[StreamPiece, None]: ...
    def compose(
        self,
        segments: Sequence[Segment | str],
        sampling_params: SamplingParams | None = None,
        *,
        reuse: Reuse = "exact",
        on_unsupported: Literal["error", "exact"] = "error",
        cache_salt: str = "",
        timeout_s: float | None = None,
        stream: bool = False,
    ) -> Coroutine[Any, Any, RequestOutput] | AsyncGenerator[StreamPiece, None]:
        """Continues a prompt that is put together from segments. Arguments, answer and errors are `LLM.compose`'s.

        Returns:
            What is to be awaited for the answer; cancelling that stops the request. With ``stream=True`` an iterator of
            pieces, which is left as that of `stream`. The request starts with the first step of either.
        """
        prepare = functools.partial(
            self._llm._attempts,
            segments,
            sampling_params,
            reuse=reuse,
            on_unsupported=on_unsupported,
            cache_salt=cache_salt,
            timeout_s=timeout_s,
            streams=stream,
        )
        return self._stream_composed(prepare) if stream else self._compose(prepare)

    async def _compose(self, prepare: Callable[[], Attempts]) -> RequestOutput:
        attempts = await asyncio.to_thread(prepare)
        async with aclosing(self._attempt(attempts)) as pieces:
            async for _ in pieces:
                pass
        return attempts.request.draft.result(None, attempts.request.ids)

    async def _stream_composed(self, prepare: Callable[[], Attempts]) -> AsyncGenerator[StreamPiece, None]:
        # Chunks are documents: to tokenize them takes as long as a step.
        async with aclosing(self._attempt(await asyncio.to_thread(prepare))) as pieces:
            async for piece in pieces:
                yield piece

    async def _attempt(self, attempts: Attempts) -> AsyncGenerator[StreamPiece, None]:
        """The pieces of the attempt that is served. Leaving them stops the request."""
        while True:
            request: AsyncRequest | None = None
            try:
                request = self._submit(attempts.request)
                async for piece in request:
                    yield piece
                return
            except (UnsupportedError, OutOfMemoryError) as error:
                await asyncio.to_thread(attempts.retry, error)
            finally:
                if request is not None:
                    request.abort()

    async def encode_chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> list[int]:
        """As `LLM.encode_chat`, in a thread of its own: the template is rendered by another process.

        Raises:
            InvalidArgumentError, ChatTemplateError: As `LLM.encode_chat`.
        """
        return await asyncio.to_thread(self._llm.encode_chat, messages, **options)

    async def shutdown(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Takes no more requests, ends those there, and closes the engine and its `LLM`.

        Args:
            drain: Let the requests end by themselves; otherwise they are stopped at once.
            timeout_s: Seconds to wait for that; what has not ended then is stopped. None: any time.
        """
        if self._driver.closed:
            return
        if drain:
            await asyncio.to_thread(self._driver.drain, math.inf if timeout_s is None else timeout_s)
        await asyncio.to_thread(self._llm.close)
        await asyncio.to_thread(_stop, self._call, self._reader)


def _stop(call: Call, reader: threading.Thread) -> None:
    call.outbox.close()
    if reader is not threading.current_thread():
        reader.join()
