"""The default model, shortened, as a quantized Hugging Face folder and as a plain one of the same values."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantized_hf import Scheme, quantized
from tiny_hf import config_of, write_folder

from nanobraid._core import ModelFile
from nanobraid.export import export_model, hf_folder

#: Of 30: enough to see, and tests that end soon.
NUM_LAYERS = 6


def write_default(folder: Path, model_path: Path, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes the folders ``hf``, quantized, and ``plain``, in float32. Neither has a tokenizer of its own: as long as
    `monkeypatch` lasts, all folders have the default model's."""
    source = ModelFile(str(model_path))
    facts = source.metadata()
    config = config_of("llama", tie_word_embeddings=True, **{
        ours: facts[f"llama.{theirs}"] for ours, theirs in {
            "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
            "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv", "max_position_embeddings": "context_length",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}.items()},
        vocab_size=source.read_rows("token_embd.weight").shape[0])  # fmt: skip
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    config["num_hidden_layers"] = NUM_LAYERS
    export_model(model_path, folder / "source.braid", "keep")  # rows in the order of Hugging Face folders
    file = ModelFile(str(folder / "source.braid"))
    tensors = {}
    for stored, ours in hf_folder._names(config, "config.json").items():
        values = file.read_rows(ours)
        tensors[stored] = values if values.shape[0] > 1 else values.reshape(-1)
    tokenizer = {key: value for key, value in facts.items() if key.startswith("tokenizer.")}
    monkeypatch.setattr(hf_folder, "_tokenizer", lambda _: tokenizer)
    config, stored, plain = quantized(config, tensors, scheme)
    write_folder(folder / "hf", config, stored)
    write_folder(folder / "plain", {**config, "quantization_config": None}, plain)
