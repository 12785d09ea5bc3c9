"""The tokenizer of a model file, usable without loading the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from nanobraid import _core
from nanobraid.errors import InvalidArgumentError, core_errors
from nanobraid.sampling_params import require_int


class Encoding(NamedTuple):
    """Token ids of a text and where each comes from.

    Attributes:
        ids: The token ids.
        offsets: For each the characters ``text[begin:end]`` that it has a byte of; ``(0, 0)`` for tokens that are in no
            text, such as the one that begins it. Tokens that share a character share its offsets.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """Turns text into token ids and back, as the model was trained to.

    Safe to use from several threads.

    Args:
        path: A model file (also one without tensors), a Hugging Face folder with ``tokenizer.json`` or
            ``tokenizer.model``, or a known name such as ``smollm2-135m`` (see `nanobraid.models.resolve`).

    Raises:
        ModelNotFoundError: There is no such file or name.
        FormatError: The file is damaged.
        UnsupportedError: The file needs a tokenizer that nanobraid does not have.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from nanobraid import models

        given = Path(path) if path else None
        self._path = given if given is not None and _has_hf_tokenizer(given) else models.ensure(path)
        if self._path.is_dir():
            from nanobraid._gguf_bytes import gguf_bytes
            from nanobraid.export.hf_tokenizer import read_hf_tokenizer

            data = gguf_bytes(read_hf_tokenizer(self._path))
            with core_errors():
                self._core = _core.Tokenizer.from_gguf(data, str(self._path))
            return
        with core_errors():
            self._core = _core.Tokenizer(str(self._path))

    def __repr__(self) -> str:
        return f"Tokenizer({str(self._path)!r}, vocab_size={self.vocab_size})"

    @property
    def vocab_size(self) -> int:
        """Number of tokens V; ids are 0 .. V - 1."""
        return self._core.vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if the model has one."""
        return self._core.bos_token_id

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a text or an answer."""
        return list(self._core.eos_token_ids)

    @property
    def chat_template(self) -> str | None:
        """The jinja2 source of the model's chat template. Untrusted: render it with `nanobraid.ChatTemplate`."""
        return self._core.chat_template

    @property
    def add_bos(self) -> bool:
        """Whether ``encode(..., add_special_tokens=True)`` begins with `bos_token_id`."""
        return self._core.add_bos

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text and id of the control tokens, which `encode` makes only with ``parse_special=True``."""
        return dict(self._core.special_tokens)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False, at_start: bool = True
    ) -> list[int]:
        """Returns the token ids of a text.

        Args:
            text: Any text; lone surrogates are refused.
            add_special_tokens: Begin with the beginning-of-text token where the model wants one.
            parse_special: Turn the spelling of control tokens (``<|im_end|>``) into these tokens. Leave it off for
                text from users: there it stays text.
            at_start: The text begins a prompt. If it comes behind a control token instead, SentencePiece tokenizers may
                put no space in front of it.

        Raises:
            InvalidArgumentError: `text` is not a string or not valid Unicode.
        """
        _check_text(text)
        with core_errors():
            return list(self._core.encode(text, add_special_tokens, parse_special, at_start))

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> Encoding:
        """Returns the token ids of a text and the characters that each comes from.

        Args:
            text: As for `encode`, and so the following.
            add_special_tokens: Begin with the beginning-of-text token where the model wants one.
            parse_special: Turn the spelling of control tokens into these tokens.

        Raises:
            InvalidArgumentError: `text` is not a string or not valid Unicode.
        """
        _check_text(text)
        with core_errors():
            return Encoding(*self._core.encode_with_offsets(text, add_special_tokens, parse_special))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            token_ids: Ids in [0, vocab_size).
            skip_special_tokens: Leave control tokens out.

        Raises:
            InvalidArgumentError: An id is outside the vocabulary.
        """
        ids = self.check_token_ids(token_ids)
        with core_errors():
            return self._core.decode(ids, skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Returns the text of one token, control tokens included.

        Raises:
            InvalidArgumentError: The id is outside the vocabulary.
        """
        (checked,) = self.check_token_ids([token_id])
        with core_errors():
            return self._core.token_text(checked)

    def find_token(self, text: str) -> int | None:
        """Returns the id of the token spelled exactly like this, or None."""
        with core_errors():
            return self._core.find_token(text)

    def check_token_ids(self, token_ids: Sequence[object], field: str = "token_ids") -> list[int]:
        """Returns the ids as a list of int.

        Args:
            token_ids: What the user gave; numpy integers are accepted.
            field: Name used in the error message.

        Raises:
            InvalidArgumentError: One is not an integer or outside [0, vocab_size); the message says which.
        """
        last = self.vocab_size - 1
        if (
            type(token_ids) is list
            and set(map(type, token_ids)) == {int}
            and 0 <= min(token_ids) <= max(token_ids) <= last
        ):
            return list(token_ids)
        return [
            require_int(f"{field}[{i}]", token_id, 0, last, f"a token id in [0, {last}]")
            for i, token_id in enumerate(token_ids)
        ]

    @property
    def core(self) -> _core.Tokenizer:
        """The tokenizer of the core, for the engine."""
        return self._core

    def stream(
        self,
        *,
        skip_special_tokens: bool = True,
        at_start: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> _core.TextStream:
        """Returns a decoder that is fed one token at a time and gives out only whole characters.

        Args:
            skip_special_tokens: Leave control tokens out.
            at_start: The tokens begin a text. If they go on with one, a space that the first begins with is text;
                otherwise SentencePiece tokenizers leave it out, as they put one in front of every text.
            stop: Strings that end the text, at most 16. What could be the beginning of one is held back.
            include_stop: The stop string is part of the text.
            min_tokens: So many tokens must have come before anything stops.

        Returns:
            An object with ``push(token_id) -> str``, ``finish() -> str`` and ``stop_reason``, the stop string that came
            up or None.

        Raises:
            InvalidArgumentError: There are too many stop strings, or one is empty or too long.
        """
        with core_errors():
            return self._core.stream(skip_special_tokens, at_start, list(stop), include_stop, min_tokens)


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise InvalidArgumentError(f"text must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"text has a lone surrogate {text[error.start]!r} at character {error.start}, which is not Unicode text"
        ) from None


def _has_hf_tokenizer(path: Path) -> bool:
    if not path.is_dir():
        return False
    from nanobraid.export.hf_tokenizer import has_hf_tokenizer  # importing the exporter takes time and memory

    return has_hf_tokenizer(path)
