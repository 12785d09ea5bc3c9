"""Small random Hugging Face folders of every family, written with numpy alone, and their forward pass in float64."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
Tensors = dict[str, NDArray[Any]]


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """A configuration in the spelling of transformers 4."""
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32 if family == "qwen3" else 16,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "tie_word_embeddings": family in ("llama", "qwen3"),
        "vocab_size": 300,
        "torch_dtype": "float32",
    }
    if family == "mistral":
        config["sliding_window"] = 9
    return {**config, **changes}


def tensors_of(config: dict[str, Any], seed: int = 0, dtype: Any = np.float32) -> Tensors:
    random = np.random.default_rng(seed)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim

    def matrix(rows: int, cols: int) -> NDArray[Any]:
        return (random.standard_normal((rows, cols), dtype=np.float32) * (1.5 / np.sqrt(cols))).astype(dtype)

    def vector(size: int, mean: float) -> NDArray[Any]:
        return (random.standard_normal(size, dtype=np.float32) * 0.2 + mean).astype(dtype)

    out: Tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden) * dtype(4)}
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        out[prefix + "input_layernorm.weight"] = vector(hidden, 1)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            out[f"{prefix}self_attn.{name}_proj.weight"] = matrix(rows, hidden)
            if config["model_type"] == "qwen2":
                out[f"{prefix}self_attn.{name}_proj.bias"] = vector(rows, 0)
        if config["model_type"] == "qwen3":
            out[prefix + "self_attn.q_norm.weight"] = vector(dim, 1)
            out[prefix + "self_attn.k_norm.weight"] = vector(dim, 1)
        out[prefix + "self_attn.o_proj.weight"] = matrix(hidden, q)
        out[prefix + "post_attention_layernorm.weight"] = vector(hidden, 1)
        out[prefix + "mlp.gate_proj.weight"] = matrix(inner, hidden)
        out[prefix + "mlp.up_proj.weight"] = matrix(inner, hidden)
        out[prefix + "mlp.down_proj.weight"] = matrix(hidden, inner)
    out["model.norm.weight"] = vector(hidden, 1)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return out


# Bytes are 8-bit floats here.
_DTYPES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.int64): "I64",
           np.dtype(np.int32): "I32", np.dtype(np.uint8): "F8_E4M3"}  # fmt: skip


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Tensor after tensor, so that large ones are not held twice."""
    header, at = {}, 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": _DTYPES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [at, at + values.nbytes],
        }
        at += values.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(values.tobytes())


def write_folder(folder: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: values for k, (name, values) in enumerate(tensors.items()) if k % shards == i}
        write_safetensors(folder / file, part)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def vocabulary(size: int) -> dict[str, Any]:
    """Metadata of a tokenizer of single bytes, then filler."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in shown]
    alphabet = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    pairs = [(a, b) for a in "etaoinshrdlu" for b in "etaoinshrdlu"][: size - 256]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [alphabet[byte] for byte in range(256)] + [a + b for a, b in pairs],
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in pairs],
        "tokenizer.ggml.add_bos_token": False,
    }


def forward(config: dict[str, Any], weights: dict[str, NDArray[Any]], ids: list[int]) -> NDArray[np.float64]:
    """Logits of every position, from weights under our names: no cache, no packing, one head at a time."""
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    count = len(ids)
    window = config.get("sliding_window") or count
    w = {name: np.asarray(values, np.float64) for name, values in weights.items()}

    def norm(x: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight)

    def rotate(x: NDArray[Any]) -> NDArray[Any]:
        angles = np.arange(count)[:, None] * config["rope_theta"] ** (-np.arange(dim // 2) / (dim // 2))
        a, b = x[:, : dim // 2], x[:, dim // 2 :]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], 1)

    distance = np.arange(count)[:, None] - np.arange(count)[None, :]
    visible = (distance >= 0) & (distance < window)
    x = w["token_embd.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = {name.removeprefix(f"blk.{i}."): values for name, values in w.items() if name.startswith(f"blk.{i}.")}
        normed = norm(x, layer["attn_norm.weight"])
        q, k, v = (normed @ layer[f"attn_{n}.weight"].T + layer.get(f"attn_{n}.bias", 0.0) for n in "qkv")
        attended = []
        for head in range(heads):
            group = head * kv_heads // heads
            one_q, one_k = q[:, head * dim : (head + 1) * dim], k[:, group * dim : (group + 1) * dim]
            if "attn_q_norm.weight" in layer:
                one_q, one_k = norm(one_q, layer["attn_q_norm.weight"]), norm(one_k, layer["attn_k_norm.weight"])
            scores = np.where(visible, rotate(one_q) @ rotate(one_k).T / np.sqrt(dim), -np.inf)
            weight = np.exp(scores - scores.max(1, keepdims=True))
            attended.append(weight / weight.sum(1, keepdims=True) @ v[:, group * dim : (group + 1) * dim])
        x = x + np.concatenate(attended, 1) @ layer["attn_output.weight"].T
        normed = norm(x, layer["ffn_norm.weight"])
        gate, up = normed @ layer["ffn_gate.weight"].T, normed @ layer["ffn_up.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["ffn_down.weight"].T
    return norm(x, w["output_norm.weight"]) @ w.get("output.weight", w["token_embd.weight"]).T
