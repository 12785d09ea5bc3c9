#!/usr/bin/env python3
"""Writes a random model of a known shape, for measuring speed where no weights can be had.

    python tools/make_random_model.py --like llama-3.2-1b --dtype bf16 OUT_FOLDER
    nanobraid export OUT_FOLDER OUT.braid
    python tools/make_random_model.py --like qwen2.5-0.5b --format gguf OUT.gguf
    llama-quantize OUT.gguf OUT-Q4_K_M.gguf Q4_K_M

A Hugging Face folder, or a GGUF file as llama.cpp's programs read it. Configuration and tensors are those of the named
model, so that every engine runs it as it would the real one; its tokenizer knows single bytes and a pair of spaces. The
same arguments give the same bytes, and both formats the same values. What it says means nothing, but no value is
special: a kernel takes as long as with real weights.
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
    "qwen2.5-0.5b": {
        "shape": (896, 4864, 24, 14, 2, 64, 151936, 32768, 1000000.0, 1e-6),
        "model_type": "qwen2",
        "tie_word_embeddings": True,
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


def rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """What reading `packed` gives back."""
    if dtype == "bf16":
        return (np.frombuffer(packed(values, dtype), np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(packed(values, dtype), np.float16 if dtype == "f16" else np.float32).astype(np.float32)


def values_of(config: dict[str, Any], seed: int) -> Iterator[tuple[str, Shape, Iterator[NDArray[np.float32]]]]:
    """Name, shape and values of every tensor, in pieces; a tensor's pieces are to be taken before the next tensor."""
    random = np.random.default_rng(seed)
    pool = random.standard_normal(POOL, dtype=np.float32)

    def pieces(shape: Shape, mean: float, begin: int) -> Iterator[NDArray[np.float32]]:
        # As wide as keeps a row of outputs at the size of a row of inputs; vectors stay close to their mean.
        width = 1.0 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.1
        left = int(np.prod(shape))
        while left > 0:
            part = pool[begin : begin + left] * np.float32(width) + np.float32(mean)
            yield part
            left -= len(part)
            begin = 0

    for name, shape, mean in tensors_of(config):
        yield name, shape, pieces(shape, mean, int(random.integers(POOL)))


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
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, pieces in values_of(config, seed):
            for part in pieces:
                file.write(packed(part, dtype))
    return 8 + len(text) + at


def byte_letters() -> list[str]:
    """The 256 bytes as byte-level BPE shows them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [letters[byte] for byte in range(256)]


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json of the 256 bytes and of two spaces: BPE wants a merge."""
    letters = byte_letters()
    vocabulary = {letter: byte for byte, letter in enumerate(letters)}
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


# ---- GGUF, version 3; source of the format: ggml's docs/gguf.md ----

GGUF_TYPES = {"f32": 0, "f16": 1, "bf16": 30}
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
SCALARS = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # kinds of tokens
ALIGNMENT = 32
GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` as GGUF files call it: ``blk.3.ffn_up.weight``."""
    stem, kind = name.rsplit(".", 1)
    if stem in GGUF_TENSORS:
        return f"{GGUF_TENSORS[stem]}.{kind}"
    layer, rest = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{GGUF_LAYER[rest]}.{kind}"


def interleave(rows: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of each head from (half, pair), as transformers has them, to (pair, half), as llama files have them."""
    heads = rows.reshape(num_heads, 2, -1, rows.shape[-1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def rope_divisors(config: dict[str, Any]) -> NDArray[np.float32]:
    """What llama3 scaling divides the frequency of each rotated pair by (Llama 3.1's published rule)."""
    rule, dim = config["rope_scaling"], config["head_dim"]
    turns = rule["original_max_position_embeddings"] / (2 * np.pi)
    turns = turns * config["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    low, high, factor = rule["low_freq_factor"], rule["high_freq_factor"], rule["factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors: NDArray[np.float32] = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return divisors


def gguf_metadata(config: dict[str, Any]) -> list[tuple[str, int, Any]]:
    """Key, type and value; a list for an array of that type."""
    kind = config["model_type"]
    letters = byte_letters()
    space = letters[ord(" ")]
    num_fillers = config["vocab_size"] - 257
    # Some token ends a text, or programs take one by its number.
    end = 257 if num_fillers > 0 else 256
    fillers = [f"<|filler_{i}|>" for i in range(num_fillers)]
    types = [NORMAL] * 257 + [CONTROL] * min(num_fillers, 1) + [UNUSED] * (num_fillers - 1)
    return [
        ("general.architecture", STRING, kind),
        ("general.name", STRING, "random " + kind),
        (f"{kind}.block_count", U32, config["num_hidden_layers"]),
        (f"{kind}.context_length", U32, config["max_position_embeddings"]),
        (f"{kind}.embedding_length", U32, config["hidden_size"]),
        (f"{kind}.feed_forward_length", U32, config["intermediate_size"]),
        (f"{kind}.attention.head_count", U32, config["num_attention_heads"]),
        (f"{kind}.attention.head_count_kv", U32, config["num_key_value_heads"]),
        (f"{kind}.attention.key_length", U32, config["head_dim"]),
        (f"{kind}.attention.value_length", U32, config["head_dim"]),
        (f"{kind}.attention.layer_norm_rms_epsilon", F32, config["rms_norm_eps"]),
        (f"{kind}.rope.dimension_count", U32, config["head_dim"]),
        (f"{kind}.rope.freq_base", F32, config["rope_theta"]),
        (f"{kind}.vocab_size", U32, config["vocab_size"]),
        ("tokenizer.ggml.model", STRING, "gpt2"),
        ("tokenizer.ggml.pre", STRING, "gpt-2"),
        ("tokenizer.ggml.tokens", STRING, [*letters, space + space, *fillers]),
        ("tokenizer.ggml.token_type", I32, types),
        ("tokenizer.ggml.merges", STRING, [f"{space} {space}"]),
        ("tokenizer.ggml.eos_token_id", U32, end),
        ("tokenizer.ggml.add_bos_token", BOOL, False),
    ]


def gguf_value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        data = str(value).encode()
        return struct.pack("<Q", len(data)) + data
    return struct.pack(SCALARS[kind], value)


def write_gguf(path: Path, config: dict[str, Any], dtype: str, seed: int) -> int:
    """Writes the model as one file; vectors are f32 with the values that `dtype` leaves. Returns its size in bytes."""
    metadata = gguf_metadata(config)
    parts = []
    for key, kind, value in metadata:
        items = value if isinstance(value, list) else [value]
        array = struct.pack("<IIQ", ARRAY, kind, len(items)) if isinstance(value, list) else struct.pack("<I", kind)
        parts += [gguf_value(STRING, key), array, *(gguf_value(kind, item) for item in items)]
    divisors = rope_divisors(config) if "rope_scaling" in config else None
    tensors = [(gguf_name(name), shape) for name, shape, _ in tensors_of(config)]
    if divisors is not None:
        tensors.append(("rope_freqs.weight", divisors.shape))
    at = 0
    for name, shape in tensors:
        stored = dtype if len(shape) == 2 else "f32"
        parts += [gguf_value(STRING, name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        parts.append(struct.pack("<IQ", GGUF_TYPES[stored], at))
        size = int(np.prod(shape)) * DTYPES[stored][2]
        at += size + -size % ALIGNMENT
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join(parts)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    with path.open("wb") as file:

        def aligned(data: bytes = b"") -> None:
            file.write(data)
            file.write(b"\0" * (-file.tell() % ALIGNMENT))

        aligned(header)
        for name, shape, pieces in values_of(config, seed):
            projection = name.split(".")[-2]
            if len(shape) == 1:
                aligned(rounded(np.concatenate(list(pieces)), dtype).tobytes())
            elif config["model_type"] == "llama" and projection in heads:
                rows = np.concatenate(list(pieces)).reshape(shape)
                aligned(packed(interleave(rows, heads[projection]), dtype))
            else:
                for part in pieces:
                    file.write(packed(part, dtype))
                aligned()
        if divisors is not None:
            aligned(divisors.tobytes())
        return file.tell()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="where to write it: a folder, which is created, or a GGUF file")
    parser.add_argument("--like", choices=sorted(MODELS), required=True)
    parser.add_argument("--format", choices=("hf", "gguf"), default="hf", help="Hugging Face folder (default) or GGUF")
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
    if args.format == "gguf":
        size = write_gguf(args.path, config, args.dtype, args.seed)
    else:
        args.path.mkdir(parents=True, exist_ok=True)
        (args.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (args.path / "tokenizer.json").write_text(json.dumps(byte_tokenizer()) + "\n")
        size = write_tensors(args.path / "model.safetensors", config, args.dtype, args.seed)
    print(f"{args.path}: {config['num_hidden_layers']} layers, {args.dtype}, {size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
