"""nanobraid.Tokenizer against the packages that define the expected ids: `tokenizers` and `tiktoken`.

SmolLM2 is compared on its own vocabulary, every other pre-tokenizer on small vocabularies which the test trains and
writes into a GGUF file itself. Texts are generated from a fixed seed. Every comparison counts its strings, and shows
the first few texts that differ.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizer_texts import compare, make_texts, random_ids, sweep_texts

import nanobraid as nb

gguf = pytest.importorskip("gguf", reason="the `gguf` package, which writes the test files, is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="the `tokenizers` package, the oracle, is not installed")
tiktoken = pytest.importorskip("tiktoken", reason="the `tiktoken` package, the oracle, is not installed")

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

SEED = 20240611
NUM_TEXTS = 12_000

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PATTERNS = {"gpt2": GPT2, "llama-bpe": LLAMA3, "qwen2": QWEN2}


def encode(tokenizer: Any, text: str, parse_special: bool = False) -> list[int]:
    """Ids without bos and eos."""
    return list(tokenizer.encode(text, add_special_tokens=False, parse_special=parse_special))


# --- SmolLM2's own vocabulary ----------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Our tokenizer and the oracle for one file."""

    ours: Any
    plain: Any  # knows no added tokens
    special: Any  # knows the added tokens


@pytest.fixture(scope="module")
def smollm(model_path: Path) -> Pair:
    fields = gguf.GGUFReader(model_path).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"

    def build() -> Any:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        oracle = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(m.split(" ")) for m in merges]))
        oracle.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        oracle.decoder = decoders.ByteLevel()
        return oracle

    special = build()
    special.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == 3])
    return Pair(nb.Tokenizer(model_path), build(), special)


def test_smollm_encodes_as_tokenizers(smollm: Pair) -> None:
    texts = make_texts(SEED, NUM_TEXTS)
    compare(texts, lambda t: encode(smollm.ours, t), lambda t: smollm.plain.encode(t).ids, NUM_TEXTS)


def test_smollm_encodes_every_code_point_as_tokenizers(smollm: Pair) -> None:
    compare(sweep_texts(), lambda t: encode(smollm.ours, t), lambda t: smollm.plain.encode(t).ids, 3_000)


def test_smollm_parses_special_tokens_as_tokenizers(smollm: Pair) -> None:
    rng = random.Random(SEED + 1)
    specials = [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<repo_name>",
        "<filename>",
        "<|im_",
        "<|",
        "|>",
        "<<|im_end|>>",
    ]
    texts = []
    for text in make_texts(SEED + 2, 2_000):
        cut = rng.randint(0, len(text))
        texts.append(text[:cut] + rng.choice(specials) * rng.randint(1, 2) + text[cut:] + rng.choice(specials))
    compare(texts, lambda t: encode(smollm.ours, t, True), lambda t: smollm.special.encode(t).ids, 2_000)
    control = set(range(17))
    assert not any(control & set(encode(smollm.ours, text)) for text in texts)


def test_smollm_decodes_as_tokenizers(smollm: Pair) -> None:
    sequences = [smollm.special.encode(text).ids for text in make_texts(SEED + 3, 3_000)]
    sequences += random_ids(SEED, 49_152, 5_000) + random_ids(SEED, 300, 2_000)
    for skip in (True, False):
        compare(
            sequences,
            partial(smollm.ours.decode, skip_special_tokens=skip),
            partial(smollm.special.decode, skip_special_tokens=skip),
            10_000,
        )


# --- the other pre-tokenizers, on vocabularies made here -------------------------------------------------------------


def write_gguf(
    path: Path,
    pre: str,
    tokens: list[str],
    merges: list[str],
    *,
    user_defined: Sequence[str] = (),
    normalizer: str | None = None,
) -> Path:
    """A GGUF file with nothing but a tokenizer in it; `user_defined` are added behind the other tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *user_defined])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.USER_DEFINED] * len(user_defined))
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    if normalizer is not None:
        writer.add_string("tokenizer.braid.normalizer", normalizer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_alphabet() -> list[str]:
    """GPT-2's spelling of the 256 bytes, in the order of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]


def split_then_bytes(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def trained(pre: str, pattern: str, path: Path, user_defined: Sequence[str] = ()) -> Pair:
    """A byte-level BPE of 3,000 tokens trained on generated text, and user-defined tokens.

    For llama-bpe some merges are left out, so that some tokens arise only as whole pieces (`ignore_merges`).
    """
    teacher = tokenizers.Tokenizer(models.BPE())
    teacher.pre_tokenizer = split_then_bytes(pattern)
    trainer = trainers.BpeTrainer(vocab_size=3_000, initial_alphabet=byte_alphabet(), show_progress=False)
    teacher.train_from_iterator(make_texts(SEED + 10, 4_000), trainer)
    model = json.loads(teacher.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    whole_pieces_first = pre == "llama-bpe"
    if whole_pieces_first:
        rng = random.Random(SEED)
        merges = [merge for merge in merges if rng.random() > 0.1]
    oracle = tokenizers.Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, ignore_merges=whole_pieces_first))
    oracle.pre_tokenizer = split_then_bytes(pattern)
    oracle.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        oracle.normalizer = normalizers.NFC()
    oracle.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in user_defined])
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    write_gguf(path, pre, tokens, [" ".join(merge) for merge in merges], user_defined=user_defined)
    return Pair(nb.Tokenizer(path), oracle, oracle)


@pytest.fixture(scope="module", params=sorted(PATTERNS))
def trained_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return trained(request.param, PATTERNS[request.param], tmp_path_factory.mktemp("vocab") / "trained.gguf")


def test_trained_vocabulary_encodes_as_tokenizers(trained_pair: Pair) -> None:
    texts = make_texts(SEED + 4, NUM_TEXTS)
    compare(texts, lambda t: encode(trained_pair.ours, t), lambda t: trained_pair.plain.encode(t).ids, NUM_TEXTS)


def test_trained_vocabulary_decodes_as_tokenizers(trained_pair: Pair) -> None:
    sequences = random_ids(SEED + 5, 3_000, 3_000) + random_ids(SEED + 6, 256, 3_000)
    compare(
        sequences,
        partial(trained_pair.ours.decode, skip_special_tokens=True),
        partial(trained_pair.plain.decode, skip_special_tokens=True),
        6_000,
    )


@pytest.mark.parametrize("pre", sorted(PATTERNS))
def test_user_defined_tokens_are_found_as_by_tokenizers(pre: str, tmp_path: Path) -> None:
    user_defined = ["<tool>", "<tool><tool>", "<to", "    ", "\n\n\n", "é漢", "👍🏽", "👍", "the cat", "1️⃣", "Ġ<x"]
    pair = trained(pre, PATTERNS[pre], tmp_path / "added.gguf", user_defined)
    rng = random.Random(SEED + 12)
    texts = []
    for text in make_texts(SEED + 13, 3_000):
        cut = rng.randint(0, len(text))
        texts.append(text[:cut] + rng.choice(user_defined) * rng.randint(1, 3) + text[cut:] + rng.choice(user_defined))
    compare(texts, lambda t: encode(pair.ours, t), lambda t: pair.plain.encode(t).ids, 3_000)


@pytest.fixture(scope="module", params=sorted(PATTERNS))
def paired_bytes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The 256 bytes and the most frequent pairs of them.

    `tiktoken` ranks a pair by the token it makes, we by the merge: with tokens of two bytes that is the same thing,
    and as merges never cross pieces, equal ids mean equal pieces.
    """
    counts: Counter[bytes] = Counter()
    for text in make_texts(SEED + 11, 4_000):
        data = text.encode()
        counts.update(data[i : i + 2] for i in range(len(data) - 1))
    pairs = [pair for pair, _ in counts.most_common(6_000)]
    alphabet = byte_alphabet()
    tokens = alphabet + [alphabet[pair[0]] + alphabet[pair[1]] for pair in pairs]
    merges = [f"{alphabet[pair[0]]} {alphabet[pair[1]]}" for pair in pairs]
    ranks = {bytes([byte]): byte for byte in range(256)} | {pair: 256 + i for i, pair in enumerate(pairs)}
    oracle = tiktoken.Encoding("pairs", pat_str=PATTERNS[request.param], mergeable_ranks=ranks, special_tokens={})
    path = write_gguf(tmp_path_factory.mktemp("vocab") / "pairs.gguf", request.param, tokens, merges, normalizer="none")
    return Pair(nb.Tokenizer(path), oracle, oracle)


def test_pieces_as_tiktoken(paired_bytes: Pair) -> None:
    texts = make_texts(SEED + 7, NUM_TEXTS)
    compare(texts, lambda t: encode(paired_bytes.ours, t), paired_bytes.plain.encode_ordinary, NUM_TEXTS)


def test_pieces_of_every_code_point_as_tiktoken(paired_bytes: Pair) -> None:
    compare(sweep_texts(), lambda t: encode(paired_bytes.ours, t), paired_bytes.plain.encode_ordinary, 3_000)


def test_decodes_as_tiktoken(paired_bytes: Pair) -> None:
    compare(
        random_ids(SEED + 8, 3_000, 3_000) + random_ids(SEED + 9, 256, 3_000),
        partial(paired_bytes.ours.decode, skip_special_tokens=True),
        paired_bytes.plain.decode,
        6_000,
    )


def test_hostile_texts_as_tokenizers(smollm: Pair) -> None:
    texts = [
        "a" * 100_000,
        " " * 100_000,
        " " * 99_999 + "x",
        "漢" * 30_000,
        "\n " * 50_000,
        "1" * 100_000,
        "'" * 50_000,
    ]
    rng = random.Random(SEED)
    texts += ["".join(rng.choice("abcde") for _ in range(length)) for length in (40, 47, 48, 49, 50, 1_000, 100_000)]
    compare(texts, lambda t: encode(smollm.ours, t), lambda t: smollm.plain.encode(t).ids, 14)
