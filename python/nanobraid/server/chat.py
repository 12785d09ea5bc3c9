"""Chat completions: from a request to chunks and answers in OpenAI's shape."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson

from nanobraid import __version__
from nanobraid.composition import Reuse, Segment
from nanobraid.errors import NanobraidError
from nanobraid.guided import Guided
from nanobraid.outputs import StreamPiece, TokenLogprobs
from nanobraid.sampling_params import SamplingParams
from nanobraid.server import errors, reasoning, sse
from nanobraid.server.channel import Channel
from nanobraid.server.chunks import Chunks, reuse_of, tokens_of
from nanobraid.server.conversation import (
    checked_messages,
    checked_stream_options,
    checked_tool_choice,
    checked_tools,
    prompt_field,
    response_schema,
)
from nanobraid.server.errors import invalid_value, unsupported
from nanobraid.server.generation import ComposedGeneration, Generation, Take, TakeText
from nanobraid.server.logprobs import ChatLogprobs
from nanobraid.server.reasoning import ThinkSplitter
from nanobraid.server.schema import ChatRequest
from nanobraid.server.service import Caller, Service, Usage, guided_field, reuse_report, structured

FINGERPRINT = f"nanobraid-{__version__}"
_NOT_YET = SamplingParams()  # until a request is checked
_TOOL_PARAM = re.compile(r"tools\[\d+\][\w.]*")


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

    Attributes:
        id: Of the answer.
        created: When it was asked for, in seconds since 1970.
        request: The request.
        usage: Tokens so far.
    """

    def __init__(self, service: Service, chunks: Chunks, request: ChatRequest, caller: Caller) -> None:
        self._service = service
        self._chunks = chunks
        self._caller = caller
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.request = request
        self.usage = Usage()
        self._prompt = Prompt([], None, None)
        self._params = _NOT_YET
        self._with_usage = False
        self._logprobs: ChatLogprobs | None = None
        self._report: dict[str, Any] = {}
        self._generation: Generation | ComposedGeneration | None = None
        self._channels: dict[int, Channel] = {}
        self._unsent: dict[int, list[TokenLogprobs]] = {}  # of tokens whose text is held back
        self._tools: list[dict[str, Any]] = []
        self._opened = False  # the prompt ends inside the model's thoughts

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
        if request.parallel_tool_calls is not None and not tools:
            raise invalid_value("parallel_tool_calls", "parallel_tool_calls is only allowed together with tools")
        self._tools = [] if choice == "none" else tools
        self._prompt = await self._encode(messages)
        self.usage.prompt = len(self._prompt.ids)
        max_tokens, field = request.max_completion_tokens, "max_completion_tokens"
        if max_tokens is None:
            max_tokens, field = request.max_tokens, "max_tokens"
            if max_tokens == 0:
                raise invalid_value(field, "max_tokens must be at least 1")
        num_top = request.top_logprobs or 0
        kept: list[int] = []
        if service.reasons:
            self._opened = reasoning.prompt_opens_thinking(service.tokenizer, self._prompt.ids)
            kept += reasoning.keep_special_token_ids(service.tokenizer)
        if self._tools:
            kept += service.tools.format.keep_special_token_ids(service.tokenizer)
        self._params = service.sampling(
            request,
            num_prompt=len(self._prompt.ids),
            prompt_field="messages",
            max_tokens=max_tokens,
            max_tokens_field=field,
            logprobs=num_top if request.logprobs else None,
            guided=await self._guided(choice),
            keep_special_token_ids=kept,
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

    async def _guided(self, choice: str) -> Guided | None:
        """What the answer must look like; grammars are made off the event loop."""
        request = self.request
        kind, schema = response_schema(request.response_format)
        wanted = ["structured_outputs"] * (request.structured_outputs is not None)
        wanted += ["response_format"] * (kind != "text") + ["tools"] * bool(self._tools)
        if len(wanted) > 1:
            raise invalid_value(wanted[0], f"{wanted[0]} and {wanted[1]} cannot be combined in one request")
        if not wanted:
            return None
        return await asyncio.to_thread(self._grammar, wanted[0], kind, schema, choice)

    def _grammar(self, wanted: str, kind: str, schema: Any, choice: str) -> Guided | None:
        service, request = self._service, self.request
        param: str | None = {"json_schema": "response_format.json_schema.schema"}.get(kind, "response_format")
        try:
            if wanted == "structured_outputs":
                guided = structured(request)
            elif wanted == "tools":
                param = "tools"
                parallel = request.parallel_tool_calls is not False
                guided = service.tools.grammar(self._tools, choice, parallel=parallel, tokenizer=service.tokenizer)
            else:
                guided = Guided.json_object() if kind == "json_object" else Guided.json_schema(schema)
            if guided is not None and service.reasons:
                guided = reasoning.with_reasoning(guided, service.tokenizer, opened=self._opened)
            return guided
        except NanobraidError as error:
            found = _TOOL_PARAM.match(str(error)) if wanted == "tools" else None
            raise errors.of(error, found[0] if found else param) from None

    async def _encode(self, messages: list[dict[str, Any]]) -> Prompt:
        request, service = self.request, self._service
        reuse = reuse_of(request.reuse)
        messages = service.tools.messages(messages, self._tools)
        options = service.chat_options(request, self._tools, request.reasoning_effort)
        try:
            if request.chunks:
                salt = self._caller.salt(request.cache_salt)
                segments = await self._chunks.in_chat(request.chunks, messages, salt=salt, options=options)
                return Prompt(tokens_of(segments), segments, reuse or "exact")
            return Prompt(await service.engine.encode_chat(messages, **options), None, None)
        except NanobraidError as error:
            raise errors.of(error, prompt_field(error)) from None

    def rendered(self) -> dict[str, Any]:
        """What the engine would be given."""
        params = self._params
        return {
            "request_id": self.id,
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
            ApiError: It does not take it.
        """
        request, service = self.request, self._service
        try:
            self._generation = await service.begin(
                self._prompt.segments if self._prompt.segments is not None else self._prompt.ids,
                self._params,
                self._caller,
                num_prompt=len(self._prompt.ids),
                salt=self._caller.salt(request.cache_salt),
                timeout_s=service.timeout(request),
                streams=bool(request.stream),
                reuse=self._prompt.reuse,
            )
        except NanobraidError as error:
            raise service.answer_to(error, guided_field(request)) from None

    async def run(self, take: Callable[[Update], None]) -> None:
        """Calls a function with what the answers grow by, in order. Cancelling the task stops the request.

        Raises:
            ApiError: The request fails.
            Exception: What the function raises.
        """

        def take_piece(piece: StreamPiece) -> None:
            for update in self._updates_of(piece):
                take(update)

        await self._run(take_piece)

    async def _run(self, take: Take, take_text: TakeText | None = None) -> None:
        if self._generation is None:
            await self.start()
        assert self._generation is not None
        try:
            await self._generation.run(take, take_text)
        except NanobraidError as error:  # only its first token shows that a grammar has no answer
            raise self._service.answer_to(error, guided_field(self.request)) from None
        finally:
            await self._generation.close()

    def _updates_of(self, piece: StreamPiece) -> list[Update]:
        """What a piece adds."""
        index = piece.index
        updates: list[Update] = []
        channel = self._channels.get(index)
        if channel is None:
            channel = self._open(index, updates.append)
        self.usage.completion += len(piece.token_ids)
        deltas = channel.feed(piece)
        logprobs = None
        if self._logprobs is not None:
            rows = self._unsent.pop(index, []) + (piece.logprobs or [])
            if deltas or piece.finish_reason is not None:
                logprobs = self._logprobs.of(rows) if rows else None
            else:
                self._unsent[index] = rows
            if logprobs is not None and not deltas:
                deltas = [{"content": ""}]
        for delta in deltas:
            updates.append(Update(index, delta, logprobs))
            logprobs = None
        if piece.finish_reason is not None:
            self._take_report(piece)
            self.usage.reasoning += channel.reasoning_tokens
            reason = self._finish(piece)
            if reason == "stop" and channel.num_calls:
                reason = "tool_calls"
            updates.append(Update(index, {}, None, reason, piece.stop_reason))
        return updates

    def _open(self, index: int, take: Callable[[Update], None]) -> Channel:
        """An answer begins."""
        service = self._service
        splitter = ThinkSplitter(service.tokenizer, opened=self._opened) if service.reasons else None
        parser = service.tools.format.parser(self._tools) if self._tools else None
        take(Update(index, {"role": "assistant", "content": ""}))
        channel = self._channels[index] = Channel(splitter, parser, reasoning_field=service.settings.reasoning_field)
        return channel

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
        await self.run(lambda update: answers[update.choice].add(update))
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self._service.name,
            "choices": [answer.choice(index) for index, answer in enumerate(answers)],
            "usage": self.usage.report(),
            "system_fingerprint": FINGERPRINT,
            "nanobraid": self._report,
        }

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
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

    async def chunks(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Calls a function with the answer as it grows, in objects of the kind ``chat.completion.chunk``.

        Raises:
            Exception: As `run`.
        """
        num_open = self._params.n

        def add(update: Update) -> None:
            nonlocal num_open
            num_open -= update.finish_reason is not None
            take(self._chunk(update, num_open))

        await self.run(add)
        if self._with_usage:
            take(self._last())

    def _last(self) -> dict[str, Any]:
        return {**self._head(), "choices": [], "usage": self.usage.report(), "nanobraid": self._report}

    async def events(self, write: Callable[[bytes], None]) -> None:
        """Writes the same as server-sent events.

        Raises:
            Exception: As `run`.
        """
        # Most chunks differ in one text only: what stands around it is made once.
        marker = "\x00"
        head = orjson.dumps(self._chunk(Update(0, {"content": marker}), self._params.n))
        begin, end = (b"data: " + head + b"\n\n").split(orjson.dumps(marker))
        num_open = self._params.n
        dumps = orjson.dumps
        usage, started = self.usage, self._channels
        is_plain = self._logprobs is None and not self._service.reasons and not self._tools

        def take_update(update: Update) -> None:
            nonlocal num_open
            num_open -= update.finish_reason is not None
            write(sse.event(self._chunk(update, num_open)))

        def take(piece: StreamPiece) -> None:
            for update in self._updates_of(piece):
                take_update(update)

        def take_text(text: str, token_ids: list[int]) -> None:
            if 0 not in started:
                self._open(0, take_update)
            usage.completion += len(token_ids)
            write(begin + dumps(text) + end)

        await self._run(take, take_text if is_plain else None)
        if self._with_usage:
            write(sse.event(self._last()))
        write(sse.DONE)


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
