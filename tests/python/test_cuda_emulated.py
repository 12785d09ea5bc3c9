"""``device="cuda"`` from Python, with the kernels on the emulator: models of every family against the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_hf import config_of, tensors_of, write_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from make_random_model import byte_tokenizer

PROMPTS = [[5], list(range(30, 47)), [7, 300 - 1, 0, 12]]
# In a process of its own: which libraries of kernels there are is looked up once.
SCRIPT = """
import json, sys, warnings
import nanobraid as nb
folder, device, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if "streaming" in options:
    options["streaming_config"] = nb.StreamingConfig(**options.pop("streaming"))
params = nb.SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=2)
with nb.LLM(folder, device=device, max_model_len=64, max_num_seqs=2, **options) as llm:
    outputs = llm.generate(json.loads(sys.argv[4]), params)
    stats = llm.stats()
    print(json.dumps({"backend": llm.config["backend"], "fusion": llm.config["fusion"], "fused": stats["fused_ops"],
                      "composed": stats["composed_ops"],
                      "graphs": [stats["graphs_recorded"], stats["graph_steps"]],
                      "streamed": {key: value for key, value in stats.items() if "stream" in key},
                      "tokens": [o.token_ids for o in outputs],
                      "logprobs": [[p[t].logprob for t, p in zip(o.token_ids, o.logprobs)] for o in outputs]}))
"""


@pytest.fixture(scope="module")
def library() -> Path:
    folder = os.environ.get("NANOBRAID_BUILD_DIR")
    if not folder:
        pytest.skip("NANOBRAID_BUILD_DIR names no build of the tests, which has the emulated kernels")
    path = Path(folder) / "libnanobraid_cuda_emulated.so"
    if not path.exists():
        pytest.skip(f"{path} has not been built")
    return path


def run(library: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NANOBRAID_CUDA_LIBRARY": str(library)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def answer(library: Path, folder: Path, device: str, **options: Any) -> dict[str, Any]:
    done = run(library, "-c", SCRIPT, folder, device, json.dumps(options), json.dumps(PROMPTS))
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr}


def test_doctor_calls_it_usable(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path))  # without the default model, which is long to emulate
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = run(library, "-m", "nanobraid", "doctor")
    assert done.returncode == 0, done.stderr
    assert "usable: emulated GPU" in done.stdout
    assert "cuda:0" in done.stdout
    assert re.search(r"^fusion +\S", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_gives_the_tokens_of_the_cpu(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    config = config_of(family)
    folder = write_folder(tmp_path / family, config, tensors_of(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    exact = {"dtype": "f32", "kv_dtype": "f32"}
    cpu = answer(library, folder, "reference", **exact)
    gpu = answer(library, folder, "cuda", **exact)
    assert (cpu["backend"], gpu["backend"]) == ("reference", "cuda:0")
    assert gpu["tokens"] == cpu["tokens"]
    np.testing.assert_allclose(np.concatenate(gpu["logprobs"]), np.concatenate(cpu["logprobs"]), atol=2e-4)
    assert answer(library, folder, "auto", deterministic=True, **exact)["tokens"] == cpu["tokens"]
    assert answer(library, folder, "cpu")["backend"] != "cuda:0"


def test_steps_are_recorded_unless_enforce_eager(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    config = config_of("llama")
    folder = write_folder(tmp_path / "llama", config, tensors_of(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    recorded = answer(library, folder, "cuda", deterministic=True)
    eager = answer(library, folder, "cuda", deterministic=True, enforce_eager=True)
    assert recorded["tokens"] == eager["tokens"]
    assert recorded["logprobs"] == eager["logprobs"]
    assert min(recorded["graphs"]) > 0
    assert eager["graphs"] == [0, 0]
    assert answer(library, folder, "cpu")["graphs"] == [0, 0]


def test_signed_bytes_stay_what_they_are_and_other_codes_become_bf16_which_it_says(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    config = config_of("llama")
    folder = write_folder(tmp_path / "llama", config, tensors_of(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    file, bytes_file = tmp_path / "llama.w4.braid", tmp_path / "llama.w8.braid"
    for path, dtype in ((file, "w4"), (bytes_file, "w8")):
        made = run(library, "-m", "nanobraid", "export", folder, "-o", path, "--dtype", dtype)
        assert made.returncode == 0, made.stderr
    expanded = answer(library, file, "cuda")
    assert expanded["stderr"].count("quantized weights become bf16 on cuda:0") == 1
    assert "become bf16" not in answer(library, file, "cpu")["stderr"]
    assert "become bf16" not in answer(library, folder, "cuda")["stderr"]
    exact = {"dtype": "f32", "kv_dtype": "f32"}
    codes = answer(library, bytes_file, "cuda", **exact)
    assert "become bf16" not in codes["stderr"]
    assert codes["tokens"] == answer(library, bytes_file, "reference", **exact)["tokens"]


def compare(library: Path, folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """What eval/compare_devices.py says of a model, small enough for an emulator."""
    script = Path(__file__).resolve().parents[2] / "eval" / "compare_devices.py"
    small = ["--tokens", "24", "--context", "12", "--batch", "3", "--new", "3", "--processor", "reference"]
    done = run(library, script, "--model", folder, *small, *arguments)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_devices_are_compared(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    config = config_of("llama")
    folder = write_folder(tmp_path / "llama", config, tensors_of(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    code, report = compare(library, folder)
    assert code == 0, report
    assert (report["device"]["backend"], report["device"]["dtype"]) == ("cuda:0", "bf16")
    assert (report["processor"]["backend"], report["processor"]["dtype"]) == ("reference", "bf16")
    assert report["divergence"]["positions"] == 24
    assert 0 <= report["divergence"]["mean_kl"] <= 1e-3
    assert report["promises"]["answers"] == 3
    assert report["promises"]["broken"] == report["failed"] == []
    # What is asked for too much is told, and fails.
    code, report = compare(library, folder, "--max-kl", "-1", "--tokens", "12")
    assert code == 1
    assert len(report["failed"]) == 1 and "mean KL" in report["failed"][0]


def test_exports_are_calibrated_on_the_cpu(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    config = config_of("llama")
    folder = write_folder(tmp_path / "llama", config, tensors_of(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    made = run(library, "-m", "nanobraid", "export", folder, "-o", tmp_path / "gpu.braid", "--dtype", "w4")
    assert made.returncode == 0, made.stderr
    none = run(tmp_path / "none.so", "-m", "nanobraid", "export", folder, "-o", tmp_path / "cpu.braid", "--dtype", "w4")
    assert none.returncode == 0, none.stderr
    assert (tmp_path / "gpu.braid").read_bytes() == (tmp_path / "cpu.braid").read_bytes()


def test_weights_beyond_a_budget_come_from_host_memory(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    config = config_of("llama") | {"num_hidden_layers": 5}
    folder = write_folder(tmp_path / "llama", config, tensors_of(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    resident = answer(library, folder, "cuda")
    streamed = answer(library, folder, "cuda", streaming={"keep_first_k": 1, "prefetch_layers": 1})
    assert resident["streamed"]["streamed_layers"] == 0
    assert streamed["streamed"]["streamed_layers"] == 4
    assert streamed["streamed"]["streamed_direct"]
    assert streamed["streamed"]["streamed_reads"] > 4
    assert (streamed["tokens"], streamed["logprobs"]) == (resident["tokens"], resident["logprobs"])
    assert not list((tmp_path / "cache").rglob("*.layers"))
    limited = {"streaming": {"cache_bytes": 10**9}}
    done = run(library, "-c", SCRIPT, folder, "cuda", json.dumps(limited), "[[1]]")
    assert done.returncode != 0
    assert "streaming_config.cache_bytes limits a folder of packed layers, which cuda" in done.stderr


def test_what_it_cannot_do_is_refused_by_name(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    config = config_of("llama")
    folder = write_folder(tmp_path / "llama", config, tensors_of(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    done = run(library, "-c", SCRIPT, folder, "cuda", json.dumps({"dtype": "int8"}), "[[1]]")
    assert done.returncode != 0
    assert "dtype int8 on a device: auto, bf16 or f32" in done.stderr


def test_without_the_library_it_says_why(tmp_path: Path) -> None:
    done = run(tmp_path / "none.so", "-c", "import nanobraid as nb; nb.LLM('smollm2-135m', device='cuda')")
    assert done.returncode != 0
    assert "device 'cuda' is not available" in done.stderr
    assert "none.so" in done.stderr


def test_fusion_is_measured_when_a_model_is_loaded_and_forced_either_way(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    config = config_of("qwen3")
    tensors = tensors_of(config)
    for name in tensors:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            tensors[name] *= 96
    folder = write_folder(tmp_path / "qwen3", config, tensors)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    few = {"max_batch_tokens": 8}  # rows that fused kernels take
    auto = answer(library, folder, "cuda", **few)
    assert [row["error"] for row in auto["fusion"]["errors"]] == [0.0] * 5
    on = answer(library, folder, "cuda", fusion="on", **few)
    off = answer(library, folder, "cuda", fusion="off", **few)
    assert on["fusion"]["errors"] == off["fusion"]["errors"] == []
    assert auto["fused"] == on["fused"] == off["composed"] > 0
    assert auto["composed"] == on["composed"] == off["fused"] == 0
    assert (auto["tokens"], auto["logprobs"]) == (on["tokens"], on["logprobs"])
    assert (off["tokens"], off["logprobs"]) == (on["tokens"], on["logprobs"])
