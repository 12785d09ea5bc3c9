#!/usr/bin/env python3
"""Writes a random model of a known shape as a Hugging Face folder, for measuring speed where no weights can be had.

    python tools/make_random_model.py --like llama-3.2-1b --dtype bf16 OUT_FOLDER
    nanobraid export OUT_FOLDER OUT.braid

Configuration and tensors are those of the named model, so that transformers and nanobraid run it as they would the real
one; its tokenizer knows single bytes and a pair of spaces. The same arguments give the same bytes. What it says means
nothing, but no value is special: a kernel takes as long as with real weights.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Published configurations: hidden, inner, layers, heads, KV heads, head_dim, vocabulary, positions, base of RoPE, eps.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "shape": (2048, 8192, 16, 32, 8, 64, 128256, 131072, 500000.0, 1e-5),
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_scaling": LLAMA3_ROPE,
    },
    "tinyllama-1.1b": {
        "shape": (2048, 5632, 22, 32, 4, 64, 32000, 2048, 10000.0, 1e-5),
        "model_type": "llama",
        "tie_word_embeddings": False,
    },
    "qwen2.5-1.5b": {
        "shape": (1536, 8960, 28, 12, 2, 128, 151936, 32768, 1000000.0, 1e-6),
        "model_type": "qwen2",
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "shape": (1024, 3072, 28, 16, 8, 128, 151936, 40960, 1000000.0, 1e-6),
        "model_type": "qwen3",
        "tie_word_embeddings": True,
    },
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DTYPES = {"f32": ("F32", "float32", 4), "bf16": ("BF16", "bfloat16", 2), "f16": ("F16", "float16", 2)}
POOL = 1 << 24  # random values that are drawn; a tensor takes a stretch of them, again and again


def config_of(name: str, dtype: str, layers: int | None, vocab_size: int | None) -> dict[str, Any]:
    """The configuration in the spelling of transformers."""
    model = dict(MODELS[name])
    hidden, inner, num_layers, heads, kv_heads, dim, vocab, positions, theta, eps = model.pop("shape")
    return {
        "architectures": [ARCHITECTURES[model["model_type"]]],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers or num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "vocab_size": vocab_size or vocab,
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "torch_dtype": DTYPES[dtype][1],
        **model,
    }


def tensors_of(config: dict[str, Any]) -> Iterator[tuple[str, Shape, float]]:
    """Name, shape and mean of every tensor; matrices have mean 0."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden), 0.0
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (hidden,), 1.0
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{layer}self_attn.{name}_proj.weight", (rows, hidden), 0.0
            if config["model_type"] == "qwen2":
                yield f"{layer}self_attn.{name}_proj.bias", (rows,), 0.0
        if config["model_type"] == "qwen3":
            yield layer + "self_attn.q_norm.weight", (dim,), 1.0
            yield layer + "self_attn.k_norm.weight", (dim,), 1.0
        yield layer + "self_attn.o_proj.weight", (hidden, q), 0.0
        yield layer + "post_attention_layernorm.weight", (hidden,), 1.0
        yield layer + "mlp.gate_proj.weight", (inner, hidden), 0.0
        yield layer + "mlp.up_proj.weight", (inner, hidden), 0.0
        yield layer + "mlp.down_proj.weight", (hidden, inner), 0.0
    yield "model.norm.weight", (hidden,), 1.0
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden), 0.0


def packed(values: NDArray[np.float32], dtype: str) -> bytes:
    """The values in the type of the file, rounded to nearest even."""
    if dtype == "f32":
        return values.tobytes()
    if dtype == "f16":
        return values.astype(np.float16).tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


def write_tensors(path: Path, config: dict[str, Any], dtype: str, seed: int) -> int:
    """Writes `model.safetensors`; returns its size in bytes."""
    stored, _, size = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, _ in tensors_of(config):
        count = int(np.prod(shape))
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [at, at + count * size]}
        at += count * size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(seed)
    pool = random.standard_normal(POOL, dtype=np.float32)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape, mean in tensors_of(config):
            left, begin = int(np.prod(shape)), int(random.integers(POOL))
            # As wide as keeps a row of outputs at the size of a row of inputs; vectors stay close to their mean.
            width = 1.0 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.1
            while left > 0:
                part = pool[begin : begin + left] * np.float32(width) + np.float32(mean)
                file.write(packed(part, dtype))
                left -= len(part)
                begin = 0
    return 8 + len(text) + at


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json of the 256 bytes, shown as byte-level BPE shows them, and of two spaces: BPE wants a merge."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    space = letters[ord(" ")]
    bytes_as_they_are = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": bytes_as_they_are,
        "post_processor": None,
        "decoder": bytes_as_they_are,
        "model": {"type": "BPE", "vocab": vocabulary | {space + space: 256}, "merges": [f"{space} {space}"]},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write it; created")
    parser.add_argument("--like", choices=sorted(MODELS), required=True)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--layers", type=int, help="fewer layers than the named model has")
    parser.add_argument("--vocab-size", type=int, help="a smaller vocabulary")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("layers", "vocab_size"):
        value = getattr(args, name)
        least = 257 if name == "vocab_size" else 1
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    config = config_of(args.like, args.dtype, args.layers, args.vocab_size)
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (args.folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()) + "\n")
    size = write_tensors(args.folder / "model.safetensors", config, args.dtype, args.seed)
    print(f"{args.folder}: {config['num_hidden_layers']} layers, {args.dtype}, {size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
