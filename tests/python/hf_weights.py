"""A Hugging Face folder read with numpy alone, and its rotary frequencies: the ground the slow oracles stand on.

Everything is float64. Nothing here is shared with the engine or its Python package.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def read_safetensors(path: Path) -> dict[str, Array]:
    """Every tensor of a file, widened to float64."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    tensors: dict[str, Array] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        values: NDArray[Any] = np.frombuffer(data[begin:end], _STORED[entry["dtype"]])
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = values.astype(np.float64).reshape(entry["shape"])
    return tensors


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """config.json, and the tensors of all safetensors files together."""
    tensors: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= read_safetensors(path)
    return json.loads((folder / "config.json").read_text()), tensors


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """The RoPE facts of both spellings: rope_parameters, or rope_theta beside rope_scaling."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return rope


def frequencies(rope: dict[str, Any], dim: int) -> tuple[Array, float]:
    """Angle per position of each pair of channels, float64[dim / 2], and the factor of cos and sin.

    Formulas: the Llama 3.1 model card's reference code, and YaRN (arXiv 2309.00071, section 3.2 and 3.4).

    Raises:
        ValueError: the frequencies depend on the length, or the kind is unknown.
    """
    plain = rope["rope_theta"] ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    kind = rope["rope_type"]
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / rope["factor"], 1.0
    if kind == "llama3":
        turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return kept * plain + (1 - kept) * plain / rope["factor"], 1.0
    if kind == "yarn" and not {"mscale", "mscale_all_dim"} & set(rope):
        return yarn(rope, plain)
    raise ValueError(f"rope_type {kind} with {sorted(rope)}: the oracle has default, linear, llama3 and yarn")


def yarn(rope: dict[str, Any], plain: Array) -> tuple[Array, float]:
    pairs, theta, context = len(plain), rope["rope_theta"], rope["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(context / (times * 2 * math.pi)) / math.log(theta)

    first, last = pair_that_turns(rope.get("beta_fast") or 32.0), pair_that_turns(rope.get("beta_slow") or 1.0)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    stretched = np.clip((np.arange(pairs) - first) / max(last - first, 1e-3), 0.0, 1.0)
    factor = rope.get("attention_factor") or 0.1 * math.log(rope["factor"]) + 1.0
    return (1 - stretched) * plain + stretched * plain / rope["factor"], float(factor)
