"""nanobraid.Tokenizer against `sentencepiece`: BPE models trained here with several options, and real vocabularies.

The models are written into GGUF files as converters write them. Texts are generated from a fixed seed.
"""

from __future__ import annotations

import io
import os
import random
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizer_texts import compare, make_texts, random_ids

import nanobraid as nb

gguf = pytest.importorskip("gguf", reason="the `gguf` package, which writes the test files, is not installed")
spm = pytest.importorskip("sentencepiece", reason="the `sentencepiece` package, the oracle, is not installed")

SEED = 20261121
ROOT = Path(__file__).parents[2]
TYPES = {"unknown": 2, "control": 3, "unused": 5, "byte": 6}


@dataclass(frozen=True)
class Options:
    """How a model is trained."""

    name: str
    dummy_prefix: bool = True
    collapse: bool = False
    user_defined: tuple[str, ...] = ()
    split_by_whitespace: bool = True
    unused: bool = False


OPTIONS = [
    Options("llama"),
    Options("no_prefix", dummy_prefix=False),
    Options("collapse", collapse=True),
    Options("collapse_no_prefix", collapse=True, dummy_prefix=False),
    Options("user_defined", user_defined=("<tool>", "<tool><tool>", "<to", "é漢", "👍🏽", "👍", "the", "1️⃣")),
    Options("across_words", split_by_whitespace=False),
    Options("unused", unused=True),
]


@dataclass
class Pair:
    """Our tokenizer and the oracle for one model."""

    options: Options
    ours: nb.Tokenizer
    oracle: Any
    path: Path


def train(options: Options) -> Any:
    texts = [line for line in (ROOT / "eval/text/mixed.txt").read_text().splitlines() if line]
    texts += [text.replace("\0", "") for text in make_texts(SEED, 3_000)]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=3_000,
        byte_fallback=True,
        character_coverage=0.995,
        normalization_rule_name="identity",
        add_dummy_prefix=options.dummy_prefix,
        remove_extra_whitespaces=options.collapse,
        user_defined_symbols=list(options.user_defined),
        split_by_whitespace=options.split_by_whitespace,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        max_sentencepiece_length=24,
        minloglevel=2,
        num_threads=1,
    )
    data = model.getvalue()
    if options.unused:
        data = with_unused_pieces(data)
    return spm.SentencePieceProcessor(model_proto=data)


def with_unused_pieces(data: bytes) -> bytes:
    """Every seventh normal piece of several characters becomes unused."""
    from sentencepiece import sentencepiece_model_pb2 as pb

    proto = pb.ModelProto.FromString(data)
    normal = [piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) > 1]
    for piece in normal[::7]:
        piece.type = 5
    return bytes(proto.SerializeToString())


def write_gguf(path: Path, oracle: Any, options: Options) -> Path:
    """A GGUF file with the vocabulary of a SentencePiece model and nothing else."""
    size = oracle.vocab_size()
    types = []
    for i in range(size):
        piece = oracle.id_to_piece(i)
        kind = next((number for name, number in TYPES.items() if getattr(oracle, f"is_{name}")(i)), 1)
        types.append(4 if piece in options.user_defined else kind)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([oracle.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([oracle.get_score(i) for i in range(size)])
    writer.add_token_types(types)
    writer.add_bos_token_id(oracle.bos_id())
    writer.add_eos_token_id(oracle.eos_id())
    writer.add_unk_token_id(oracle.unk_id())
    writer.add_add_space_prefix(options.dummy_prefix)
    writer.add_bool("tokenizer.ggml.remove_extra_whitespaces", options.collapse)
    writer.add_string("tokenizer.braid.space_prefix", "text")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=OPTIONS, ids=lambda options: options.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    oracle = train(request.param)
    path = write_gguf(tmp_path_factory.mktemp("spm") / "trained.gguf", oracle, request.param)
    return Pair(request.param, nb.Tokenizer(path), oracle, path)


def texts_with(options: Options, seed: int, count: int) -> list[str]:
    """Texts, half of them with user-defined symbols in them."""
    texts = [text.replace("\0", "") for text in make_texts(seed, count)]  # `sentencepiece` ends a text there
    rng = random.Random(seed)
    if options.user_defined:
        for i in range(0, len(texts), 2):
            cut = rng.randint(0, len(texts[i]))
            symbols = [rng.choice(options.user_defined) for _ in range(3)]
            texts[i] = texts[i][:cut] + symbols[0] * rng.randint(1, 2) + texts[i][cut:] + rng.choice(symbols)
    return texts


def test_encodes_as_sentencepiece(pair: Pair) -> None:
    texts = texts_with(pair.options, SEED + 1, 8_000)
    compare(texts, partial(pair.ours.encode, add_special_tokens=False), pair.oracle.encode, 8_000)


def test_encodes_real_text_as_sentencepiece(pair: Pair) -> None:
    paths = sorted((ROOT / "eval" / "text").glob("*.txt")) + sorted(ROOT.glob("*.md"))
    texts = [path.read_text() for path in paths]
    compare(texts, partial(pair.ours.encode, add_special_tokens=False), pair.oracle.encode, 3)


def test_begins_with_bos(pair: Pair) -> None:
    assert pair.ours.encode("hot word") == [pair.oracle.bos_id(), *pair.oracle.encode("hot word")]
    assert pair.ours.eos_token_ids == [pair.oracle.eos_id()]


def test_round_trips(pair: Pair) -> None:
    if pair.options.collapse:
        pytest.skip("spaces that are collapsed do not come back")
    texts = texts_with(pair.options, SEED + 2, 4_000)
    compare(texts, lambda t: pair.ours.decode(pair.ours.encode(t)), lambda t: t.replace("\u2581", " "), 4_000)


def test_decodes_as_sentencepiece(pair: Pair) -> None:
    """What encoding gives, from any token on: a space that comes first is the dummy prefix to both."""
    if pair.options.unused or pair.options.collapse:
        pytest.skip("unused pieces are padding to us and text to sentencepiece; so are spaces that it strips")
    rng = random.Random(SEED + 3)
    sequences = []
    for text in texts_with(pair.options, SEED + 3, 4_000):
        ids = pair.oracle.encode(text)
        sequences.append(ids[rng.randint(0, 2) :])
    sequences += random_ids(SEED + 4, 3_000, 3_000)
    unknown = pair.oracle.unk_id()
    sequences = [[i for i in ids if i != unknown] for ids in sequences]  # " ⁇ " to sentencepiece, nothing to us

    def replaced(text: str) -> str:
        # For bytes that are no character, sentencepiece gives U+FFFD each, we and others one for a maximal subpart.
        return re.sub("\ufffd+", "\ufffd", text)

    compare(
        sequences, lambda ids: replaced(pair.ours.decode(ids)), lambda ids: replaced(pair.oracle.decode(ids)), 7_000
    )


def test_streams_as_it_decodes(pair: Pair) -> None:
    def streamed(ids: list[int]) -> str:
        stream = pair.ours.stream()
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    sequences = random_ids(SEED + 5, 3_000, 2_000)
    sequences += [pair.ours.encode(text) for text in make_texts(SEED + 5, 500)]
    compare(sequences, streamed, pair.ours.decode, 2_500)


def test_control_tokens_in_text_are_text(pair: Pair) -> None:
    control = {pair.oracle.bos_id(), pair.oracle.eos_id(), pair.oracle.unk_id()}
    for text in ("<s>", "</s>", "<unk>", "a</s>b", "<s>[INST] x [/INST] </s>", "<0x0A>"):
        ids = pair.ours.encode(text, add_special_tokens=False)
        assert not control & set(ids)
        assert pair.ours.decode(ids) == text
        parsed = set(pair.ours.encode(text, add_special_tokens=False, parse_special=True))
        assert bool(parsed & control) == (text != "<0x0A>")
    assert pair.ours.decode(pair.ours.encode("a<0x0A>b")) == "a<0x0A>b"


def test_hostile_texts_as_sentencepiece(pair: Pair) -> None:
    rng = random.Random(SEED)
    texts = ["a" * 50_000, "_" * 50_000, "^" * 50_000, "7" * 50_000, " " * 50_000, "漢" * 20_000, " a" * 20_000]
    texts += ["".join(rng.choice("ethan ") for _ in range(20_000))]
    compare(texts, partial(pair.ours.encode, add_special_tokens=False), pair.oracle.encode, 8)


# --- real vocabularies -----------------------------------------------------------------------------------------------

VOCABULARIES = ["llama-spm", "phi-3", "llama-bpe", "qwen2", "gpt-2"]


def llama_cpp_vocabulary(name: str) -> Path:
    """One of the vocabularies that llama.cpp's sources carry; skips where they are not at hand."""
    folder = Path(os.environ.get("NANOBRAID_LLAMA_CPP", Path.home() / ".cache/nanobraid-peers/src/vendor/llama.cpp"))
    path = folder / "models" / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        pytest.skip(f"no {path}: unpack the source package of llama_cpp_python, or set NANOBRAID_LLAMA_CPP")
    return path


@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_vocabularies_as_llama_cpp(name: str) -> None:
    """llama.cpp's own test vectors, ids that transformers gives, from the sources in the package llama_cpp_python."""
    path = llama_cpp_vocabulary(name)
    with open(f"{path}.inp", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    with open(f"{path}.out") as file:
        lines = file.read().split("\n")  # of the empty text too
    expected = {text: [int(i) for i in line.split()] for text, line in zip(texts, lines, strict=True)}
    tokenizer = nb.Tokenizer(path)
    compare(texts, partial(tokenizer.encode, add_special_tokens=False), expected.__getitem__, 40)
    compare(texts, lambda text: tokenizer.decode(tokenizer.encode(text)), lambda text: text, 40)
