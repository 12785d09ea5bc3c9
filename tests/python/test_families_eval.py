"""The evaluation scripts on seeded models of two layers: what they report, and that they notice a difference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch, the oracle's base, is not installed")
pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")
pytest.importorskip("gguf", reason="the `gguf` package, which writes the test files, is not installed")

import numpy as np  # noqa: E402
from hf_to_gguf import write_gguf  # noqa: E402
from seeded_models import FAMILIES, build, build_family  # noqa: E402

EVAL = Path(__file__).parents[2] / "eval"
NAMED = {family.name: family for family in FAMILIES}
SMALL = ["--prompts", "3", "--prompt-tokens", "110", "--tokens", "8"]


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EVAL / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def report(script: str, *args: object, code: int = 0) -> dict[str, Any]:
    result = run(script, *args, "--json")
    assert result.returncode == code, result.stderr[-2000:]
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral with a window and a Qwen2 with YaRN as GGUF files, the Mistral also as a folder, and a changed one."""
    folder = tmp_path_factory.mktemp("eval")
    mistral = build_family(NAMED["mistral-as-llama"])
    write_gguf(mistral, folder / "mistral.gguf", architecture="llama")
    mistral.save_pretrained(folder / "mistral_hf")
    with torch.no_grad():
        mistral.lm_head.weight[::7] *= 1.5
    write_gguf(mistral, folder / "changed.gguf", architecture="llama")
    return folder


def test_hf_verify_against_a_folder(folder: Path) -> None:
    got = report("hf_verify.py", "--model", folder / "mistral.gguf", "--oracle", folder / "mistral_hf", *SMALL)
    assert got["passed"]
    assert got["greedy_identical"] and got["greedy_identical_batched"]
    assert got["max_relative_difference"] < 1e-4
    assert [row["prompt_tokens"] for row in got["prompts"]] == [110] * 3
    assert [row["batched"]["identical_tokens"] for row in got["prompts"]] == [8] * 3


def test_hf_verify_shows_where_the_models_part(folder: Path) -> None:
    args = ["--model", folder / "changed.gguf", "--oracle", folder / "mistral_hf", *SMALL]
    got = report("hf_verify.py", *args, code=1)
    assert not got["passed"]
    parted = [row for row in got["prompts"] if row["identical_tokens"] < 8]
    assert parted
    for part in (parted[0], parted[0]["batched"]):
        sides = part["divergence"]
        assert len(sides["ours"]) == len(sides["transformers"]) == 5
        assert sides["ours"][0].split()[0] != sides["transformers"][0].split()[0]
    printed = run("hf_verify.py", *args)
    assert printed.returncode == 1
    assert "FAILED" in printed.stdout and " | " in printed.stdout


@pytest.mark.parametrize("name", ["llama3-divisors", "qwen2-yarn", "qwen2-window", "qwen3"])
def test_the_oracle_reads_every_fact_of_a_gguf_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the comparison would be with another model."""
    monkeypatch.syspath_prepend(str(EVAL))
    from oracle import Oracle

    model = build_family(NAMED[name])
    path = write_gguf(model, tmp_path / "model.gguf", **NAMED[name].file)
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 320, 200)]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(Oracle(path).logits(ids), expected, rtol=0, atol=1e-4)


def test_the_oracle_refuses_what_it_cannot_stand_in_for(folder: Path, tmp_path: Path) -> None:
    windowed = run("hf_verify.py", "--model", folder / "mistral.gguf", *SMALL)
    assert windowed.returncode == 1
    assert "sliding_window = 50" in windowed.stderr and "--oracle" in windowed.stderr
    other = write_gguf(build("llama", vocab_size=300), tmp_path / "other.gguf")
    result = run("hf_verify.py", "--model", other, "--oracle", folder / "mistral_hf", *SMALL)
    assert result.returncode == 1
    assert "300 and 320 tokens" in result.stderr


def test_perplexity_of_two_files(folder: Path) -> None:
    limits = ["--tokens", "256", "--context", "128", "--kv-dtype", "f32", "--other-kv-dtype", "f32"]
    same = report("perplexity.py", "--model", folder / "mistral.gguf", "--other", folder / "mistral.gguf", *limits)
    assert same["mean_kl"] == 0.0
    assert same["positions"] == 254
    changed = report("perplexity.py", "--model", folder / "changed.gguf", "--other", folder / "mistral.gguf", *limits)
    assert changed["mean_kl"] > 0.01
    assert changed["other_perplexity"] == same["perplexity"]
    limited = ["--max-kl", "0.01", "--model", folder / "changed.gguf", "--other", folder / "mistral.gguf", *limits]
    assert report("perplexity.py", *limited, code=1)["mean_kl"] == changed["mean_kl"]


def test_perplexity_against_transformers(folder: Path) -> None:
    other = f"transformers:{folder / 'mistral_hf'}"
    got = report(
        "perplexity.py", "--model", folder / "mistral.gguf", "--other", other, "--tokens", 200, "--kv-dtype", "f32"
    )
    assert got["other"]["backend"] == "transformers"
    assert abs(got["mean_kl"]) < 1e-6
    assert got["perplexity_ratio"] == pytest.approx(1.0, abs=1e-5)
