"""The tokenizer of a Hugging Face folder as GGUF metadata keys, which GGUF and `.braid` files share.

`tokenizer.json` is read if there is one, else SentencePiece's `tokenizer.model`; special tokens, ends of answers and
the chat template come from the files beside it. What GGUF has no key for stands under ``tokenizer.braid.``:

===============================  ====================================================================================
``tokenizer.braid.``             meaning
===============================  ====================================================================================
``eos_token_ids``                more tokens that end an answer
``normalizer``                   ``nfc`` or ``none``; of byte-level BPE
``ignore_merges``                a piece that is a token is that token, whatever the merges say; of byte-level BPE
``space_prefix``                 where SentencePiece's dummy prefix goes: in front of the ``text``, of ``stretches``
                                 between added tokens, or of those without a space (``text_if_unspaced``,
                                 ``stretches_unspaced``)
``lstrip_token_ids``             added tokens that take the whitespace before them
``rstrip_token_ids``             added tokens that take the whitespace behind them
===============================  ====================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from nanobraid.errors import FormatError, ModelIOError, ModelNotFoundError, UnsupportedError
from nanobraid.export.json_file import read_json
from nanobraid.export.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_sentencepiece_model,
)
from nanobraid.export.tokenizer_json import (
    AddedToken,
    TokenizerJson,
    added_token,
    is_byte_name,
    read_tokenizer_json,
)

Scalar: TypeAlias = "bool | int | float | str"
MetadataValue: TypeAlias = "bool | int | float | str | list[bool] | list[int] | list[float] | list[str]"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

_MAX_VOCAB = 1 << 24
_NEVER_MERGED = -1e6  # the score of what merging cannot make

# Classes of transformers that put BOS and EOS where their configuration says, whatever tokenizer.json says.
_FLAG_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")


@dataclass
class _Vocabulary:
    """Tokens with what the file of the vocabulary says; ids are 0 .. len - 1."""

    path: Path
    kind: str
    tokens: list[str]
    types: list[int]
    added: dict[int, AddedToken]
    special: dict[str, int] = field(default_factory=dict)  # "bos", ...: ids
    add_bos: bool | None = None
    add_eos: bool | None = None
    keys: dict[str, MetadataValue] = field(default_factory=dict)


def has_hf_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a file that `read_hf_tokenizer` starts from."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_hf_tokenizer(folder: Path) -> dict[str, MetadataValue]:
    """Reads the tokenizer of a Hugging Face folder.

    Args:
        folder: Holds ``tokenizer.json`` or ``tokenizer.model`` and, if they are there, ``tokenizer_config.json``,
            ``special_tokens_map.json``, ``added_tokens.json``, ``generation_config.json``, ``config.json`` and
            ``chat_template.jinja``.

    Returns:
        Keys as in GGUF (``tokenizer.ggml.*``, ``tokenizer.chat_template``) and those of the table above.

    Raises:
        FormatError: A file is damaged, or two contradict each other; the message names file and place.
        UnsupportedError: The tokenizer is of a kind that nanobraid does not have; the message names what.
        ModelNotFoundError: There is no tokenizer in the folder.
        ModelIOError: A file cannot be read.
    """
    config = _optional_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        vocabulary = _from_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").exists():
        vocabulary = _from_sentencepiece(folder, config)
    else:
        raise ModelNotFoundError(f"{folder}: no tokenizer: there is neither {' nor '.join(TOKENIZER_FILES)}")
    _pad(vocabulary, folder / "config.json")
    _add_special_tokens(vocabulary, folder, config)
    out: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": vocabulary.kind,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
    }
    out.update(vocabulary.keys)
    for name, key in _ID_KEYS.items():
        if name in vocabulary.special:
            out[key] = vocabulary.special[name]
    out["tokenizer.ggml.add_bos_token"] = _adds(vocabulary, "bos", config)
    out["tokenizer.ggml.add_eos_token"] = _adds(vocabulary, "eos", config)
    if ends := _end_ids(vocabulary, folder):
        out["tokenizer.braid.eos_token_ids"] = ends
    for flag in ("lstrip", "rstrip"):
        if ids := sorted(i for i, token in vocabulary.added.items() if getattr(token, flag)):
            out[f"tokenizer.braid.{flag}_token_ids"] = ids
    template = _chat_template(folder, config)
    if template is not None:
        out["tokenizer.chat_template"] = template
    return out


_ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


# ---- tokenizer.json ----


def _from_tokenizer_json(path: Path) -> _Vocabulary:
    parsed = read_tokenizer_json(path)
    tokens = dict(parsed.tokens)
    tokens.update({i: token.content for i, token in parsed.added.items()})
    vocabulary = _Vocabulary(path, parsed.kind, _consecutive(path, tokens), [], parsed.added)
    if parsed.unk is not None:
        vocabulary.special["unk"] = _id_of(vocabulary, parsed.unk, "model.unk_token")
    vocabulary.types = [_type_of(vocabulary, i) for i in range(len(vocabulary.tokens))]
    if parsed.kind == "gpt2":
        vocabulary.keys = {
            "tokenizer.ggml.pre": parsed.pre,
            "tokenizer.ggml.merges": [f"{left} {right}" for left, right in parsed.merges],
            "tokenizer.braid.normalizer": "nfc" if parsed.nfc else "none",
            "tokenizer.braid.ignore_merges": parsed.ignore_merges,
        }
        if not parsed.merges:
            raise UnsupportedError(f"{path}: byte-level BPE without merges is not supported")
    else:
        vocabulary.keys = {
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": _scores_of(vocabulary, parsed),
            "tokenizer.ggml.add_space_prefix": parsed.space_prefix != "none",
        }
        if parsed.space_prefix != "none":
            vocabulary.keys["tokenizer.braid.space_prefix"] = parsed.space_prefix
    if parsed.first is not None:
        vocabulary.add_bos, vocabulary.add_eos = bool(parsed.first), bool(parsed.last)
        for name, found in (("bos", parsed.first), ("eos", parsed.last)):
            if found:
                vocabulary.special[name] = _id_of(vocabulary, found[0], "post_processor.single")
    return vocabulary


def _consecutive(path: Path, tokens: dict[int, str]) -> list[str]:
    if max(tokens) != len(tokens) - 1:
        hole = next(i for i in range(len(tokens)) if i not in tokens)
        raise FormatError(f"{path}: the ids are not consecutive: no token has the id {hole}, but one has {max(tokens)}")
    listed = [tokens[i] for i in range(len(tokens))]
    if len(set(listed)) != len(listed):
        seen: dict[str, int] = {}
        for i, token in enumerate(listed):
            if token in seen:
                raise FormatError(f"{path}: the token {token!r} has two ids, {seen[token]} and {i}")
            seen[token] = i
    return listed


def _id_of(vocabulary: _Vocabulary, token: str, where: str) -> int:
    try:
        return vocabulary.tokens.index(token)
    except ValueError:
        raise FormatError(f"{vocabulary.path}: {where} is {token!r}, which is not a token") from None


def _type_of(vocabulary: _Vocabulary, token_id: int) -> int:
    if vocabulary.special.get("unk") == token_id and vocabulary.kind == "llama":
        return UNKNOWN
    if token_id in vocabulary.added:
        return CONTROL if vocabulary.added[token_id].special else USER_DEFINED
    return BYTE if vocabulary.kind == "llama" and is_byte_name(vocabulary.tokens[token_id]) else NORMAL


def _scores_of(vocabulary: _Vocabulary, parsed: TokenizerJson) -> list[float]:
    """Scores that make SentencePiece merge as the listed merges say.

    A score belongs to a token, a merge to a pair. They say the same if the merges list, token by token, every way to
    cut it into two tokens, which is how they are made from a SentencePiece model; other merges are refused.
    """
    pieces = {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == NORMAL}
    scores: dict[str, float] = {}
    listed: dict[str, int] = {}
    previous = None
    for left, right in parsed.merges:
        token = left + right
        if token != previous and token in scores:
            raise UnsupportedError(
                f"{vocabulary.path}: the merges into {token!r} do not stand together, so this is no vocabulary of "
                "SentencePiece, which BPE with byte_fallback is supported for"
            )
        previous = token
        scores.setdefault(token, -float(len(scores)))
        if token in pieces:
            listed[token] = listed.get(token, 0) + 1
    for token in pieces:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        possible = sum(all(part in pieces or len(part) == 1 for part in cut) for cut in cuts)
        if possible != listed.get(token, 0):
            raise UnsupportedError(
                f"{vocabulary.path}: there are {possible} ways to merge two tokens into {token!r}, but the merges list "
                f"{listed.get(token, 0)}, so this is no vocabulary of SentencePiece, which BPE with byte_fallback is "
                "supported for"
            )
    return [scores.get(token, _NEVER_MERGED) for token in vocabulary.tokens]


# ---- tokenizer.model ----


def _from_sentencepiece(folder: Path, config: dict[str, Any]) -> _Vocabulary:
    path = folder / "tokenizer.model"
    model = read_sentencepiece_model(path)
    tokens = {i: piece.text for i, piece in enumerate(model.pieces)}
    types = [piece.type for piece in model.pieces]
    added = _added_beside(folder, config)
    for i, token in sorted(added.items()):
        if tokens.get(i, token.content) != token.content:
            raise FormatError(f"{path}: token {i} is {tokens[i]!r}, but beside the model it is {token.content!r}")
        if i < len(types):
            types[i] = CONTROL if token.special and types[i] in (NORMAL, USER_DEFINED) else types[i]
        tokens[i] = token.content
    listed = _consecutive(path, tokens)
    types += [CONTROL if added[i].special else USER_DEFINED for i in range(len(types), len(listed))]
    vocabulary = _Vocabulary(path, "llama", listed, types, {i: t for i, t in added.items() if i < len(listed)})
    for name, i in (("unk", model.unk_id), ("bos", model.bos_id), ("eos", model.eos_id), ("pad", model.pad_id)):
        if i >= len(listed):
            raise FormatError(f"{path}: {name}_id is {i}, outside the vocabulary of {len(listed)} tokens")
        if i >= 0:
            vocabulary.special[name] = i
    scores = [piece.score for piece in model.pieces]
    vocabulary.keys = {
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores + [_NEVER_MERGED] * (len(listed) - len(scores)),
        "tokenizer.ggml.add_space_prefix": model.add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": model.remove_extra_whitespaces,
    }
    if model.add_dummy_prefix:
        vocabulary.keys["tokenizer.braid.space_prefix"] = "stretches" if config.get("legacy") is True else "text"
    vocabulary.add_bos = model.bos_id >= 0 if config.get("add_bos_token") is None else None
    return vocabulary


def _added_beside(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Added tokens that stand in the files beside ``tokenizer.model``."""
    added: dict[int, AddedToken] = {}
    path = folder / "added_tokens.json"
    for content, token_id in _optional_json(path).items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < _MAX_VOCAB:
            raise FormatError(f"{path}: token {content!r} has the id {token_id!r}, expected an integer from 0")
        if token_id in added:
            raise FormatError(f"{path}: token {content!r} has the id {token_id}, as {added[token_id].content!r} has")
        added[token_id] = added_token(path, {"content": content}, token_id, f"token {token_id}")
    path = folder / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise FormatError(f"{path}: added_tokens_decoder is a {type(decoder).__name__}, expected an object")
    for key, table in decoder.items():
        where = f"added_tokens_decoder[{key!r}]"
        if not key.isascii() or not key.isdigit() or len(key) > 8 or not isinstance(table, dict):
            raise FormatError(f"{path}: {where}: expected an id and an object")
        added[int(key)] = added_token(path, table, int(key), where)
    return added


# ---- what stands beside the vocabulary ----


def _pad(vocabulary: _Vocabulary, path: Path) -> None:
    """Adds unused tokens up to the number of rows that the model's embedding has."""
    size = _optional_json(path).get("vocab_size")
    if size is None:
        return
    found = len(vocabulary.tokens)
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= _MAX_VOCAB:
        raise FormatError(f"{path}: vocab_size is {size!r}, expected an integer in [1, {_MAX_VOCAB}]")
    if size < found:
        raise FormatError(f"{path}: vocab_size is {size}, but {vocabulary.path.name} has {found} tokens")
    vocabulary.tokens += [f"[PAD{i}]" for i in range(found, size)]
    vocabulary.types += [UNUSED] * (size - found)
    scores = vocabulary.keys.get("tokenizer.ggml.scores")
    if isinstance(scores, list):
        vocabulary.keys["tokenizer.ggml.scores"] = [float(s) for s in scores] + [_NEVER_MERGED] * (size - found)


def _add_special_tokens(vocabulary: _Vocabulary, folder: Path, config: dict[str, Any]) -> None:
    sources = [(folder / "tokenizer_config.json", config)]
    path = folder / "special_tokens_map.json"
    sources.append((path, _optional_json(path)))
    for name in _ID_KEYS:
        named: dict[str, Path] = {}
        for source, table in sources:
            value = table.get(f"{name}_token")
            if isinstance(value, dict):
                value = value.get("content")
            if value is None:
                continue
            if not isinstance(value, str):
                raise FormatError(f"{source}: {name}_token is {value!r}, expected a string")
            named.setdefault(value, source)
        if len(named) > 1:
            told = ", ".join(f"{token!r} in {source.name}" for token, source in named.items())
            raise FormatError(f"{folder}: there are two {name} tokens: {told}")
        for token, source in named.items():
            if token not in vocabulary.tokens:
                if name == "pad":
                    continue  # transformers would append it; no model has learnt it
                raise FormatError(f"{source}: {name}_token is {token!r}, which is not a token")
            i = vocabulary.tokens.index(token)
            if name == "bos" and vocabulary.special.get("bos", i) != i and vocabulary.add_bos:
                first = vocabulary.tokens[vocabulary.special["bos"]]
                raise FormatError(
                    f"{folder}: there are two bos tokens: {token!r} in {source.name}, {first!r} in "
                    f"{vocabulary.path.name}"
                )
            vocabulary.special[name] = i


def _adds(vocabulary: _Vocabulary, name: str, config: dict[str, Any]) -> bool:
    """Whether texts begin (end) with the token: as tokenizer.json's template says, or the configuration."""
    value = config.get(f"add_{name}_token")
    if value is not None and not isinstance(value, bool):
        raise FormatError(f"{vocabulary.path.parent}: add_{name}_token is {value!r}, expected true or false")
    from_file = vocabulary.add_bos if name == "bos" else vocabulary.add_eos
    is_obeyed = config.get("tokenizer_class") in _FLAG_CLASSES or vocabulary.path.name == "tokenizer.model"
    adds = value if value is not None and (is_obeyed or from_file is None) else bool(from_file)
    if adds and name not in vocabulary.special:
        # Without a template nothing would be added, whatever the flag says.
        if from_file:
            raise FormatError(f"{vocabulary.path.parent}: texts are to get a {name} token, but none is named")
        return False
    return bool(adds)


def _end_ids(vocabulary: _Vocabulary, folder: Path) -> list[int]:
    """Tokens that end an answer and are not the tokenizer's eos, in the order they are named."""
    ids: list[int] = []
    for path in (folder / "generation_config.json", folder / "config.json"):
        value = _optional_json(path).get("eos_token_id")
        for i in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(vocabulary.tokens):
                size = len(vocabulary.tokens)
                raise FormatError(f"{path}: eos_token_id {i!r} is outside the vocabulary of {size} tokens")
            if i != vocabulary.special.get("eos") and i not in ids:
                ids.append(i)
    return ids


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            if path.stat().st_size > 1 << 20:
                raise FormatError(f"{path}: larger than 1 MiB")
            return path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: at offset {error.start}: not UTF-8") from None
        except OSError as error:
            raise ModelIOError(f"{path}: {error.strerror}") from None
    path = folder / "tokenizer_config.json"
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        if "default" not in named:
            raise UnsupportedError(f"{path}: chat_template has several templates and none is called default")
        value = named["default"]
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{path}: chat_template is a {type(value).__name__}, expected a string")
    return value
