"""Registered chunks and retained answers as a file: texts, tokens and names, no keys and values.

    {"format": "nanobraid chunks", "version": 1, "vocab_size": V,
     "chunks": [{"chunk_id", "chunk_type", "content", "token_ids", "kv_token_ids", "anchor_token_ids", "metadata",
                 "pinned"}, ...],
     "outputs": [{"seq_id", "text", "token_ids", "prompt_token_ids", "tainted_origin", "chunk_ids",
                  "output_chunk_id", "messages", "segments": [[token ids, is a chunk, anchor], ...]}, ...],
     "extra": what the caller wants to remember}

What is read was written by others: every field is checked, and ids are made anew from what they name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from nanobraid._chunk_base import ids_of
from nanobraid._chunk_outputs import RetainedOutput, think_spans
from nanobraid._chunk_prompt import core_of
from nanobraid._chunk_registry import Chunk, ChunkType, chunk_identity
from nanobraid.composition import Segment
from nanobraid.errors import FormatError, InvalidArgumentError, ModelIOError
from nanobraid.tokenizer import Tokenizer

_FORMAT = "nanobraid chunks"
_VERSION = 1
_MAX_BYTES = 1 << 30
_T = TypeVar("_T")


def write(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    chunks: Sequence[Chunk],
    outputs: Sequence[RetainedOutput],
    extra: Any,
) -> None:
    """Writes the file, whole or not at all.

    Raises:
        InvalidArgumentError: Metadata is not made of what JSON has.
        ModelIOError: The file cannot be written.
    """
    target = Path(path)
    data = {
        "format": _FORMAT,
        "version": _VERSION,
        "vocab_size": tokenizer.vocab_size,
        "chunks": [_chunk_fields(chunk) for chunk in chunks],
        "outputs": [_output_fields(output) for output in outputs],
        "extra": extra,
    }
    try:
        text = json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"metadata cannot be saved: {error}") from None
    scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(target)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ModelIOError(f"{target}: cannot be written: {error.strerror or error}") from error


def _chunk_fields(chunk: Chunk) -> dict[str, Any]:
    names = ("chunk_id", "content", "token_ids", "kv_token_ids", "anchor_token_ids", "metadata", "pinned")
    return {"chunk_type": chunk.chunk_type.value, **{name: getattr(chunk, name) for name in names}}


def _output_fields(output: RetainedOutput) -> dict[str, Any]:
    names = ("seq_id", "text", "token_ids", "prompt_token_ids", "tainted_origin", "chunk_ids", "output_chunk_id")
    segments = [[ids_of(segment), segment.chunk, list(segment.anchor)] for segment in output.segments]
    return {**{name: getattr(output, name) for name in names}, "messages": output.messages, "segments": segments}


class Reader:
    """Reads such a file.

    Args:
        path: The file.
        tokenizer: The model's.
        max_len: Tokens of the longest chunk with its anchor.
        think: The model's tags, see `think_tags`.

    Attributes:
        chunks: The chunks and the ids they had.
        outputs: The retained answers, with the handles they had and the old ids of their chunks.
        extra: What the caller wanted to remember.

    Raises:
        ModelIOError: The file cannot be read.
        FormatError: It is not such a file, or of another tokenizer.
    """

    def __init__(
        self, path: str | os.PathLike[str], tokenizer: Tokenizer, max_len: int, think: tuple[int, int] | None
    ) -> None:
        self._path = Path(path)
        self._tokenizer = tokenizer
        self._max_len = max_len
        try:
            if self._path.stat().st_size > _MAX_BYTES:
                raise self._wrong(f"it has more than {_MAX_BYTES} bytes")
            raw = self._path.read_bytes()
        except OSError as error:
            raise ModelIOError(f"{path}: cannot be read: {error.strerror or error}") from error
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError):
            raise self._wrong("it is no JSON") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise self._wrong("it was not written by save()")
        if data.get("version") != _VERSION:
            raise self._wrong(f"its version {data.get('version')!r:.20} is not {_VERSION}")
        if data.get("vocab_size") != tokenizer.vocab_size:
            raise self._wrong(f"it is of a model with {data.get('vocab_size')!r:.20} tokens")
        self.chunks = [self._chunk(item) for item in self._get(data, "chunks", list)]
        self.outputs = [self._output(item, think) for item in self._get(data, "outputs", list)]
        self.extra: Any = data.get("extra")

    def _wrong(self, why: str) -> FormatError:
        return FormatError(f"{self._path}: not a file of chunks that can be used here: {why}")

    def _get(self, item: Any, name: str, kind: type[_T]) -> _T:
        value = item.get(name) if isinstance(item, dict) else None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._wrong(f"{name} is {value!r:.40}")
        return value

    def _ids(self, item: Any, name: str) -> list[int]:
        try:
            return self._tokenizer.check_token_ids(self._get(item, name, list), name)
        except InvalidArgumentError as error:
            raise self._wrong(str(error)) from None

    def _chunk(self, item: Any) -> tuple[str, Chunk]:
        content = self._get(item, "content", str)
        ids, anchor = self._ids(item, "token_ids"), self._ids(item, "anchor_token_ids")
        kv_ids = self._ids(item, "kv_token_ids")
        kind = self._get(item, "chunk_type", str)
        if kind not in [member.value for member in ChunkType]:
            raise self._wrong(f"chunk_type is {kind!r:.40}")
        chunk_type = ChunkType(kind)
        if not ids or len(ids) + len(anchor) > self._max_len:
            raise self._wrong(f"a chunk has {len(ids)} tokens and an anchor of {len(anchor)}")
        if chunk_type is ChunkType.OUTPUT and kv_ids == ids and self._tokenizer.decode(ids) == content:
            core = (0, len(content))  # tokens that a model generated: other ones may spell the same
        else:
            found = core_of(self._tokenizer, content)
            has_kv = chunk_type in (ChunkType.CONTEXT, ChunkType.OUTPUT)
            core = (found.begin, found.end) if has_kv else (0, 0)
            own = self._tokenizer.encode(content, add_special_tokens=False, at_start=False)
            if own != ids or kv_ids != (list(found.token_ids) if has_kv else []):
                raise self._wrong("its texts have other tokens here")
        chunk = Chunk(
            chunk_id=chunk_identity(chunk_type, anchor, ids),
            chunk_type=chunk_type,
            content=content,
            token_ids=ids,
            kv_token_ids=kv_ids,
            anchor_token_ids=anchor,
            metadata=self._get(item, "metadata", dict),
            pinned=self._get(item, "pinned", bool),
            core=core,
        )
        return self._get(item, "chunk_id", str), chunk

    def _output(self, item: Any, think: tuple[int, int] | None) -> RetainedOutput:
        ids, prompt = self._ids(item, "token_ids"), self._ids(item, "prompt_token_ids")
        segments = []
        for row in self._get(item, "segments", list):
            if not isinstance(row, list) or len(row) != 3 or not isinstance(row[1], bool):
                raise self._wrong(f"segments has {row!r:.40}")
            parts = {"segments": row[0], "anchor": row[2]}
            segments.append(Segment(self._ids(parts, "segments"), chunk=row[1], anchor=self._ids(parts, "anchor")))
        if [token for segment in segments for token in ids_of(segment)] != prompt:
            raise self._wrong("segments are not the prompt")
        messages = self._get(item, "messages", list)
        for message in messages:
            self._get(message, "role", str)
            self._get(message, "content", str)
        chunk_ids, chunk_id = item.get("chunk_ids"), item.get("output_chunk_id")
        if not isinstance(chunk_ids, dict | None) or not isinstance(chunk_id, str | None):
            raise self._wrong("an output has chunk ids that are none")
        return RetainedOutput(
            seq_id=self._get(item, "seq_id", int),
            text=self._get(item, "text", str),
            token_ids=ids,
            prompt_token_ids=prompt,
            prompt_length=len(prompt),
            completion_length=len(ids),
            think_positions=think_spans(ids, think),
            tainted_origin=self._get(item, "tainted_origin", bool),
            cache_info={},
            chunk_ids=chunk_ids,
            output_chunk_id=chunk_id,
            messages=messages,
            segments=segments,
        )
