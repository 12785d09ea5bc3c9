"""Completions: texts that are continued, several prompts at once, their own tokens scored on demand."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from nanobraid.composition import Reuse, Segment
from nanobraid.errors import InvalidArgumentError, NanobraidError
from nanobraid.outputs import StreamPiece, TokenLogprobs
from nanobraid.sampling_params import SamplingParams
from nanobraid.server import errors, sse
from nanobraid.server.chat import FINGERPRINT
from nanobraid.server.chunks import Chunks, reuse_of, tokens_of
from nanobraid.server.conversation import checked_stream_options
from nanobraid.server.errors import cut, invalid_type, invalid_value, missing, unsupported
from nanobraid.server.logprobs import completion_logprobs
from nanobraid.server.schema import CompletionRequest
from nanobraid.server.service import ACCEPTED, Caller, Service, Usage, guided_field, reuse_report, structured

_DEFAULT_MAX_TOKENS = 16


@dataclass
class _Prompt:
    """One of the prompts and its answers, of which the first has the index `first`."""

    first: int
    text: str | None
    ids: list[int]
    params: SamplingParams
    segments: list[Segment] | None = None
    texts: list[list[str]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[TokenLogprobs]] = field(default_factory=list)
    ends: dict[int, StreamPiece] = field(default_factory=dict)
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def __post_init__(self) -> None:
        n = self.params.n
        self.texts, self.tokens, self.logprobs = ([[] for _ in range(n)] for _ in range(3))  # type: ignore[assignment]

    def add(self, piece: StreamPiece) -> None:
        self.texts[piece.index].append(piece.text)
        self.tokens[piece.index] += piece.token_ids
        self.logprobs[piece.index] += piece.logprobs or []
        if piece.finish_reason is not None:
            self.ends[piece.index] = piece


class CompletionCall:
    """One request to ``/v1/completions``.

    Args:
        service: The model.
        chunks: Chunks that requests may use.
        request: The request, its fields checked one by one.
        caller: Who sent it.
    """

    def __init__(self, service: Service, chunks: Chunks, request: CompletionRequest, caller: Caller) -> None:
        self._service = service
        self._chunks = chunks
        self.request = request
        self._caller = caller
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._prompts: list[_Prompt] = []
        self._max_tokens = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        self._reuse: Reuse | None = None
        self._with_usage = False
        self._report: dict[str, Any] = {}
        self._pieces: AsyncGenerator[tuple[_Prompt, StreamPiece], None] | None = None
        self.usage = Usage()

    async def prepare(self) -> None:
        """Checks what the fields say together, encodes the prompts.

        Raises:
            ApiError: The request cannot be served; nothing has been computed.
        """
        request, service = self.request, self._service
        service.check_model(request.model)
        self._with_usage = checked_stream_options(request)
        self._check_fields()
        if request.user is not None:
            self._caller.log["user"] = request.user
        given = self._given()
        n = request.n or 1
        if len(given) * n > service.settings.max_prompts:
            raise invalid_value(
                "prompt",
                f"prompt and n ask for {len(given) * n} answers; at most {service.settings.max_prompts} are allowed",
            )
        guided = structured(request)
        salt = self._caller.salt(request.cache_salt)
        self._reuse = reuse_of(request.reuse)
        if request.chunks and self._reuse is None:
            self._reuse = "exact"
        elif not request.chunks:
            self._reuse = None  # there is nothing to reuse but the prefix, which is exact
        for i, prompt in enumerate(given):
            where = "prompt" if len(given) == 1 else f"prompt[{i}]"
            text, ids = await self._encoded(prompt, where)
            segments = None
            if request.chunks:
                segments = await self._chunks.in_text(request.chunks, text if text is not None else ids, salt=salt)
                ids = tokens_of(segments)
            params = (
                service.sampling(
                    request,
                    num_prompt=len(ids),
                    prompt_field="prompt",
                    max_tokens=self._max_tokens or None,
                    logprobs=request.logprobs,
                    prompt_logprobs=request.logprobs if request.echo else None,
                    guided=guided,
                )
                if self._max_tokens
                else self._scoring(len(ids))
            )
            self._prompts.append(_Prompt(i * n, text, ids, params, segments))
            self.usage.prompt += len(ids)

    def _scoring(self, num_prompt: int) -> SamplingParams:
        if num_prompt > self._service.max_model_len:
            raise errors.context_length_exceeded("prompt", num_prompt, 0, self._service.max_model_len)
        return SamplingParams(n=self.request.n or 1)

    def _check_fields(self) -> None:
        request = self.request
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise unsupported("best_of", "all answers that are computed are returned; use n")
        if self._max_tokens == 0 and not request.echo:
            raise invalid_value("max_tokens", "max_tokens must be at least 1; 0 is only allowed together with echo")
        if request.echo and request.stream and request.logprobs is not None:
            raise unsupported("logprobs", "of a prompt's tokens (echo) they are not streamed")
        if request.echo and request.chunks:
            raise unsupported("echo", "prompts with chunks are not echoed")

    def _given(self) -> list[str | list[int]]:
        """The prompts one by one."""
        prompt = self.request.prompt
        if prompt is None:
            raise missing("prompt")
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list):
            raise invalid_type("prompt", "prompt must be a string, a list of strings, token ids or a list of them")
        if not prompt:
            raise invalid_value("prompt", "prompt must not be empty")
        if all(type(item) is int for item in prompt):
            return [prompt]
        if len(prompt) > self._service.settings.max_prompts:
            most = self._service.settings.max_prompts
            raise invalid_value("prompt", f"prompt has {len(prompt)} entries; at most {most} are allowed")
        for i, item in enumerate(prompt):
            if not isinstance(item, str | list):
                raise invalid_type(f"prompt[{i}]", f"prompt[{i}] must be a string or a list of token ids")
        return prompt

    async def _encoded(self, prompt: str | list[int], where: str) -> tuple[str | None, list[int]]:
        service = self._service
        try:
            if isinstance(prompt, str):
                ids = await service.encode(prompt)
            else:
                ids = service.tokenizer.check_token_ids(prompt, where)
        except NanobraidError as error:
            raise errors.of(error, cut(where, 100)) from None
        if not ids:
            raise invalid_value(where, f"{where} is empty: at least one token is needed to begin with")
        return (prompt if isinstance(prompt, str) else None), ids

    # ---- the answer ----

    async def start(self) -> None:
        """Gives the request to the engine, for `events`.

        Raises:
            ApiError, NanobraidError: It does not take it.
        """
        self._pieces = self._all_pieces()
        await anext(self._pieces)

    async def _pieces_of(self, prompt: _Prompt) -> AsyncGenerator[StreamPiece, None]:
        request, service = self.request, self._service
        pieces = service.generate(
            prompt.ids if prompt.segments is None else prompt.segments,
            prompt.params,
            self._caller,
            num_prompt=len(prompt.ids),
            salt=self._caller.salt(request.cache_salt),
            timeout_s=service.timeout(request),
            streams=bool(request.stream),
            reuse=self._reuse,
        )
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    self.usage.completion += len(piece.token_ids)
                    if piece.finish_reason is not None:
                        self._check_end(prompt, piece)
                    yield piece
        except InvalidArgumentError as error:  # only its first token shows that a grammar has no answer
            raise errors.of(error, guided_field(request)) from None

    def _check_end(self, prompt: _Prompt, piece: StreamPiece) -> None:
        if piece.finish_reason == "timeout":
            raise errors.timed_out()
        if piece.finish_reason == "abort":
            raise self._service.busy()
        if piece.index == 0 and piece.reuse is not None:
            self.usage.cached += piece.reuse.exact_prefix + piece.reuse.isolated
            if prompt.first == 0:
                self._report = reuse_report(piece.metrics, piece.reuse)

    async def complete(self) -> dict[str, Any]:
        """The whole answer, a ``text_completion``."""
        tasks = [asyncio.ensure_future(self._collect(prompt)) for prompt in self._prompts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._log()
        choices = [self._choice(prompt, i) for prompt in self._prompts for i in range(prompt.params.n)]
        return {**self._head(), "choices": choices, "usage": self.usage.report(), "nanobraid": self._report}

    async def _collect(self, prompt: _Prompt) -> None:
        if self._max_tokens == 0:
            await self._score(prompt)
            return
        if prompt.params.prompt_logprobs is not None:
            await self._score(prompt)
        async with aclosing(self._pieces_of(prompt)) as pieces:
            async for piece in pieces:
                if piece is not ACCEPTED:
                    prompt.add(piece)

    async def _score(self, prompt: _Prompt) -> None:
        """The log-probabilities of the prompt's own tokens."""
        request, service = self.request, self._service
        output = await service.engine.score(
            prompt.ids,
            top_logprobs=request.logprobs or 0,
            cache_salt=self._caller.salt(request.cache_salt),
            timeout_s=service.timeout(request),
        )
        if output.finish_reason == "timeout":
            raise errors.timed_out()
        if output.finish_reason == "abort":
            raise service.busy()
        prompt.prompt_logprobs = output.prompt_logprobs

    def _log(self) -> None:
        self._caller.log |= {"prompt_tokens": self.usage.prompt, "completion_tokens": self.usage.completion}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.name,
            "system_fingerprint": FINGERPRINT,
        }

    def _choice(self, prompt: _Prompt, i: int) -> dict[str, Any]:
        request = self.request
        end = prompt.ends.get(i)
        text = "".join(prompt.texts[i])
        rows: list[TokenLogprobs | None] = [*prompt.logprobs[i]]
        tokens = list(prompt.tokens[i])
        if request.echo:
            text = self._echo(prompt) + text
            rows = [*(prompt.prompt_logprobs or ()), *rows]
            tokens = prompt.ids + tokens
        logprobs = None
        if request.logprobs is not None:
            logprobs = completion_logprobs(rows, tokens, self._texts_of(tokens), 0, request.logprobs)
        choice = {
            "index": prompt.first + i,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if end is None else end.finish_reason,
        }
        if end is not None and end.stop_reason is not None:
            choice["stop_reason"] = end.stop_reason
        return choice

    def _texts_of(self, tokens: list[int]) -> list[str]:
        """What each token adds to the text, control tokens included."""
        stream = self._service.tokenizer.stream(skip_special_tokens=False)
        texts = [stream.push(token) for token in tokens]
        if texts:
            texts[-1] += stream.finish()
        return texts

    def _echo(self, prompt: _Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._service.tokenizer.decode(prompt.ids, skip_special_tokens=False)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as it grows, as server-sent events."""
        if self._pieces is None:
            await self.start()
        assert self._pieces is not None
        async with aclosing(self._pieces) as pieces:
            num_open = sum(prompt.params.n for prompt in self._prompts)
            offsets: dict[int, int] = {}
            if self.request.echo:
                for prompt in self._prompts:
                    for i in range(prompt.params.n):
                        yield self._event(prompt.first + i, StreamPiece(self._echo(prompt), [], None), None, False)
            async for prompt, piece in pieces:
                if piece is ACCEPTED:
                    continue
                index = prompt.first + piece.index
                logprobs = None
                if self.request.logprobs is not None:
                    texts = self._texts_of(piece.token_ids)
                    offset = offsets.get(index, 0)
                    rows = piece.logprobs or []
                    logprobs = completion_logprobs(rows, piece.token_ids, texts, offset, self.request.logprobs)
                    offsets[index] = offset + sum(map(len, texts))
                ended = piece.finish_reason is not None
                num_open -= ended
                yield self._event(index, piece, logprobs, ended and num_open == 0)
        self._log()
        if self._with_usage:
            last = {**self._head(), "choices": [], "usage": self.usage.report(), "nanobraid": self._report}
            yield sse.event(last)
        yield sse.DONE

    def _event(self, index: int, piece: StreamPiece, logprobs: dict[str, Any] | None, is_last: bool) -> bytes:
        choice = {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
        if piece.stop_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        chunk = {**self._head(), "choices": [choice]}
        if self._with_usage:
            chunk["usage"] = None
        if is_last:
            chunk["nanobraid"] = self._report
        return sse.event(chunk)

    async def _all_pieces(self) -> AsyncGenerator[tuple[_Prompt, StreamPiece], None]:
        """The pieces of all prompts as they come."""
        if self._max_tokens == 0:
            yield self._prompts[0], ACCEPTED
            for prompt in self._prompts:
                for i in range(prompt.params.n):
                    yield prompt, StreamPiece("", [], "length", index=i)
            return
        if len(self._prompts) == 1:
            async with aclosing(self._pieces_of(self._prompts[0])) as pieces:
                async for piece in pieces:
                    yield self._prompts[0], piece
            return
        arrived: asyncio.Queue[tuple[_Prompt, StreamPiece] | BaseException | None] = asyncio.Queue()

        async def pump(prompt: _Prompt) -> None:
            try:
                async with aclosing(self._pieces_of(prompt)) as pieces:
                    async for piece in pieces:
                        arrived.put_nowait((prompt, piece))
                arrived.put_nowait(None)
            except Exception as error:
                arrived.put_nowait(error)

        tasks = [asyncio.ensure_future(pump(prompt)) for prompt in self._prompts]
        try:
            running = len(tasks)
            while running:
                item = await arrived.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
