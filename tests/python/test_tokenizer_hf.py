"""Tokenizers of Hugging Face folders: against `tokenizers` and `sentencepiece`, and folders that are damaged.

Folders are made here: of vocabularies that `tokenizers` trains, of SentencePiece models, and of real vocabularies where
llama.cpp's sources are at hand.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizer_texts import compare, make_texts, sweep_texts

import nanobraid as nb
from nanobraid.export.hf_tokenizer import read_hf_tokenizer
from nanobraid.export.tokenizer_json import byte_alphabet

tokenizers = pytest.importorskip("tokenizers", reason="the `tokenizers` package, the oracle, is not installed")

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

SEED = 7331
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
MARK = "\u2581"


def split_then_bytes(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@dataclass(frozen=True)
class Family:
    """How a family's tokenizer.json is made."""

    pre: str
    pre_tokenizer: Callable[[], Any]
    nfc: bool = False
    ignore_merges: bool = False


FAMILIES = {
    "gpt2": Family("gpt-2", lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": Family(
        "smollm",
        lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "llama3": Family("llama-bpe", lambda: split_then_bytes(LLAMA3), ignore_merges=True),
    "llama3_first_release": Family("llama-bpe", lambda: split_then_bytes(LLAMA3)),
    "qwen2": Family("qwen2", lambda: split_then_bytes(QWEN2), nfc=True),
    "deepseek_qwen": Family("qwen2", lambda: split_then_bytes(QWEN2)),
}

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|end|>"]
USER = ["<tool>", "<tool><tool>", "    ", "é漢", "the cat"]


def byte_level(family: Family) -> Any:
    teacher = tokenizers.Tokenizer(models.BPE())
    teacher.pre_tokenizer = family.pre_tokenizer()
    trainer = trainers.BpeTrainer(vocab_size=2_000, initial_alphabet=byte_alphabet(), show_progress=False)
    teacher.train_from_iterator(make_texts(SEED, 2_000), trainer)
    model = json.loads(teacher.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    rng = random.Random(SEED)
    merges = [merge for merge in merges if rng.random() > 0.1]  # so that ignore_merges makes a difference
    oracle = tokenizers.Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, ignore_merges=family.ignore_merges))
    oracle.pre_tokenizer = family.pre_tokenizer()
    oracle.decoder = decoders.ByteLevel()
    if family.nfc:
        oracle.normalizer = normalizers.NFC()
    oracle.add_special_tokens(SPECIAL)
    oracle.add_tokens([AddedToken(token, normalized=False) for token in USER])
    return oracle


def save(folder: Path, oracle: Any, **files: Any) -> Path:
    """Writes tokenizer.json and other files; the names are without ``.json``."""
    folder.mkdir(exist_ok=True)
    oracle.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def texts_with(added: list[str], count: int) -> list[str]:
    rng = random.Random(SEED)
    texts = make_texts(SEED + 1, count)
    for i in range(0, count, 2):
        cut = rng.randint(0, len(texts[i]))
        texts[i] = texts[i][:cut] + rng.choice(added) * rng.randint(1, 2) + texts[i][cut:] + rng.choice(added)
    return texts


def ours_with_offsets(tokenizer: nb.Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer.encode_with_offsets(text, parse_special=True)
    assert encoding.ids == tokenizer.encode(text, parse_special=True)
    return encoding.ids, encoding.offsets


def oracle_with_offsets(oracle: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = oracle.encode(text)
    return encoding.ids, encoding.offsets


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_byte_level_folders_as_tokenizers(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    oracle = byte_level(family)
    folder = save(tmp_path / "model", oracle)
    metadata = read_hf_tokenizer(folder)
    assert metadata["tokenizer.ggml.pre"] == family.pre
    assert metadata["tokenizer.braid.normalizer"] == ("nfc" if family.nfc else "none")
    ours = nb.Tokenizer(folder)
    texts = texts_with(SPECIAL + USER, 4_000)
    if family.nfc:
        texts += ["e\u0301 \u1100\u1161\u11a8 \u212b \u0344 a\u0328\u0301", "\u0958\u0301\u0327"]
        compare(texts, lambda t: ours.encode(t, parse_special=True), lambda t: oracle.encode(t).ids, 4_000)
        compare(sweep_texts(), ours.encode, lambda t: oracle.encode(t).ids, 3_000)
        texts = [text for text in texts if normalizers.NFC().normalize_str(text) == text]
    compare(texts, lambda t: ours_with_offsets(ours, t), lambda t: oracle_with_offsets(oracle, t), 2_000)
    compare(texts, lambda t: ours.decode(ours.encode(t)), lambda t: t, 2_000)


# --- SentencePiece in tokenizer.json ---------------------------------------------------------------------------------


def sentencepiece_like(scheme: str) -> Any:
    """BPE with byte fallback as transformers makes it from a SentencePiece model: every cut of a token is a merge."""
    spm = pytest.importorskip("sentencepiece", reason="the `sentencepiece` package is not installed")
    from test_tokenizer_sentencepiece import Options, train

    model: Any = train(Options("llama"))
    assert isinstance(model, spm.SentencePieceProcessor)
    size = model.vocab_size()
    vocab = {model.id_to_piece(i): i for i in range(size)}
    ranked = sorted((i for i in range(size) if not model.is_byte(i)), key=lambda i: -model.get_score(i))
    merges = []
    for i in ranked:
        piece = model.id_to_piece(i)
        if not model.is_control(i) and not model.is_unknown(i):
            merges += [
                (piece[:cut], piece[cut:])
                for cut in range(1, len(piece))
                if piece[:cut] in vocab and piece[cut:] in vocab
            ]
    oracle = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    mark = normalizers.Replace(" ", MARK)
    if scheme == "prepend":
        oracle.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), mark])
    elif scheme == "none":
        oracle.normalizer = normalizers.Sequence([mark])
    else:
        oracle.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    oracle.decoder = decoders.Sequence(steps if scheme in ("none", "never") else [*steps, decoders.Strip(" ", 1, 0)])
    oracle.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    oracle.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_end|>"])
    oracle.add_tokens([AddedToken(token, normalized=False) for token in ("<tool>", "<tool><tool>")])
    return oracle


@pytest.mark.parametrize("scheme", ["prepend", "none", "first", "always", "never"])
def test_sentencepiece_folders_as_tokenizers(scheme: str, tmp_path: Path) -> None:
    oracle = sentencepiece_like(scheme)
    folder = save(tmp_path / "model", oracle)
    metadata = read_hf_tokenizer(folder)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] == (scheme not in ("none", "never"))
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    ours = nb.Tokenizer(folder)
    texts = [text for text in texts_with(["<s>", "</s>", "<|im_end|>", "<tool>", "<tool><tool>"], 4_000)]
    compare(texts, lambda t: ours.encode(t, parse_special=True), lambda t: oracle.encode(t).ids, 4_000)
    plain = [text for text in texts if "<" not in text]
    ids = [oracle.encode(text).ids for text in texts]
    compare(ids, ours.decode, oracle.decode, 4_000)
    if scheme not in ("first", "always"):  # these make " a" and "a" the same tokens
        compare(plain, lambda t: ours.decode(ours.encode(t)), lambda t: t.replace(MARK, " "), 500)
    # A space in front that is a token of its own is the first character to `tokenizers`, nothing to us.
    compare(plain, lambda t: ours_with_offsets(ours, t)[1][2:], lambda t: oracle_with_offsets(oracle, t)[1][2:], 500)


@pytest.mark.parametrize("name", ["llama-spm", "qwen2", "llama-bpe", "gpt-2"])
def test_real_vocabularies(name: str, tmp_path: Path) -> None:
    """The same ids from a GGUF file and from a folder that is made of it."""
    from test_tokenizer_sentencepiece import llama_cpp_vocabulary

    gguf = pytest.importorskip("gguf", reason="the `gguf` package is not installed")
    path = llama_cpp_vocabulary(name)
    fields = gguf.GGUFReader(path).fields
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    vocab = {token: i for i, token in enumerate(tokens) if types[i] in ((1, 2, 3, 6) if name == "llama-spm" else (1,))}
    if name == "llama-spm":
        scores = fields["tokenizer.ggml.scores"].contents()
        normal = sorted((i for i in range(len(tokens)) if types[i] == 1), key=lambda i: -scores[i])
        cuts = [(tokens[i][:cut], tokens[i][cut:]) for i in normal for cut in range(1, len(tokens[i]))]
        merges = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        oracle = tokenizers.Tokenizer(model)
        mark = normalizers.Replace(" ", MARK)
        oracle.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), mark])
        steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        oracle.decoder = decoders.Sequence(steps)
    else:
        family = FAMILIES[{"qwen2": "qwen2", "llama-bpe": "llama3", "gpt-2": "gpt2"}[name]]
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=family.ignore_merges)
        oracle = tokenizers.Tokenizer(model)
        oracle.pre_tokenizer = family.pre_tokenizer()
        oracle.decoder = decoders.ByteLevel()
        if family.nfc:
            oracle.normalizer = normalizers.NFC()
    oracle.add_special_tokens([token for i, token in enumerate(tokens) if types[i] == 3])
    folder, from_gguf = nb.Tokenizer(save(tmp_path / "model", oracle)), nb.Tokenizer(path)
    texts = make_texts(SEED, 3_000)

    def encode_both(text: str) -> list[int]:
        ids = folder.encode(text, add_special_tokens=False)
        assert ids == from_gguf.encode(text, add_special_tokens=False)
        return ids

    compare(texts, encode_both, lambda t: oracle.encode(t).ids, 3_000)


# --- special tokens, ends of answers, templates ----------------------------------------------------------------------


def tiny() -> dict[str, Any]:
    """A tokenizer.json of GPT-2's kind: the bytes, one merge, two special tokens."""
    vocab = {char: i for i, char in enumerate(byte_alphabet())} | {"ab": 256}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 257, "content": "<s>", "special": True, **flags},
            {"id": 258, "content": "</s>", "special": True, **flags},
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "dropout": None, "vocab": vocab, "merges": [["a", "b"]]},
    }


def tiny_llama() -> dict[str, Any]:
    """A tokenizer.json of Llama 2's kind."""
    root = tiny()
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), MARK, "a", "b", "ab"]
    root["added_tokens"] = [
        {"id": i, "content": text, "special": True, "normalized": False} for i, text in enumerate(texts[:3])
    ]
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    root["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": MARK}, mark]}
    root["pre_tokenizer"] = None
    root["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    root["model"] = {
        "type": "BPE",
        "byte_fallback": True,
        "unk_token": "<unk>",
        "vocab": {text: i for i, text in enumerate(texts)},
        "merges": [["a", "b"]],
    }
    return root


def write(folder: Path, root: object, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(root if isinstance(root, str) else json.dumps(root))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_ends_of_answers_come_from_every_file(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "m",
        tiny(),
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ messages }}"},
        generation_config={"eos_token_id": [258, 256]},
        config={"vocab_size": 300, "eos_token_id": 97},
    )
    tokenizer = nb.Tokenizer(folder)
    assert tokenizer.bos_token_id == 257
    assert sorted(tokenizer.eos_token_ids) == [97, 256, 258]
    assert tokenizer.eos_token_ids[0] == 258
    assert tokenizer.vocab_size == 300
    assert tokenizer.token_text(299) == "[PAD299]"
    assert tokenizer.chat_template == "{{ messages }}"
    assert not tokenizer.add_bos
    (folder / "chat_template.jinja").write_text("{# from the file #}")
    assert nb.Tokenizer(folder).chat_template == "{# from the file #}"


def test_control_tokens_in_text_are_text(tmp_path: Path) -> None:
    for root in (tiny(), tiny_llama()):
        tokenizer = nb.Tokenizer(
            write(tmp_path / "m", root, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
        )
        control = set(tokenizer.special_tokens.values())
        text = "a<s>b</s>"
        assert not control & set(tokenizer.encode(text, add_special_tokens=False))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(control & set(tokenizer.encode(text, add_special_tokens=False, parse_special=True))) == 2


def test_added_tokens_take_whitespace(tmp_path: Path) -> None:
    root = tiny()
    flags = {"special": False, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    root["added_tokens"] += [
        {"id": 259, "content": "<l>", **flags, "lstrip": True},
        {"id": 260, "content": "<r>", **flags, "rstrip": True},
    ]
    folder = write(tmp_path / "m", root)
    ours = nb.Tokenizer(folder)
    oracle = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = ["a <l> b", "a \n\u2003<l>", "<l>", " <l>", "a <r> b", "<r>\t\u3000 c", "<r>  ", "<l><r> <l> <r>", "é <l>"]
    compare(texts, ours.encode, lambda t: oracle.encode(t).ids, 9)


def test_the_template_says_what_is_added(tmp_path: Path) -> None:
    root = tiny()
    root["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
    }
    assert nb.Tokenizer(write(tmp_path / "m", root)).encode("ab") == [257, 256, 258]
    folder = write(tmp_path / "m", root, tokenizer_config={"tokenizer_class": "LlamaTokenizer", "add_eos_token": False})
    assert nb.Tokenizer(folder).encode("ab") == [257, 256]


# --- damaged and foreign files ---------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], object], base: Callable[[], dict[str, Any]] = tiny) -> dict[str, Any]:
    root = base()
    change(root)
    return root


def added(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda root: root["added_tokens"].append({"id": 259, "content": "<x>", "special": False} | values)


def template(*tokens: str) -> dict[str, Any]:
    single = [{"SpecialToken": {"id": token}} for token in tokens] + [{"Sequence": {"id": "A"}}]
    return {"type": "TemplateProcessing", "single": single}


def split_with(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


NESTED = "[" * 100_000 + "]" * 100_000
BAD_FORMAT: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "line 1, column 2: not JSON"),
    "empty": ("", "not JSON"),
    "a list": ("[]", "expected an object"),
    "BOM": ("\ufeff{}", "not JSON"),
    "nested": (NESTED, "nested deeper than 64"),
    "nested a little": ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64"),
    "a key twice": ('{"model": 1, "model": 2}', "'model' occurs twice"),
    "NaN": ('{"model": NaN}', "NaN is no JSON value"),
    "long number": ('{"model": ' + "1" * 10_000 + "}", "not JSON"),
    "no model": ({}, "model is a NoneType"),
    "no merges": (edited(lambda r: r["model"].pop("merges")), "model.merges is no list"),
    "vocab is a list": (edited(lambda r: r["model"].update(vocab=[])), "model.vocab is a list"),
    "vocab empty": (edited(lambda r: r["model"].update(vocab={}, merges=[])), "model.vocab is empty"),
    "id negative": (edited(lambda r: r["model"]["vocab"].update(ab=-1)), "the id -1"),
    "id a float": (edited(lambda r: r["model"]["vocab"].update(ab=1.0)), "the id 1.0"),
    "id true": (edited(lambda r: r["model"]["vocab"].update(ab=True)), "the id True"),
    "id huge": (edited(lambda r: r["model"]["vocab"].update(ab=1 << 70)), "the id 1180591620717411303424"),
    "id twice": (edited(lambda r: r["model"]["vocab"].update(ab=5)), "has the id 5, as token"),
    "ids sparse": (edited(lambda r: r["model"]["vocab"].update(ab=999)), "no token has the id 256"),
    "empty token": (edited(lambda r: r["model"]["vocab"].update({"": 259})), "empty token"),
    "lone surrogate": (edited(lambda r: r["model"]["vocab"].update({"\ud800": 259})), "not Unicode text"),
    "merge of an unknown token": (edited(lambda r: r["model"]["merges"].append(["a", "zz"])), "'zz' is not a token"),
    "merge into an unknown token": (edited(lambda r: r["model"]["merges"].append("b a")), "'ba' is not a token"),
    "merge of three": (edited(lambda r: r["model"]["merges"].append("a b c")), "expected two tokens"),
    "merge a number": (edited(lambda r: r["model"]["merges"].append(7)), r"merges[1] is '7'"),
    "missing byte tokens": (
        edited(lambda r: (r["model"]["vocab"].pop("x"), r["model"]["vocab"].update(xx=120))),
        "no token for the byte 0x78",
    ),
    "missing byte token": (
        edited(lambda r: (r["model"]["vocab"].pop("<0x0A>"), r["model"]["vocab"].update(xx=13)), tiny_llama),
        "no byte token <0x0A>",
    ),
    "empty added token": (edited(added(content="")), "is an empty token"),
    "added twice": (edited(added(id=258)), "has the id 258, as '</s>' has"),
    "added token of another id": (edited(added(content="ab")), "is another token"),
    "added over another": (edited(added(id=5)), "is another token"),
    "added id negative": (edited(added(id=-1)), "the id -1"),
    "flag a number": (edited(added(lstrip=1)), "lstrip is 1, expected true or false"),
    "two BOS": (edited(lambda r: r.update(post_processor=template("<s>", "<s>"))), "puts 2 tokens before"),
    "unknown BOS": (edited(lambda r: r.update(post_processor=template("<x>"))), "'<x>', which is not a token"),
}
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "WordPiece": (edited(lambda r: r["model"].update(type="WordPiece")), "'WordPiece' is not supported"),
    "dropout": (edited(lambda r: r["model"].update(dropout=0.1)), "dropout 0.1"),
    "suffix": (edited(lambda r: r["model"].update(end_of_word_suffix="</w>")), "end_of_word_suffix"),
    "single_word": (edited(added(single_word=True)), "'<x>': single_word is not supported"),
    "normalized": (
        edited(lambda r: (added(id=263, normalized=True)(r), None), tiny_llama),
        "'<x>': normalized is not supported",
    ),
    "unknown pattern": (
        edited(lambda r: r.update(pre_tokenizer=split_with(r"\p{L}+"))),
        "unknown pre_tokenizer pattern",
    ),
    "nested quantifiers": (edited(lambda r: r.update(pre_tokenizer=split_with("(a*)*b"))), "(a*)*b"),
    "unknown pre_tokenizer": (edited(lambda r: r.update(pre_tokenizer={"type": "Whitespace"})), '"Whitespace"'),
    "prefix space": (edited(lambda r: r["pre_tokenizer"].update(add_prefix_space=True)), "add_prefix_space"),
    "NFKC": (edited(lambda r: r.update(normalizer={"type": "NFKC"})), '"NFKC"'),
    "unknown decoder": (edited(lambda r: r.update(decoder={"type": "WordPiece"})), '"WordPiece"'),
    "unknown post_processor": (edited(lambda r: r.update(post_processor={"type": "Bert"})), "'Bert'"),
    "unknown SentencePiece normalizer": (
        edited(lambda r: r.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "x"}), tiny_llama),
        '"Precompiled"',
    ),
    "Metaspace that splits": (
        edited(
            lambda r: r.update(normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": MARK}), tiny_llama
        ),
        "split = false",
    ),
    "merges of no SentencePiece model": (
        edited(
            lambda r: (
                r["model"]["vocab"].update(aba=263, ba=264),
                r["model"]["merges"].extend([["b", "a"], ["ab", "a"]]),
            ),
            tiny_llama,
        ),
        "2 ways to merge two tokens into 'aba', but the merges list 1",
    ),
}


@pytest.mark.parametrize("name", sorted(BAD_FORMAT))
def test_damaged_files_are_errors_that_say_where(name: str, tmp_path: Path) -> None:
    root, message = BAD_FORMAT[name]
    with pytest.raises(nb.FormatError) as caught:
        nb.Tokenizer(write(tmp_path / "m", root))
    assert message in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_foreign_tokenizers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    root, message = UNSUPPORTED[name]
    with pytest.raises(nb.UnsupportedError) as caught:
        nb.Tokenizer(write(tmp_path / "m", root))
    assert message in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


def test_bytes_of_no_text_may_be_missing(tmp_path: Path) -> None:
    """As in real vocabularies; they are left out of a text, as other readers leave them out."""
    root = tiny()
    root["model"]["vocab"] = {{"\u0104": "xx", "\xf1": "yy"}.get(k, k): v for k, v in root["model"]["vocab"].items()}
    folder = write(tmp_path / "m", root)
    ours = nb.Tokenizer(folder)
    oracle = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    compare(["\x04", "a\x04b", "\U00040000", "x\x04\x04"], ours.encode, lambda t: oracle.encode(t).ids, 4)
    assert ours.decode(ours.encode("a\x04b")) == "ab"


def test_more_damage(tmp_path: Path) -> None:
    def refused(match: str, root: object = None, **files: Any) -> None:
        for old in (tmp_path / "m").glob("*.json"):
            old.unlink()
        with pytest.raises(nb.FormatError, match=match):
            nb.Tokenizer(write(tmp_path / "m", root or tiny(), **files))

    refused("two bos tokens", tokenizer_config={"bos_token": "<s>"}, special_tokens_map={"bos_token": "</s>"})
    refused("two bos tokens", edited(lambda r: r.update(post_processor=template("<s>"))),
            tokenizer_config={"bos_token": "</s>"})  # fmt: skip
    refused("'<e>', which is not a token", tokenizer_config={"eos_token": "<e>"})
    refused("eos_token_id 400 is outside", generation_config={"eos_token_id": [400]})
    refused("eos_token_id '2' is outside", generation_config={"eos_token_id": "2"})
    refused("vocab_size is 10, but", config={"vocab_size": 10})
    refused("vocab_size is 99999999999", config={"vocab_size": 99999999999})
    refused("chat_template is a int", tokenizer_config={"chat_template": 5})
    folder = write(tmp_path / "bytes", tiny())
    (folder / "tokenizer.json").write_bytes(b'{"model": "\xff"}')
    with pytest.raises(nb.FormatError, match="at offset 11: not UTF-8"):
        nb.Tokenizer(folder)
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(nb.FormatError, match="larger than 256 MiB"):
        nb.Tokenizer(folder)


def test_folders_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(nb.ModelNotFoundError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read_hf_tokenizer(tmp_path)


# --- tokenizer.model -------------------------------------------------------------------------------------------------


def sentencepiece_bytes(name: str = "llama") -> bytes:
    pytest.importorskip("sentencepiece", reason="the `sentencepiece` package is not installed")
    from test_tokenizer_sentencepiece import OPTIONS, train

    options = next(options for options in OPTIONS if options.name == name)
    return bytes(train(options).serialized_model_proto())


@pytest.mark.parametrize("name", ["llama", "no_prefix", "collapse", "user_defined", "unused"])
def test_sentencepiece_model_files(name: str, tmp_path: Path) -> None:
    data = sentencepiece_bytes(name)
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_proto=data)
    (tmp_path / "tokenizer.model").write_bytes(data)
    ours = nb.Tokenizer(tmp_path)
    texts = [text.replace("\0", "") for text in make_texts(SEED + 5, 3_000)]
    compare(texts, lambda t: ours.encode(t, add_special_tokens=False), oracle.encode, 3_000)
    assert ours.encode("a")[0] == ours.bos_token_id == oracle.bos_id()
    assert ours.eos_token_ids == [oracle.eos_id()]


def test_tokens_added_beside_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes())
    size = nb.Tokenizer(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size}))
    decoder = {str(size + 1): {"content": "<|im_end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder, "eos_token": "<|im_end|>", "add_bos_token": False})
    )
    tokenizer = nb.Tokenizer(tmp_path)
    assert tokenizer.encode("a<tool><|im_end|>", parse_special=True)[-2:] == [size, size + 1]
    assert size + 1 not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.eos_token_ids == [size + 1]
    assert not tokenizer.add_bos


def test_sentencepiece_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece", reason="the `sentencepiece` package is not installed")
    import io

    sentences = make_texts(SEED, 500)
    for options, message in (
        ({"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity"}, "type unigram"),
        ({"model_type": "char", "byte_fallback": True, "normalization_rule_name": "identity"}, "type char"),
        ({"model_type": "bpe", "normalization_rule_name": "identity"}, "without byte_fallback"),
        ({"model_type": "bpe", "byte_fallback": True}, "normalisation 'nmt_nfkc'"),
    ):
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter([text.replace("\0", "") for text in sentences if text.strip()]),
            model_writer=model,
            vocab_size=1_500,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
        (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
        with pytest.raises(nb.UnsupportedError, match=message):
            nb.Tokenizer(tmp_path)


def test_damaged_sentencepiece_models(tmp_path: Path) -> None:
    """Every cut and every changed byte is an error that names the file, or a model; nothing else comes out."""
    data = sentencepiece_bytes()
    path = tmp_path / "tokenizer.model"
    rng = random.Random(SEED)
    cuts = [0, 1, 2, 3, 5, 10, *(rng.randrange(len(data)) for _ in range(60))]
    damaged = [data[:cut] for cut in cuts]
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            changed[rng.choice([rng.randrange(len(data)), rng.randrange(60), len(data) - rng.randint(1, 300)])] = (
                rng.randrange(256)
            )
        damaged.append(bytes(changed))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            nb.Tokenizer(tmp_path).encode("hot word")
        except nb.NanobraidError as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert refused > 60
