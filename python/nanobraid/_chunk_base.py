"""What the parts of `ChunkedLLM` share: the model, the chunks, and how prompts made of them are served."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from nanobraid._chunk_kv import ChunkKv
from nanobraid._chunk_outputs import KvKey
from nanobraid._chunk_prompt import SEPARATOR, Core, Piece, compose_chat, segments_of
from nanobraid._chunk_registry import Chunk, ChunkType, Registry
from nanobraid.chat_template import ChatTemplate
from nanobraid.composition import Reuse, Segment, reuse_options, used_chunks
from nanobraid.errors import InvalidCompositionError, OutOfMemoryError
from nanobraid.llm import LLM
from nanobraid.outputs import RequestOutput, StreamPiece
from nanobraid.sampling_params import SamplingParams
from nanobraid.tokenizer import Tokenizer

_A_QUERY = "\U0010fffd"  # no text has it


@dataclass(frozen=True)
class Job:
    """A prompt made of chunks, and what is wanted of it."""

    segments: list[Segment]
    params: SamplingParams
    reuse: Reuse
    chunk_ids: dict[str, Any] | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    retain: bool = False

    @property
    def keys(self) -> list[KvKey]:
        """Keys and values of chunks that it will use, in order."""
        return [kv_key(segment) for segment in used_chunks(self.segments, self.reuse)]


def ids_of(segment: Segment) -> list[int]:
    """The tokens of a segment that was given as tokens."""
    assert not isinstance(segment.content, str)
    return list(segment.content)


def kv_key(segment: Segment) -> KvKey:
    """What the engine finds a chunk by."""
    return tuple(ids_of(segment)), tuple(segment.anchor)


class ChunkedBase:
    """Prompts from chunks, and requests from prompts."""

    _llm: LLM
    _tokenizer: Tokenizer
    _template: ChatTemplate
    _registry: Registry
    _kv: ChunkKv
    _reuse: Reuse
    _on_unsupported: Literal["error", "exact"]
    _cache_salt: str
    _exact_prefix_tokens: int
    _warm_keys: set[KvKey]

    if TYPE_CHECKING:  # what `Keeping` has

        def _check_room(self, job: Job) -> None: ...

    def _reuse_of(self, mode: Reuse | None) -> Reuse:
        """The mode of a request; checked."""
        if mode is None:
            return self._reuse
        reuse_options(mode)
        return mode

    # ---- prompts ----

    def _check_roles(self, system: Chunk, contexts: Sequence[Chunk], query: Chunk) -> None:
        wanted: list[tuple[Chunk, str, tuple[ChunkType, ...]]] = [
            (system, "system_chunk_id", (ChunkType.SYSTEM_PROMPT,)),
            (query, "query_chunk_id", (ChunkType.QUERY,)),
        ]
        wanted += [(chunk, f"context_chunk_ids[{i}]", _CONTEXTS) for i, chunk in enumerate(contexts)]
        for chunk, name, types in wanted:
            if chunk.chunk_type not in types:
                raise InvalidCompositionError(
                    f"{name} must be a chunk of type {' or '.join(types)}, got one of type {chunk.chunk_type}"
                )

    def _messages(self, system: Chunk, contexts: Sequence[Chunk], query: Chunk) -> list[dict[str, Any]]:
        user = SEPARATOR.join(chunk.content for chunk in [*contexts, query])
        return [{"role": "system", "content": system.content}, {"role": "user", "content": user}]

    def _pieces(self, system: Chunk, contexts: Sequence[Chunk], query: Chunk) -> list[Piece]:
        """The prompt: the template's tokens of a system message and one of the user, with contexts before the query."""
        self._check_roles(system, contexts, query)
        cores: list[Core] = []
        at = 0
        for chunk in contexts:
            begin, end = chunk.core
            if begin < end:
                anchor = tuple(chunk.anchor_token_ids)
                cores.append(Core(at + begin, at + end, tuple(chunk.kv_token_ids), anchor))
            at += len(chunk.content) + len(SEPARATOR)
        return compose_chat(self._template, self._tokenizer, self._messages(system, contexts, query), [[], cores])

    def _head_ids(self, system: str) -> list[int]:
        """The tokens of a prompt with this system message, up to what the user says."""
        ids: list[int] = []
        messages = [{"role": "system", "content": system}, {"role": "user", "content": _A_QUERY}]
        for part in self._template.parts(messages, self._tokenizer):
            if isinstance(part, int):
                ids.append(part)
                continue
            text, found, _ = part.partition(_A_QUERY)
            ids += self._tokenizer.encode(text, add_special_tokens=False, at_start=not ids) if text else []
            if found:
                break
        return ids

    def _job(
        self,
        system: Chunk,
        contexts: Sequence[Chunk],
        query: Chunk,
        params: SamplingParams,
        reuse: Reuse,
        *,
        retain: bool = False,
    ) -> Job:
        segments = segments_of(self._pieces(system, contexts, query))
        for chunk in (system, *contexts, query):
            self._registry.used(chunk)
        ids = {"system": system.chunk_id, "context": [c.chunk_id for c in contexts], "query": query.chunk_id}
        return Job(segments, params, reuse, ids, self._messages(system, contexts, query), retain)

    # ---- requests ----

    def _admit(self, jobs: Sequence[Job]) -> tuple[list[Reuse], str | None]:
        """Makes room for chunks; returns the modes, and why they are ``exact`` where there is none and that may be.

        Raises:
            OutOfMemoryError: There is none, or none to retain an answer.
        """
        for job in jobs:
            self._check_room(job)
        keys = [key for job in jobs for key in job.keys]
        try:
            if keys:
                self._kv.make_room(keys)
        except OutOfMemoryError as error:
            if self._on_unsupported == "error":
                raise
            return ["exact"] * len(jobs), str(error)
        return [job.reuse for job in jobs], None

    def _account(self, job: Job, out: RequestOutput, known: set[KvKey], reason: str | None) -> RequestOutput:
        """Counts what a request has reused; returns it with the reason for its mode."""
        assert out.reuse is not None
        self._exact_prefix_tokens += out.reuse.exact_prefix
        if out.reuse.mode_served != "exact":
            self._kv.count(job.keys, known)
            self._kv.used(job.keys)
        if reason is None:
            return out
        asked = reuse_options(job.reuse)["reuse"]
        return dataclasses.replace(
            out, reuse=dataclasses.replace(out.reuse, mode_requested=asked, downgrade_reason=reason)
        )

    def _drop_orphans(self, jobs: Sequence[Job], known: set[KvKey]) -> None:
        """Gives back what was computed for these requests alone: it belongs to nothing that is registered."""
        for key in {key for job in jobs for key in job.keys} - known - self._warm_keys:
            if not self._registry.has_key(key):
                self._kv.remove(key)

    def _known(self, jobs: Sequence[Job]) -> set[KvKey]:
        return set(self._kv.infos()) if any(job.keys for job in jobs) else set()

    def _serve(self, jobs: Sequence[Job]) -> list[RequestOutput]:
        """Runs requests as one batch."""
        known = self._known(jobs)
        modes, reason = self._admit(jobs)
        seen = set(known)
        try:
            outs = self._llm.compose_batch(
                [job.segments for job in jobs],
                [job.params for job in jobs],
                reuse=modes,
                on_unsupported=self._on_unsupported,
                cache_salt=self._cache_salt,
            )
            results = []
            for job, out in zip(jobs, outs, strict=True):
                results.append(self._account(job, out, seen, reason if job.keys else None))
                seen.update(job.keys)
            return results
        finally:
            self._drop_orphans(jobs, known)

    def _stream_job(self, job: Job) -> Generator[StreamPiece, None, RequestOutput]:
        """Runs a request piece by piece; returns the whole at the end."""
        known = self._known([job])
        (mode,), reason = self._admit([job])
        prompt_ids = [token for segment in job.segments for token in ids_of(segment)]
        texts: list[str] = []
        token_ids: list[int] = []
        stream = self._llm.compose(
            job.segments,
            job.params,
            reuse=mode,
            on_unsupported=self._on_unsupported,
            cache_salt=self._cache_salt,
            stream=True,
        )
        try:
            for piece in stream:
                texts.append(piece.text)
                token_ids += piece.token_ids
                yield piece
        finally:
            stream.close()
            self._drop_orphans([job], known)
        assert piece.finish_reason is not None and piece.metrics is not None and piece.reuse is not None
        out = RequestOutput(
            text="".join(texts),
            token_ids=token_ids,
            finish_reason=piece.finish_reason,
            prompt=None,
            prompt_token_ids=prompt_ids,
            num_cached_tokens=piece.reuse.exact_prefix,
            metrics=piece.metrics,
            reuse=piece.reuse,
        )
        return self._account(job, out, known, reason)


_CONTEXTS = (ChunkType.CONTEXT, ChunkType.OUTPUT)
