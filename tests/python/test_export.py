"""Exports: folders of every family, GGUF and .braid sources, every format, memory, refusals, and the command."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_hf import config_of, forward, tensors_of, vocabulary, write_folder, write_safetensors

import nanobraid as nb
from nanobraid import _core
from nanobraid._core import ModelFile
from nanobraid.errors import FormatError, InvalidArgumentError, ModelIOError, NanobraidError, UnsupportedError
from nanobraid.export import calibration, export_model, hf_folder
from nanobraid.export.hf_config import read_hf_config

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
IDS = [int(i) for i in np.random.default_rng(4).integers(0, 300, 40)]


@pytest.fixture(autouse=True)
def tiny_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders here have no tokenizer files; what they would say is given."""
    monkeypatch.setattr(hf_folder, "_tokenizer", lambda _: vocabulary(300))


def logits(path: Path, ids: list[int]) -> NDArray[np.float32]:
    with nb.LLM(path, dtype="f32", kv_dtype="f32", num_threads=1) as llm:
        return np.asarray(llm.logits(ids))


def weights_of(path: Path) -> dict[str, NDArray[np.float32]]:
    file = ModelFile(str(path))
    return {name: file.read_rows(name).reshape(shape) for name, _, shape, _ in file.tensors()}


def distance(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    return float((np.abs(ours - theirs).max(-1) / np.abs(theirs).max(-1)).max())


# ---- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "w8", "w4", "keep"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_in_a_format_is_the_forward_of_its_weights(family: str, dtype: str, tmp_path: Path) -> None:
    config = config_of(family)
    folder = write_folder(tmp_path / "hf", config, tensors_of(config), shards=3 if family == "qwen2" else 1)
    out = tmp_path / "out.braid"
    summary = export_model(folder, out, dtype)
    weights = weights_of(out)
    assert distance(logits(out, IDS), forward(config, weights, IDS)) < 1e-4
    formats = {tensor.name: tensor.format for tensor in summary.tensors}
    body, head = {"w4": ("w4", "w8"), "keep": ("f32", "f32")}.get(dtype, (dtype, dtype))
    assert formats["blk.1.ffn_down.weight"] == body
    assert formats["token_embd.weight"] == head
    assert formats["blk.0.attn_norm.weight"] == formats["output_norm.weight"] == "f32"
    if dtype in ("f32", "keep"):
        for name, values in tensors_of(config).items():
            ours = {"model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight"}.get(name)
            if ours:
                assert np.array_equal(weights[ours], values)
        assert distance(logits(out, IDS), forward(config, weights_of(out), IDS)) < 1e-4
    worst = {"f32": 0.0, "keep": 0.0, "bf16": 3e-3, "f16": 5e-4, "w8": 0.01, "w4": 0.12}[dtype]
    assert max(tensor.relative_error for tensor in summary.tensors) <= worst
    metadata = ModelFile(str(out)).metadata()
    assert metadata["general.architecture"] == family
    assert metadata["braid.dtype"] == dtype
    assert metadata["braid.source_kind"] == "hf"
    assert ("braid.calibration.tokens" in metadata) == (dtype in ("w8", "w4"))


def test_the_summary_says_what_is_there(tmp_path: Path) -> None:
    config = config_of("qwen2")
    tensors = tensors_of(config)
    folder = write_folder(tmp_path / "hf", config, tensors)
    summary = export_model(folder, tmp_path / "out.braid", "w4")
    weights = weights_of(tmp_path / "out.braid")
    stored = {"blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight", "output.weight": "lm_head.weight"}
    for tensor in summary.tensors:
        assert tensor.num_weights == weights[tensor.name].size
        if tensor.name in stored:
            source = tensors[stored[tensor.name]].astype(np.float64)
            error = np.sqrt(((source - weights[tensor.name]) ** 2).sum() / (source**2).sum())
            assert tensor.relative_error == pytest.approx(error, rel=1e-6)
    bits = {tensor.name: tensor.bits_per_weight for tensor in summary.tensors}
    assert bits["blk.0.attn_q.weight"] == 4.5
    assert bits["output.weight"] == 8.25
    assert summary.file_bytes == (tmp_path / "out.braid").stat().st_size
    assert summary.calibration_tokens > 0
    assert summary.calibration_text == "calibration.txt"
    assert summary.peak_rss_bytes > 0


def test_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    config = config_of("llama")
    folder = write_folder(tmp_path / "hf", config, tensors_of(config))
    for dtype in ("bf16", "w8", "w4"):
        export_model(folder, tmp_path / "a.braid", dtype, force=True)
        export_model(folder, tmp_path / "b.braid", dtype, force=True)
        assert (tmp_path / "a.braid").read_bytes() == (tmp_path / "b.braid").read_bytes()


def test_per_channel_head_dtype_and_columns_that_do_not_fit(tmp_path: Path) -> None:
    config = config_of("mistral", intermediate_size=96)
    folder = write_folder(tmp_path / "hf", config, tensors_of(config))
    summary = export_model(folder, tmp_path / "a.braid", "w4", head_dtype="bf16")
    formats = {tensor.name: tensor.format for tensor in summary.tensors}
    assert formats["blk.0.ffn_down.weight"] == "bf16"  # 96 columns
    assert formats["blk.0.ffn_up.weight"] == "w4"
    assert formats["output.weight"] == "bf16"
    assert any("blk.0.ffn_down.weight" in note and "96 columns" in note for note in summary.notes)
    summary = export_model(folder, tmp_path / "b.braid", "w8", w8_per_channel=True)
    formats = {tensor.name: tensor.format for tensor in summary.tensors}
    assert formats["blk.0.ffn_up.weight"] == "w8_channel"
    for name in ("a", "b"):
        path = tmp_path / f"{name}.braid"
        assert distance(logits(path, IDS), forward(config, weights_of(path), IDS)) < 1e-4


def test_a_gguf_source_keeps_every_block(model_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "keep.braid"
    summary = export_model(model_path, out, "keep")
    source, copy = ModelFile(str(model_path)), ModelFile(str(out))
    assert [t[:3] for t in sorted(source.tensors())] == [t[:3] for t in sorted(copy.tensors())]
    assert source.read("blk.3.ffn_down.weight") == copy.read("blk.3.ffn_down.weight")
    # Rows of Q stand in halves of a head of 64: row (s, i) is row (i, s) of the GGUF file.
    ours, theirs = copy.read_rows("blk.3.attn_q.weight"), source.read_rows("blk.3.attn_q.weight")
    for row in (0, 1, 31, 32, 63, 64, 100, 575):
        head, within = divmod(row, 64)
        assert np.array_equal(ours[row], theirs[64 * head + 2 * (within % 32) + within // 32])
    params = nb.SamplingParams(temperature=0, max_tokens=16)
    with nb.LLM(model_path, max_model_len=64) as a, nb.LLM(out, max_model_len=64) as b:
        assert np.array_equal(a.logits(IDS), b.logits(IDS))
        assert a.generate("The sea", params)[0].text == b.generate("The sea", params)[0].text
    metadata, original = copy.metadata(), source.metadata()
    assert metadata["tokenizer.ggml.tokens"] == original["tokenizer.ggml.tokens"]
    assert "general.alignment" not in metadata
    assert metadata["braid.source_kind"] == "gguf"
    assert summary.bits_per_weight < 6
    again = export_model(out, tmp_path / "again.braid", "keep")  # a .braid source, nothing to reorder
    assert ModelFile(str(again.out)).read("blk.3.attn_q.weight") == copy.read("blk.3.attn_q.weight")


def test_a_gguf_source_in_another_format_is_reordered_too(model_path: Path, tmp_path: Path) -> None:
    export_model(model_path, tmp_path / "keep.braid", "keep")
    export_model(model_path, tmp_path / "f32.braid", "f32")
    keep, f32 = ModelFile(str(tmp_path / "keep.braid")), ModelFile(str(tmp_path / "f32.braid"))
    for name in ("blk.7.attn_k.weight", "token_embd.weight", "blk.0.attn_norm.weight"):
        assert np.array_equal(keep.read_rows(name), f32.read_rows(name))


# ---- memory ---------------------------------------------------------------------------------------------------------

CHILD = """
import json, sys
from pathlib import Path
from nanobraid import _core
from nanobraid.export import export_model
before = _core.memory_status()["peak_rss_bytes"]
summary = export_model(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
print(json.dumps([before, summary.peak_rss_bytes]))
"""


@pytest.mark.parametrize("dtype", ["bf16", "w4"])
def test_memory_is_that_of_two_layers_and_a_tensor(dtype: str, tmp_path: Path) -> None:
    config = config_of("llama", hidden_size=768, intermediate_size=3072, num_hidden_layers=10, num_attention_heads=12,
                       num_key_value_heads=12, head_dim=64)  # fmt: skip
    tensors = tensors_of(config, dtype=np.float16)
    layer = sum(values.nbytes for name, values in tensors.items() if name.startswith("model.layers.0."))
    largest = max(values.nbytes for values in tensors.values())
    folder = write_folder(tmp_path / "hf", config, tensors)
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(tmp_path / "out.braid"), dtype],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    before, peak = json.loads(done.stdout)
    assert peak - before < 2 * layer + largest
    assert (folder / "model.safetensors").stat().st_size > 3 * (2 * layer + largest)  # or the bound would say nothing


# ---- calibration ----------------------------------------------------------------------------------------------------


def test_the_calibration_text_is_disjoint_from_texts_of_tests_and_evaluation() -> None:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    ours = grams(calibration.TEXT.read_text(encoding="utf-8"))
    assert len(ours) > 1000
    root = Path(__file__).parents[2]
    others = [*root.glob("eval/text/*"), *root.glob("tests/**/*.py"), *root.glob("tests/**/*.txt")]
    assert len(others) > 10
    for path in others:
        assert not ours & grams(path.read_text(encoding="utf-8")), path


def test_importance_lowers_the_error_of_outputs(model_path: Path) -> None:
    """What the search is for: products with real inputs, not weights, come out closer."""
    file = ModelFile(str(model_path))
    ids = _core.encode_text(file, calibration.TEXT.read_text(encoding="utf-8"))[:256]
    layers, _ = _core.measure_inputs(file, ids, 256)
    rows, columns = file.read_rows("blk.4.attn_q.weight"), layers[4]["qkv"]
    assert columns.shape == (576,)

    def output_error(importance: NDArray[np.float32] | None) -> float:
        packed = np.frombuffer(_core.quantize("w4", rows, importance), np.uint8).reshape(len(rows), -1, 36)
        scale, minimum = (packed[..., i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
        codes = np.concatenate([packed[..., 4:] & 15, packed[..., 4:] >> 4], -1)
        unpacked = (codes * scale + minimum).reshape(rows.shape)
        error, _ = _core.packing_error("w4", rows, packed.tobytes())
        assert error == pytest.approx(float(((rows.astype(np.float64) - unpacked) ** 2).sum()), rel=1e-5)
        return float((columns * (rows - unpacked) ** 2).sum())

    assert output_error(columns) < 0.8 * output_error(None)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama", {"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ("llama", {"architectures": []}, "architectures"),
        ("llama", {"model_type": "mistral"}, "model_type"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "longrope"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "x": 1}}, "x = 1"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "rope_theta"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position_embeddings"),
        ("llama", {"sliding_window": 8}, "sliding_window"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"num_experts": 8}, "num_experts"),
        ("llama", {"logit_scale": 0.5}, "logit_scale"),
        ("llama", {"hidden_size": "64"}, "hidden_size"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ("llama", {"rms_norm_eps": float("nan")}, "NaN is no JSON value"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "max_window_layers"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8,
                   "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"rope_theta": None}, "rope_theta"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ],
)  # fmt: skip
def test_facts_that_are_not_offered_are_named(family: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    config = config_of(family)
    folder = write_folder(tmp_path / "hf", config, tensors_of(config))
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises((FormatError, UnsupportedError), match=re.escape(says)):
        export_model(folder, tmp_path / "out.braid", "f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_spellings_of_rope_and_windows() -> None:
    def facts(family: str, **changes: Any) -> dict[str, Any]:
        prefix = family + "."
        mapped = read_hf_config(config_of(family, **changes), "config.json")
        return {key.removeprefix(prefix): value for key, value in mapped.items()}

    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64}  # fmt: skip
    old = facts("llama", rope_scaling=llama3)
    assert old["rope.scaling.type"] == "llama3"
    assert old["rope.scaling.original_context_length"] == 64
    assert old["rope.freq_base"] == 5000.0
    new = facts("llama", rope_theta=None, rope_parameters={**llama3, "rope_theta": 5000.0})
    assert new == old
    assert "rope.scaling.type" not in facts("llama", rope_scaling=None)
    linear = facts("llama", rope_scaling={"type": "linear", "factor": 4})
    assert (linear["rope.scaling.type"], linear["rope.scaling.factor"]) == ("linear", 4.0)
    yarn = facts("qwen3", rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                                        "attention_factor": 1.5, "truncate": False})  # fmt: skip
    assert yarn["rope.scaling.attn_factor"] == 1.5
    assert yarn["rope.scaling.truncate"] is False
    assert facts("mistral")["attention.sliding_window"] == 9
    assert "attention.sliding_window" not in facts("mistral", sliding_window=None)
    without = config_of("mistral")
    del without["sliding_window"]  # transformers' default for an entry that is not there
    assert read_hf_config(without, "c")["mistral.attention.sliding_window"] == 4096
    assert "attention.sliding_window" not in facts("qwen2", use_sliding_window=False, sliding_window=8)
    assert (
        facts("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)["attention.sliding_window"] == 8
    )


def folder_of(tmp_path: Path, shards: int = 1) -> tuple[Path, dict[str, Any]]:
    config = config_of("llama")
    tensors = tensors_of(config)
    return write_folder(tmp_path / "hf", config, tensors, shards), tensors


def refused(folder: Path, error: type[NanobraidError], *says: str) -> None:
    with pytest.raises(error) as caught:
        export_model(folder, folder.parent / "out.braid", "bf16")
    for piece in says:
        assert piece in str(caught.value)
    assert not list(folder.parent.glob("*.braid*"))


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    folder, tensors = folder_of(tmp_path)
    norm = "model.layers.1.input_layernorm.weight"
    write_safetensors(folder / "model.safetensors", {k: v for k, v in tensors.items() if k != norm})
    refused(folder, FormatError, norm)
    extra = {"model.layers.0.mlp.experts.weight": np.zeros((2, 2), np.float32)}
    write_safetensors(folder / "model.safetensors", tensors | extra)
    refused(folder, UnsupportedError, *extra)
    write_safetensors(folder / "model.safetensors", tensors | {"model.layers.2.input_layernorm.weight": tensors[norm]})
    refused(folder, UnsupportedError, "model.layers.2.input_layernorm.weight")
    wrong = "model.layers.0.self_attn.q_proj.weight"
    write_safetensors(folder / "model.safetensors", tensors | {wrong: np.zeros((64, 65), np.float32)})
    refused(folder, FormatError, "blk.0.attn_q.weight")
    write_safetensors(folder / "model.safetensors", tensors | {wrong: np.zeros((64, 64), np.int64)})
    refused(folder, UnsupportedError, "I64")
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    write_safetensors(folder / "model.safetensors", tensors | harmless)
    export_model(folder, tmp_path / "fine.braid", "bf16")


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    folder, tensors = folder_of(tmp_path)
    head = tensors["model.embed_tokens.weight"].copy()
    write_safetensors(folder / "model.safetensors", tensors | {"lm_head.weight": head})
    export_model(folder, tmp_path / "fine.braid", "bf16")
    (tmp_path / "fine.braid").unlink()
    head[5, 5] += 1
    write_safetensors(folder / "model.safetensors", tensors | {"lm_head.weight": head})
    refused(folder, UnsupportedError, "lm_head.weight", "tie_word_embeddings")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder, tensors = folder_of(tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 7] = np.nan
    write_safetensors(folder / "model.safetensors", tensors)
    refused(folder, InvalidArgumentError, "blk.1.ffn_up.weight", "row 3")


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path)
    (folder / "config.json").rename(folder / "c")
    refused(folder, ModelIOError, "config.json")
    for text, says in (("[1]", "expected an object"), ("{", "not JSON"), ('{"a":1,"a":2}', "'a' occurs twice"),
                       ("[" * 100_000, "nested deeper than 64")):  # fmt: skip
        (folder / "config.json").write_text(text)
        refused(folder, FormatError, "config.json", says)
    (folder / "c").rename(folder / "config.json")
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    refused(folder, UnsupportedError, "pytorch_model.bin", "refused")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, ModelIOError, "model.safetensors")
    refused(tmp_path / "nothing", ModelIOError, "nothing")


def test_shards(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def with_map(**changes: Any) -> None:
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], **changes}}))

    outside = tmp_path / "x.safetensors"
    write_safetensors(outside, {"t": np.zeros(1, np.float32)})
    for name in ("../x.safetensors", str(outside), "a/../../x.safetensors", "..", "", "x.bin", 3):
        with_map(**{"model.norm.weight": name})
        refused(folder, FormatError, "model.norm.weight", "no name of a safetensors file")
    with_map(**{"model.other.weight": "model-00001-of-00002.safetensors"})
    refused(folder, FormatError, "model.other.weight")
    swapped = next(name for name, file in good["weight_map"].items() if file.startswith("model-00001"))
    with_map(**{swapped: "model-00002-of-00002.safetensors"})
    refused(folder, FormatError, swapped)
    index.write_text(json.dumps({"weight_map": {}}))
    refused(folder, FormatError, "weight_map")
    index.write_text(json.dumps(good))
    shard = folder / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    refused(folder, ModelIOError, shard.name)
    shard.write_bytes(data[:-1])
    refused(folder, FormatError, shard.name)
    shard.write_bytes(struct.pack("<Q", 2**63) + data[8:])
    refused(folder, FormatError, shard.name, str(2**63))


def test_sources_that_are_no_source_and_targets_in_the_way(tmp_path: Path, model_path: Path) -> None:
    folder, _ = folder_of(tmp_path)
    pickle = tmp_path / "model.pt"
    pickle.write_bytes(b"\x80\x04")
    with pytest.raises(UnsupportedError, match="refused"):
        export_model(pickle, tmp_path / "out.braid", "bf16")
    with pytest.raises(UnsupportedError, match="folder"):
        export_model(folder / "model.safetensors", tmp_path / "out.braid", "bf16")
    with pytest.raises(InvalidArgumentError, match="q4_0"):
        export_model(folder, tmp_path / "out.braid", "q4_0")
    with pytest.raises(InvalidArgumentError, match="w8_per_channel"):
        export_model(folder, tmp_path / "out.braid", "bf16", w8_per_channel=True)
    with pytest.raises(ModelIOError, match="no such folder"):
        export_model(folder, tmp_path / "none" / "out.braid", "bf16")
    with pytest.raises(ModelIOError, match="is a folder"):
        export_model(folder, tmp_path, "bf16")
    out = tmp_path / "out.braid"
    out.write_text("precious")
    with pytest.raises(ModelIOError, match="exists already"):
        export_model(folder, out, "bf16")
    assert out.read_text() == "precious"
    export_model(folder, out, "bf16", force=True)
    with pytest.raises(InvalidArgumentError, match="same file"):
        export_model(out, out, "f32", force=True)


# ---- safetensors against its own package ----------------------------------------------------------------------------


def test_safetensors_are_read_as_by_their_package(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy", reason="the `safetensors` package, the oracle, is not installed")
    random = np.random.default_rng(0)
    tensors = {
        "a": random.standard_normal((7, 5)).astype(np.float32),
        "b": random.standard_normal((3, 2, 4)).astype(np.float16),
        "c": np.arange(6, dtype=np.int64),
        "é": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "x.safetensors"
    package.save_file(tensors, path, metadata={"format": "np"})
    listed = {name: (dtype, shape, size) for name, dtype, shape, size in _core.list_safetensors(str(path))}
    assert listed == {
        name: ({"f4": "F32", "f2": "F16", "i8": "I64"}[v.dtype.str[1:]], list(v.shape), v.nbytes)
        for name, v in tensors.items()
    }
    file = _core.open_safetensors("x", [str(path)], [("A", 0, "a"), ("B", 0, "b")], {"general.architecture": "llama"})
    assert file.kind == "safetensors"
    assert np.array_equal(file.read_rows("A", 2, 3), tensors["a"][2:5])
    assert np.array_equal(file.read_rows("B").reshape(3, 2, 4), tensors["b"].astype(np.float32))
    write_safetensors(path, {"a": tensors["a"]})  # the writer of these tests, read by the package
    assert np.array_equal(package.load_file(path)["a"], tensors["a"])


# ---- the command ----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nanobraid", "export", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=dict(os.environ), check=False,
    )  # fmt: skip


def test_the_command(tmp_path: Path, model_path: Path) -> None:
    out = tmp_path / "m.braid"
    done = run(model_path, "-o", out, "--dtype", "w8")
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout
    assert "calibration" in done.stdout
    assert done.stdout.count("blk.") == 5  # the worst few
    assert done.stderr.split() == ["calibrating", "writing"]
    again = run(model_path, "-o", out, "--dtype", "keep")
    assert again.returncode == 2
    assert again.stderr.startswith("nanobraid: error: ")
    assert "--force" in again.stderr
    verbose = run(model_path, "-o", out, "--dtype", "keep", "--force", "--verbose")
    assert verbose.stdout.count("blk.") == 9 * 30
    assert run(tmp_path / "none", "-o", out, "--dtype", "w4").returncode == 2
    assert run(model_path, "-o", out).returncode == 2
    shutil.copy(model_path, tmp_path / "cut.gguf")
    with (tmp_path / "cut.gguf").open("r+b") as file:
        file.truncate(1000)
    cut = run(tmp_path / "cut.gguf", "-o", tmp_path / "x.braid", "--dtype", "keep")
    assert cut.returncode == 2
    assert len(cut.stderr.splitlines()) == 1
    assert not (tmp_path / "x.braid").exists()
