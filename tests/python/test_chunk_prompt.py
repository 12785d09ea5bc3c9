"""Prompts made of chunks have the tokens of the chat template, for every kind of tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import nanobraid as nb
from nanobraid._chunk_prompt import SEPARATOR, Core, compose_chat, core_of, moved, place, segments_of
from nanobraid._gguf_bytes import gguf_bytes
from nanobraid.export.hf_tokenizer import read_hf_tokenizer

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ '[INST] <<SYS>>\\n' + m['content'] + "
    "'\\n<</SYS>>\\n\\n' }}{% else %}{{ m['content'].strip() + ' [/INST]' }}{% endif %}{% endfor %}"
)
PARTS = [
    "Hello", " world", " the cat", " ", "\n", "\t", "  \n", "é", "日本語", "😀", "<|im_end|>", "<|im_start|>user\n",
    "user", ".", " 42", "42", ":", "}", "\n\n", "{{x}}", "'s", "\x00", "…", "</s>", "<s>", "[/INST]",
]  # fmt: skip


def from_folder(oracle: object, folder: Path, template: str, **config: str) -> nb.Tokenizer:
    from test_tokenizer_hf import save

    save(folder, oracle, tokenizer_config={"chat_template": template, **config})
    model = folder / "vocabulary.gguf"
    model.write_bytes(gguf_bytes(read_hf_tokenizer(folder)))
    return nb.Tokenizer(model)


def byte_level(family: str, template: str = CHATML) -> Callable[[Path], nb.Tokenizer]:
    def make(folder: Path) -> nb.Tokenizer:
        from test_tokenizer_hf import FAMILIES
        from test_tokenizer_hf import byte_level as oracle_of

        return from_folder(oracle_of(FAMILIES[family]), folder, template)

    return make


def sentencepiece(scheme: str) -> Callable[[Path], nb.Tokenizer]:
    def make(folder: Path) -> nb.Tokenizer:
        from test_tokenizer_hf import sentencepiece_like

        return from_folder(sentencepiece_like(scheme), folder, LLAMA2, bos_token="<s>", eos_token="</s>")

    return make


TOKENIZERS: dict[str, Callable[[Path], nb.Tokenizer]] = {
    "smollm2-135m": lambda _: nb.Tokenizer("smollm2-135m"),
    "gpt2": byte_level("gpt2"),
    "llama3": byte_level("llama3"),
    "llama3, trimming": byte_level("llama3", TRIMMING),
    "qwen2": byte_level("qwen2"),
    "sentencepiece": sentencepiece("prepend"),
    "sentencepiece, first": sentencepiece("first"),
}


def some_text(draw: random.Random, most: int) -> str:
    return "".join(draw.choices(PARTS, k=draw.randint(1, most)))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_composed_prompt_has_the_tokens_of_the_template(name: str, model_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the `tokenizers` package, which makes vocabularies, is not installed")
    tokenizer = TOKENIZERS[name](tmp_path)
    template = nb.ChatTemplate.of(tokenizer)
    draw = random.Random(3)
    equal = chunks = wanted = 0
    rounds = 250
    for _ in range(rounds):
        contexts = [some_text(draw, 9) for _ in range(draw.randint(1, 4))]
        system, query = some_text(draw, 5), some_text(draw, 5)
        cores: list[Core] = []
        at = 0
        for context in contexts:
            core = core_of(tokenizer, context)
            if core.token_ids:
                cores.append(moved(core, at, anchor=[len(cores)]))
            at += len(context) + len(SEPARATOR)
        user = SEPARATOR.join([*contexts, query])
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        pieces = compose_chat(template, tokenizer, messages, [[], cores])
        ids = [token for piece in pieces for token in piece.token_ids]
        flat = template.encode(messages, tokenizer)
        # What the model reads is always the template's text, with one beginning, and chunks have their own tokens.
        assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.decode(flat, skip_special_tokens=False)
        if name.startswith("sentencepiece"):
            assert ids.count(tokenizer.bos_token_id) == 1
        found = [segment for segment in segments_of(pieces) if segment.chunk]
        by_anchor = {core.anchor: list(core.token_ids) for core in cores}
        assert all(list(segment.content) == by_anchor[tuple(segment.anchor)] for segment in found)
        assert [segment.anchor for segment in found] == sorted(segment.anchor for segment in found)
        equal += ids == flat
        chunks += len(found)
        wanted += len(cores)
    assert chunks == wanted > rounds
    # A space that the template cuts off may have decided how the word behind it is cut.
    assert equal == rounds or (name == "llama3, trimming" and equal >= rounds - 5)


def test_a_seam_that_merges_keeps_the_tokens_of_the_chunk(model_path: Path) -> None:
    tokenizer = nb.Tokenizer(model_path)
    half = tokenizer.encode("wor", add_special_tokens=False)
    begin, end = len("Hello "), len("Hello wor")
    pieces = place(tokenizer, "Hello world. Hello", [Core(begin, end, tuple(half))], at_start=True)
    ids = [token for piece in pieces for token in piece.token_ids]
    assert ids != tokenizer.encode("Hello world. Hello")
    assert tokenizer.decode(ids) == "Hello world. Hello"
    assert [list(piece.token_ids) for piece in pieces if piece.core] == [half]
    before, _, after = (list(piece.token_ids) for piece in pieces)
    assert before == tokenizer.encode("Hello ")
    assert after == tokenizer.encode("ld. Hello")


def test_many_seams_that_merge(model_path: Path) -> None:
    tokenizer = nb.Tokenizer(model_path)
    count = 2_000
    ids = tuple(tokenizer.encode("wor"))
    cores = [Core(6 * i + 1, 6 * i + 4, ids) for i in range(count)]
    text = " world" * 50
    pieces = place(tokenizer, text, cores[:50], at_start=True)
    assert sum(piece.core is not None for piece in pieces) == 50
    assert tokenizer.decode([token for piece in pieces for token in piece.token_ids]) == text


def test_white_space_has_no_chunk(model_path: Path) -> None:
    tokenizer = nb.Tokenizer(model_path)
    for text in (" ", "\n\n", " \t\n "):
        assert core_of(tokenizer, text) == Core(0, 0, ())
    core = core_of(tokenizer, "  Hello there. \n")
    assert "  Hello there. \n"[core.begin : core.end] == " there."


def test_only_wanted_pieces_are_chunks(model_path: Path) -> None:
    tokenizer = nb.Tokenizer(model_path)
    ids = tuple(tokenizer.encode("a b c d e f g h i"))
    pieces = place(tokenizer, "a b c d e f g h i", [Core(0, 17, ids, slice_len=4)], at_start=True)
    segments = segments_of(pieces, lambda key: key[0] != ids[4:8])
    assert [(list(s.content), s.chunk) for s in segments] == [
        (list(ids[:4]), True), (list(ids[4:8]), False), (list(ids[8:]), True),
    ]  # fmt: skip


def test_a_template_that_changes_texts_is_refused(model_path: Path) -> None:
    tokenizer = nb.Tokenizer(model_path)
    template = nb.ChatTemplate(CHATML.replace("m['content']", "m['content'] | upper"))
    core = core_of(tokenizer, "Some words.")
    messages = [{"role": "user", "content": "Some words."}]
    with pytest.raises(nb.UnsupportedError, match="changes the text of message 0"):
        compose_chat(template, tokenizer, messages, [[core]])
    pieces = compose_chat(template, tokenizer, messages, [[]])
    assert [t for piece in pieces for t in piece.token_ids] == template.encode(messages, tokenizer)
