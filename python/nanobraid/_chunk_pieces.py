"""The part of `ChunkedLLM` that finds stored pieces in prompts that were not made of chunks.

A prompt is cut at borders that come up again: of messages, of paragraphs, or after so many tokens. A piece that was
computed before (`warm`) is used as a chunk if the request accepts an approximate mode. What is not there is computed as
any prompt is: pieces are not stored because they were seen once, which fills memory with what never comes again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanobraid._chunk_base import ChunkedBase, Job
from nanobraid._chunk_outputs import ChunkedOutput, KvKey, Params, output_of, params_of
from nanobraid._chunk_prompt import Core, Piece, compose_chat, core_of, moved, place, segments_of
from nanobraid.chat_template import Message, check_messages
from nanobraid.composition import Reuse
from nanobraid.errors import InvalidArgumentError, UnsupportedError
from nanobraid.sampling_params import require_int

#: Tokens of a piece where a text has no border.
FALLBACK_TOKENS = 128
#: Tokens of the smallest piece: a block.
MIN_TOKENS = 16

_PARAGRAPH = re.compile(r"\S.*?(?=\s*\n[^\S\n]*\n|\s*\Z)", re.DOTALL)
_LONGEST = 1 << 20


@dataclass(frozen=True)
class WarmReport:
    """What `ChunkedLLM.warm` has done.

    Attributes:
        pieces: Pieces of the texts that are stored now.
        new_pieces: Those of them that were not before.
        tokens: Tokens of the pieces.
        left_out: Tokens of the texts that are in no piece: too few, or merged with what stands around them.
        kv_bytes: Memory of the pieces.
    """

    pieces: int
    new_pieces: int
    tokens: int
    left_out: int
    kv_bytes: int


class AutomaticReuse(ChunkedBase):
    """Prompts as they come, with stored pieces found in them."""

    def _cores(self, text: str, boundaries: str | int, *, is_message: bool) -> list[Core]:
        """The pieces of a text, ends of pieces that are too short left out."""
        spans, size = [(0, len(text))], 0
        if isinstance(boundaries, int):
            size = boundaries
        elif boundaries == "paragraphs":
            spans = [match.span() for match in _PARAGRAPH.finditer(text)]
            size = FALLBACK_TOKENS if len(spans) == 1 else 0
        elif not is_message:
            size = FALLBACK_TOKENS
        cores = []
        for begin, end in spans:
            if begin == end:
                continue
            core = core_of(self._tokenizer, text[begin:end])
            if len(core.token_ids) >= MIN_TOKENS:
                cores.append(dataclasses.replace(moved(core, begin), slice_len=size))
        return cores

    def complete(
        self,
        prompt: Sequence[Message] | str,
        sampling_params: Params | None = None,
        *,
        mode: Reuse | None = None,
        chunk_boundaries: str | int = "messages",
    ) -> ChunkedOutput:
        """Answers a conversation, or continues a text; pieces of it that are stored are used as chunks.

        Args:
            prompt: Messages, as for `LLM.chat`; or a text, as for `LLM.generate`.
            sampling_params: As for `generate_from_chunks`.
            mode: As for `generate_from_chunks`. With ``exact`` the prefix cache alone is used.
            chunk_boundaries: Where pieces end: ``"messages"`` with messages (a text without messages: after every 128
                tokens); ``"paragraphs"`` at empty lines (in a text without: after every 128 tokens); or after so many
                tokens, counted from the beginning of each message. A piece has at least 16 tokens.

        Returns:
            The answer; ``pieces`` says how many there were and how many of them were found.

        Raises:
            InvalidArgumentError: The boundaries are none of these; or as `LLM.chat`, and so all other errors.
        """
        _check(chunk_boundaries)
        params, _ = params_of(sampling_params)
        reuse = self._reuse_of(mode)
        if isinstance(prompt, str):
            cores = self._cores(prompt, chunk_boundaries, is_message=False)
            begin = self._tokenizer.encode("")
            pieces = [Piece(tuple(begin))] if begin else []
            pieces += place(self._tokenizer, prompt, cores, at_start=True)
        else:
            pieces = self._chat_pieces(check_messages(prompt), chunk_boundaries)
        candidates = [key for piece in pieces for key in _keys(piece)]
        known = set(self._kv.infos())
        segments = segments_of(pieces, lambda key: key in known and len(key[0]) >= MIN_TOKENS)
        job = Job(segments, params, reuse)
        answer = output_of(self._serve([job])[0], None)
        assert answer.reuse is not None
        used = sum(segment.chunk for segment in segments) if not answer.reuse.is_exact else 0
        return dataclasses.replace(answer, pieces={"candidates": len(candidates), "reused": used})

    def _chat_pieces(self, messages: list[dict[str, Any]], boundaries: str | int) -> list[Piece]:
        cores = [self._cores(message["content"] or "", boundaries, is_message=True) for message in messages]
        while True:
            try:
                return compose_chat(self._template, self._tokenizer, messages, cores)
            except UnsupportedError:  # a template that changes what messages say: nothing can be found in it
                if not any(cores):
                    raise
                cores = [[] for _ in messages]

    def warm(
        self, text_or_texts: str | Sequence[str], *, chunk_boundaries: str | int = "messages", pin: bool = False
    ) -> WarmReport:
        """Computes and stores the pieces of texts, for `complete` to find.

        Args:
            text_or_texts: Contents of messages, or documents that come up in them.
            chunk_boundaries: As for `complete`, which finds what has the same ones; with ``"messages"`` every text is
                one piece.
            pin: They stay until they are removed. Otherwise they go when others need the room.

        Raises:
            InvalidArgumentError: No text, or an empty one; or the boundaries are none of these.
            OutOfMemoryError: They do not fit in `chunk_memory_ratio`.
        """
        _check(chunk_boundaries)
        texts = [text_or_texts] if isinstance(text_or_texts, str) else list(text_or_texts)
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise InvalidArgumentError("text_or_texts must be a text or a list of texts, none of them empty")
        keys: list[KvKey] = []
        total = 0
        for text in texts:
            total += len(self._tokenizer.encode(text, add_special_tokens=False, at_start=False))
            for core in self._cores(text, chunk_boundaries, is_message=True):
                keys += [key for key in _keys(Piece(core.token_ids, core)) if len(key[0]) >= MIN_TOKENS]
        keys = list(dict.fromkeys(keys))
        known = self._kv.infos()
        if keys:
            self._warm_keys.update(keys)
            self._kv.compute(keys, pin=pin)
        tokens = sum(len(key[0]) for key in keys)
        return WarmReport(
            pieces=len(keys),
            new_pieces=sum(key not in known for key in keys),
            tokens=tokens,
            left_out=max(total - tokens, 0),
            kv_bytes=sum(self._kv.bytes_of(key) for key in keys),
        )

    def _cool(self) -> None:
        """Gives the memory of all that `warm` has stored back."""
        keys, self._warm_keys = self._warm_keys, set()
        for key in keys:
            self._kv.remove(key)


def _keys(piece: Piece) -> list[KvKey]:
    return [] if piece.core is None else [(tokens, piece.core.anchor) for tokens in piece.core.slices()]


def _check(boundaries: object) -> None:
    if isinstance(boundaries, str):
        if boundaries not in ("messages", "paragraphs"):
            raise InvalidArgumentError(
                f"chunk_boundaries must be 'messages', 'paragraphs' or a number of tokens, got {boundaries!r}"
            )
        return
    require_int("chunk_boundaries", boundaries, MIN_TOKENS, _LONGEST, f"an integer >= {MIN_TOKENS}, or a name")
