"""The part of `ChunkedLLM` that answers, and keeps answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from nanobraid._chunk_base import Job
from nanobraid._chunk_keep import Keeping
from nanobraid._chunk_outputs import (
    ChunkedOutput,
    ChunkedPiece,
    Params,
    RetainedOutput,
    output_of,
    params_of,
    think_spans,
    without,
)
from nanobraid._chunk_registry import Chunk, ChunkType, chunk_identity
from nanobraid.chat_template import Message
from nanobraid.composition import Reuse, Segment
from nanobraid.errors import InvalidArgumentError, InvalidCompositionError
from nanobraid.outputs import RequestOutput

_REQUEST_KEYS = ("system_chunk_id", "query_chunk_id", "context_chunk_ids", "sampling_params", "mode")
_AN_ANSWER = "\U0010fffc"  # no text has it


class Generating(Keeping):
    """Answers to prompts made of chunks."""

    _think: tuple[int, int] | None

    if TYPE_CHECKING:  # what a `ChunkedLLM` has

        def _new_chunk(
            self, content: str, chunk_type: ChunkType | str, metadata: Mapping[str, Any] | None, anchor: str | None
        ) -> Chunk: ...

    # ---- from registered chunks ----

    @overload
    def generate_from_chunks(
        self,
        system_chunk_id: str,
        query_chunk_id: str,
        context_chunk_ids: Sequence[str] | None = None,
        sampling_params: Params | None = None,
        *,
        mode: Reuse | None = None,
        stream: Literal[False] = False,
        retain_output: bool = False,
    ) -> ChunkedOutput: ...
    @overload
    def generate_from_chunks(
        self,
        system_chunk_id: str,
        query_chunk_id: str,
        context_chunk_ids: Sequence[str] | None = None,
        sampling_params: Params | None = None,
        *,
        mode: Reuse | None = None,
        stream: Literal[True],
        retain_output: bool = False,
    ) -> Generator[ChunkedPiece, None, None]: ...
    def generate_from_chunks(
        self,
        system_chunk_id: str,
        query_chunk_id: str,
        context_chunk_ids: Sequence[str] | None = None,
        sampling_params: Params | None = None,
        *,
        mode: Reuse | None = None,
        stream: bool = False,
        retain_output: bool = False,
    ) -> ChunkedOutput | Generator[ChunkedPiece, None, None]:
        """Answers a query about contexts.

        Args:
            system_chunk_id: A chunk of type SYSTEM_PROMPT.
            query_chunk_id: A chunk of type QUERY.
            context_chunk_ids: Chunks of type CONTEXT or OUTPUT, in the order in which they stand; the same may stand
                twice.
            sampling_params: `SamplingParams`, or a dict of its fields, of which those that are missing are
                ``temperature=1.0, max_tokens=64`` and the defaults. ``{"retain_output_cache": True}`` is
                `retain_output`.
            mode: How the contexts are reused: ``"exact"``, ``"isolated"``, ``"blend"``, `Isolated` or `Blend`. None is
                the mode of this `ChunkedLLM`.
            stream: Return an iterator of pieces instead. The request starts with the first ``next()``.
            retain_output: Keep the answer, see `generate_and_retain_output`.

        Raises:
            ChunkNotFoundError: There is no chunk of one of the ids.
            InvalidCompositionError: One is of the wrong type.
            InvalidArgumentError: As `LLM.generate`; or more than one answer is wanted.
            UnsupportedError, OutOfMemoryError: As `LLM.compose`.
        """
        job = self._job_of(
            system_chunk_id, query_chunk_id, context_chunk_ids, sampling_params, mode, retain=retain_output
        )
        if stream:
            return self._pieces_of(job)
        return self._finish(job, self._serve([job])[0])

    def batch_generate_from_chunks(
        self,
        requests: Sequence[Mapping[str, Any]],
        sampling_params: Params | Sequence[Params] | None = None,
        *,
        mode: Reuse | None = None,
    ) -> list[ChunkedOutput]:
        """Answers several requests, all of them as one continuous batch.

        Args:
            requests: Mappings with ``system_chunk_id``, ``query_chunk_id`` and, where wanted, ``context_chunk_ids``,
                ``sampling_params`` and ``mode``, which override those below.
            sampling_params: For all requests, or one for each.
            mode: For all requests.

        Returns:
            One answer per request, in order.

        Raises:
            InvalidArgumentError: A request has a key that is none of these, or lacks one; or as
                `generate_from_chunks`, and so all other errors. Nothing has been computed then.
        """
        if isinstance(requests, str | Mapping) or not isinstance(requests, Sequence) or not requests:
            raise InvalidArgumentError("requests must be a list of mappings, with at least one")
        many = [sampling_params] * len(requests)
        if isinstance(sampling_params, list | tuple):
            many = list(sampling_params)
        if len(many) != len(requests):
            raise InvalidArgumentError(f"sampling_params has {len(many)} entries for {len(requests)} requests")
        jobs = []
        for i, request in enumerate(requests):
            if not isinstance(request, Mapping):
                raise InvalidArgumentError(f"requests[{i}] must be a mapping, got {type(request).__name__}")
            for key in request:
                if key not in _REQUEST_KEYS:
                    raise InvalidArgumentError(
                        f"requests[{i}] has the unknown key {key!r}; there are {', '.join(_REQUEST_KEYS)}"
                    )
            for key in _REQUEST_KEYS[:2]:
                if key not in request:
                    raise InvalidArgumentError(f"requests[{i}] has no {key}")
            jobs.append(
                self._job_of(
                    request["system_chunk_id"],
                    request["query_chunk_id"],
                    request.get("context_chunk_ids"),
                    request.get("sampling_params", many[i]),
                    request.get("mode", mode),
                )
            )
        return [self._finish(job, out) for job, out in zip(jobs, self._serve(jobs), strict=True)]

    def _job_of(
        self,
        system_chunk_id: str,
        query_chunk_id: str,
        context_chunk_ids: Sequence[str] | None,
        sampling_params: Params | None,
        mode: Reuse | None,
        *,
        retain: bool = False,
    ) -> Job:
        params, asked = params_of(sampling_params)
        reuse = self._reuse_of(mode)
        return self._job(
            *self._named(system_chunk_id, context_chunk_ids, query_chunk_id), params, reuse, retain=retain or asked
        )

    def _named(
        self, system_chunk_id: str, context_chunk_ids: Sequence[str] | None, query_chunk_id: str
    ) -> tuple[Chunk, list[Chunk], Chunk]:
        """The chunks of these ids.

        Raises:
            ChunkNotFoundError, InvalidCompositionError: As `generate_from_chunks`.
        """
        if isinstance(context_chunk_ids, str) or not isinstance(context_chunk_ids, Sequence | None):
            raise InvalidCompositionError(f"context_chunk_ids must be a list of chunk ids, got {context_chunk_ids!r}")
        get = self._registry.get
        chunks = (get(system_chunk_id), [get(i) for i in context_chunk_ids or ()], get(query_chunk_id))
        self._check_roles(*chunks)
        return chunks

    def _pieces_of(self, job: Job) -> Generator[ChunkedPiece, None, None]:
        stream = self._stream_job(job)
        seen = ""
        last: list[int] = []
        text = ""
        try:
            while True:
                piece = next(stream)
                seen += piece.text
                if piece.finish_reason is None:
                    yield ChunkedPiece(piece.text, piece.token_ids, seen, finished=False)
                else:  # held back until the whole is known
                    text, last = piece.text, piece.token_ids
        except StopIteration as end:
            yield ChunkedPiece(text, last, seen, finished=True, final_output=self._finish(job, end.value))
        finally:
            stream.close()

    # ---- from texts ----

    def generate(
        self,
        system_prompt: str,
        query: str,
        context: str | Sequence[str] | None = None,
        sampling_params: Params | None = None,
        persist_chunks: bool = True,
        *,
        mode: Reuse | None = None,
    ) -> ChunkedOutput:
        """Answers a query about texts, which are registered as chunks.

        Args:
            system_prompt: What the model is to be.
            query: What the user asks.
            context: A text, or several, that stand before the query.
            sampling_params: As for `generate_from_chunks`.
            persist_chunks: The chunks stay registered. Otherwise nothing is registered, and keys and values that are
                computed for this answer go after it.
            mode: As for `generate_from_chunks`.

        Raises:
            InvalidArgumentError: A text is empty or no string; or as `generate_from_chunks`, and so all other errors.
        """
        return self._generate((system_prompt, context, query), sampling_params, persist_chunks, mode, retain=False)

    def generate_and_retain_output(
        self,
        system_prompt: str | None = None,
        query: str | None = None,
        context: str | Sequence[str] | None = None,
        sampling_params: Params | None = None,
        persist_chunks: bool = True,
        *,
        system_chunk_id: str | None = None,
        query_chunk_id: str | None = None,
        context_chunk_ids: Sequence[str] | None = None,
        mode: Reuse | None = None,
    ) -> ChunkedOutput:
        """As `generate`, or with ids as `generate_from_chunks`; the answer is kept and registered as a chunk.

        What is kept, until the answer is released, are the tokens of prompt and answer and, in whole blocks, those of
        their keys and values that are exact: all of them, or with approximate contexts what stands before the first
        one. Going on in the same context (`continue_output`) finds them, whatever came between. They count towards
        `chunk_memory_ratio`. Answers that begin alike share memory. Without prefix caching, tokens alone are kept. As a
        context of other prompts, the answer is a chunk like others, with its prompt as anchor.

        Returns:
            The answer, with ``output_chunk_id`` and ``retained_seq_id``.

        Raises:
            InvalidArgumentError: Neither texts nor ids were given, or both; or as those.
            OutOfMemoryError: `chunk_memory_ratio` has no room for what is to be kept: for the prompt, before anything
                is computed; for the answer too, after it. Nothing is kept then.
        """
        by_id = (system_chunk_id, query_chunk_id)
        texts = (system_prompt, query)
        if None not in texts and by_id == (None, None) and context_chunk_ids is None:
            assert system_prompt is not None and query is not None
            return self._generate((system_prompt, context, query), sampling_params, persist_chunks, mode, retain=True)
        if None in by_id or texts != (None, None) or context is not None or not persist_chunks:
            raise InvalidArgumentError("give either system_prompt and query, or system_chunk_id and query_chunk_id")
        assert system_chunk_id is not None and query_chunk_id is not None
        return self.generate_from_chunks(
            system_chunk_id, query_chunk_id, context_chunk_ids, sampling_params, mode=mode, retain_output=True
        )

    def _generate(
        self,
        given: tuple[str, str | Sequence[str] | None, str],
        sampling_params: Params | None,
        persist_chunks: bool,
        mode: Reuse | None,
        *,
        retain: bool,
    ) -> ChunkedOutput:
        params, asked = params_of(sampling_params)
        reuse = self._reuse_of(mode)
        system_prompt, context, query = given
        texts = [context] if isinstance(context, str) else list(context or ())
        system = self._new_chunk(system_prompt, ChunkType.SYSTEM_PROMPT, None, None)
        contexts = [self._new_chunk(text, ChunkType.CONTEXT, None, None) for text in texts]
        asking = self._new_chunk(query, ChunkType.QUERY, None, None)
        if persist_chunks:
            system, asking = self._registry.add(system), self._registry.add(asking)
            contexts = [self._registry.add(chunk) for chunk in contexts]
        job = self._job(system, contexts, asking, params, reuse, retain=retain or asked)
        return self._finish(job, self._serve([job])[0])

    # ---- answers that are kept ----

    def _finish(self, job: Job, out: RequestOutput) -> ChunkedOutput:
        answer = output_of(out, job.chunk_ids)
        if not job.retain:
            return answer
        assert out.reuse is not None
        kept = RetainedOutput(
            seq_id=0,
            text=out.text,
            token_ids=out.token_ids,
            prompt_token_ids=out.prompt_token_ids,
            prompt_length=len(out.prompt_token_ids),
            completion_length=len(out.token_ids),
            think_positions=think_spans(out.token_ids, self._think),
            tainted_origin=not out.reuse.is_exact,
            cache_info={},
            chunk_ids=job.chunk_ids,
            messages=job.messages,
            segments=job.segments,
        )
        handle = self._keep_answer(job, kept)
        chunk_id = self.register_output_chunk_from_retained(handle) if out.token_ids and out.text else None
        self._retained[handle] = dataclasses.replace(self._retained[handle], output_chunk_id=chunk_id)
        return dataclasses.replace(answer, output_chunk_id=chunk_id, retained_seq_id=handle)

    def register_output_chunk_from_retained(
        self, seq_id: int, metadata: Mapping[str, Any] | None = None, strip_think: bool = False
    ) -> str:
        """Registers a retained answer as a chunk of type OUTPUT, with the prompt that it answers as anchor.

        Args:
            seq_id: Its handle.
            metadata: The user's; ``source``, ``seq_id``, ``prompt_length``, ``completion_length``, ``has_think_tags``
                and ``tainted_origin`` are added.
            strip_think: Leave out what the model thought. The rest is another text, whose keys and values are computed
                when it is used.

        Returns:
            The chunk's id.

        Raises:
            ChunkNotFoundError: There is no such handle.
            InvalidArgumentError: Nothing is left.
        """
        kept = self._retained_output(seq_id)
        token_ids, text = kept.token_ids, kept.text
        if strip_think and kept.think_positions:
            token_ids = without(token_ids, kept.think_positions)
            text = self._tokenizer.decode(token_ids)
        if not token_ids or not text:
            raise InvalidArgumentError(f"nothing is left of the retained output {seq_id} to make a chunk of")
        facts = {
            "source": "retained_output",
            "seq_id": seq_id,
            "prompt_length": kept.prompt_length,
            "completion_length": kept.completion_length,
            "has_think_tags": bool(kept.think_positions),
            "tainted_origin": kept.tainted_origin,
        }
        chunk = Chunk(
            chunk_id=chunk_identity(ChunkType.OUTPUT, kept.prompt_token_ids, token_ids),
            chunk_type=ChunkType.OUTPUT,
            content=text,
            token_ids=list(token_ids),
            kv_token_ids=list(token_ids),
            anchor_token_ids=list(kept.prompt_token_ids),
            metadata={**(metadata or {}), **facts},
            core=(0, len(text)),
        )
        return self._registry.add(chunk).chunk_id

    def continue_output(
        self,
        seq_id: int,
        query: str,
        sampling_params: Params | None = None,
        *,
        mode: Reuse | None = None,
        retain_output: bool = True,
    ) -> ChunkedOutput:
        """Goes on with the conversation of a retained answer: the same prompt, the answer, and the next question.

        The tokens of prompt and answer are those of before, so that their keys and values are found as far as they are
        exact and still there.

        Args:
            seq_id: The handle of the answer.
            query: What the user says next.
            sampling_params: As for `generate_from_chunks`.
            mode: As for `generate_from_chunks`; contexts of the first prompt are contexts here too.
            retain_output: Keep the new answer.

        Raises:
            ChunkNotFoundError: There is no such handle.
            InvalidArgumentError: As `generate_from_chunks`, and so all other errors.
        """
        kept = self._retained_output(seq_id)
        params, asked = params_of(sampling_params)
        if not isinstance(query, str) or not query:
            raise InvalidArgumentError(f"query must be a text, got {query!r:.80}")
        turns: list[Message] = [
            *kept.messages, {"role": "assistant", "content": _AN_ANSWER}, {"role": "user", "content": query},
        ]  # fmt: skip
        parts = self._template.parts(turns, self._tokenizer)
        at = max(i for i, part in enumerate(parts) if isinstance(part, str) and _AN_ANSWER in part)
        opened = str(parts[at]).rpartition(_AN_ANSWER)[2]
        tail: list[int] = []
        for part in [opened, *parts[at + 1 :]]:
            if isinstance(part, int):
                tail.append(part)
            elif part:
                tail += self._tokenizer.encode(part, add_special_tokens=False, at_start=False)
        segments = [*kept.segments, Segment([*kept.token_ids, *tail])]
        messages = [*kept.messages, {"role": "assistant", "content": kept.text}, {"role": "user", "content": query}]
        job = Job(segments, params, self._reuse_of(mode), None, messages, retain_output or asked)
        return self._finish(job, self._serve([job])[0])
