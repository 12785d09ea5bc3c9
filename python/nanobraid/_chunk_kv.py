"""The keys and values of chunks in the engine, kept within a share of its memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from nanobraid._chunk_outputs import KvKey
from nanobraid.chunk_cache import BLOCK_TOKENS, ChunkInfo
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
        self._keepers: Counter[KvKey] = Counter()

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

    def check_room(self, keys: Iterable[KvKey]) -> None:
        """Raises what `make_room` would; evicts nothing.

        Raises:
            OutOfMemoryError: As `make_room`.
        """
        with self._lock:
            self._excess(set(keys), self.infos())

    def make_room(self, keys: Iterable[KvKey]) -> None:
        """Evicts others, the ones not used for longest first, so that these are within the budget.

        Raises:
            OutOfMemoryError: They do not fit beside what is pinned or in use. Nothing has been evicted then.
        """
        wanted = set(keys)
        with self._lock:
            infos = self.infos()
            excess = self._excess(wanted, infos)
            others = [info for key, info in infos.items() if key not in wanted and not info.pinned and not info.users]
            others.sort(key=lambda info: self._last_use.get(info.id, 0))
            for info in others:
                if excess <= 0:
                    return
                if self._llm.chunks.remove(info.id):
                    self.evictions += 1
                    self._last_use.pop(info.id, None)
                    excess = self._excess(wanted, self.infos())  # what it shared with others is still taken

    def _excess(self, wanted: set[KvKey], infos: Mapping[KvKey, ChunkInfo]) -> int:
        """Bytes that `wanted` and all others take beyond the budget.

        Raises:
            OutOfMemoryError: So do they when all that may be evicted has gone.
        """
        new = sum(self._own_bytes(key, infos) for key in wanted if key not in infos)
        own = {key: info.kv_bytes - info.shared_bytes for key, info in infos.items()}
        fixed = new + sum(own[key] for key, info in infos.items() if key in wanted or info.pinned or info.users)
        if fixed > self.budget_bytes:
            raise OutOfMemoryError(
                f"chunks may take {self.budget_bytes} bytes (chunk_memory_ratio of the {self._llm.stats()['kv_bytes']} "
                f"for keys and values); these, and those that are pinned or in use, need {fixed}"
            )
        return new + sum(own.values()) - self.budget_bytes

    def _own_bytes(self, key: KvKey, infos: Mapping[KvKey, ChunkInfo]) -> int:
        """What a chunk that is not there will take: its blocks but those of one that stays and begins with the same."""
        tokens = [*key[1], *key[0]]
        common = 0
        for info in infos.values():
            if not info.pinned or not info.ready:
                continue
            other = [*info.anchor_token_ids, *info.token_ids]
            differ = (i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b)
            common = max(common, next(differ, min(len(tokens), len(other))))
        return self.bytes_of(key) - common // BLOCK_TOKENS * self._llm.chunks.bytes_for(1)

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

    def keep(self, key: KvKey) -> None:
        """Computes what is not there and keeps it until `let_go` has been called as often.

        Raises:
            OutOfMemoryError: As `compute`.
        """
        with self._lock:
            self._keepers[key] += 1
        try:
            self.compute([key], pin=True)
        except BaseException:
            self.let_go(key)
            raise

    def let_go(self, key: KvKey) -> bool:
        """Whether nobody keeps it any more. It is still pinned."""
        with self._lock:
            self._keepers[key] -= 1
            if self._keepers[key] == 0:
                del self._keepers[key]
            return key not in self._keepers

    def kept_bytes(self, infos: Mapping[KvKey, ChunkInfo]) -> int:
        """Memory of what is kept."""
        with self._lock:
            kept = [infos[key] for key in self._keepers if key in infos]
        return sum(info.kv_bytes - info.shared_bytes for info in kept)

    def pin(self, key: KvKey, pinned: bool) -> None:
        """Keeps what is stored, or lets it go when others need the room, unless it is kept."""
        with self._lock:
            if (pinned or key not in self._keepers) and (chunk_id := self.find(key)) is not None:
                self._llm.chunks.pin(chunk_id, pinned)

    def remove(self, key: KvKey) -> None:
        """Gives the memory back, unless it is kept."""
        with self._lock:
            if key not in self._keepers and (chunk_id := self.find(key)) is not None:
                self._llm.chunks.remove(chunk_id)
                self._last_use.pop(chunk_id, None)
