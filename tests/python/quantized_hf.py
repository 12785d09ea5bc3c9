"""Hugging Face folders in the formats of AWQ, GPTQ and 8-bit floats, made with numpy alone, and what their weights are.

Written after the documents of AutoAWQ, AutoGPTQ and compressed-tensors. Nothing here is shared with the engine. Weights
are rounded to nearest: what is tested is how they are stored, not how they were found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]

# Every value of E4M3 by its code; the last one of either sign is NaN.
_CODES = np.arange(128)
_HALF = np.where(_CODES < 8, _CODES % 8 * 2.0**-9, (8 + _CODES % 8) * 2.0 ** (_CODES // 8 - 10.0))
FP8_VALUES = np.concatenate([_HALF, -_HALF]).astype(np.float32)
FP8_VALUES[[127, 255]] = np.nan


@dataclass
class Scheme:
    """How to quantize, in the words of the formats.

    Attributes:
        method: "awq", "gptq", "fp8" or "compressed-tensors".
        act_order: Of GPTQ: "" for none, "shared" for one order for all matrices of equally many columns, "own" for one
            for each matrix.
    """

    method: str
    group_size: int = 32
    sym: bool = False
    version: str = "gptq"
    act_order: str = ""
    per_channel: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The entry `quantization_config`."""
        if self.method == "awq":
            entry = {"quant_method": "awq", "bits": 4, "group_size": self.group_size, "zero_point": True,
                     "version": "gemm", "modules_to_not_convert": None}  # fmt: skip
        elif self.method == "gptq":
            entry = {"quant_method": "gptq", "bits": 4, "group_size": self.group_size, "desc_act": bool(self.act_order),
                     "sym": self.sym, "checkpoint_format": self.version, "damp_percent": 0.1, "true_sequential": True,
                     "lm_head": False}  # fmt: skip
        elif self.method == "fp8":
            entry = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
        else:
            weights = {"num_bits": 8, "type": "float", "strategy": "channel" if self.per_channel else "tensor",
                       "symmetric": True, "dynamic": False, "group_size": None, "observer": "minmax"}  # fmt: skip
            entry = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
                     "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {
                         "num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}}},
                     "kv_cache_scheme": None, "quantization_status": "compressed"}  # fmt: skip
        return {**entry, **self.changes}


def pack_columns(values: NDArray[Any], places: list[int]) -> NDArray[np.int32]:
    """[rows, n] to [rows, n / 8]: number i of each 8 goes to nibble places[i]."""
    shifts = 4 * np.array(places, np.uint32)
    words = (values.astype(np.uint32).reshape(len(values), -1, 8) << shifts).sum(-1, dtype=np.uint32)
    return words.view(np.int32)


NATURAL = list(range(8))
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # AutoAWQ's order_map = [0, 2, 4, 6, 1, 3, 5, 7], inverted


def quantize_int4(
    weight: NDArray[np.float32], groups: NDArray[np.int64], num_groups: int, sym: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float16]]:
    """Codes [cols, rows], zero points and scales [groups, rows] of a matrix [rows, cols]."""
    codes = np.zeros(weight.T.shape, np.int64)
    zeros = np.zeros((num_groups, len(weight)), np.int64)
    scales = np.zeros((num_groups, len(weight)), np.float16)
    for group in range(num_groups):
        part = weight[:, groups == group]
        if sym:
            scale = (2 * np.abs(part).max(1) / 15).astype(np.float16)
            zero = np.full(len(weight), 8)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = ((high - low) / 15).astype(np.float16)
            zero = np.clip(np.rint(-low / scale.astype(np.float32)), 0, 15).astype(np.int64)
        zeros[group], scales[group] = zero, scale
        codes[groups == group] = np.clip(np.rint(part / scale.astype(np.float32)[:, None]) + zero[:, None], 0, 15).T
    return codes, zeros, scales


def quantize(stem: str, weight: NDArray[np.float32], scheme: Scheme, seed: int) -> tuple[Tensors, NDArray[np.float32]]:
    """The tensors of a matrix [rows, cols], and its values as any reader must see them."""
    if scheme.method in ("fp8", "compressed-tensors"):
        return quantize_fp8(stem, weight, scheme)
    rows, cols = weight.shape
    groups = np.arange(cols) // scheme.group_size
    if scheme.act_order:
        order = np.random.default_rng(cols if scheme.act_order == "shared" else seed).permutation(cols)
        groups = groups[order]
    codes, zeros, scales = quantize_int4(weight, groups, cols // scheme.group_size, scheme.sym)
    factors = scales.astype(np.float32)[groups]
    values = np.ascontiguousarray(((codes - zeros[groups]).astype(np.float32) * factors).T)
    if scheme.method == "awq":
        parts = {"qweight": pack_columns(codes, AWQ_PLACES), "qzeros": pack_columns(zeros, AWQ_PLACES)}
    else:
        stored = (zeros - 1) % 16 if scheme.version == "gptq" else zeros
        words = pack_columns(codes.reshape(-1, 8, rows).transpose(0, 2, 1).reshape(-1, 8), NATURAL)
        parts = {"qweight": words.reshape(-1, rows), "qzeros": pack_columns(stored, NATURAL),
                 "g_idx": groups.astype(np.int32)}  # fmt: skip
    return {f"{stem}.{name}": np.ascontiguousarray(part) for name, part in {**parts, "scales": scales}.items()}, values


def quantize_fp8(stem: str, weight: NDArray[np.float32], scheme: Scheme) -> tuple[Tensors, NDArray[np.float32]]:
    peaks = np.abs(weight).max(1, keepdims=True)
    scale = ((peaks if scheme.per_channel else peaks.max(keepdims=True)) / np.float32(448)).astype(np.float32)
    wanted = np.abs(weight / scale)
    above = np.clip(np.searchsorted(FP8_VALUES[:127], wanted), 0, 126)
    below = np.clip(above - 1, 0, 126)
    code = np.where(wanted - FP8_VALUES[below] < FP8_VALUES[above] - wanted, below, above).astype(np.uint8)
    code |= (weight < 0).astype(np.uint8) << 7
    parts: Tensors = {f"{stem}.weight": code}
    parts[f"{stem}.weight_scale"] = scale if scheme.per_channel else scale.reshape(1)
    if scheme.method == "fp8":
        parts[f"{stem}.input_scale"] = np.ones(1, np.float32)
    return parts, FP8_VALUES[code] * scale


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def quantized(config: dict[str, Any], tensors: Tensors, scheme: Scheme) -> tuple[dict[str, Any], Tensors, Tensors]:
    """Configuration and tensors of the quantized folder, and the tensors of the same model in float32."""
    out: Tensors = {}
    plain: Tensors = {}
    for seed, (name, values) in enumerate(tensors.items()):
        if not is_linear(name):
            out[name] = plain[name] = values
            continue
        parts, plain[name] = quantize(name.removesuffix(".weight"), values, scheme, seed)
        out |= parts
    return {**config, "quantization_config": scheme.config()}, out, plain
