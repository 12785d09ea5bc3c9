"""The default model as a `.braid` file: the same tokens as from its GGUF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_threads import THREADS

import nanobraid as nb
from nanobraid import _core

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Grüße aus", "1, 2, 3, 4,"]


def half_split(rows: bytes, num_heads: int, num_rows: int) -> bytes:
    """Rows of interleaved rotary pairs (i, s) put back into halves (s, i)."""
    row = len(rows) // num_rows
    pairs = np.frombuffer(rows, np.uint8).reshape(num_heads, num_rows // num_heads // 2, 2, row)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).tobytes()


@pytest.fixture(scope="module")
def braid_path(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("braid") / "smollm2.braid"
    file = _core.ModelFile(str(model_path))
    metadata = file.metadata()
    heads = {"q": metadata["llama.attention.head_count"], "k": metadata["llama.attention.head_count_kv"]}
    tensors = file.tensors()
    with _core.BraidWriter(str(path), metadata, [tensor[:3] for tensor in tensors]) as writer:
        for index, (name, _, shape, _) in enumerate(tensors):
            data = file.read(name)
            for letter, num_heads in heads.items():
                if name.endswith(f"attn_{letter}.weight"):
                    data = half_split(data, num_heads, shape[0])
            writer.write(index, data)
    return path


def test_greedy_tokens_equal_those_of_the_gguf_file(braid_path: Path, llm: nb.LLM) -> None:
    greedy = nb.SamplingParams(temperature=0, max_tokens=48)
    wanted = llm.generate(PROMPTS, greedy)
    with nb.LLM(braid_path, num_threads=THREADS, max_model_len=1024) as other:
        found = other.generate(PROMPTS, greedy)
    assert [answer.prompt_token_ids for answer in found] == [answer.prompt_token_ids for answer in wanted]
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in wanted]
    assert len({tuple(answer.token_ids) for answer in found}) == len(PROMPTS)


def test_scores_equal_those_of_the_gguf_file(braid_path: Path, llm: nb.LLM) -> None:
    text = "Keys and values of a document are computed once and used again."
    with nb.LLM(braid_path, num_threads=THREADS, max_model_len=1024) as other:
        assert other.score(text).logprobs == llm.score(text).logprobs


def test_the_tokenizer_and_the_template_are_in_the_file(braid_path: Path, llm: nb.LLM) -> None:
    tokenizer = _core.Tokenizer(str(braid_path))
    assert tokenizer.chat_template
    assert tokenizer.encode("Hello <|im_end|>", parse_special=True)[-1] in tokenizer.eos_token_ids
    messages = [{"role": "user", "content": "Hello"}]
    greedy = nb.SamplingParams(temperature=0, max_tokens=8)
    with nb.LLM(braid_path, num_threads=THREADS, max_model_len=1024) as other:
        assert other.chat(messages, greedy).token_ids == llm.chat(messages, greedy).token_ids


def test_loading_warns_of_weights_that_are_not_finite(
    braid_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The bytes are changed behind the checksums, which opening a file does not compare for tensors."""
    path = tmp_path / "bad.braid"
    data = bytearray(braid_path.read_bytes())
    file = _core.ModelFile(str(braid_path))
    bad = {"blk.3.attn_norm.weight": b"\0\0\xc0\x7f", "blk.7.ffn_down.weight": b"\0\x7c"}  # f32 NaN; infinite f16 scale
    for name, wrong in bad.items():
        at = data.index(file.read(name)) + 5 * 20
        data[at : at + len(wrong)] = wrong
    path.write_bytes(data)
    with caplog.at_level("WARNING", logger="nanobraid"), nb.LLM(path, num_threads=THREADS, max_model_len=64):
        pass
    lines = [record.getMessage() for record in caplog.records if "NaN or infinity" in record.getMessage()]
    assert len(lines) == len(bad)
    for name in bad:
        assert any(f"{path}: tensor {name} holds" in line for line in lines)
    caplog.clear()
    with caplog.at_level("WARNING", logger="nanobraid"), nb.LLM(braid_path, num_threads=THREADS, max_model_len=64):
        pass
    assert not [record for record in caplog.records if "NaN" in record.getMessage()]
