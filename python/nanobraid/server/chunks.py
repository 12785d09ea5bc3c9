"""Chunks: texts that are computed once and stand in many prompts, by name."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanobraid._chat_inputs import ChatOptions
from nanobraid._chunk_prompt import SEPARATOR, Core, Piece, compose_chat, core_of, moved, place, segments_of
from nanobraid.chunk_cache import ChunkInfo
from nanobraid.composition import Blend, Isolated, Reuse, Segment, reuse_options
from nanobraid.errors import NanobraidError
from nanobraid.server import errors
from nanobraid.server.errors import ApiError, cut, invalid_type, invalid_value, missing
from nanobraid.server.schema import ChunkRequest
from nanobraid.server.service import Service

_SHOWN_CHARS = 200


@dataclass
class _Chunk:
    id: str
    text: str
    name: str | None
    core: Core
    created: int


class Chunks:
    """The registered chunks of all namespaces. Names and texts are kept here, keys and values by the engine.

    A chunk whose keys and values had to make room is computed again by the next request that uses it.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._chunks: dict[tuple[str, str], _Chunk] = {}

    # ---- routes ----

    async def register(self, request: ChunkRequest, salt: str) -> dict[str, Any]:
        """Computes a chunk and keeps it; the same text again is the same chunk.

        Raises:
            ApiError: The text is too short or too long, or there is no room.
        """
        chunk = await self._made(request.text, salt)
        if request.name is not None:
            chunk.name = request.name
        key = (salt, chunk.id)
        if key not in self._chunks and len(self._chunks) >= self._service.settings.max_chunks:
            raise errors.overloaded(f"there are {len(self._chunks)} chunks already; delete some", 60)
        try:
            await self._service.engine.chunks.compute([chunk.core.token_ids], pin=bool(request.pin), cache_salt=salt)
        except NanobraidError as error:
            raise errors.of(error, "text") from None
        self._chunks[key] = chunk
        return self._report(chunk, await self._infos(salt))

    async def listed(self, salt: str) -> dict[str, Any]:
        """The chunks of a namespace."""
        infos = await self._infos(salt)
        data = [self._report(chunk, infos) for (space, _), chunk in self._chunks.items() if space == salt]
        return {"object": "list", "data": data}

    async def get(self, chunk_id: str, salt: str) -> dict[str, Any]:
        """One chunk.

        Raises:
            ApiError: There is no such chunk.
        """
        chunk = self._find(chunk_id, salt)
        return {**self._report(chunk, await self._infos(salt)), "text": chunk.text}

    async def pin(self, chunk_id: str, pinned: bool, salt: str) -> dict[str, Any]:
        """Keeps a chunk's keys and values until it is unpinned or deleted, or no longer.

        Raises:
            ApiError: There is no such chunk, or no room to compute it again.
        """
        chunk = self._find(chunk_id, salt)
        cache = self._service.engine.chunks
        try:
            if pinned:
                await cache.compute([chunk.core.token_ids], pin=True, cache_salt=salt)
            elif (found := await cache.find(chunk.core.token_ids, cache_salt=salt)) is not None:
                await cache.pin(found, False)
        except NanobraidError as error:
            raise errors.of(error) from None
        return self._report(chunk, await self._infos(salt))

    async def delete(self, chunk_id: str, salt: str) -> dict[str, Any]:
        """Forgets a chunk. Requests that use it go on.

        Raises:
            ApiError: There is no such chunk.
        """
        chunk = self._find(chunk_id, salt)
        del self._chunks[(salt, chunk_id)]
        cache = self._service.engine.chunks
        if (found := await cache.find(chunk.core.token_ids, cache_salt=salt)) is not None:
            await cache.remove(found)
        return {"id": chunk_id, "object": "chunk", "deleted": True}

    async def _infos(self, salt: str) -> dict[tuple[int, ...], ChunkInfo]:
        infos = await self._service.engine.chunks.list(cache_salt=salt)
        return {tuple(info.token_ids): info for info in infos if not info.anchor_token_ids}

    def _report(self, chunk: _Chunk, infos: dict[tuple[int, ...], ChunkInfo]) -> dict[str, Any]:
        info = infos.get(chunk.core.token_ids)
        return {
            "id": chunk.id,
            "object": "chunk",
            "created": chunk.created,
            "name": chunk.name,
            "tokens": len(chunk.core.token_ids),
            "ready": info is not None and info.ready,
            "pinned": info is not None and info.pinned,
            "users": 0 if info is None else info.users,
            "hits": 0 if info is None else info.hits,
            "kv_bytes": 0 if info is None else info.kv_bytes,
            "shared_bytes": 0 if info is None else info.shared_bytes,
            "text": cut(chunk.text, _SHOWN_CHARS),
        }

    def _find(self, chunk_id: str, salt: str, param: str | None = None) -> _Chunk:
        chunk = self._chunks.get((salt, chunk_id))
        if chunk is None:
            raise ApiError(404, f"there is no chunk {cut(chunk_id, 60)!r}", param=param, code="chunk_not_found")
        return chunk

    async def _made(self, text: str, salt: str, param: str = "text") -> _Chunk:
        chunk_id = "chunk-" + hashlib.sha256(f"{salt}\x00{text}".encode()).hexdigest()[:24]
        if (known := self._chunks.get((salt, chunk_id))) is not None:
            return known
        core = await asyncio.to_thread(core_of, self._service.tokenizer, text)
        if not core.token_ids:
            raise invalid_value(param, f"{param} has no token that would be the same in every prompt")
        if len(core.token_ids) >= self._service.max_model_len:
            raise errors.context_length_exceeded(param, len(core.token_ids), 1, self._service.max_model_len)
        return _Chunk(chunk_id, text, None, core, int(time.time()))

    # ---- prompts ----

    async def _wanted(self, chunks: list[Any], salt: str) -> list[_Chunk]:
        """The chunks that a request names, or gives as ``{"text": ...}``."""
        wanted = []
        for i, given in enumerate(chunks):
            param = f"chunks[{i}]"
            if isinstance(given, str):
                wanted.append(self._find(given, salt, param))
                continue
            if not isinstance(given, Mapping):
                raise invalid_type(param, f"{param} must be the id of a chunk, or an object with a text")
            text = given.get("text")
            if text is None:
                raise missing(f"{param}.text")
            if not isinstance(text, str) or not text:
                raise invalid_type(f"{param}.text", f"{param}.text must be a string that is not empty")
            wanted.append(await self._made(text, salt, f"{param}.text"))
        return wanted

    async def in_chat(
        self, chunks: list[Any], messages: list[dict[str, Any]], *, salt: str, options: ChatOptions
    ) -> list[Segment]:
        """The prompt of a conversation whose last message of the user begins with chunks.

        Args:
            chunks: Their ids or texts. They stand before the message's own text, an empty line behind each.
            messages: The conversation, checked.
            salt: The namespace.
            options: For the chat template.

        Raises:
            ApiError: One does not exist, or the user says nothing.
            NanobraidError: The template refuses the conversation.
        """
        wanted = await self._wanted(chunks, salt)
        last = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "user"), None)
        if last is None:
            raise invalid_value("chunks", "chunks stand before the user's last message, and there is none")
        text, cores = joined(wanted)
        changed = [*messages]
        changed[last] = {**messages[last], "content": text + messages[last]["content"]}
        placed: list[list[Core]] = [cores if i == last else [] for i in range(len(messages))]
        pieces = await asyncio.to_thread(
            compose_chat, self._service.template, self._service.tokenizer, changed, placed, **options
        )
        return segments_of(pieces)

    async def in_text(self, chunks: list[Any], prompt: str | list[int], *, salt: str) -> list[Segment]:
        """A prompt that begins with chunks, an empty line behind each.

        Raises:
            ApiError: One does not exist.
        """
        text, cores = joined(await self._wanted(chunks, salt))
        tokenizer = self._service.tokenizer
        begin = tokenizer.encode("")
        pieces = [Piece(tuple(begin))] if begin else []
        whole = text + prompt if isinstance(prompt, str) else text
        pieces += await asyncio.to_thread(place, tokenizer, whole, cores, at_start=True)
        if not isinstance(prompt, str):
            pieces.append(Piece(tuple(prompt)))
        return segments_of(pieces)


def tokens_of(segments: Sequence[Segment]) -> list[int]:
    """The tokens of a prompt of segments, all of them token ids."""
    tokens: list[int] = []
    for segment in segments:
        ids: Any = segment.content
        tokens += ids
    return tokens


def joined(chunks: list[_Chunk]) -> tuple[str, list[Core]]:
    """The texts of chunks, an empty line behind each, and where their tokens are."""
    text, cores = "", []
    for chunk in chunks:
        cores.append(moved(chunk.core, len(text)))
        text += chunk.text + SEPARATOR
    return text, cores


def reuse_of(value: Any) -> Reuse | None:
    """How a request wants chunks to be used: a mode, or an object with ``mode`` and its options.

    Raises:
        ApiError: There is no such mode or option.
    """
    if value is None:
        return None
    options = {"mode": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping):
        raise invalid_type("reuse", "reuse must be a mode, or an object with a mode")
    mode = options.get("mode")
    rest = {name: option for name, option in options.items() if name != "mode" and option is not None}
    kinds: dict[str, type[Isolated] | type[Blend] | None] = {"exact": None, "isolated": Isolated, "blend": Blend}
    if mode is None:
        raise missing("reuse.mode")
    if not isinstance(mode, str) or mode not in kinds:
        raise invalid_value("reuse", f"reuse must be exact, isolated or blend, got {cut(repr(mode), 40)}")
    kind = kinds[mode]
    allowed = () if kind is None else tuple(kind.__dataclass_fields__)
    for name in rest:
        if name not in allowed:
            raise errors.unknown_parameter(f"reuse.{cut(name, 40)}")
    if kind is None:
        return "exact"
    try:
        options_of: Any = kind
        made: Reuse = options_of(**rest)
        reuse_options(made)
    except NanobraidError as error:
        raise errors.of(error, "reuse") from None
    return made
