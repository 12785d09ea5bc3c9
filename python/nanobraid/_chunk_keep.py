"""The part of `ChunkedLLM` that keeps beginnings of prompts: retained answers, and system prompts that are pinned.

A beginning is what a chunk without anchor is at position 0, so it is stored as one and pinned. Its blocks are those of
the prefix cache, which cannot lose them then.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

from nanobraid._chunk_base import ChunkedBase, Job, ids_of
from nanobraid._chunk_outputs import KvKey, RetainedOutput
from nanobraid._chunk_registry import Chunk, ChunkType
from nanobraid.chunk_cache import BLOCK_TOKENS
from nanobraid.errors import ChunkNotFoundError, OutOfMemoryError


class Keeping(ChunkedBase):
    """What is kept of prompts and answers."""

    _retained: dict[int, RetainedOutput]
    _retained_lock: threading.Lock
    _next_handle: int
    _heads: dict[str, KvKey]

    # ---- beginnings ----

    def _beginning(self, token_ids: list[int]) -> KvKey | None:
        """Names the keys and values of tokens that begin a prompt: whole blocks, as the prefix cache gives them."""
        count = len(token_ids) // BLOCK_TOKENS * BLOCK_TOKENS
        if count == 0 or not self._llm.config["enable_prefix_caching"]:
            return None
        return tuple(token_ids[:count]), ()

    def _let_go(self, key: KvKey | None) -> None:
        """One keeper fewer; after the last one the memory is given back, unless a chunk has the same content."""
        if key is None or not self._kv.let_go(key):
            return
        if key in self._warm_keys or self._registry.has_key(key):
            self._unpin_kv(key)
        else:
            self._kv.remove(key)

    def _unpin_kv(self, key: KvKey) -> None:
        if key[0] and not any(c.pinned and c.kv_key == key for c in self._registry.chunks()):
            self._kv.pin(key, False)

    # ---- registered chunks ----

    def _add(self, chunk: Chunk) -> Chunk:
        """Registers a chunk; if it is pinned, with its keys and values.

        Raises:
            OutOfMemoryError: There is no room for them, or all chunks are pinned.
        """
        if chunk.pinned and chunk.kv_token_ids:
            self._kv.compute([chunk.kv_key], pin=True)
        is_head = chunk.pinned and chunk.chunk_type is ChunkType.SYSTEM_PROMPT
        head = self._keep_head(chunk.content) if is_head else None
        try:
            added = self._registry.add(chunk)
        except OutOfMemoryError:
            self._let_go(head)
            raise
        self._pin_head(added, head)
        return added

    def _stored_key(self, chunk: Chunk) -> KvKey:
        """What the engine finds the chunk's keys and values by, a pinned system prompt's too."""
        return self._heads.get(chunk.chunk_id, chunk.kv_key)

    def _keep_head(self, system_prompt: str) -> KvKey | None:
        """Computes and keeps what prompts with this system message begin with.

        Raises:
            OutOfMemoryError: There is no room.
        """
        key = self._beginning(self._head_ids(system_prompt))
        if key is not None:
            self._kv.keep(key)
        return key

    def _pin_head(self, chunk: Chunk, key: KvKey | None) -> None:
        """A registered system prompt is pinned, and `key`, which is kept for that, is its own."""
        if key is not None and self._heads.setdefault(chunk.chunk_id, key) is not key:
            self._let_go(key)  # it was pinned already

    def _unpin_head(self, chunk: Chunk) -> None:
        self._let_go(self._heads.pop(chunk.chunk_id, None))

    # ---- answers ----

    def _exact_ids(self, job: Job, answer: list[int], *, is_exact: bool) -> list[int]:
        """The tokens of prompt and answer whose keys and values are exact: all, or those before the first chunk.

        Nobody has computed the last token of an answer.
        """
        ids: list[int] = []
        for segment in job.segments:
            if segment.chunk and not is_exact:
                return ids
            ids += ids_of(segment)
        return [*ids, *answer][:-1]

    def _check_room(self, job: Job) -> None:
        """Raises what `_keep_answer` would for an answer of no tokens, before anything is computed.

        Raises:
            OutOfMemoryError: There is no room.
        """
        key = self._beginning(self._exact_ids(job, [], is_exact=not job.keys)) if job.retain else None
        if key is not None:
            self._kv.check_room([key])

    def _keep_answer(self, job: Job, kept: RetainedOutput) -> int:
        """Keeps an answer and its keys and values under a new handle.

        Raises:
            OutOfMemoryError: There is no room.
        """
        key = self._beginning(self._exact_ids(job, kept.token_ids, is_exact=not kept.tainted_origin))
        if key is not None:
            self._kv.keep(key)
        return self._keep(dataclasses.replace(kept, kv_key=key), None)

    def _keep(self, kept: RetainedOutput, output_chunk_id: str | None) -> int:
        """Keeps an answer under a new handle."""
        with self._retained_lock:
            handle = self._next_handle
            self._next_handle += 1
        self._retained[handle] = dataclasses.replace(kept, seq_id=handle, output_chunk_id=output_chunk_id)
        return handle

    def _retained_output(self, seq_id: int) -> RetainedOutput:
        kept = self._retained.get(seq_id) if isinstance(seq_id, int) else None
        if kept is None:
            raise ChunkNotFoundError(f"there is no retained output {seq_id!r:.80}; it may have been released")
        return kept

    def get_retained_outputs(self) -> dict[int, RetainedOutput]:
        """The answers that are kept, by their handles."""
        return {handle: self._with_cache_info(kept) for handle, kept in list(self._retained.items())}

    def _with_cache_info(self, kept: RetainedOutput) -> RetainedOutput:
        ids = [*kept.prompt_token_ids, *kept.token_ids]
        cached = self._llm.chunks.cached_prefix(ids, cache_salt=self._cache_salt)
        num_kept = 0 if kept.kv_key is None else len(kept.kv_key[0])
        return dataclasses.replace(kept, cache_info={"cached_tokens": cached, "kept_tokens": num_kept})

    def release_retained_output(self, seq_id: int) -> bool:
        """Forgets a retained answer and gives its memory back; a chunk made of it stays. False if there is none."""
        kept = self._retained.pop(seq_id, None)
        if kept is None:
            return False
        self._let_go(kept.kv_key)
        return True

    def release_all_retained_outputs(self) -> int:
        """Forgets all retained answers; returns how many there were."""
        return sum(self.release_retained_output(handle) for handle in list(self._retained))

    release_all = release_all_retained_outputs
    get_retained_sequences = get_retained_outputs
    release_retained_sequence = release_retained_output
    release_all_retained_sequences = release_all_retained_outputs


def with_kv(chunk: Chunk, infos: Mapping[KvKey, Any], key: KvKey) -> Chunk:
    """A copy that says what is stored of it."""
    info = infos.get(key)
    return dataclasses.replace(
        chunk,
        metadata=dict(chunk.metadata),
        kv_ready=info is not None and info.ready,
        kv_bytes=0 if info is None else info.kv_bytes,
        kv_hits=0 if info is None else info.hits,
    )
