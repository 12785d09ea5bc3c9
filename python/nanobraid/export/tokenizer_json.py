"""Reader of Hugging Face's ``tokenizer.json``: vocabulary, merges, added tokens, and which known tokenizer it is.

The file describes a pipeline of named parts. Each part is compared with the pipelines of the families that nanobraid
knows; an unknown part is refused by name, never approximated. Written for hostile input. Source of the format: the
`tokenizers` package.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanobraid.errors import FormatError, UnsupportedError
from nanobraid.export.json_file import read_json

SPACE_MARK = "\u2581"

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PATTERNS = {_GPT2: "gpt-2", _LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}

# Bytes that no UTF-8 has, and a vocabulary need not spell.
# Bytes of text as people write it. Vocabularies of real models lack some others, which are then left out of a text:
# control characters, and the first bytes of planes without characters.
_BYTES_OF_TEXT = {0x09, 0x0A, 0x0D, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)}


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in text before anything else."""

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclass
class TokenizerJson:
    """What the file says.

    Attributes:
        kind: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece BPE), as GGUF calls them.
        tokens: Text by id, without added tokens that the vocabulary lacks.
        merges: Pairs, best first.
        added: By id.
        pre: Name of the pre-tokenizer; of gpt2 only.
        nfc: Whether text is normalised to NFC; of gpt2 only.
        ignore_merges: Whether a piece that is a token is that token; of gpt2 only.
        space_prefix: ``none`` or a value of ``tokenizer.braid.space_prefix``; of llama only.
        unk: The unknown token.
        first: Special tokens that the template puts in front of a text; None if there is no template.
        last: Those behind it.
    """

    kind: str
    tokens: dict[int, str]
    merges: list[tuple[str, str]]
    added: dict[int, AddedToken]
    pre: str = ""
    nfc: bool = False
    ignore_merges: bool = False
    space_prefix: str = "none"
    unk: str | None = None
    first: list[str] | None = None
    last: list[str] = field(default_factory=list)


class _Reader:
    """The file with its path, for messages."""

    def __init__(self, path: Path, root: dict[str, Any]) -> None:
        self.path, self.root = path, root

    def bad(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: {what}")

    def unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{self.path}: {what}")

    def text(self, value: object, where: str) -> str:
        if not isinstance(value, str):
            raise self.bad(f"{where} is a {type(value).__name__}, expected a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.bad(f"{where} is {value!r}, which is not Unicode text") from None
        return value

    def flag(self, table: dict[str, Any], key: str, where: str, missing: bool = False) -> bool:
        value = table.get(key, missing)
        if value is None:
            return missing
        if not isinstance(value, bool):
            raise self.bad(f"{where}.{key} is {value!r}, expected true or false")
        return value

    def table(self, value: object, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.bad(f"{where} is a {type(value).__name__}, expected an object")
        return value

    def parts(self, value: object, list_key: str, where: str) -> list[dict[str, Any]]:
        """A part or a ``Sequence`` of parts, flattened; None gives none."""
        if value is None:
            return []
        table = self.table(value, where)
        if table.get("type") != "Sequence":
            return [table]
        inner = table.get(list_key)
        if not isinstance(inner, list):
            raise self.bad(f"{where}.{list_key} is no list")
        return [part for i, item in enumerate(inner) for part in self.parts(item, list_key, f"{where}[{i}]")]

    def token_id(self, value: object, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 28:
            raise self.bad(f"{where} has the id {value!r}, expected an integer from 0")
        return value


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """Reads a ``tokenizer.json``.

    Raises:
        FormatError: The file is damaged; the message has the place.
        UnsupportedError: It describes a tokenizer that nanobraid does not know; the message names the part.
        ModelIOError: The file cannot be read.
    """
    reader = _Reader(path, read_json(path))
    model = reader.table(reader.root.get("model"), "model")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise reader.unsupported(f"a tokenizer model of type {kind!r} is not supported, only BPE")
    if model.get("dropout"):
        raise reader.unsupported(f"model.dropout {model['dropout']!r} is not supported")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise reader.unsupported(f"model.{key} {model[key]!r} is not supported")
    tokens = _read_vocab(reader, model)
    byte_fallback = reader.flag(model, "byte_fallback", "model")
    out = TokenizerJson(
        kind="llama" if byte_fallback else "gpt2",
        tokens=tokens,
        merges=_read_merges(reader, model, set(tokens.values())),
        added=_read_added(reader, tokens),
        ignore_merges=reader.flag(model, "ignore_merges", "model"),
    )
    if model.get("unk_token") is not None:
        out.unk = reader.text(model["unk_token"], "model.unk_token")
    if out.kind == "gpt2":
        _recognize_byte_level(reader, out)
    else:
        _recognize_sentencepiece(reader, out)
    _read_template(reader, out)
    return out


def _read_vocab(reader: _Reader, model: dict[str, Any]) -> dict[int, str]:
    tokens: dict[int, str] = {}
    for text, value in reader.table(model.get("vocab"), "model.vocab").items():
        where = f"model.vocab: token {text!r}"
        reader.text(text, where)
        if not text:
            raise reader.bad("model.vocab has an empty token")
        token_id = reader.token_id(value, where)
        if token_id in tokens:
            raise reader.bad(f"{where} has the id {token_id}, as token {tokens[token_id]!r} has")
        tokens[token_id] = text
    if not tokens:
        raise reader.bad("model.vocab is empty")
    return tokens


def _read_merges(reader: _Reader, model: dict[str, Any], known: set[str]) -> list[tuple[str, str]]:
    listed = model.get("merges")
    if not isinstance(listed, list):
        raise reader.bad("model.merges is no list")
    merges = []
    for i, merge in enumerate(listed):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise reader.bad(f"model.merges[{i}] is {str(merge)[:80]!r}, expected two tokens")
        left, right = pair
        for part in (left, right, left + right):
            if part not in known:
                raise reader.bad(f"model.merges[{i}] ({left!r}, {right!r}): {part!r} is not a token")
        merges.append((left, right))
    return merges


def _read_added(reader: _Reader, tokens: dict[int, str]) -> dict[int, AddedToken]:
    listed = reader.root.get("added_tokens") or []
    if not isinstance(listed, list):
        raise reader.bad("added_tokens is no list")
    ids = {text: token_id for token_id, text in tokens.items()}
    added: dict[int, AddedToken] = {}
    for i, item in enumerate(listed):
        where = f"added_tokens[{i}]"
        table = reader.table(item, where)
        token = added_token(reader.path, table, reader.token_id(table.get("id"), where), where)
        if token.id in added:
            raise reader.bad(f"{where} {token.content!r} has the id {token.id}, as {added[token.id].content!r} has")
        if tokens.get(token.id, token.content) != token.content or ids.get(token.content, token.id) != token.id:
            raise reader.bad(f"{where} {token.content!r} has the id {token.id}, in model.vocab it is another token")
        ids[token.content] = token.id
        added[token.id] = token
    return added


def added_token(path: Path, table: dict[str, Any], token_id: int, where: str) -> AddedToken:
    """The token that an object with ``content`` and flags describes.

    Raises:
        FormatError: A value is of the wrong type or empty.
        UnsupportedError: It asks for `single_word`.
    """
    reader = _Reader(path, {})
    content = reader.text(table.get("content"), f"{where}.content")
    if not content:
        raise reader.bad(f"{where} is an empty token")
    if reader.flag(table, "single_word", where):
        raise reader.unsupported(f"{where} {content!r}: single_word is not supported")
    flags = {key: reader.flag(table, key, where) for key in ("special", "lstrip", "rstrip", "normalized")}
    return AddedToken(token_id, content, **flags)


# ---- the pipelines of the families ----


def _without(part: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in keys}


def _shown(part: object) -> str:
    text = json.dumps(part, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "..."


def _recognize_byte_level(reader: _Reader, out: TokenizerJson) -> None:
    normalizers = reader.parts(reader.root.get("normalizer"), "normalizers", "normalizer")
    for part in normalizers:
        if part != {"type": "NFC"}:
            raise reader.unsupported(f"unknown normalizer {_shown(part)} (known for byte-level BPE: NFC)")
    out.nfc = bool(normalizers)
    parts = reader.parts(reader.root.get("pre_tokenizer"), "pretokenizers", "pre_tokenizer")
    if not parts or parts[-1].get("type") != "ByteLevel":
        raise reader.unsupported(f"unknown pre_tokenizer {_shown(reader.root.get('pre_tokenizer'))}")
    if reader.flag(parts[-1], "add_prefix_space", "ByteLevel", True):
        raise reader.unsupported("ByteLevel with add_prefix_space is not supported")
    has_regex = reader.flag(parts[-1], "use_regex", "ByteLevel", True)
    before = parts[:-1]
    if has_regex and not before:
        out.pre = "gpt-2"
    elif has_regex and before == [{"type": "Digits", "individual_digits": True}]:
        out.pre = "smollm"
    elif not has_regex and len(before) == 1 and before[0].get("type") == "Split":
        split = before[0]
        pattern = split.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if _without(split, "pattern") != {"type": "Split", "behavior": "Isolated", "invert": False}:
            raise reader.unsupported(f"unknown pre_tokenizer {_shown(split)}")
        if not isinstance(regex, str) or regex not in _PATTERNS:
            known = ", ".join(_PATTERNS.values())
            raise reader.unsupported(f"unknown pre_tokenizer pattern {_shown(pattern)} (known: {known})")
        out.pre = _PATTERNS[regex]
    else:
        raise reader.unsupported(f"unknown pre_tokenizer {_shown(reader.root.get('pre_tokenizer'))}")
    decoders = reader.parts(reader.root.get("decoder"), "decoders", "decoder")
    if [part.get("type") for part in decoders] != ["ByteLevel"]:
        raise reader.unsupported(f"unknown decoder {_shown(reader.root.get('decoder'))}")
    spelled = set(out.tokens.values())
    missing = [byte for byte, char in enumerate(byte_alphabet()) if byte in _BYTES_OF_TEXT and char not in spelled]
    if missing:
        raise reader.bad(f"model.vocab has no token for the byte 0x{missing[0]:02X} ({len(missing)} bytes are missing)")


def byte_alphabet() -> list[str]:
    """GPT-2's spelling of the 256 bytes, in the order of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
_PREPEND = {"type": "Prepend", "prepend": SPACE_MARK}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_TO_TEXT = [
    {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_SCHEMES = {"never": "none", "first": "text_if_unspaced", "always": "stretches_unspaced"}


def _recognize_sentencepiece(reader: _Reader, out: TokenizerJson) -> None:
    normalizers = reader.parts(reader.root.get("normalizer"), "normalizers", "normalizer")
    parts = reader.parts(reader.root.get("pre_tokenizer"), "pretokenizers", "pre_tokenizer")
    if normalizers in ([_PREPEND, _TO_MARK], [_TO_MARK]) and not parts:
        out.space_prefix = "stretches" if len(normalizers) == 2 else "none"
    elif not normalizers and len(parts) == 1 and parts[0].get("type") == "Metaspace":
        part = parts[0]
        if part.get("replacement") != SPACE_MARK or reader.flag(part, "split", "Metaspace", True):
            raise reader.unsupported(f"unknown pre_tokenizer {_shown(part)} (Metaspace is known with split = false)")
        scheme = part.get("prepend_scheme", "always")
        if scheme not in _SCHEMES:
            raise reader.unsupported(f"unknown Metaspace prepend_scheme {scheme!r}")
        out.space_prefix = _SCHEMES[scheme]
    elif normalizers:
        raise reader.unsupported(f"unknown normalizer {_shown(reader.root.get('normalizer'))}")
    else:
        raise reader.unsupported(f"unknown pre_tokenizer {_shown(reader.root.get('pre_tokenizer'))}")
    decoders = reader.parts(reader.root.get("decoder"), "decoders", "decoder")
    if decoders != _TO_TEXT + ([_STRIP] if out.space_prefix != "none" else []):
        raise reader.unsupported(f"unknown decoder {_shown(reader.root.get('decoder'))}")
    if out.ignore_merges:
        raise reader.unsupported("model.ignore_merges with byte_fallback is not supported")
    names = set(out.tokens.values())
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in names]
    if missing:
        raise reader.bad(f"model.vocab has no byte token <0x{missing[0]:02X}> ({len(missing)} bytes are missing)")
    # Where text is changed first, such a token would be looked for in the changed text.
    for token in out.added.values():
        if token.normalized and not token.special and normalizers:
            raise reader.unsupported(f"the added token {token.content!r}: normalized is not supported here")


def _read_template(reader: _Reader, out: TokenizerJson) -> None:
    for part in reader.parts(reader.root.get("post_processor"), "processors", "post_processor"):
        kind = part.get("type")
        if kind == "ByteLevel":
            continue  # it only moves offsets
        if kind != "TemplateProcessing":
            raise reader.unsupported(f"unknown post_processor {kind!r}")
        single = part.get("single")
        if not isinstance(single, list):
            raise reader.bad("post_processor.single is no list")
        out.first = []
        target = out.first
        texts = 0
        for i, item in enumerate(single):
            table = reader.table(item, f"post_processor.single[{i}]")
            if "Sequence" in table:
                texts += 1
                target = out.last
                continue
            special = reader.table(table.get("SpecialToken"), f"post_processor.single[{i}].SpecialToken")
            target.append(reader.text(special.get("id"), f"post_processor.single[{i}].SpecialToken.id"))
        if texts != 1:
            raise reader.bad(f"post_processor.single has {texts} texts, expected one")
        for name, found in (("before", out.first), ("behind", out.last)):
            if len(found) > 1:
                raise reader.bad(f"post_processor.single puts {len(found)} tokens {name} the text: {', '.join(found)}")


def is_byte_name(text: str) -> bool:
    """Whether the text is the name of a byte token, e.g. ``<0x0A>``."""
    return re.fullmatch(r"<0x[0-9A-F]{2}>", text) is not None
