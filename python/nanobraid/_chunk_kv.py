"""The keys and values of chunks in the engine, kept within a share of its memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from nanobraid._chunk_registry import KvKey
from nanobraid.chunk_cache import ChunkInfo
from nanobraid.errors import OutOfMemoryError
from nanobraid.llm import LLM


class ChunkKv:
    """Chunks of one namespace of an `LLM`. Any thread may call anything.

    Args:
        llm: Whose.
        cache_salt: The namespace.
        memory_ratio: The share of the memory for keys and values that chunks may take.
    """

    def __init__(self, llm: LLM, cache_salt: str, memory_ratio: float) -> None:
        self._llm = llm
        self._salt = cache_salt
        self.budget_bytes = int(memory_ratio * llm.stats()["kv_bytes"])
        self.evictions = 0
        self.hits = 0
        self.misses = 0
        self._lock = threading.RLock()
        self._clock = 0
        self._last_use: dict[int, int] = {}

    def infos(self) -> dict[KvKey, ChunkInfo]:
        """What is stored or being computed now."""
        chunks = self._llm.chunks.list(cache_salt=self._salt)
        return {(tuple(info.token_ids), tuple(info.anchor_token_ids)): info for info in chunks}

    def bytes_of(self, key: KvKey) -> int:
        """Memory that a chunk takes, also before it is there."""
        return self._llm.chunks.bytes_for(len(key[0]) + len(key[1]))

    def find(self, key: KvKey) -> int | None:
        """The engine's id of a chunk that is stored or being computed."""
        return self._llm.chunks.find(key[0], anchor=key[1], cache_salt=self._salt)

    def make_room(self, keys: Iterable[KvKey]) -> None:
        """Evicts others, the ones not used for longest first, so that these are within the budget.

        Raises:
            OutOfMemoryError: They do not fit beside what is pinned or in use.
        """
        wanted = set(keys)
        with self._lock:
            infos = self.infos()
            size = sum(self.bytes_of(key) for key in wanted)
            others = [(key, info) for key, info in infos.items() if key not in wanted]
            size += sum(info.kv_bytes for _, info in others)
            others.sort(key=lambda item: self._last_use.get(item[1].id, 0))
            for _, info in others:
                if size <= self.budget_bytes:
                    return
                if not info.pinned and not info.users and self._llm.chunks.remove(info.id):
                    self.evictions += 1
                    self._last_use.pop(info.id, None)
                    size -= info.kv_bytes
        if size > self.budget_bytes:
            raise OutOfMemoryError(
                f"chunks may take {self.budget_bytes} bytes (chunk_memory_ratio of the {self._llm.stats()['kv_bytes']} "
                f"for keys and values); these, and those that are pinned or in use, need {size}"
            )

    def count(self, keys: Sequence[KvKey], known: Iterable[KvKey]) -> None:
        """Counts the chunks of a prompt: those that were known when it came, and those that had to be computed."""
        with self._lock:
            there = set(known)
            for key in keys:
                self.hits += key in there
                self.misses += key not in there
                there.add(key)

    def used(self, keys: Iterable[KvKey]) -> None:
        """A prompt has used them."""
        with self._lock:
            self._clock += 1
            for key in keys:
                if (chunk_id := self.find(key)) is not None:
                    self._last_use[chunk_id] = self._clock

    def compute(self, keys: Sequence[KvKey], *, pin: bool = False) -> None:
        """Computes what is not there, in one batch for each anchor.

        Raises:
            OutOfMemoryError: As `make_room`, or because the engine has no room.
        """
        self.make_room(keys)
        by_anchor: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for tokens, anchor in dict.fromkeys(keys):
            by_anchor.setdefault(anchor, []).append(tokens)
        for anchor, contents in by_anchor.items():
            self._llm.chunks.compute(contents, anchor=anchor, pin=pin, cache_salt=self._salt)
        self.used(keys)

    def pin(self, key: KvKey, pinned: bool) -> None:
        """Keeps what is stored, or lets it go when others need the room."""
        if (chunk_id := self.find(key)) is not None:
            self._llm.chunks.pin(chunk_id, pinned)

    def remove(self, key: KvKey) -> None:
        """Gives the memory back."""
        if (chunk_id := self.find(key)) is not None:
            self._llm.chunks.remove(chunk_id)
            self._last_use.pop(chunk_id, None)
