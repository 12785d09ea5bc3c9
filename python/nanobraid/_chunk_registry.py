"""Chunks as users name them: what was registered, under which id, in what order it was used.

Texts and numbers only. The keys and values that belong to them are in the engine, see _chunk_kv.py.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nanobraid._chunk_outputs import Keyed, KvKey
from nanobraid.errors import ChunkNotFoundError, OutOfMemoryError

_PREVIEW_CHARS = 50


class ChunkType(str, Enum):
    """What a chunk is in a prompt."""

    SYSTEM_PROMPT = "system_prompt"
    CONTEXT = "context"
    QUERY = "query"
    OUTPUT = "output"

    def __str__(self) -> str:
        return self.value


@dataclass
class Chunk(Keyed):
    """A registered piece of prompts.

    Attributes:
        chunk_id: Names it: hexadecimal SHA-256 of its type, anchor and tokens.
        chunk_type: What it is in a prompt.
        content: Its text.
        token_ids: The tokens of its text alone.
        kv_token_ids: Those of them that are stored as a chunk: all but white space at the ends, and what text around it
            may change. Empty for system prompts and queries, which begin a prompt or are computed.
        anchor_token_ids: What stands before it while it is computed.
        metadata: The user's.
        pinned: Neither evicted nor cleared.
        created_at: Seconds since the epoch.
        last_accessed: When it was last part of a prompt, or registered.
        access_count: How often it was part of a prompt.
        kv_ready: Whether its keys and values are stored now.
        kv_bytes: Memory they take.
        kv_hits: How often a request found them there.
    """

    chunk_id: str
    chunk_type: ChunkType
    content: str
    token_ids: list[int]
    kv_token_ids: list[int]
    anchor_token_ids: list[int]
    metadata: dict[str, Any] = field(default_factory=dict)
    pinned: bool = False
    created_at: float = 0.0
    last_accessed: float = 0.0
    access_count: int = 0
    kv_ready: bool = False
    kv_bytes: int = 0
    kv_hits: int = 0
    core: tuple[int, int] = field(default=(0, 0), repr=False)  # the characters of `content` that kv_token_ids stand for

    @property
    def token_count(self) -> int:
        """Tokens of its text alone."""
        return len(self.token_ids)

    @property
    def content_preview(self) -> str:
        """Its first 50 characters."""
        return self.content[:_PREVIEW_CHARS]

    @property
    def kv_key(self) -> KvKey:
        """What the engine finds its keys and values by."""
        return tuple(self.kv_token_ids), tuple(self.anchor_token_ids)


def chunk_identity(chunk_type: ChunkType, anchor: Sequence[int], token_ids: Sequence[int], serial: int = 0) -> str:
    """Returns the id of a chunk: SHA-256 over fields with tags and lengths, so that no two lists of fields are alike.

    Args:
        chunk_type: What it is.
        anchor: Tokens before it.
        token_ids: Its tokens.
        serial: Tells chunks of equal content apart; 0 where they are one.
    """
    digest = hashlib.sha256()

    def put(tag: bytes, payload: bytes) -> None:
        for part in (tag, payload):
            digest.update(len(part).to_bytes(8, "little") + part)

    put(b"format", b"nanobraid chunk 1")
    put(b"type", chunk_type.value.encode())
    put(b"anchor", b"".join(token.to_bytes(4, "little") for token in anchor))
    put(b"tokens", b"".join(token.to_bytes(4, "little") for token in token_ids))
    if serial:
        put(b"serial", serial.to_bytes(8, "little"))
    return digest.hexdigest()


class Registry:
    """Chunks in the order of their last use. Any thread may call anything.

    Args:
        max_chunks: Most chunks; the one not used for longest goes when there is one more, unless it is pinned.
        deduplicate: Chunks of equal type, anchor and tokens are one.
        on_removed: Told of every chunk that goes, after it has gone.
    """

    def __init__(self, max_chunks: int, deduplicate: bool, on_removed: Callable[[Chunk], None]) -> None:
        self.max_chunks = max_chunks
        self.evictions = 0
        self.total_registered = 0
        self.deduplicated = 0
        self._deduplicate = deduplicate
        self._on_removed = on_removed
        self._lock = threading.RLock()
        self._chunks: OrderedDict[str, Chunk] = OrderedDict()

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, chunk_id: object) -> bool:
        return chunk_id in self._chunks

    def chunks(self) -> list[Chunk]:
        """All of them, the one not used for longest first."""
        with self._lock:
            return list(self._chunks.values())

    def get(self, chunk_id: object) -> Chunk:
        """Returns a chunk, without counting that as a use.

        Raises:
            ChunkNotFoundError: There is none of that id.
        """
        chunk = self._chunks.get(chunk_id) if isinstance(chunk_id, str) else None
        if chunk is None:
            raise ChunkNotFoundError(f"there is no chunk {chunk_id!r:.80}; it may have been deleted or evicted")
        return chunk

    def add(self, chunk: Chunk) -> Chunk:
        """Registers a chunk; returns it, or the one that is there already, with the new metadata and pin as well.

        Raises:
            OutOfMemoryError: There are `max_chunks`, all of them pinned.
        """
        with self._lock:
            self.total_registered += 1
            there = self._chunks.get(chunk.chunk_id)
            if there is not None and self._deduplicate:
                self.deduplicated += 1
                there.metadata.update(chunk.metadata)
                there.pinned = there.pinned or chunk.pinned
                self._chunks.move_to_end(there.chunk_id)
                there.last_accessed = time.time()
                return there
            if not self._deduplicate:
                chunk.chunk_id = chunk_identity(
                    chunk.chunk_type, chunk.anchor_token_ids, chunk.token_ids, self.total_registered
                )
            while len(self._chunks) >= self.max_chunks:
                oldest = next((c for c in self._chunks.values() if not c.pinned), None)
                if oldest is None:
                    raise OutOfMemoryError(f"all of the {self.max_chunks} chunks (max_chunks) are pinned")
                self.evictions += 1
                self.remove(oldest.chunk_id)
            chunk.created_at = chunk.last_accessed = time.time()
            self._chunks[chunk.chunk_id] = chunk
            return chunk

    def used(self, chunk: Chunk) -> None:
        """A chunk is part of a prompt now."""
        with self._lock:
            chunk.access_count += 1
            chunk.last_accessed = time.time()
            if chunk.chunk_id in self._chunks:
                self._chunks.move_to_end(chunk.chunk_id)

    def remove(self, chunk_id: str) -> bool:
        """Whether there was such a chunk."""
        with self._lock:
            chunk = self._chunks.pop(chunk_id, None)
        if chunk is not None:
            self._on_removed(chunk)
        return chunk is not None

    def has_key(self, key: KvKey) -> bool:
        """Whether a chunk has these keys and values."""
        return any(chunk.kv_key == key for chunk in self.chunks())


def matches(metadata: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> bool:
    """Whether metadata has all of the wanted values."""
    return all(key in metadata and metadata[key] == value for key, value in (wanted or {}).items())
