"""Checkpoints of AWQ, GPTQ and 8-bit floats: weights bit for bit, logits of the model, and what is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from default_checkpoint import write_default
from numpy.typing import NDArray
from quantized_hf import AWQ_PLACES, FP8_VALUES, NATURAL, Scheme, Tensors, pack_columns, quantized
from tiny_hf import config_of, forward, tensors_of, vocabulary, write_folder

import nanobraid as nb
from nanobraid import _core
from nanobraid._core import ModelFile
from nanobraid.bench_kv.divergence import mean_kl
from nanobraid.errors import FormatError, NanobraidError, UnsupportedError
from nanobraid.export import export_model, hf_folder

IDS = [int(i) for i in np.random.default_rng(4).integers(0, 300, 40)]
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}

SCHEMES = {
    "awq-g32": Scheme("awq", 32),
    "awq-g64": Scheme("awq", 64),
    "awq-g128": Scheme("awq", 128),
    "gptq-sym": Scheme("gptq", 128, sym=True),
    "gptq-asym": Scheme("gptq", 64),
    "gptq-v2-sym": Scheme("gptq", 64, sym=True, version="gptq_v2"),
    "gptq-v2-asym": Scheme("gptq", 32, version="gptq_v2"),
    "gptq-act-order": Scheme("gptq", 32, act_order="shared"),
    "gptq-act-order-own": Scheme("gptq", 64, sym=True, act_order="own"),
    "fp8-tensor": Scheme("fp8"),
    "fp8-channel": Scheme("fp8", per_channel=True),
    "ct-tensor": Scheme("compressed-tensors"),
    "ct-channel": Scheme("compressed-tensors", per_channel=True),
}
STORED = {"awq": "awq_int4", "gptq": "gptq_int4", "fp8": "fp8_e4m3", "compressed-tensors": "fp8_e4m3"}


@pytest.fixture(autouse=True)
def tiny_tokenizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folders here have no tokenizer files; what they would say is given. Nothing is left in the user's cache."""
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "home"))
    if "model_path" not in request.fixturenames:
        monkeypatch.setattr(hf_folder, "_tokenizer", lambda _: vocabulary(300))


def our_names(config: dict[str, Any]) -> dict[str, str]:
    return hf_folder._names(config, "config.json")


def make(
    folder: Path, scheme: Scheme, family: str = "llama", **changes: Any
) -> tuple[dict[str, Any], Tensors, Tensors]:
    """Writes a quantized folder; returns its configuration and tensors, and the plain weights under our names."""
    config = config_of(family, **{**SHAPE, **changes})
    config, stored, plain = quantized(config, tensors_of(config), scheme)
    write_folder(folder, config, stored, shards=2)
    names = our_names(config)
    return config, stored, {names[name]: values for name, values in plain.items()}


def logits(path: Path, ids: list[int], dtype: str = "f32", **options: Any) -> NDArray[np.float32]:
    with nb.LLM(path, dtype=dtype, kv_dtype="f32", num_threads=1, **options) as llm:
        return np.asarray(llm.logits(ids))


def kl(reference: NDArray[Any], other: NDArray[Any]) -> float:
    return float(np.mean(mean_kl(np.asarray(reference, np.float32), np.asarray(other, np.float32))))


# ---- nibbles --------------------------------------------------------------------------------------------------------


def test_the_order_of_nibbles_is_that_of_the_projects() -> None:
    """The words that the writers of this test make, against words written by hand."""
    row = np.arange(8)[None, :]
    assert pack_columns(row, NATURAL).view(np.uint32)[0, 0] == 0x76543210
    assert pack_columns(row, AWQ_PLACES).view(np.uint32)[0, 0] == 0x75316420  # 0 2 4 6 1 3 5 7 from the lowest bits on
    assert FP8_VALUES[[0x38, 0x7E, 0x01, 0x80, 0xC0]].tolist() == [1.0, 448.0, 2.0**-9, -0.0, -2.0]


@pytest.mark.parametrize(
    "name", ["awq_int4", "awq_int4_g64", "awq_int4_g32", "gptq_int4", "gptq_int4_g64", "gptq_int4_g32"]
)
def test_a_row_of_the_format_is_code_less_zero_point_times_scale(name: str) -> None:
    size = {"64": 64, "32": 32}.get(name[-2:], 128)
    random = np.random.default_rng(7)
    codes = random.integers(0, 16, (50, 3, size))
    zeros = random.integers(0, 256, (50, 3))
    scales = random.standard_normal((50, 3)).astype(np.float16)
    pieces = codes.reshape(50, 3, -1, 2, 16).astype(np.uint8)
    nibbles = (pieces[..., 0, :] | pieces[..., 1, :] << 4).reshape(50, 3, -1)
    data = np.concatenate([scales.view(np.uint8).reshape(50, 3, 2), zeros.astype(np.uint8)[..., None], nibbles], -1)
    expected = (codes - zeros[..., None]).astype(np.float32) * scales.astype(np.float32)[..., None]
    actual = _core.unpack_weights(name, data.tobytes(), 3 * size)
    np.testing.assert_array_equal(actual.view(np.uint32), expected.reshape(50, -1).view(np.uint32))


# ---- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SCHEMES)
def test_weights_are_taken_over_bit_for_bit(case: str, tmp_path: Path) -> None:
    scheme = SCHEMES[case]
    config, _, plain = make(tmp_path / "hf", scheme)
    summary = export_model(tmp_path / "hf", tmp_path / "out.braid", "keep")
    file = ModelFile(str(tmp_path / "out.braid"))
    formats = {name: kind for name, kind, *_ in file.tensors()}
    suffix = {32: "_g32", 64: "_g64", 128: ""}[scheme.group_size] if scheme.method in ("awq", "gptq") else ""
    for name, values in plain.items():
        if values.ndim == 2:
            np.testing.assert_array_equal(file.read_rows(name).view(np.uint32), values.view(np.uint32), err_msg=name)
        if name.startswith("blk.") and values.ndim == 2:
            assert formats[name] == STORED[scheme.method] + suffix
    assert ("blk.1.attn_q.order" in formats) == bool(scheme.act_order)
    assert not any(tensor.relative_error for tensor in summary.tensors)
    assert summary.calibration_tokens == 0
    ours = logits(tmp_path / "out.braid", IDS)
    theirs = forward(config, plain, IDS)
    assert float((np.abs(ours - theirs).max(-1) / np.abs(theirs).max(-1)).max()) < 1e-4
    assert kl(theirs, ours) < 1e-6
    assert kl(theirs, logits(tmp_path / "out.braid", IDS, "bf16")) < 1e-3
    assert kl(theirs, logits(tmp_path / "out.braid", IDS, "int8")) < 2e-2
    assert kl(theirs, logits(tmp_path / "out.braid", IDS, device="reference")) < 1e-6


@pytest.mark.parametrize("case", ["awq-g64", "gptq-act-order-own", "fp8-channel"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_every_family(family: str, case: str, tmp_path: Path) -> None:
    config, _, plain = make(tmp_path / "hf", SCHEMES[case], family)
    export_model(tmp_path / "hf", tmp_path / "out.braid", "keep")
    assert kl(forward(config, plain, IDS), logits(tmp_path / "out.braid", IDS)) < 1e-6


@pytest.mark.parametrize("case", ["gptq-act-order", "gptq-act-order-own", "awq-g128", "ct-channel"])
def test_tokens_are_the_same_alone_and_in_a_batch(case: str, tmp_path: Path) -> None:
    make(tmp_path / "hf", SCHEMES[case])
    export_model(tmp_path / "hf", tmp_path / "out.braid", "keep")
    prompts = [IDS[:n] for n in (3, 17, 40, 9)]
    params = nb.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with nb.LLM(tmp_path / "out.braid", num_threads=2, max_model_len=128) as llm:
        together = [out.token_ids for out in llm.generate(prompts, params)]
        alone = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("case", ["awq-g32", "gptq-act-order", "fp8-tensor"])
def test_a_folder_is_loaded_as_it_is(case: str, tmp_path: Path) -> None:
    make(tmp_path / "hf", SCHEMES[case])
    export_model(tmp_path / "hf", tmp_path / "out.braid", "keep")
    assert np.array_equal(logits(tmp_path / "hf", IDS), logits(tmp_path / "out.braid", IDS))
    (cached,) = (tmp_path / "home").rglob("*.braid")
    assert "-keep-" in cached.name
    assert cached.stat().st_size == (tmp_path / "out.braid").stat().st_size


@pytest.mark.parametrize("case", ["awq-g64", "gptq-act-order-own", "fp8-channel"])
def test_other_formats_are_made_of_the_weights_in_the_order_of_the_input(case: str, tmp_path: Path) -> None:
    _, _, plain = make(tmp_path / "hf", SCHEMES[case])
    export_model(tmp_path / "hf", tmp_path / "keep.braid", "keep")
    for source, dtype, worst in (
        ("hf", "f32", 0.0),
        ("keep.braid", "f32", 0.0),
        ("hf", "w8", 0.01),
        ("hf", "w4", 0.15),
    ):
        out = tmp_path / f"{source}-{dtype}.braid"
        export_model(tmp_path / source, out, dtype)
        file = ModelFile(str(out))
        assert not any(name.endswith(".order") for name, *_ in file.tensors())
        for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.1.ffn_up.weight"):
            error = np.linalg.norm(file.read_rows(name) - plain[name]) / np.linalg.norm(plain[name])
            assert error <= worst, (source, dtype, name)


def test_the_importance_of_columns_follows_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration sees a down matrix's inputs as they are packed; the search needs them as the weights are."""
    from nanobraid.export import exporter

    seen: dict[str, dict[str, NDArray[np.float32]]] = {}

    def recorded(into: str) -> Any:
        original = exporter._pack

        def pack(file: Any, plan: Any, begin: int, values: Any, importance: Any) -> bytes:
            seen.setdefault(into, {})[plan.name] = importance
            return original(file, plan, begin, values, importance)

        return pack

    config, _, plain = make(tmp_path / "ordered", SCHEMES["gptq-act-order-own"])
    stored = {stored: plain[ours] for stored, ours in our_names(config).items()}
    write_folder(tmp_path / "plain", {**config, "quantization_config": None}, stored)
    for name in ("ordered", "plain"):
        with monkeypatch.context() as patch:
            patch.setattr(exporter, "_pack", recorded(name))
            export_model(tmp_path / name, tmp_path / f"{name}.braid", "w4")
    for name, importance in seen["plain"].items():
        if importance is not None:
            np.testing.assert_allclose(seen["ordered"][name], importance, rtol=2e-3, err_msg=name)


def test_zeros_that_another_project_stored_with_borrows(tmp_path: Path) -> None:
    scheme = Scheme(
        "gptq", 32, version="gptq_v2", changes={"checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:2.0"]}}
    )
    config = config_of("llama", **SHAPE)
    tensors = {
        name: np.abs(values) if name.endswith("_proj.weight") else values for name, values in tensors_of(config).items()
    }
    config, stored, plain = quantized(config, tensors, scheme)  # zero points are 0, so that each borrows
    for name in stored:
        if name.endswith(".qzeros"):
            stored[name] = (stored[name].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    write_folder(tmp_path / "hf", config, stored)
    export_model(tmp_path / "hf", tmp_path / "out.braid", "keep")
    name = "model.layers.1.mlp.up_proj.weight"
    assert np.array_equal(ModelFile(str(tmp_path / "out.braid")).read_rows("blk.1.ffn_up.weight"), plain[name])


def test_biases_of_zeros_are_nothing(tmp_path: Path) -> None:
    config, stored, plain = make(tmp_path / "hf", SCHEMES["gptq-sym"])
    bias = "model.layers.0.self_attn.o_proj.bias"
    write_folder(tmp_path / "hf", config, stored | {bias: np.zeros(128, np.float16)}, shards=2)
    export_model(tmp_path / "hf", tmp_path / "out.braid", "keep")
    assert kl(forward(config, plain, IDS), logits(tmp_path / "out.braid", IDS)) < 1e-6
    write_folder(tmp_path / "hf", config, stored | {bias: np.full(128, 0.5, np.float16)}, shards=2)
    refused(tmp_path / "hf", UnsupportedError, bias)


def test_a_matrix_may_be_left_as_it_is(tmp_path: Path) -> None:
    config, stored, plain = make(tmp_path / "hf", Scheme("awq", 64, changes={"modules_to_not_convert": ["o_proj"]}))
    stem = "model.layers.1.self_attn.o_proj"
    for part in ("qweight", "qzeros", "scales"):
        del stored[f"{stem}.{part}"]
    stored[f"{stem}.weight"] = plain["blk.1.attn_output.weight"]
    write_folder(tmp_path / "hf", config, stored, shards=2)
    summary = export_model(tmp_path / "hf", tmp_path / "out.braid", "keep")
    formats = {tensor.name: tensor.format for tensor in summary.tensors}
    assert (formats["blk.1.attn_output.weight"], formats["blk.0.attn_output.weight"]) == ("f32", "awq_int4_g64")
    assert kl(forward(config, plain, IDS), logits(tmp_path / "out.braid", IDS)) < 1e-6


# ---- the default model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["awq-g64", "gptq-act-order", "fp8-channel"])
def test_the_default_model(case: str, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_default(tmp_path, model_path, SCHEMES[case], monkeypatch)
    export_model(tmp_path / "hf", tmp_path / "out.braid", "keep")
    export_model(tmp_path / "plain", tmp_path / "plain.braid", "f32")
    ids = nb.Tokenizer(model_path).encode("The sea was calm that morning, and the boats had not yet gone out. " * 4)
    reference = logits(tmp_path / "plain.braid", ids, max_model_len=256)
    assert kl(reference, logits(tmp_path / "out.braid", ids, max_model_len=256)) < 1e-6
    assert kl(reference, logits(tmp_path / "out.braid", ids, "bf16", max_model_len=256)) < 1e-3
    assert kl(reference, logits(tmp_path / "out.braid", ids, "int8", max_model_len=256)) < 0.02


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(folder: Path, error: type[NanobraidError], *says: str) -> None:
    with pytest.raises(error) as caught:
        export_model(folder, folder.parent / "refused.braid", "keep")
    for piece in says:
        assert piece in str(caught.value), str(caught.value)
    assert not (folder.parent / "refused.braid").exists()


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("awq-g32", {"bits": 8}, "bits = 8"),
        ("awq-g32", {"version": "gemv"}, "version = 'gemv'"),
        ("awq-g32", {"version": "exllama"}, "version = 'exllama'"),
        ("awq-g32", {"group_size": -1}, "group_size = -1"),
        ("awq-g32", {"zero_point": False}, "zero_point"),
        ("gptq-sym", {"bits": 3}, "bits = 3"),
        ("gptq-sym", {"group_size": 1024}, "group_size = 1024"),
        ("gptq-sym", {"checkpoint_format": "marlin"}, "marlin"),
        ("gptq-sym", {"is_marlin_format": True}, "is_marlin_format"),
        ("gptq-sym", {"dynamic": {"-:.*gate.*": {}}}, "dynamic"),
        ("fp8-tensor", {"weight_block_size": [128, 128]}, "weight_block_size"),
        ("fp8-tensor", {"activation_scheme": "other"}, "activation_scheme"),
        ("fp8-tensor", {"fmt": "e5m2"}, "fmt"),
        ("ct-tensor", {"format": "pack-quantized"}, "pack-quantized"),
        ("ct-tensor", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ("awq-g32", {"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ("awq-g32", {"quant_method": None}, "quant_method"),
    ],
)
def test_what_a_configuration_says_and_is_not_offered(
    case: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    scheme = SCHEMES[case]
    make(tmp_path / "hf", Scheme(**{**vars(scheme), "changes": changes}))
    refused(tmp_path / "hf", UnsupportedError, "quantization_config", says)


@pytest.mark.parametrize("strategy", ["block", "group", "channel"])
def test_strategies_of_compressed_tensors(strategy: str, tmp_path: Path) -> None:
    entry = SCHEMES["ct-channel"].config()
    entry["config_groups"]["group_0"]["weights"]["strategy"] = strategy
    make(tmp_path / "hf", Scheme("compressed-tensors", per_channel=True, changes=entry))
    if strategy == "channel":
        export_model(tmp_path / "hf", tmp_path / "out.braid", "keep")
    else:
        refused(tmp_path / "hf", UnsupportedError, "config_groups.group_0.weights.strategy", strategy)


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("case", "part", "change", "error", "says"),
    [
        ("awq-g32", "scales", None, FormatError, f"{Q}.scales"),
        ("awq-g32", "qzeros", None, FormatError, f"{Q}.qzeros"),
        ("awq-g32", "qweight", None, FormatError, Q),
        ("awq-g32", "qweight", lambda x: x[:, :8], FormatError, f"{Q}.qzeros"),
        ("awq-g32", "qweight", lambda x: x[:100], FormatError, f"{Q}.qweight"),
        ("awq-g32", "qweight", lambda x: x.astype(np.int64), FormatError, "I64"),
        ("awq-g32", "scales", lambda x: x[:1], FormatError, f"{Q}.scales"),
        ("awq-g32", "scales", lambda x: x * np.float16("inf"), FormatError, f"{Q}.scales"),
        ("awq-g32", "scales", lambda x: x.astype(np.float32) * np.float32(1.0001), FormatError, "fp16"),
        ("gptq-act-order", "g_idx", None, FormatError, f"{Q}.g_idx"),
        ("gptq-act-order", "g_idx", lambda x: x + 1, FormatError, f"{Q}.g_idx"),
        ("gptq-act-order", "g_idx", lambda x: x - 9, FormatError, f"{Q}.g_idx"),
        ("gptq-act-order", "g_idx", lambda x: x // 2, UnsupportedError, f"{Q}.g_idx"),
        ("gptq-sym", "qzeros", lambda x: x[:, :-1], FormatError, f"{Q}.qzeros"),
        ("fp8-channel", "weight_scale", None, FormatError, f"{Q}.weight_scale"),
        ("fp8-channel", "weight_scale", lambda x: x[:-1], FormatError, f"{Q}.weight_scale"),
        ("fp8-channel", "weight", lambda x: x | 127, FormatError, f"{Q}.weight"),
        ("ct-tensor", "weight", lambda x: x[:64], FormatError, "attn_q.weight"),
    ],
)
def test_damaged_tensors_are_named(  # noqa: PLR0917 - a row of the table
    case: str, part: str, change: Any, error: type[NanobraidError], says: str, tmp_path: Path
) -> None:
    config, stored, _ = make(tmp_path / "hf", SCHEMES[case])
    name = f"{Q}.{part}"
    if change is None:
        del stored[name]
    else:
        stored[name] = np.ascontiguousarray(change(stored[name]))
    write_folder(tmp_path / "hf", config, stored, shards=2)
    refused(tmp_path / "hf", error, says)


def test_folders_that_contradict_themselves(tmp_path: Path) -> None:
    config, stored, plain = make(tmp_path / "hf", SCHEMES["awq-g32"])
    folder = tmp_path / "hf"
    write_folder(folder, {**config, "quantization_config": None}, stored, shards=2)
    refused(folder, UnsupportedError, "quantization_config")
    write_folder(folder, config, stored | {f"{Q}.weight": plain["blk.1.attn_q.weight"]}, shards=2)
    refused(folder, FormatError, f"{Q}.qweight", f"{Q}.weight")
    write_folder(folder, {**config, "quantization_config": [4]}, stored, shards=2)
    refused(folder, FormatError, "quantization_config")
    plain_config = config_of("llama", **SHAPE)
    tensors = tensors_of(plain_config)
    other = tmp_path / "plain"
    write_folder(other, {**plain_config, "quantization_config": config["quantization_config"]}, tensors)
    refused(other, FormatError, "no matrix is quantized")


# ---- quantize_config.json -------------------------------------------------------------------------------------------


def place_beside(folder: Path, config: dict[str, Any], beside: dict[str, Any] | None, **inside: Any) -> None:
    """`quantize_config.json` of these entries, and a `config.json` that has only those of `inside`."""
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": inside or None}))
    if beside is not None:
        (folder / "quantize_config.json").write_text(json.dumps(beside))


@pytest.mark.parametrize("case", ["gptq-asym", "gptq-v2-sym", "gptq-act-order-own"])
@pytest.mark.parametrize("has_method", [False, True])
def test_the_configuration_may_stand_beside(case: str, has_method: bool, tmp_path: Path) -> None:
    config, _, plain = make(tmp_path / "hf", SCHEMES[case])
    entry = {**config["quantization_config"], "model_name_or_path": "there", "model_file_base_name": "model"}
    if not has_method:  # as AutoGPTQ wrote it at first
        del entry["quant_method"]
    place_beside(tmp_path / "hf", config, entry)
    export_model(tmp_path / "hf", tmp_path / "out.braid", "keep")
    file = ModelFile(str(tmp_path / "out.braid"))
    for name, values in plain.items():
        if values.ndim == 2:
            np.testing.assert_array_equal(file.read_rows(name).view(np.uint32), values.view(np.uint32), err_msg=name)
    assert np.array_equal(logits(tmp_path / "hf", IDS), logits(tmp_path / "out.braid", IDS))
    assert all("-keep-" in path.name for path in (tmp_path / "home").rglob("*.braid"))


def test_a_change_beside_is_a_change_of_the_folder(tmp_path: Path) -> None:
    config, _, _ = make(tmp_path / "hf", SCHEMES["gptq-asym"])
    entry = config["quantization_config"]
    for version in ("gptq", "gptq_v2"):
        place_beside(tmp_path / "hf", config, {**entry, "checkpoint_format": version})
        logits(tmp_path / "hf", IDS)
    assert len(list((tmp_path / "home").rglob("*.braid"))) == 2


def test_what_one_file_does_not_say_the_other_does(tmp_path: Path) -> None:
    config, _, plain = make(tmp_path / "hf", SCHEMES["gptq-v2-asym"])
    entry = config["quantization_config"]
    beside = {"checkpoint_format": "gptq_v2", "bits": 4, "dataset": "one"}
    inside = {**entry, "checkpoint_format": None, "dataset": "two", "meta": None}
    place_beside(tmp_path / "hf", config, beside, **inside)
    export_model(tmp_path / "hf", tmp_path / "out.braid", "keep")
    rows = ModelFile(str(tmp_path / "out.braid")).read_rows("blk.1.ffn_up.weight")
    assert np.array_equal(rows, plain["blk.1.ffn_up.weight"])


@pytest.mark.parametrize(
    ("changes", "ours", "theirs"),
    [
        ({"bits": 8}, "quantization_config.bits = 4", "bits = 8"),
        ({"group_size": 128}, "quantization_config.group_size = 64", "group_size = 128"),
        ({"desc_act": True}, "quantization_config.desc_act = False", "desc_act = True"),
        ({"desc_act": 0}, "quantization_config.desc_act = False", "desc_act = 0"),
        ({"sym": True}, "quantization_config.sym = False", "sym = True"),
        ({"quant_method": "awq"}, "quantization_config.quant_method = 'gptq'", "quant_method = 'awq'"),
        ({"checkpoint_format": "gptq_v2"}, "quantization_config.checkpoint_format = 'gptq'", "'gptq_v2'"),
        ({"format": "gptq_v2"}, "quantization_config.checkpoint_format = 'gptq'", "format = 'gptq_v2'"),
        ({"meta": {"quantizer": "gptqmodel:2.0"}}, "quantization_config.meta", "quantize_config.json: meta"),
    ],
)
def test_files_that_contradict_each_other(changes: dict[str, Any], ours: str, theirs: str, tmp_path: Path) -> None:
    config, _, _ = make(tmp_path / "hf", SCHEMES["gptq-asym"])
    entry = {**config["quantization_config"], "meta": {"quantizer": "optimum:1.0"}}
    beside = {**entry, **changes}
    if "format" in changes:
        del beside["checkpoint_format"]
    place_beside(tmp_path / "hf", config, beside, **entry)
    refused(tmp_path / "hf", FormatError, "config.json", ours, "quantize_config.json", theirs)
    place_beside(tmp_path / "hf", config, {**entry, "damp_percent": 0.5, "quant_method": "GPTQ"}, **entry)
    export_model(tmp_path / "hf", tmp_path / "out.braid", "keep")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 3}, "quantize_config.json: bits = 3"),
        ({"group_size": -1}, "quantize_config.json: group_size = -1"),
        ({"w_bit": 4}, "quantize_config.json: w_bit = 4"),
        ({"is_marlin_format": True}, "quantize_config.json: is_marlin_format = True"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "quantize_config.json: format = 'gptq_v2'"),
    ],
)
def test_what_is_not_offered_beside_is_named_there(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    config, _, _ = make(tmp_path / "hf", SCHEMES["gptq-asym"])
    entry = config["quantization_config"]
    place_beside(tmp_path / "hf", config, {**entry, **changes})
    refused(tmp_path / "hf", UnsupportedError, says)
    inside = {key: value for key, value in entry.items() if key not in changes}
    place_beside(tmp_path / "hf", config, {**entry, **changes}, **inside)
    refused(tmp_path / "hf", UnsupportedError, says)


def test_damage_beside_is_named(tmp_path: Path) -> None:
    config, _, _ = make(tmp_path / "hf", SCHEMES["gptq-asym"])
    place_beside(tmp_path / "hf", config, None)
    refused(tmp_path / "hf", UnsupportedError, "config.json has no quantization_config", "no quantize_config.json")
    for text in ("[4]", "{"):
        (tmp_path / "hf" / "quantize_config.json").write_text(text)
        refused(tmp_path / "hf", FormatError, "quantize_config.json")


def test_weights_under_the_name_that_autogptq_gives_them(tmp_path: Path) -> None:
    config, stored, plain = make(tmp_path / "other", SCHEMES["gptq-asym"])
    folder = tmp_path / "hf"
    write_folder(folder, config, stored)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-64g.safetensors")
    place_beside(folder, config, config["quantization_config"])
    export_model(folder, tmp_path / "out.braid", "keep")
    assert np.array_equal(logits(folder, IDS), logits(tmp_path / "out.braid", IDS))
    assert kl(forward(config, plain, IDS), logits(folder, IDS)) < 1e-6
    write_folder(tmp_path / "third", config, {})
    (tmp_path / "third" / "model.safetensors").rename(folder / "gptq_model-8bit-64g.safetensors")
    refused(folder, UnsupportedError, "gptq_model-4bit-64g", "gptq_model-8bit-64g")


def read_tensor(path: Path, tensor: str) -> bytes:
    file = ModelFile(str(path))
    (size,) = (size for name, _, _, size in file.tensors() if name == tensor)
    return file.read(tensor, 0, size)


def write_changed(source: Path, path: Path, tensor: str, damaged: bytes) -> None:
    """The same `.braid` file with other bytes in one tensor."""
    file = ModelFile(str(source))
    specs = [(name, kind, shape) for name, kind, shape, _ in file.tensors()]
    with _core.BraidWriter(str(path), file.metadata(), specs) as writer:
        for index, (name, _, _, size) in enumerate(file.tensors()):
            writer.write(index, damaged if name == tensor else file.read(name, 0, size))
        writer.finish()


def test_a_damaged_order_in_a_file_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "hf", SCHEMES["gptq-act-order"])
    path, bad, order = tmp_path / "out.braid", tmp_path / "bad.braid", "blk.1.attn_output.order"
    export_model(tmp_path / "hf", path, "keep")
    values = np.frombuffer(read_tensor(path, order), np.float32)
    for damaged, says in ((np.zeros_like(values), "twice"), (values + 1, "128"), (values + 0.5, "0.5")):
        write_changed(path, bad, order, damaged.astype(np.float32).tobytes())
        with pytest.raises(FormatError, match=re.escape(order)) as caught:
            nb.LLM(bad)
        assert says in str(caught.value)
        bad.unlink()


def test_nan_among_8_bit_floats_of_a_file_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "hf", SCHEMES["ct-channel"])
    path, bad, matrix = tmp_path / "out.braid", tmp_path / "bad.braid", "blk.1.ffn_down.weight"
    export_model(tmp_path / "hf", path, "keep")
    write_changed(path, bad, matrix, read_tensor(path, matrix)[:-1] + b"\xff")
    with pytest.raises(FormatError, match=re.escape(matrix)):
        nb.LLM(bad)
