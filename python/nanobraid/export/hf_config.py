"""What a Hugging Face `config.json` says, as metadata keys of a `.braid` file.

Every entry of the configuration is either mapped, known to change no result, or refused by name: an export never drops
a fact in silence. The keys are those that the families read (see ARCHITECTURE.md). Names of entries: transformers'
configuration classes of the four architectures, in the spelling of its versions 4 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from nanobraid.errors import FormatError, UnsupportedError

Config = dict[str, Any]
MetadataValue = Any  # bool | int | float | str | list of one of them


ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

# Whether a family's q, k and v have biases when the configuration does not say.
_ALWAYS_QKV_BIAS = {"qwen2"}
# The window holds only where the configuration says so; elsewhere a window given is a window used.
_WINDOW_NEEDS_SWITCH = {"qwen2", "qwen3"}
# Defaults of transformers' classes for entries that older files leave out; where a family is not listed, they must be
# there. The defaults have changed between versions, so a guess could be wrong.
_DEFAULT_THETA = {"llama": 10000.0}
_DEFAULT_WINDOW = {"mistral": 4096}
_DEFAULT_EPS = 1e-6
_DEFAULT_HEAD_DIM = {"qwen3": 128}

# Entries that change no result of a forward pass: history, training, generation, storage, transformers' own switches.
_WITHOUT_EFFECT = {
    "add_cross_attention",
    "architectures", "attention_dropout", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "hidden_dropout", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "is_llama_config",
    "label2id", "length_penalty", "mask_token_id",
    "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "rope_interleaved", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache", "use_mrope",
}  # fmt: skip
# Of the former, those that would change results with other values than these.
_MUST_BE = {"rope_interleaved": (False,), "use_mrope": (False,), "is_encoder_decoder": (False,), "pruned_heads": ({},),
            "add_cross_attention": (False,), "is_decoder": (False, True)}  # fmt: skip

_MAPPED = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "tie_word_embeddings", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types", "partial_rotary_factor", "quantization_config",
    "use_qkv_bias", "qkv_bias",
}  # fmt: skip


class _Facts:
    """Typed reading of a configuration; errors name the file and the entry."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self._config.get(key) is not None  # null means what a missing entry means

    def names(self, key: str) -> bool:
        """The entry is there, be it null."""
        return key in self._config

    def raw(self, key: str) -> Any:
        return self._config.get(key)

    def integer(self, key: str, missing: int | None = None) -> int:
        value = self._get(key, missing)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise FormatError(f"{self.where}: {key} = {value!r}, expected a whole number from 0 to 2147483647")
        return value

    def real(self, key: str, missing: float | None = None) -> float:
        value = self._get(key, missing)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise FormatError(f"{self.where}: {key} = {value!r}, expected a finite number")
        return float(value)

    def boolean(self, key: str, missing: bool) -> bool:
        value = self._get(key, missing)
        if not isinstance(value, bool):
            raise FormatError(f"{self.where}: {key} = {value!r}, expected true or false")
        return value

    def refuse(self, key: str, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self.where}: {key} = {self._config.get(key)!r}: {why}")

    def _get(self, key: str, missing: Any) -> Any:
        value = self._config.get(key)
        if value is None:
            value = missing
        if value is None:
            raise FormatError(f"{self.where}: entry {key} is missing")
        return value


def architecture_of(config: Config, where: str) -> str:
    """The value of `general.architecture` for a configuration.

    Raises:
        UnsupportedError: Naming the architecture and those there are.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise FormatError(f"{where}: architectures = {names!r}, expected a list of one name")
    if names[0] not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedError(f"{where}: architecture {names[0]!r} is not offered; there are: {known}")
    architecture = ARCHITECTURES[names[0]]
    model_type = config.get("model_type", architecture)
    if model_type != architecture:
        raise UnsupportedError(f"{where}: model_type = {model_type!r} with architecture {names[0]!r} is not offered")
    return architecture


def read_hf_config(config: Config, where: str) -> dict[str, MetadataValue]:
    """Maps a configuration to metadata keys.

    Args:
        config: The object in `config.json`.
        where: The file's path, for messages.

    Raises:
        FormatError: An entry is missing or of the wrong type.
        UnsupportedError: An entry says something that the engine does not do, or that is not known here.
    """
    architecture = architecture_of(config, where)
    facts = _Facts(config, where)
    _refuse_unknown(config, facts)
    heads = facts.integer("num_attention_heads")
    hidden = facts.integer("hidden_size")
    if heads == 0:
        raise FormatError(f"{where}: num_attention_heads is 0")
    head_dim = facts.integer("head_dim", _DEFAULT_HEAD_DIM.get(architecture, hidden // heads))
    facts_of_file: dict[str, MetadataValue] = {
        "block_count": facts.integer("num_hidden_layers"),
        "context_length": facts.integer("max_position_embeddings"),
        "embedding_length": hidden,
        "feed_forward_length": facts.integer("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": _kv_heads(facts, architecture, heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": facts.real("rms_norm_eps", _DEFAULT_EPS),
        "vocab_size": facts.integer("vocab_size"),
        "rope.dimension_count": head_dim,
        **_rope(facts, architecture),
    }
    window = _sliding_window(facts, architecture)
    if window:
        facts_of_file["attention.sliding_window"] = window
    out: dict[str, MetadataValue] = {"general.architecture": architecture}
    out.update((f"{architecture}.{key}", value) for key, value in facts_of_file.items())
    return out


def _kv_heads(facts: _Facts, architecture: str, heads: int) -> int:
    # null means a KV head per head in every family; an entry that is not there does so for Llama only.
    return facts.integer(
        "num_key_value_heads", heads if facts.names("num_key_value_heads") or architecture == "llama" else None
    )


def has_qkv_bias(config: Config, architecture: str) -> bool:
    """Whether q, k and v must have biases."""
    return architecture in _ALWAYS_QKV_BIAS or bool(config.get("attention_bias"))


def ties_embeddings(config: Config, where: str) -> bool:
    """Whether the head is the embedding. A missing entry means no, as in transformers' classes of these families."""
    return _Facts(config, where).boolean("tie_word_embeddings", False)


def _refuse_unknown(config: Config, facts: _Facts) -> None:
    for key, value in config.items():
        is_private = key.startswith("_")  # transformers' own notes, never facts of a model
        if key not in _MAPPED and key not in _WITHOUT_EFFECT and not is_private and value is not None:
            raise facts.refuse(key, "this entry says something about the model that nanobraid does not know")
        if key in _MUST_BE and value is not None and value not in _MUST_BE[key]:
            raise facts.refuse(key, "this is not offered")
    architecture = ARCHITECTURES[config["architectures"][0]]
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "hidden_act": (lambda v: v in ("silu", "swish"), "this activation is not offered; there is silu"),
        "mlp_bias": (lambda v: v is False, "biases of the feed-forward matrices are not offered"),
        "partial_rotary_factor": (lambda v: v == 1, "rotation of a part of each head is not offered"),
        "attention_bias": (
            lambda v: v is False or (v is True and architecture == "qwen2"),
            "a bias of the attention output is not offered",
        ),
        "use_qkv_bias": (lambda v: v is (architecture == "qwen2"), "this is not offered"),
        "qkv_bias": (lambda v: v is (architecture == "qwen2"), "this is not offered"),
    }
    for key, (is_fine, why) in checks.items():
        if key in facts and not is_fine(facts.raw(key)):
            raise facts.refuse(key, why)


def _sliding_window(facts: _Facts, architecture: str) -> int:
    """Tokens of the window, 0 for none: for all layers alike, or refused."""
    types = _layer_types(facts)
    missing = 0 if facts.names("sliding_window") else _DEFAULT_WINDOW.get(architecture, 0)
    window = facts.integer("sliding_window", missing)
    if architecture == "llama" and window:
        raise facts.refuse("sliding_window", "transformers' Llama has no window")
    if architecture not in _WINDOW_NEEDS_SWITCH:
        if "use_sliding_window" in facts and facts.boolean("use_sliding_window", False) != (window > 0):
            raise facts.refuse("use_sliding_window", f"transformers' {architecture} has no such switch")
        if window and types == {"full_attention"}:
            raise facts.refuse("layer_types", f"sliding_window = {window} says otherwise")
        return window
    if not facts.boolean("use_sliding_window", False):
        return 0
    if not facts.names("sliding_window"):
        raise FormatError(f"{facts.where}: entry sliding_window is missing")
    if types:
        return window if types == {"sliding_attention"} else 0
    full, layers = facts.integer("max_window_layers", 28), facts.integer("num_hidden_layers")
    if window and 0 < full < layers:  # the first layers see everything
        raise facts.refuse("max_window_layers", "layers that differ in attention are not offered")
    return window if full == 0 else 0


def _layer_types(facts: _Facts) -> set[str]:
    """The one kind of attention that every layer has; empty if the configuration does not say."""
    types = facts.raw("layer_types")
    if types is None:
        return set()
    if not isinstance(types, list) or not all(isinstance(name, str) for name in types):
        raise FormatError(f"{facts.where}: layer_types = {types!r}, expected a list of names")
    strange = sorted(set(types) - {"full_attention", "sliding_attention"})
    if strange:
        raise UnsupportedError(f"{facts.where}: layer_types names {strange[0]!r}, which is not offered")
    if len(types) != facts.integer("num_hidden_layers"):
        raise FormatError(f"{facts.where}: layer_types has {len(types)} entries for the layers there are")
    if len(set(types)) > 1:
        raise facts.refuse("layer_types", "layers that differ in attention are not offered")
    return set(types)


def _rope(facts: _Facts, architecture: str) -> dict[str, MetadataValue]:
    old, new = facts.raw("rope_scaling"), facts.raw("rope_parameters")
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, dict):
            raise FormatError(f"{facts.where}: {key} = {value!r}, expected an object or null")
    if old is not None and new is not None and old != new:
        raise facts.refuse("rope_scaling", "rope_parameters says something else")
    key = "rope_parameters" if new is not None else "rope_scaling"
    scaling = _Facts(new or old or {}, f"{facts.where}: {key}")
    theta = (
        scaling.real("rope_theta")
        if "rope_theta" in scaling
        else (facts.real("rope_theta", _DEFAULT_THETA.get(architecture)))
    )
    if "rope_theta" in facts and facts.real("rope_theta") != theta:
        raise facts.refuse("rope_theta", f"{key} says {theta}")
    if "partial_rotary_factor" in scaling and scaling.real("partial_rotary_factor") != 1.0:
        raise scaling.refuse("partial_rotary_factor", "rotation of a part of each head is not offered")
    kind = scaling.raw("rope_type") or scaling.raw("type") or "default"
    out: dict[str, MetadataValue] = {"rope.freq_base": theta}
    mapped = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind != "default":
        if kind not in ("linear", "llama3", "yarn"):
            raise UnsupportedError(
                f"{scaling.where}: RoPE type {kind!r} is not offered; there are default, linear, llama3 and yarn"
            )
        out["rope.scaling.type"] = kind
        out["rope.scaling.factor"] = scaling.real("factor")
        mapped.add("factor")
    original = "original_max_position_embeddings"
    if kind == "llama3":
        out["rope.scaling.original_context_length"] = scaling.integer(original)
        out["rope.scaling.low_freq_factor"] = scaling.real("low_freq_factor")
        out["rope.scaling.high_freq_factor"] = scaling.real("high_freq_factor")
        mapped |= {original, "low_freq_factor", "high_freq_factor"}
    if kind == "yarn":
        out.update(_yarn(scaling, facts))
        mapped |= {original, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    for name in new or old or {}:
        if name not in mapped and scaling.raw(name) is not None:
            raise scaling.refuse(name, f"this entry is not known with RoPE type {kind!r}")
    return out


def _yarn(scaling: _Facts, facts: _Facts) -> dict[str, MetadataValue]:
    out: dict[str, MetadataValue] = {
        "rope.scaling.original_context_length": scaling.integer(
            "original_max_position_embeddings", facts.integer("max_position_embeddings")
        ),
        "rope.scaling.yarn_beta_fast": scaling.real("beta_fast", 32.0),
        "rope.scaling.yarn_beta_slow": scaling.real("beta_slow", 1.0),
        "rope.scaling.truncate": scaling.boolean("truncate", True),
    }
    if "attention_factor" in scaling:
        out["rope.scaling.attn_factor"] = scaling.real("attention_factor")
    elif scaling.raw("mscale") and scaling.raw("mscale_all_dim"):
        factor = scaling.real("factor")

        def magnitude(mscale: float) -> float:
            return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0

        out["rope.scaling.attn_factor"] = magnitude(scaling.real("mscale")) / magnitude(scaling.real("mscale_all_dim"))
    return out
