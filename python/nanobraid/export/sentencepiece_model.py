"""Reader of SentencePiece's ``tokenizer.model``: the pieces and what the model asks of its tokenizer.

The file is a protocol buffer; only the fields that say how text is cut are kept, and what changes the result in a way
that nanobraid does not offer (Unigram models, compiled character maps) is refused by name. Written for hostile input:
every length is checked against what is left. Source of the format: sentencepiece_model.proto of the sentencepiece
package and the description of protocol buffers' wire format.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nanobraid.errors import FormatError, ModelIOError, UnsupportedError

MAX_BYTES = 256 << 20
"""Larger files are refused; real ones have a few megabytes."""

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5
_WIRE_NAMES = {VARINT: "varint", FIXED64: "fixed64", LENGTH_DELIMITED: "bytes", FIXED32: "fixed32"}

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class Piece:
    """One token: its text, its score and its type as numbered in the file (and in GGUF)."""

    text: str
    score: float
    type: int


@dataclass
class SentencePieceModel:
    """What a BPE model without character map says.

    Attributes:
        pieces: The tokens; the index is the id.
        add_dummy_prefix: A space is put in front of every text.
        remove_extra_whitespaces: Runs of spaces become one, those at the ends of a text none.
        unk_id: This and the following: -1 if the model has none.
        bos_id: Begins a text.
        eos_id: Ends a text.
        pad_id: Fills.
    """

    pieces: list[Piece] = field(default_factory=list)
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1


@dataclass(frozen=True)
class _Field:
    number: int
    wire: int
    value: int  # of a varint; else 0
    begin: int  # of a fixed or delimited value
    end: int


class _Message:
    """Walks the fields of a message that stands at [begin, end) of the file."""

    def __init__(self, path: Path, data: bytes, begin: int, end: int, name: str) -> None:
        self.path, self.data, self.begin, self.end, self.name = path, data, begin, end, name

    def fail(self, offset: int, what: str) -> FormatError:
        return FormatError(f"{self.path}: at offset {offset}, in {self.name}: {what}")

    def _varint(self, position: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if position >= self.end:
                raise self.fail(position, "a number is cut off")
            byte = self.data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 1 << 64:
                    break
                return value, position
        raise self.fail(position, "a number has more than 64 bits")

    def fields(self) -> Iterator[_Field]:
        """Every field in order.

        Raises:
            FormatError: A field does not fit or is of a kind that does not exist.
        """
        position = self.begin
        while position < self.end:
            start = position
            key, position = self._varint(position)
            number, wire = key >> 3, key & 7
            value = 0
            if number == 0:
                raise self.fail(start, "field 0 does not exist")
            if wire == VARINT:
                value, position = self._varint(position)
                begin = position
            elif wire in (FIXED32, FIXED64):
                begin, position = position, position + (4 if wire == FIXED32 else 8)
            elif wire == LENGTH_DELIMITED:
                length, begin = self._varint(position)
                position = begin + length
            else:
                raise self.fail(start, f"field {number} has the unknown wire type {wire}")
            if position > self.end:
                raise self.fail(start, f"field {number} ends {position - self.end} bytes behind its message")
            yield _Field(number, wire, value, begin, position)

    def expect(self, found: _Field, wire: int) -> None:
        if found.wire != wire:
            raise self.fail(
                found.begin,
                f"field {found.number} is a {_WIRE_NAMES[found.wire]}, expected {_WIRE_NAMES[wire]}",
            )

    def integer(self, found: _Field) -> int:
        """A varint as a signed number of 32 bits, which is how negative ids are written."""
        self.expect(found, VARINT)
        value = found.value - (1 << 64) if found.value >= 1 << 63 else found.value
        if not -(1 << 31) <= value < 1 << 31:
            raise self.fail(found.begin, f"field {found.number} is {value}, which does not fit into 32 bits")
        return value

    def boolean(self, found: _Field) -> bool:
        self.expect(found, VARINT)
        return found.value != 0

    def number(self, found: _Field) -> float:
        self.expect(found, FIXED32)
        return float(struct.unpack_from("<f", self.data, found.begin)[0])

    def text(self, found: _Field) -> str:
        self.expect(found, LENGTH_DELIMITED)
        try:
            return self.data[found.begin : found.end].decode()
        except UnicodeDecodeError as error:
            raise self.fail(found.begin + error.start, f"field {found.number} is not UTF-8") from None

    def message(self, found: _Field, name: str) -> _Message:
        self.expect(found, LENGTH_DELIMITED)
        return _Message(self.path, self.data, found.begin, found.end, name)

    def unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{self.path}: {what}")


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Reads a ``tokenizer.model``.

    Args:
        path: The file.

    Raises:
        FormatError: The file is damaged; the message has the offset.
        UnsupportedError: The model is not BPE or asks for something that nanobraid does not do; the message names it.
        ModelIOError: The file cannot be read.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FormatError(f"{path}: larger than {MAX_BYTES >> 20} MiB, which no SentencePiece model is")
        data = path.read_bytes()
    except OSError as error:
        raise ModelIOError(f"{path}: {error.strerror}") from None
    model = SentencePieceModel()
    top = _Message(path, data, 0, len(data), "the model")
    has_trainer = False
    for found in top.fields():
        if found.number == 1:
            model.pieces.append(_read_piece(top.message(found, f"piece {len(model.pieces)}")))
        elif found.number == 2:
            _read_trainer(top.message(found, "trainer_spec"), model)
            has_trainer = True
        elif found.number == 3:
            _read_normalizer(top.message(found, "normalizer_spec"), model)
        elif found.number == 5:
            _refuse_map(top.message(found, "denormalizer_spec"), "denormalisation")
    if not model.pieces:
        raise FormatError(f"{path}: the model has no pieces")
    if not has_trainer:
        raise FormatError(f"{path}: the model has no trainer_spec, so its type is unknown")
    return model


def _read_piece(message: _Message) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for found in message.fields():
        if found.number == 1:
            text = message.text(found)
        elif found.number == 2:
            score = message.number(found)
        elif found.number == 3:
            kind = message.integer(found)
    if not text:
        raise message.fail(message.begin, "the piece is empty")
    if not NORMAL <= kind <= BYTE:
        raise message.fail(message.begin, f"the piece {text!r} has the unknown type {kind}")
    if math.isnan(score):
        raise message.fail(message.begin, f"the score of the piece {text!r} is not a number")
    return Piece(text, score, kind)


def _read_trainer(message: _Message, model: SentencePieceModel) -> None:
    kind = 1  # what a file without the field means
    byte_fallback = False
    ids = {40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id"}
    for found in message.fields():
        if found.number == 3:
            kind = message.integer(found)
        elif found.number == 24 and message.boolean(found):
            raise message.unsupported("treat_whitespace_as_suffix is not supported")
        elif found.number == 35:
            byte_fallback = message.boolean(found)
        elif found.number in ids:
            setattr(model, ids[found.number], message.integer(found))
    if kind != 2:
        raise message.unsupported(
            f"SentencePiece models of type {_MODEL_TYPES.get(kind, kind)} are not supported, only bpe"
        )
    if not byte_fallback:
        raise message.unsupported("SentencePiece models without byte_fallback are not supported")


def _read_normalizer(message: _Message, model: SentencePieceModel) -> None:
    name = ""
    for found in message.fields():
        if found.number == 1:
            name = message.text(found)
        elif found.number == 3:
            model.add_dummy_prefix = message.boolean(found)
        elif found.number == 4:
            model.remove_extra_whitespaces = message.boolean(found)
        elif found.number == 5 and not message.boolean(found):
            raise message.unsupported("escape_whitespaces = false is not supported")
    _refuse_map(message, f"normalisation {name!r}")


def _refuse_map(message: _Message, what: str) -> None:
    for found in message.fields():
        if found.number == 2 and found.end > found.begin:
            raise message.unsupported(f"SentencePiece's {what} by a compiled character map is not supported")
