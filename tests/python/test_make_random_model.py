"""tools/make_random_model.py: models that the engine runs, the same bytes for the same arguments, the same values in a
folder and in a GGUF file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import nanobraid as nb

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "make_random_model.py"
PARAMS = nb.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def make(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("like", "dtype"),
    [("llama-3.2-1b", "bf16"), ("tinyllama-1.1b", "f16"), ("qwen2.5-1.5b", "bf16"), ("qwen3-0.6b", "f32")],
)
def test_small_ones_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, like: str, dtype: str) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    text = make(tmp_path / "model", "--like", like, "--dtype", dtype, "--layers", "1", "--vocab-size", "300")
    assert f"1 layers, {dtype}" in text
    with nb.LLM(tmp_path / "model", max_model_len=64) as llm:
        first = llm.generate([[1, 2, 3], [299, 0]], PARAMS)
        again = llm.generate([[1, 2, 3]], PARAMS)
    assert [len(output.token_ids) for output in first] == [3, 3]
    assert again[0].token_ids == first[0].token_ids


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    arguments = ("--like", "qwen3-0.6b", "--layers", "1", "--vocab-size", "257")
    for name in ("a", "b"):
        make(tmp_path / name, *arguments)
    make(tmp_path / "c", *arguments, "--seed", "1")
    one, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert one == same
    assert one != other


@pytest.mark.parametrize("like", ["llama-3.2-1b", "qwen2.5-0.5b"])
def test_a_gguf_file_is_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, like: str) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    arguments = ("--like", like, "--layers", "1", "--vocab-size", "270")
    make(tmp_path / "model", *arguments)
    make(tmp_path / "model.gguf", *arguments, "--format", "gguf")
    prompt = [(7 * i) % 257 for i in range(250)]  # long enough for the scaling of RoPE to matter
    scores = []
    for path in (tmp_path / "model", tmp_path / "model.gguf"):
        with nb.LLM(path, dtype="f32", kv_dtype="f32", max_model_len=256) as llm:
            scores.append(llm.score(prompt).logprobs[1:])
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)
    assert max(scores[0]) - min(scores[0]) > 1  # it is not a model that says the same everywhere


def test_a_gguf_file_read_by_another_program(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    make(path, "--like", "qwen2.5-0.5b", "--layers", "1", "--vocab-size", "300", "--format", "gguf")
    reader = gguf.GGUFReader(path)
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    assert shapes["token_embd.weight"] == (896, 300)
    assert shapes["blk.0.attn_k.weight"] == (896, 128)
    assert shapes["blk.0.ffn_down.weight"] == (4864, 896)
    assert len(shapes) == 2 + 12  # embedding, last norm, and of a layer 2 norms, 4 + 3 matrices, 3 biases
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (types["blk.0.attn_q.weight"], types["blk.0.attn_q.bias"]) == ("BF16", "F32")
    assert reader.fields["qwen2.attention.head_count_kv"].contents() == 2
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 300


def test_wrong_arguments(tmp_path: Path) -> None:
    for arguments in (["--like", "gpt-2"], ["--like", "qwen3-0.6b", "--vocab-size", "256"], ["--dtype", "bf16"]):
        done = subprocess.run(
            [sys.executable, SCRIPT, tmp_path / "x", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert "error:" in done.stderr
    assert not (tmp_path / "x").exists()
