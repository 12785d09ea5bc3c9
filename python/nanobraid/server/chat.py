"""Chat completions: from a request to chunks and answers in OpenAI's shape."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple

import orjson

from nanobraid import __version__
from nanobraid.composition import Reuse, Segment
from nanobraid.errors import InvalidArgumentError, NanobraidError
from nanobraid.guided import Guided
from nanobraid.outputs import StreamPiece
from nanobraid.sampling_params import SamplingParams
from nanobraid.server import errors, sse
from nanobraid.server.chunks import Chunks, reuse_of, tokens_of
from nanobraid.server.conversation import (
    checked_messages,
    checked_stream_options,
    checked_tool_choice,
    checked_tools,
    response_schema,
)
from nanobraid.server.errors import invalid_value, unsupported
from nanobraid.server.logprobs import ChatLogprobs
from nanobraid.server.schema import ChatRequest
from nanobraid.server.service import ACCEPTED, Caller, Service, Usage, guided_field, reuse_report, structured

FINGERPRINT = f"nanobraid-{__version__}"


class Update(NamedTuple):
    """What a step adds to one of the answers: OpenAI's ``choices[]`` of a chunk."""

    choice: int
    delta: dict[str, Any]
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: str | None = None


class Prompt(NamedTuple):
    """What the engine is to go on from: token ids, or segments if chunks are used."""

    ids: list[int]
    segments: list[Segment] | None
    reuse: Reuse | None


class ChatCall:
    """One chat completion.

    Args:
        service: The model.
        chunks: Chunks that requests may use.
        request: The request, its fields checked one by one.
        caller: Who sent it.
    """

    def __init__(self, service: Service, chunks: Chunks, request: ChatRequest, caller: Caller) -> None:
        self._service = service
        self._chunks = chunks
        self.request = request
        self._caller = caller
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._prompt = Prompt([], None, None)
        self._params = SamplingParams()
        self._with_usage = False
        self._logprobs: ChatLogprobs | None = None
        self._report: dict[str, Any] = {}
        self._updates: AsyncGenerator[Update, None] | None = None
        self.usage = Usage()

    async def prepare(self) -> None:
        """Checks what the fields say together, makes the prompt.

        Raises:
            ApiError: The request cannot be served; nothing has been computed.
        """
        request, service = self.request, self._service
        service.check_model(request.model)
        self._check_fields()
        self._with_usage = checked_stream_options(request)
        messages = checked_messages(request.messages)
        tools = checked_tools(request.tools)
        choice = checked_tool_choice(request.tool_choice, tools)
        if tools and choice != "none":
            raise unsupported("tools")
        self._prompt = await self._encode(messages)
        self.usage.prompt = len(self._prompt.ids)
        max_tokens, field = request.max_completion_tokens, "max_completion_tokens"
        if max_tokens is None:
            max_tokens, field = request.max_tokens, "max_tokens"
            if max_tokens == 0:
                raise invalid_value(field, "max_tokens must be at least 1")
        num_top = request.top_logprobs or 0
        self._params = service.sampling(
            request,
            num_prompt=len(self._prompt.ids),
            prompt_field="messages",
            max_tokens=max_tokens,
            max_tokens_field=field,
            logprobs=num_top if request.logprobs else None,
            guided=self._guided(),
        )
        if request.logprobs:
            self._logprobs = ChatLogprobs(service.token_bytes, num_top)

    def _check_fields(self) -> None:
        request = self.request
        if request.top_logprobs is not None and not request.logprobs:
            raise invalid_value("top_logprobs", "top_logprobs is only allowed together with logprobs")
        if request.modalities is not None and request.modalities != ["text"]:
            raise unsupported("modalities", "models answer with text")
        if request.store:
            raise unsupported("store", "nothing is stored")
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            raise invalid_value("max_tokens", "max_tokens and max_completion_tokens are the same; give one of them")
        self._caller.log |= {
            name: value
            for name in ("user", "metadata", "safety_identifier", "prompt_cache_key")
            if (value := getattr(request, name)) is not None
        }

    def _guided(self) -> Guided | None:
        given = structured(self.request)
        kind, schema = response_schema(self.request.response_format)
        if kind == "text":
            return given
        if given is not None:
            raise invalid_value("structured_outputs", "structured_outputs and response_format exclude each other")
        try:
            return Guided.json_object() if kind == "json_object" else Guided.json_schema(schema)
        except NanobraidError as error:
            param = "response_format" if kind == "json_object" else "response_format.json_schema.schema"
            raise errors.of(error, param) from None

    async def _encode(self, messages: list[dict[str, Any]]) -> Prompt:
        request = self.request
        reuse = reuse_of(request.reuse)
        try:
            if request.chunks:
                salt = self._caller.salt(request.cache_salt)
                segments = await self._chunks.in_chat(request.chunks, messages, salt=salt)
                return Prompt(tokens_of(segments), segments, reuse or "exact")
            return Prompt(await self._service.engine.encode_chat(messages), None, None)
        except NanobraidError as error:
            raise errors.of(error, "messages") from None

    def rendered(self) -> dict[str, Any]:
        """What the engine would be given."""
        params = self._params
        return {
            "request_id": self._id,
            "model": self._service.name,
            "token_ids": self._prompt.ids,
            "prompt": self._service.tokenizer.decode(self._prompt.ids, skip_special_tokens=False),
            "max_tokens": self._service.max_model_len - len(self._prompt.ids)
            if params.max_tokens is None
            else params.max_tokens,
        }

    # ---- the answer ----

    async def start(self) -> None:
        """Gives the request to the engine.

        Raises:
            ApiError, NanobraidError: It does not take it.
        """
        self._updates = self._grow()
        await anext(self._updates)

    async def updates(self) -> AsyncGenerator[Update, None]:
        """What the answers grow by, in order. Closing it stops the request."""
        if self._updates is None:
            await self.start()
        assert self._updates is not None
        try:
            async with aclosing(self._updates) as updates:
                async for update in updates:
                    yield update
        except InvalidArgumentError as error:  # only its first token shows that a grammar has no answer
            raise errors.of(error, guided_field(self.request)) from None

    async def _grow(self) -> AsyncGenerator[Update, None]:
        request, service = self.request, self._service
        pieces = service.generate(
            self._prompt.segments if self._prompt.segments is not None else self._prompt.ids,
            self._params,
            salt=self._caller.salt(request.cache_salt),
            timeout_s=service.timeout(request),
            streams=bool(request.stream),
            reuse=self._prompt.reuse,
        )
        started: set[int] = set()
        async with aclosing(pieces):
            async for piece in pieces:
                if piece is ACCEPTED:
                    yield Update(-1, {})
                    continue
                if piece.index not in started:
                    started.add(piece.index)
                    yield Update(piece.index, {"role": "assistant", "content": ""})
                self.usage.completion += len(piece.token_ids)
                logprobs = None
                if self._logprobs is not None and piece.logprobs:
                    logprobs = self._logprobs.of(piece.logprobs)
                if piece.text or logprobs is not None:
                    yield Update(piece.index, {"content": piece.text}, logprobs)
                if piece.finish_reason is not None:
                    self._take_report(piece)
                    yield Update(piece.index, {}, None, self._finish(piece), piece.stop_reason)

    def _finish(self, piece: StreamPiece) -> str:
        if piece.finish_reason == "timeout":
            raise errors.timed_out()
        if piece.finish_reason == "abort":
            raise self._service.busy()
        return piece.finish_reason or "stop"

    def _take_report(self, piece: StreamPiece) -> None:
        if piece.index == 0:
            self._report = reuse_report(piece.metrics, piece.reuse)
            if piece.reuse is not None:
                self.usage.cached = piece.reuse.exact_prefix + piece.reuse.isolated
        self._caller.log |= {"prompt_tokens": self.usage.prompt, "completion_tokens": self.usage.completion}

    async def complete(self) -> dict[str, Any]:
        """The whole answer, a ``chat.completion``."""
        answers = [_Answer() for _ in range(self._params.n)]
        async with aclosing(self.updates()) as updates:
            async for update in updates:
                answers[update.choice].add(update)
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._service.name,
            "choices": [answer.choice(index) for index, answer in enumerate(answers)],
            "usage": self.usage.report(),
            "system_fingerprint": FINGERPRINT,
            "nanobraid": self._report,
        }

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._service.name,
            "system_fingerprint": FINGERPRINT,
        }

    def _chunk(self, update: Update, num_open: int) -> dict[str, Any]:
        choice = {
            "index": update.choice,
            "delta": update.delta,
            "logprobs": update.logprobs,
            "finish_reason": update.finish_reason,
        }
        if update.stop_reason is not None:
            choice["stop_reason"] = update.stop_reason
        chunk = {**self._head(), "choices": [choice]}
        if self._with_usage:
            chunk["usage"] = None
        if num_open == 0:
            chunk["nanobraid"] = self._report
        return chunk

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as it grows, in objects of the kind ``chat.completion.chunk``."""
        num_open = self._params.n
        async with aclosing(self.updates()) as updates:
            async for update in updates:
                num_open -= update.finish_reason is not None
                yield self._chunk(update, num_open)
        if self._with_usage:
            yield self._last()

    def _last(self) -> dict[str, Any]:
        return {**self._head(), "choices": [], "usage": self.usage.report(), "nanobraid": self._report}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The same as server-sent events."""
        # Most chunks differ in one text only: what stands around it is made once.
        marker = "\x00"
        head = orjson.dumps(self._chunk(Update(0, {"content": marker}), self._params.n))
        begin, end = (b"data: " + head + b"\n\n").split(orjson.dumps(marker))
        num_open = self._params.n
        dumps = orjson.dumps
        async with aclosing(self.updates()) as updates:
            async for update in updates:
                delta = update.delta
                if update.choice == 0 and update.logprobs is None and len(delta) == 1 and "content" in delta:
                    yield begin + dumps(delta["content"]) + end
                    continue
                num_open -= update.finish_reason is not None
                yield sse.event(self._chunk(update, num_open))
        if self._with_usage:
            yield sse.event(self._last())
        yield sse.DONE


class _Answer:
    """One of the answers, put together."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {}
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[Any] | None = None
        self._finish_reason: str | None = None
        self._stop_reason: str | None = None

    def add(self, update: Update) -> None:
        for name in ("content", "reasoning_content", "reasoning", "refusal"):
            if text := update.delta.get(name):
                self._texts.setdefault(name, []).append(text)
        for call in update.delta.get("tool_calls", ()):
            while len(self._calls) <= call["index"]:
                self._calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
            mine = self._calls[call["index"]]
            mine["id"] = mine["id"] or call.get("id", "")
            for name in ("name", "arguments"):
                mine["function"][name] += call["function"].get(name) or ""
        if update.logprobs is not None:
            self._logprobs = (self._logprobs or []) + update.logprobs["content"]
        if update.finish_reason is not None:
            self._finish_reason, self._stop_reason = update.finish_reason, update.stop_reason

    def choice(self, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {name: "".join(texts) for name, texts in self._texts.items()}
        message = {"role": "assistant", "content": message.pop("content", None if self._calls else ""), **message}
        message.setdefault("refusal", None)
        if self._calls:
            message["tool_calls"] = self._calls
        choice = {
            "index": index,
            "message": message,
            "logprobs": None if self._logprobs is None else {"content": self._logprobs, "refusal": None},
            "finish_reason": self._finish_reason,
        }
        if self._stop_reason is not None:
            choice["stop_reason"] = self._stop_reason
        return choice
