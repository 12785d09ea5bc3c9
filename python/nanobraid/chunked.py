"""`ChunkedLLM`: prompts made of registered chunks, whose keys and values are computed once and used again.

Example:
    >>> import nanobraid as nb
    >>> chunked = nb.ChunkedLLM("smollm2-135m", mode="isolated")
    >>> system = chunked.register_chunk("You answer briefly.", nb.ChunkType.SYSTEM_PROMPT)
    >>> document = chunked.register_chunk("The moon is made of cheese.", nb.ChunkType.CONTEXT)
    >>> query = chunked.register_chunk("What is the moon made of?", nb.ChunkType.QUERY)
    >>> chunked.generate_from_chunks(system, query, [document]).text  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from nanobraid import _chunk_file
from nanobraid._chunk_generate import Generating
from nanobraid._chunk_keep import with_kv
from nanobraid._chunk_kv import ChunkKv
from nanobraid._chunk_outputs import ChunkedOutput, ChunkedPiece, KvKey, RetainedOutput, think_tags
from nanobraid._chunk_pieces import AutomaticReuse, WarmReport
from nanobraid._chunk_preview import preview
from nanobraid._chunk_prompt import core_of
from nanobraid._chunk_registry import Chunk, ChunkType, Registry, chunk_identity, matches
from nanobraid._options import MAX_INT, require_one_of
from nanobraid.chat_template import ChatTemplate
from nanobraid.composition import Reuse
from nanobraid.errors import InvalidArgumentError, UnsupportedError
from nanobraid.llm import LLM
from nanobraid.sampling_params import SamplingParams, require_int

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Chunk", "ChunkType", "ChunkedLLM", "ChunkedOutput", "ChunkedPiece", "RetainedOutput", "WarmReport"]

_WITH_KV = (ChunkType.CONTEXT, ChunkType.OUTPUT)


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What `ChunkedLLM.load` has read.

    Attributes:
        chunk_ids: Ids in the file to ids here: the same, unless deduplication is off.
        outputs: Handles in the file to handles here.
        extra: What `save` was given to remember.
    """

    chunk_ids: dict[str, str]
    outputs: dict[int, int]
    extra: Any


class ChunkedLLM(Generating, AutomaticReuse):
    """A model whose prompts are made of registered chunks: one system prompt, contexts, and a query.

    The prompt is the token list that the model's chat template gives for a system message and one message of the user:
    the contexts and the query, with an empty line between them. Only where text at a seam cannot be cut without
    changing tokens does a chunk keep its own.

    Contexts and outputs are chunks in the sense of `LLM.compose`: their keys and values are computed when they are
    first used in an approximate mode, or with ``compute=True``, and kept while there is room. In the mode ``exact``
    they are text like other text, of which the prefix cache has what it has. Any thread may call anything.

    Args:
        model: As for `LLM`; or an `LLM`, which stays the caller's.
        max_chunks: Most registered chunks; one more, and the one not used for longest goes.
        chunk_memory_ratio: The share of the memory for keys and values that chunks may take, in (0, 1].
        enable_deduplication: Registering equal content again (type, anchor, tokens) gives the id that is there.
            Otherwise every registration has an id of its own; keys and values of equal content are stored once all the
            same.
        mode: How contexts are reused where a request does not say: ``"exact"``, ``"isolated"``, ``"blend"``, or
            `Isolated` or `Blend` with their options.
        on_unsupported: As for `LLM.compose`: what happens to requests that cannot be served in their mode.
        cache_salt: The namespace of keys and values, as for `LLM.generate`.
        **llm_kwargs: Further arguments of `LLM`.

    Raises:
        InvalidArgumentError: An option is outside its range, or `llm_kwargs` were given with an `LLM`.
        ChatTemplateError: The model has no chat template.
        NanobraidError: As `LLM`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LLM = "smollm2-135m",
        max_chunks: int = 1000,
        chunk_memory_ratio: float = 0.5,
        enable_deduplication: bool = True,
        mode: Reuse = "exact",
        *,
        on_unsupported: Literal["error", "exact"] = "error",
        cache_salt: str = "",
        **llm_kwargs: Any,
    ) -> None:
        require_int("max_chunks", max_chunks, 1, MAX_INT, "an integer >= 1")
        ratio: Any = chunk_memory_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise InvalidArgumentError(f"chunk_memory_ratio must be a number in (0, 1], got {ratio!r}")
        if not isinstance(enable_deduplication, bool):
            raise InvalidArgumentError(f"enable_deduplication must be True or False, got {enable_deduplication!r}")
        require_one_of("on_unsupported", on_unsupported, ("error", "exact"))
        if not isinstance(cache_salt, str):
            raise InvalidArgumentError(f"cache_salt must be a string, got {cache_salt!r}")
        self.mode = mode
        if isinstance(model, LLM) and llm_kwargs:
            raise InvalidArgumentError(f"{', '.join(llm_kwargs)}: the LLM that was given is made already")
        self._owns = not isinstance(model, LLM)
        self._llm = model if isinstance(model, LLM) else LLM(model, **llm_kwargs)
        try:
            self._tokenizer = self._llm.tokenizer
            self._template = ChatTemplate.of(self._tokenizer)
        except BaseException:
            if self._owns:
                self._llm.close()
            raise
        self._on_unsupported = on_unsupported
        self._cache_salt = cache_salt
        self._kv = ChunkKv(self._llm, cache_salt, float(ratio))
        self._registry = Registry(max_chunks, enable_deduplication, self._removed)
        self._exact_prefix_tokens = 0
        self._warm_keys = set()
        self._think = think_tags(self._tokenizer)
        self._heads = {}
        self._retained = {}
        self._retained_lock = threading.Lock()
        self._next_handle = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ChunkedLLM({self._llm!r}, {len(self._registry)} chunks, mode={self._reuse!r})"

    def close(self) -> None:
        """Closes the `LLM` if it was made here; otherwise gives the memory of chunks and retained answers back."""
        if self._owns:
            self._llm.close()
        else:
            self.release_all_retained_outputs()
            self.clear_chunks()

    @property
    def llm(self) -> LLM:
        """The model."""
        return self._llm

    @property
    def mode(self) -> Reuse:
        """How contexts are reused where a request does not say; may be set."""
        return self._reuse

    @mode.setter
    def mode(self, mode: Reuse) -> None:
        self._reuse = self._reuse_of(mode)

    # ---- registration ----

    def register_chunk(
        self,
        content: str,
        chunk_type: ChunkType | str,
        metadata: Mapping[str, Any] | None = None,
        anchor: str | None = None,
        *,
        pin: bool = False,
        compute: bool = False,
    ) -> str:
        """Registers a text.

        Args:
            content: The text; not empty.
            chunk_type: What it is in prompts; a `ChunkType` or its value.
            metadata: The user's, for `list_chunks`.
            anchor: What stands before a context while it is computed, so that it is not the beginning of a text:
                ``"bos"`` for the token that begins a text; the id of a system prompt, for a prompt up to what the user
                says; or the id of another context or output. Part of the chunk's identity.
            pin: It stays until it is deleted or unpinned; a context's keys and values too, which are computed now, and
                a system prompt's as the beginning of prompts.
            compute: Compute its keys and values now: a context's for the approximate modes, a system prompt's as the
                beginning of prompts.

        Returns:
            The chunk's id: hexadecimal SHA-256 of type, anchor and tokens.

        Raises:
            InvalidArgumentError: The text is empty, no string or too long for the context of the model; the type is
                none; or the option has no meaning for this type.
            ChunkNotFoundError: The anchor is no chunk.
            UnsupportedError: The model has no token for ``"bos"``.
            OutOfMemoryError: There is no room: all chunks are pinned, or `chunk_memory_ratio` is exhausted.
        """
        chunk = self._new_chunk(content, chunk_type, metadata, anchor)
        for name, value in (("pin", pin), ("compute", compute)):
            if not isinstance(value, bool):
                raise InvalidArgumentError(f"{name} must be True or False, got {value!r}")
        if compute and chunk.chunk_type is ChunkType.QUERY:
            raise InvalidArgumentError("compute: a query has no keys and values that prompts could share")
        if chunk.kv_token_ids and compute and not pin:
            self._kv.compute([chunk.kv_key])
        elif compute and not chunk.kv_token_ids:
            only_prompt = SamplingParams(temperature=0.0, max_tokens=1)
            self._llm.generate([self._head_ids(content)], only_prompt, cache_salt=self._cache_salt)
        chunk.pinned = pin
        return self._add(chunk).chunk_id

    def _new_chunk(
        self, content: str, chunk_type: ChunkType | str, metadata: Mapping[str, Any] | None, anchor: str | None
    ) -> Chunk:
        types = [member.value for member in ChunkType]
        if chunk_type not in types:
            raise InvalidArgumentError(f"chunk_type must be one of {', '.join(types)}, got {chunk_type!r}")
        chunk_type = ChunkType(chunk_type)
        if not isinstance(content, str) or not content:
            raise InvalidArgumentError(f"content must be a text that is not empty, got {content!r:.80}")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise InvalidArgumentError(f"metadata must be a mapping, got {metadata!r:.80}")
        if anchor is not None and chunk_type not in _WITH_KV:
            raise InvalidArgumentError(f"anchor has no meaning for chunks of type {chunk_type}")
        anchor_ids = self._anchor_ids(anchor)
        core = core_of(self._tokenizer, content)
        ids = self._tokenizer.encode(content, add_special_tokens=False, at_start=False)
        longest = int(self._llm.config["max_model_len"]) - 1
        if len(ids) + len(anchor_ids) > longest:
            raise InvalidArgumentError(
                f"content is too long: {len(ids)} tokens and an anchor of {len(anchor_ids)} exceed the {longest} that "
                "the context has room for"
            )
        has_kv = chunk_type in _WITH_KV
        return Chunk(
            chunk_id=chunk_identity(chunk_type, anchor_ids, ids),
            chunk_type=chunk_type,
            content=content,
            token_ids=ids,
            kv_token_ids=list(core.token_ids) if has_kv else [],
            anchor_token_ids=anchor_ids,
            metadata=dict(metadata or {}),
            core=(core.begin, core.end) if has_kv else (0, 0),
        )

    def _anchor_ids(self, anchor: str | None) -> list[int]:
        if anchor is None:
            return []
        if anchor == "bos":
            if self._tokenizer.bos_token_id is None:
                raise UnsupportedError("anchor='bos': the model has no token that begins a text")
            return [self._tokenizer.bos_token_id]
        chunk = self._registry.get(anchor)
        if chunk.chunk_type is ChunkType.QUERY:
            raise InvalidArgumentError("anchor must be a system prompt, a context or an output, not a query")
        if chunk.chunk_type is ChunkType.SYSTEM_PROMPT:
            return self._head_ids(chunk.content)
        return [*chunk.anchor_token_ids, *chunk.kv_token_ids]

    def _removed(self, chunk: Chunk) -> None:
        """A chunk is registered no more: so are its keys and values, unless another has the same."""
        self._unpin_head(chunk)
        if chunk.kv_token_ids and not self._registry.has_key(chunk.kv_key):
            self._kv.remove(chunk.kv_key)
        elif chunk.pinned:
            self._unpin_kv(chunk.kv_key)

    # ---- management ----

    def list_chunks(
        self, chunk_type: ChunkType | str | None = None, metadata_filter: Mapping[str, Any] | None = None
    ) -> list[Chunk]:
        """Returns the registered chunks, the one not used for longest first.

        Args:
            chunk_type: Only those of this type.
            metadata_filter: Only those whose metadata has all of these values.

        Raises:
            InvalidArgumentError: There is no such type, or the filter is no mapping.
        """
        types = [member.value for member in ChunkType]
        if chunk_type is not None and chunk_type not in types:
            raise InvalidArgumentError(f"chunk_type must be one of {', '.join(types)}, got {chunk_type!r}")
        if metadata_filter is not None and not isinstance(metadata_filter, Mapping):
            raise InvalidArgumentError(f"metadata_filter must be a mapping, got {metadata_filter!r:.80}")
        infos = self._kv.infos()
        return [
            with_kv(chunk, infos, self._stored_key(chunk))
            for chunk in self._registry.chunks()
            if (chunk_type is None or chunk.chunk_type == chunk_type) and matches(chunk.metadata, metadata_filter)
        ]

    def get_chunk(self, chunk_id: str) -> Chunk:
        """Returns a chunk as it is now. Looking is not using: nothing is counted.

        Raises:
            ChunkNotFoundError: There is none.
        """
        chunk = self._registry.get(chunk_id)
        return with_kv(chunk, self._kv.infos(), self._stored_key(chunk))

    def pin(self, chunk_id: str) -> None:
        """Keeps a chunk until it is deleted or unpinned; a context's keys and values too, which are computed now.

        So are a system prompt's, which prompts begin with: the prefix cache cannot lose them (with prefix caching).

        Raises:
            ChunkNotFoundError: There is none.
            OutOfMemoryError: There is no room for its keys and values.
        """
        chunk = self._registry.get(chunk_id)
        if chunk.kv_token_ids:
            self._kv.compute([chunk.kv_key])
            self._kv.pin(chunk.kv_key, True)
        elif chunk.chunk_type is ChunkType.SYSTEM_PROMPT:
            self._pin_head(chunk, self._keep_head(chunk.content))
        chunk.pinned = True

    def unpin(self, chunk_id: str) -> None:
        """Lets a chunk go when others need the room.

        Raises:
            ChunkNotFoundError: There is none.
        """
        chunk = self._registry.get(chunk_id)
        chunk.pinned = False
        self._unpin_head(chunk)
        self._unpin_kv(chunk.kv_key)

    def delete_chunk(self, chunk_id: str) -> bool:
        """Forgets a chunk and gives its memory back, once no request uses it. False if there is none."""
        return self._registry.remove(chunk_id)

    def clear_chunks(self, chunk_type: ChunkType | str | None = None) -> int:
        """Forgets all chunks, pinned ones too, or all of a type; returns how many there were.

        Without a type, what `warm` has stored goes too.

        Raises:
            InvalidArgumentError: There is no such type.
        """
        gone = sum(self._registry.remove(chunk.chunk_id) for chunk in self.list_chunks(chunk_type))
        if chunk_type is None:
            self._cool()
        return gone

    def evict_unused_chunks(self, max_age_seconds: float = 3600) -> int:
        """Forgets chunks that have not been part of a prompt for so long and are not pinned; returns how many.

        Raises:
            InvalidArgumentError: The age is no number >= 0.
        """
        age: Any = max_age_seconds
        if isinstance(age, bool) or not isinstance(age, int | float) or not age >= 0:
            raise InvalidArgumentError(f"max_age_seconds must be a number >= 0, got {age!r}")
        before = time.time() - age
        old = [chunk for chunk in self._registry.chunks() if not chunk.pinned and chunk.last_accessed <= before]
        gone = sum(self._registry.remove(chunk.chunk_id) for chunk in old)
        self._registry.evictions += gone
        return gone

    def get_chunk_stats(self) -> dict[str, Any]:
        """Counters.

        ``total_chunks``, ``max_chunks``, ``total_registered``, ``deduplicated``, ``evictions`` (of registrations),
        ``total_tokens``. ``cache_hits`` and ``cache_misses``: chunks of approximate prompts that were stored and that
        had to be computed, with ``hit_rate``; ``kv_evictions``: stored ones that went for others.
        ``exact_prefix_tokens``: what the prefix cache gave to all prompts, which is another thing. ``memory_used_mb``
        and ``memory_by_type`` (bytes) are of stored chunks that are registered, ``kv_bytes`` of all that are stored,
        where memory that several share counts once, ``budget_bytes`` what they may take. ``retained_outputs`` are
        there, and ``kept_bytes`` of ``kv_bytes`` are theirs and of system prompts that are pinned.
        """
        infos = self._kv.infos()
        chunks = self._registry.chunks()
        by_type: dict[str, int] = {str(member): 0 for member in ChunkType}
        counted: set[KvKey] = set()
        for chunk in chunks:
            key = self._stored_key(chunk)
            info = infos.get(key)
            if info is not None and key not in counted:
                counted.add(key)
                by_type[str(chunk.chunk_type)] += info.kv_bytes
        wanted = self._kv.hits + self._kv.misses
        return {
            "total_chunks": len(chunks),
            "max_chunks": self._registry.max_chunks,
            "total_registered": self._registry.total_registered,
            "deduplicated": self._registry.deduplicated,
            "evictions": self._registry.evictions,
            "total_tokens": sum(chunk.token_count for chunk in chunks),
            "cache_hits": self._kv.hits,
            "cache_misses": self._kv.misses,
            "hit_rate": self._kv.hits / wanted if wanted else 0.0,
            "kv_evictions": self._kv.evictions,
            "exact_prefix_tokens": self._exact_prefix_tokens,
            "memory_used_mb": sum(by_type.values()) / 1e6,
            "memory_by_type": by_type,
            "kv_bytes": sum(info.kv_bytes - info.shared_bytes for info in infos.values()),
            "retained_outputs": len(self._retained),
            "kept_bytes": self._kv.kept_bytes(infos),
            "budget_bytes": self._kv.budget_bytes,
        }

    # ---- files ----

    def save(self, path: str | os.PathLike[str], extra: Any = None) -> None:
        """Writes the registered chunks and the retained answers to a file (JSON): texts, not keys and values.

        Args:
            path: The file; replaced if it is there.
            extra: Something more to remember, made of what JSON has; `load` returns it.

        Raises:
            InvalidArgumentError: Metadata, or `extra`, is not made of what JSON has.
            ModelIOError: The file cannot be written.
        """
        _chunk_file.write(path, self._tokenizer, self._registry.chunks(), list(self._retained.values()), extra)

    def load(self, path: str | os.PathLike[str]) -> LoadReport:
        """Registers the chunks of a file and adds its retained answers; keys and values are computed when needed.

        Args:
            path: A file that `save` has written.

        Returns:
            The ids and handles that they have here, by those they had.

        Raises:
            ModelIOError: The file cannot be read.
            FormatError: It is no such file, it is damaged, or its texts have other tokens in this model. Nothing has
                been registered then.
            OutOfMemoryError: There is no room: all chunks are pinned, or `chunk_memory_ratio` is exhausted.
        """
        longest = int(self._llm.config["max_model_len"])
        file = _chunk_file.Reader(path, self._tokenizer, longest, self._think)
        chunk_ids: dict[str, str] = {}
        for old, chunk in file.chunks:
            chunk_ids[old] = self._add(chunk).chunk_id
        outputs: dict[int, int] = {}
        for kept in file.outputs:
            own = None if kept.output_chunk_id is None else chunk_ids.get(kept.output_chunk_id)
            there = (o.seq_id for o in list(self._retained.values()) if _is_same(o, kept))
            outputs[kept.seq_id] = next(there, 0) or self._keep(kept, own)
        return LoadReport(chunk_ids, outputs, file.extra)

    # ---- figures ----

    def preview_composition(
        self,
        system_chunk_id: str,
        query_chunk_id: str,
        context_chunk_ids: Sequence[str] | None = None,
        mode: Reuse | None = None,
    ) -> dict[str, Any]:
        """Says what a prompt would cost now, without computing it.

        Args:
            system_chunk_id: As for `generate_from_chunks`, and so the following.
            query_chunk_id: The query.
            context_chunk_ids: The contexts.
            mode: How they are reused.

        Returns:
            ``total_tokens``; ``chunks``: tokens of ``system``, ``contexts`` (a list) and ``query`` alone, and
            ``template``: the rest; ``mode`` that would be served; ``exact_prefix``, ``isolated``, ``recomputed``,
            ``computed``: where the prompt's tokens would come from; ``to_encode``: tokens of chunks (anchors included)
            that are not stored and would be computed before; ``num_runs``: pieces that attention reads, and
            ``num_levels``: 2, or 3 with chunks; ``memory_bytes``: keys and values of all, ``chunk_bytes`` of the
            chunks, which other prompts share, and ``own_bytes`` of the rest.

        Raises:
            NanobraidError: As `generate_from_chunks`.
        """
        system, contexts, query = self._named(system_chunk_id, context_chunk_ids, query_chunk_id)
        reuse = self._reuse_of(mode)
        pieces = self._pieces(system, contexts, query)
        return preview(self._llm, self._kv, pieces, (system, contexts, query), reuse=reuse, cache_salt=self._cache_salt)


def _is_same(one: RetainedOutput, other: RetainedOutput) -> bool:
    """Whether both are the same answer to the same prompt."""
    return (one.token_ids, one.prompt_token_ids) == (other.token_ids, other.prompt_token_ids)
