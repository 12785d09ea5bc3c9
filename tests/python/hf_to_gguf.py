"""Writes a transformers model of an offered family as a GGUF file in float32, for tests against transformers.

Follows the published conventions of GGUF files: names of tensors and keys, Q and K rows of the llama architecture with
the halves of each rotary head interleaved, llama3 scaling as the tensor rope_freqs.weight. The vocabulary is made up:
the 256 bytes and as many pairs of them as the model has rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

LAYER_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.bias`` -> ``blk.3.attn_q.bias``."""
    if name in TENSORS:
        return TENSORS[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    if rest not in LAYER_TENSORS:
        stem, kind = rest.rsplit(".", 1)
        return f"blk.{layer}.{LAYER_TENSORS[stem]}.{kind}"
    return f"blk.{layer}.{LAYER_TENSORS[rest]}"


def interleave(rows: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Half-split rows (heads, 2, pairs) to interleaved ones (heads, pairs, 2)."""
    split = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def byte_alphabet() -> list[str]:
    """GPT-2's spelling of the 256 bytes, in the order of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]


def add_vocabulary(writer: Any, vocab_size: int) -> None:
    alphabet = byte_alphabet()
    pairs = [(a, b) for a in "etaoinshrdlu" for b in "etaoinshrdlu"][: vocab_size - len(alphabet)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*alphabet, *(a + b for a, b in pairs)])
    writer.add_token_merges([f"{a} {b}" for a, b in pairs])
    writer.add_add_bos_token(False)


def add_rope(writer: Any, architecture: str, config: Any, *, divisors: bool) -> None:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    prefix = f"{architecture}.rope.scaling."
    if kind == "llama3" and divisors:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        head_dim = config.head_dim
        plain = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        writer.add_tensor("rope_freqs.weight", (plain / scaled.double().numpy()).astype(np.float32))
        return
    if kind == "default":
        return
    writer.add_string(prefix + "type", kind)
    writer.add_float32(prefix + "factor", rope["factor"])
    if kind in ("llama3", "yarn"):
        writer.add_uint32(prefix + "original_context_length", rope["original_max_position_embeddings"])
    for key, name in {
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
        "attention_factor": "yarn_attn_factor",
    }.items():
        if rope.get(key) is not None:
            writer.add_float32(prefix + name, rope[key])
    if "truncate" in rope:
        writer.add_bool(prefix + "truncate", rope["truncate"])


def write_gguf(model: Any, path: Path, *, architecture: str | None = None, divisors: bool = False) -> Path:
    """Writes `model`, a transformers causal language model.

    Args:
        model: The model; all of its parameters are written.
        path: The file.
        architecture: Name in the file; by default that of the model. ``llama`` interleaves Q and K rows.
        divisors: Write llama3 scaling as the tensor ``rope_freqs.weight`` instead of as keys.
    """
    config = model.config
    architecture = architecture or config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("seeded " + config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    add_rope(writer, architecture, config, divisors=divisors)
    add_vocabulary(writer, config.vocab_size)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.detach().float().numpy()
        projection = name.split(".")[-2]
        if architecture == "llama" and projection in heads:
            values = interleave(values, heads[projection])
        writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
