"""Seeded two-layer transformers models of every offered family, in which every fact of the family matters.

The weights are drawn wide enough that attention is not flat; biases and norms are far from 0 and 1. Windows and
original contexts are shorter than the prompts of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LONG_PROMPT = 300
CONTEXT = 512
VOCAB_SIZE = 320
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 45, "max_window_layers": 0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


def without_scaling(model: Any) -> Any:
    return build(model.config.model_type, like=model, rope_parameters={})


def without_window(model: Any) -> Any:
    return build(model.config.model_type, like=model, sliding_window=None, use_sliding_window=False)


def without_bias(model: Any) -> Any:
    other = build(model.config.model_type, like=model)
    for name, parameter in other.named_parameters():
        if name.endswith("_proj.bias"):
            parameter.data.zero_()
    return other


def without_qk_norm(model: Any) -> Any:
    import torch

    other = build(model.config.model_type, like=model)
    for layer in other.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    return other


def without_magnitude(model: Any) -> Any:
    scaling = model.config.rope_parameters | {"attention_factor": 1.0}
    return build(model.config.model_type, like=model, rope_parameters=scaling)


@dataclass(frozen=True)
class Family:
    """A kind of model: its transformers configuration, how its file is written, and what it must not be without."""

    name: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    file: dict[str, Any] = field(default_factory=dict)
    without: tuple[Callable[[Any], Any], ...] = ()


FAMILIES = [
    Family("llama-mha", "llama", {"num_key_value_heads": 4}),
    Family("llama-gqa", "llama", {"tie_word_embeddings": True}),
    Family("llama-mqa", "llama", {"num_key_value_heads": 1}),
    Family(
        "llama-linear", "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, {}, (without_scaling,)
    ),
    Family("llama3-keys", "llama", {"rope_parameters": LLAMA3}, {}, (without_scaling,)),
    Family("llama3-divisors", "llama", {"rope_parameters": LLAMA3}, {"divisors": True}, (without_scaling,)),
    Family("llama-yarn", "llama", {"rope_parameters": YARN}, {}, (without_scaling, without_magnitude)),
    Family(
        "llama-yarn-full",
        "llama",
        {"rope_parameters": YARN | {"beta_fast": 12.0, "beta_slow": 1.5, "truncate": False, "attention_factor": 1.4}},
        {},
        (without_scaling, without_magnitude),
    ),
    Family("mistral-as-llama", "mistral", {"sliding_window": 50}, {"architecture": "llama"}, (without_window,)),
    Family("mistral", "mistral", {"sliding_window": 70, "head_dim": 32}, {}, (without_window,)),
    Family("qwen2-tied", "qwen2", {"tie_word_embeddings": True}, {}, (without_bias,)),
    Family("qwen2-untied", "qwen2", {}, {}, (without_bias,)),
    Family("qwen2-yarn", "qwen2", {"rope_parameters": YARN}, {}, (without_bias, without_scaling)),
    Family("qwen2-window", "qwen2", WINDOW, {}, (without_bias, without_window)),
    Family("qwen3", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}, {}, (without_qk_norm,)),
    Family("qwen3-untied-yarn", "qwen3", {"rope_parameters": YARN}, {}, (without_qk_norm, without_scaling)),
]


def build(model_type: str, like: Any = None, **changes: Any) -> Any:
    """A model of `model_type` with seeded weights, or that of `like` with a configuration that differs in `changes`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    facts: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if like is not None:
        facts |= {key: getattr(like.config, key) for key in facts}
        facts["sliding_window"] = getattr(like.config, "sliding_window", None)
        facts["use_sliding_window"] = facts["sliding_window"] is not None
        facts["max_window_layers"] = 0
    facts |= changes
    facts["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0} | facts["rope_parameters"]
    config = AutoConfig.for_model(model_type, **facts)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    if like is not None:
        model.load_state_dict(like.state_dict())
        return model
    generator = torch.Generator().manual_seed(20)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1.0 + (0.5 if name.endswith(("q_norm.weight", "k_norm.weight")) else 0.1) * values
        elif name.endswith(".bias"):
            values *= 0.7
        elif "embed_tokens" not in name:
            values *= 1.5 / parameter.shape[-1] ** 0.5
        parameter.data.copy_(values)
    return model


def build_family(family: Family) -> Any:
    """The model of a row of FAMILIES."""
    return build(family.model_type, **family.config)
