"""The chunks that an `LLM` keeps, for asyncio. What they are is in chunk_cache.py."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from nanobraid._driver import Call
from nanobraid.chunk_cache import ChunkCache, ChunkInfo
from nanobraid.composition import Content


class AsyncChunkCache:
    """A `ChunkCache` for asyncio: methods of the same names do the same and wait without blocking the event loop.

    What looks at the engine's chunks waits for the end of a step.
    """

    def __init__(self, chunks: ChunkCache) -> None:
        self._chunks = chunks

    async def compute(
        self, contents: Sequence[Content], *, anchor: Sequence[int] = (), pin: bool = False, cache_salt: str = ""
    ) -> list[int]:
        """As `ChunkCache.compute`. Cancelling the task ends the wait; a chunk that is being computed is finished.

        Raises:
            InvalidArgumentError, OutOfMemoryError: As that.
        """
        ids, anchor_ids = await asyncio.to_thread(self._chunks._checked, contents, anchor)
        call = Call(streams=False)
        try:
            self._chunks._submit(call, ids, anchor_ids, pin=pin, cache_salt=cache_salt)
            return await asyncio.to_thread(self._chunks._wait, call, ids, anchor_ids, cache_salt)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._chunks._driver.cancel, call))
            raise

    async def find(self, content: Content, *, anchor: Sequence[int] = (), cache_salt: str = "") -> int | None:
        """As `ChunkCache.find`.

        Raises:
            InvalidArgumentError: As that.
        """
        return await asyncio.to_thread(self._chunks.find, content, anchor=anchor, cache_salt=cache_salt)

    def bytes_for(self, num_tokens: int) -> int:
        """As `ChunkCache.bytes_for`, which asks nobody."""
        return self._chunks.bytes_for(num_tokens)

    async def cached_prefix(self, token_ids: Sequence[int], *, cache_salt: str = "") -> int:
        """As `ChunkCache.cached_prefix`.

        Raises:
            InvalidArgumentError: As that.
        """
        return await asyncio.to_thread(self._chunks.cached_prefix, token_ids, cache_salt=cache_salt)

    async def list(self, *, cache_salt: str = "") -> list[ChunkInfo]:
        """As `ChunkCache.list`."""
        return await asyncio.to_thread(self._chunks.list, cache_salt=cache_salt)

    async def remove(self, chunk_id: int) -> bool:
        """As `ChunkCache.remove`."""
        return await asyncio.to_thread(self._chunks.remove, chunk_id)

    async def pin(self, chunk_id: int, pinned: bool = True) -> bool:
        """As `ChunkCache.pin`."""
        return await asyncio.to_thread(self._chunks.pin, chunk_id, pinned)
