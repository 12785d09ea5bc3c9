"""Completions: texts that are continued, several prompts at once, their own tokens scored on demand."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from nanobraid.composition import Reuse, Segment
from nanobraid.errors import NanobraidError
from nanobraid.outputs import StreamPiece, TokenLogprobs
from nanobraid.sampling_params import SamplingParams
from nanobraid.server import errors, sse
from nanobraid.server.chat import FINGERPRINT
from nanobraid.server.chunks import Chunks, reuse_of, tokens_of
from nanobraid.server.conversation import checked_stream_options
from nanobraid.server.errors import cut, invalid_type, invalid_value, missing, unsupported
from nanobraid.server.generation import ComposedGeneration, Generation, TakeText
from nanobraid.server.logprobs import completion_logprobs
from nanobraid.server.request_fields import whole_numbers
from nanobraid.server.schema import CompletionRequest
from nanobraid.server.service import Caller, Service, Usage, guided_field, reuse_report, structured

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
    generation: Generation | ComposedGeneration | None = None

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
        prompt = whole_numbers(prompt)
        if all(type(item) is int for item in prompt):
            return [prompt]
        if len(prompt) > self._service.settings.max_prompts:
            most = self._service.settings.max_prompts
            raise invalid_value("prompt", f"prompt has {len(prompt)} entries; at most {most} are allowed")
        for i, item in enumerate(prompt):
            if not isinstance(item, str | list):
                raise invalid_type(f"prompt[{i}]", f"prompt[{i}] must be a string or a list of token ids")
        return [whole_numbers(item) for item in prompt]

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
        """Scores the prompts if their tokens are wanted, and gives them to the engine.

        Raises:
            ApiError: It does not take one of them; then it has none.
        """
        if self.request.echo and (self._max_tokens == 0 or self.request.logprobs is not None):
            await together([self._score(prompt) for prompt in self._prompts])
        if self._max_tokens == 0:
            return
        request, service = self.request, self._service
        try:
            for prompt in self._prompts:
                prompt.generation = await service.begin(
                    prompt.ids if prompt.segments is None else prompt.segments,
                    prompt.params,
                    self._caller,
                    num_prompt=len(prompt.ids),
                    salt=self._caller.salt(request.cache_salt),
                    timeout_s=service.timeout(request),
                    streams=bool(request.stream),
                    reuse=self._reuse,
                )
        except BaseException as error:
            await self._close()
            if isinstance(error, NanobraidError):
                raise service.answer_to(error, guided_field(request)) from None
            raise

    async def _close(self) -> None:
        for prompt in self._prompts:
            if prompt.generation is not None:
                await prompt.generation.close()

    async def _run(
        self,
        take: Callable[[_Prompt, StreamPiece], None],
        text_taker: Callable[[_Prompt], TakeText] | None = None,
    ) -> None:
        """Calls a function with the pieces of all prompts as they come. Cancelling the task stops them.

        Args:
            take: The function.
            text_taker: Makes functions for `Generation.run` that take text.
        """

        async def run(prompt: _Prompt) -> None:
            def take_piece(piece: StreamPiece) -> None:
                self.usage.completion += len(piece.token_ids)
                if piece.finish_reason is not None:
                    self._check_end(prompt, piece)
                take(prompt, piece)

            assert prompt.generation is not None
            await prompt.generation.run(take_piece, None if text_taker is None else text_taker(prompt))

        try:
            await together([run(prompt) for prompt in self._prompts])
        except NanobraidError as error:  # only its first token shows that a grammar has no answer
            raise self._service.answer_to(error, guided_field(self.request)) from None
        finally:
            await self._close()

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
        await self.start()
        if self._max_tokens > 0:
            await self._run(_Prompt.add)
        self._log()
        choices = [self._choice(prompt, i) for prompt in self._prompts for i in range(prompt.params.n)]
        return {**self._head(), "choices": choices, "usage": self.usage.report(), "nanobraid": self._report}

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

    async def events(self, write: Callable[[bytes], None]) -> None:
        """Writes the answer as it grows, as server-sent events.

        Raises:
            ApiError: The request fails.
            Exception: What the function raises.
        """
        num_open = sum(prompt.params.n for prompt in self._prompts)
        num_top = self.request.logprobs
        offsets: dict[int, int] = {}
        decoders: dict[int, Any] = {}  # a character may be in tokens of several pieces
        usage, dumps = self.usage, orjson.dumps

        def text_taker(prompt: _Prompt) -> TakeText:
            # Most events differ in one text only: what stands around it is made once.
            head = self._event(prompt.first, StreamPiece("\x00", [], None), None, False)
            begin, end = head.split(dumps("\x00"))

            def take_text(text: str, token_ids: list[int]) -> None:
                usage.completion += len(token_ids)
                write(begin + dumps(text) + end)

            return take_text

        def logprobs_of(index: int, rows: Sequence[TokenLogprobs | None], tokens: list[int]) -> dict[str, Any] | None:
            if num_top is None:
                return None
            if index not in decoders:
                decoders[index] = self._service.tokenizer.stream(skip_special_tokens=False)
            texts = [decoders[index].push(token) for token in tokens]
            offset = offsets.get(index, 0)
            offsets[index] = offset + sum(map(len, texts))
            return completion_logprobs(rows, tokens, texts, offset, num_top)

        def add(prompt: _Prompt, piece: StreamPiece) -> None:
            nonlocal num_open
            index = prompt.first + piece.index
            logprobs = logprobs_of(index, piece.logprobs or [], piece.token_ids)
            ended = piece.finish_reason is not None
            num_open -= ended
            write(self._event(index, piece, logprobs, ended and num_open == 0))

        if self.request.echo:
            for prompt in self._prompts:
                text = self._echo(prompt)
                for i in range(prompt.first, prompt.first + prompt.params.n):
                    logprobs = logprobs_of(i, prompt.prompt_logprobs or [], prompt.ids)
                    write(self._event(i, StreamPiece(text, [], None), logprobs, False))
        if self._max_tokens == 0:
            for prompt in self._prompts:
                for i in range(prompt.params.n):
                    add(prompt, StreamPiece("", [], "length", index=i))
        else:
            await self._run(add, text_taker if num_top is None else None)
        self._log()
        if self._with_usage:
            last = {**self._head(), "choices": [], "usage": self.usage.report(), "nanobraid": self._report}
            write(sse.event(last))
        write(sse.DONE)

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


async def together(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Awaits all; when one fails, the others are cancelled and its error is raised."""
    if len(work) == 1:
        await work[0]
        return
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
