"""The independent oracle of the evaluation scripts: transformers in float32 on a Hugging Face folder or GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Oracle:
    """A model run by transformers on CPU in float32.

    transformers reads weights and the plain facts of a GGUF file, but neither RoPE scaling nor sliding windows nor a
    head_dim of its own. These are added here from the file's metadata; what cannot be added is refused.

    Args:
        path: A GGUF file (dequantized by transformers) or a Hugging Face folder.

    Raises:
        SystemExit: transformers cannot stand in for this file; the message says why.
    """

    def __init__(self, path: str | Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self._torch = torch
        path = Path(path)
        if path.is_dir():
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        elif path.suffix == ".gguf":
            source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
            config = AutoConfig.from_pretrained(**source)
            divisors = add_facts(config, path)
            self.model = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=torch.float32).eval()
            if divisors is not None:
                self.model.model.rotary_emb.inv_freq /= torch.from_numpy(divisors)
        else:
            raise SystemExit(f"{path}: the oracle takes a Hugging Face folder or a GGUF file; give one with --oracle")

    def logits(self, token_ids: list[int]) -> NDArray[np.float32]:
        """float32[T, vocab_size]: row i predicts token i + 1."""
        with self._torch.inference_mode():
            output = self.model(self._torch.tensor([token_ids]))
        return np.asarray(output.logits[0].numpy(), dtype=np.float32)

    def greedy(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """The `num_tokens` most likely continuations, one after another; does not stop at any token."""
        with self._torch.inference_mode():
            past = None
            inputs = self._torch.tensor([token_ids])
            out: list[int] = []
            for _ in range(num_tokens):
                step = self.model(inputs, past_key_values=past, use_cache=True)
                past = step.past_key_values
                token = int(step.logits[0, -1].argmax())
                out.append(token)
                inputs = self._torch.tensor([[token]])
        return out


def source_of(model: str) -> Path:
    """What the oracle opens for a model that nanobraid runs, where nothing else is given: the same folder or file."""
    from nanobraid.models import resolve

    return Path(model) if Path(model).is_dir() else resolve(model)


def add_facts(config: Any, path: Path) -> NDArray[np.float32] | None:
    """Adds to `config` what transformers leaves out of a GGUF file; returns divisors of the frequencies, if any."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    facts = {
        name.removeprefix(f"{architecture}."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(f"{architecture}.")
    }
    if "attention.key_length" in facts:
        config.head_dim = facts["attention.key_length"]
    window = facts.get("attention.sliding_window", 0)
    if window and not hasattr(config, "sliding_window"):
        raise SystemExit(
            f"{path}: {architecture}.attention.sliding_window = {window}, which transformers' {config.model_type} "
            "ignores; give the model's Hugging Face folder with --oracle"
        )
    if hasattr(config, "sliding_window"):
        config.sliding_window = window or None
        config.use_sliding_window = bool(window)
        config.layer_types = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    kind = facts.get("rope.scaling.type", "none")
    if kind != "none":
        names = {
            "factor": "factor",
            "original_context_length": "original_max_position_embeddings",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
            "yarn_attn_factor": "attention_factor",
            "truncate": "truncate",
        }
        scaling = {new: facts[f"rope.scaling.{old}"] for old, new in names.items() if f"rope.scaling.{old}" in facts}
        config.rope_parameters = {**config.rope_parameters, **scaling, "rope_type": kind}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            return np.array(tensor.data, dtype=np.float32)
    return None
