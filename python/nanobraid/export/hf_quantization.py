"""What `quantization_config` of a `config.json` or a `quantize_config.json` says, and which tensors hold a matrix.

Offered are AWQ (GEMM version), GPTQ and 8-bit floats (E4M3, a scale for a tensor or for each row), whose weights are
taken over as they are. Every entry is read, known to change no result, or refused by name. Names of entries: AutoAWQ,
AutoGPTQ and GPTQModel, compressed-tensors, and transformers' classes for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanobraid.errors import FormatError, UnsupportedError

KEY = "quantization_config"
BESIDE = "quantize_config.json"  # of AutoGPTQ and GPTQModel: the same entries, in a file of their own
GROUP_SIZES = (32, 64, 128)
Part = tuple[int, str]  # index of the file, name in it
Matrix = tuple[str, str, int, dict[str, Part]]

# Entries that change no result: how the codes were found, and which kernels someone prefers.
_AWQ_NEUTRAL = {"backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse"}
_GPTQ_NEUTRAL = {
    "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment", "damp_percent",
    "dataset", "disable_exllama", "exllama_config", "hyb_act", "lm_head", "max_input_length", "meta",
    "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "mse", "pad_token_id", "static_groups", "sym", "tokenizer", "true_sequential",
    "use_cuda_fp16", "use_exllama",
}  # fmt: skip
_TENSORS_NEUTRAL = {"global_compression_ratio", "ignore", "quantization_status", "version"}
# How the words are read: files that say different things of these are refused.
_OF_WORDS = (
    "quant_method", "bits", "group_size", "desc_act", "sym", "zero_point", "version", "checkpoint_format",
    "is_marlin_format", "pack_dtype",
)  # fmt: skip
_FP8_NEUTRAL = {"activation_scheme", "fmt", "ignored_layers", "modules_to_not_convert"}


@dataclass(frozen=True)
class Quantization:
    """How the matrices of a checkpoint are packed.

    Attributes:
        method: "awq", "gptq" or "fp8".
        scheme: The core's name: with the version of GPTQ's zero points.
        group_size: Columns that share a scale; 0 for fp8.
        needs_order: The columns are in an order of their own, so each matrix must say which.
    """

    method: str
    scheme: str
    group_size: int = 0
    needs_order: bool = False

    def parts(self, stem: str, dtypes: Mapping[str, str]) -> dict[str, str]:
        """Names of the tensors that hold a matrix, by part; empty if it is not quantized.

        Args:
            stem: The stored name without ".weight".
            dtypes: Of the stored tensors.

        Raises:
            FormatError: A part is missing, or the matrix is there twice.
        """
        if self.method == "fp8":
            names = {"codes": f"{stem}.weight", "scales": f"{stem}.weight_scale"}
            if not dtypes.get(names["codes"], "").startswith("F8_"):
                return {}
            return self._all_there(names, dtypes)
        names = {"codes": f"{stem}.qweight", "scales": f"{stem}.scales", "zeros": f"{stem}.qzeros"}
        if names["codes"] not in dtypes:
            return {}
        if f"{stem}.weight" in dtypes:
            raise FormatError(f"there are both {stem}.qweight and {stem}.weight")
        if self.method == "gptq" and (self.needs_order or f"{stem}.g_idx" in dtypes):
            names["groups"] = f"{stem}.g_idx"
        return self._all_there(names, dtypes)

    @staticmethod
    def _all_there(names: dict[str, str], dtypes: Mapping[str, str]) -> dict[str, str]:
        for name in names.values():
            if name not in dtypes:
                raise FormatError(f"tensor {name} is missing")
        return names


def read_quantization(
    config: Mapping[str, Any], where: str, beside: Mapping[str, Any] | None = None, beside_where: str = ""
) -> Quantization | None:
    """Reads the entry of a configuration; None if there is none.

    Args:
        config: The object in `config.json`.
        where: The file's path, for messages.
        beside: The object in `quantize_config.json`, whose entries count where the other has none.
        beside_where: Its path.

    Raises:
        FormatError: The entry is no object, misses what it needs, or the two files contradict each other.
        UnsupportedError: Naming what is not offered.
    """
    entry = config.get(KEY)
    if entry is None and beside is None:
        return None
    if entry is not None and not isinstance(entry, dict):
        raise FormatError(f"{where}: {KEY} = {entry!r}, expected an object or null")
    if entry is None:
        # Older versions of AutoGPTQ do not say the method: there was no other.
        facts = _Facts({"quant_method": "gptq", **_stated(beside or {})}, beside_where, "")
    else:
        facts = _Facts(entry, where)
        if beside is not None:
            facts = _both(facts, _Facts(beside, beside_where, ""))
    readers = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors, "fp8": _fp8}
    method = facts.get("quant_method")
    if not isinstance(method, str) or method not in readers:
        raise facts.refuse("quant_method", f"there are {', '.join(readers)}")
    return readers[method](facts)


def _stated(entries: Mapping[str, Any]) -> dict[str, Any]:
    """What is not null."""
    return {key: value for key, value in entries.items() if value is not None}


def _both(facts: _Facts, beside: _Facts) -> _Facts:
    """The entries of both files."""
    for key in _OF_WORDS:
        (theirs, ours), (name, value) = facts.format_entry(key), beside.format_entry(key)
        if None not in (ours, value) and repr(ours).lower() != repr(value).lower():
            said = f"{facts.name_of(theirs)} = {ours!r}, but {beside.name_of(name)} = {value!r}"
            raise FormatError(f"{said}: one of the two files is wrong")
    if None not in (facts.get("meta"), beside.get("meta")) and _made_by_gptqmodel(facts) != _made_by_gptqmodel(beside):
        both = f"{facts.name_of('meta')} and {beside.name_of('meta')}"
        raise FormatError(f"{both} name different quantizers: one of the two files is wrong")
    return facts.with_missing_of(beside)


class _Facts:
    """Entries of one object, and what another one adds to them; errors name the object and the entry."""

    def __init__(
        self, entries: Mapping[str, Any], where: str, path: str = KEY, added: dict[str, _Facts] | None = None
    ) -> None:
        self._entries = entries
        self.where = where
        self.path = path
        self._added = added or {}

    def name_of(self, key: str) -> str:
        if key in self._added:
            return self._added[key].name_of(key)
        return f"{self.where}: {self.path}.{key}" if self.path else f"{self.where}: {key}"

    def format_entry(self, key: str) -> tuple[str, Any]:
        """Name and value of an entry; `checkpoint_format` is called `format`, too."""
        if key == "checkpoint_format" and self.get(key) is None:
            key = "format"
        return key, self.get(key)

    def with_missing_of(self, other: _Facts) -> _Facts:
        own = _stated(self._entries)
        more = {key: value for key, value in _stated(other._entries).items() if key not in own}
        return _Facts({**own, **more}, self.where, self.path, dict.fromkeys(more, other))

    def get(self, key: str, missing: Any = None) -> Any:
        value = self._entries.get(key)
        return missing if value is None else value

    def refuse(self, key: str, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self.name_of(key)} = {self._entries.get(key)!r} is not offered: {why}")

    def expect(self, key: str, allowed: tuple[Any, ...], missing: Any = None) -> Any:
        value = self.get(key, missing)
        if not any(value is one or (type(value) is type(one) and value == one) for one in allowed):
            raise self.refuse(key, f"there is {' or '.join(map(repr, allowed))}")
        return value

    def inner(self, key: str) -> _Facts:
        value = self.get(key)
        if not isinstance(value, dict):
            raise FormatError(f"{self.name_of(key)} = {value!r}, expected an object")
        return _Facts(value, self.where, f"{self.path}.{key}" if self.path else key)

    def only(self, known: set[str]) -> None:
        for key, value in self._entries.items():
            if key not in known and value not in (None, {}, []):
                raise self.refuse(key, "this entry is not known")


def _awq(facts: _Facts) -> Quantization:
    facts.only(_AWQ_NEUTRAL | {"bits", "group_size", "modules_to_not_convert", "quant_method", "version", "zero_point"})
    facts.expect("bits", (4,))
    version = facts.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise facts.refuse("version", "there is 'gemm'")
    facts.expect("zero_point", (True,), True)
    return Quantization("awq", "awq", facts.expect("group_size", GROUP_SIZES))


def _gptq(facts: _Facts) -> Quantization:
    facts.only(_GPTQ_NEUTRAL | {"bits", "checkpoint_format", "desc_act", "format", "group_size", "is_marlin_format",
                                "pack_dtype", "quant_method"})  # fmt: skip
    facts.expect("bits", (4,))
    facts.expect("is_marlin_format", (False,), False)
    facts.expect("pack_dtype", ("int32",), "int32")
    desc_act = facts.expect("desc_act", (False, True), False)
    group_size = facts.expect("group_size", GROUP_SIZES)
    key, _ = facts.format_entry("checkpoint_format")
    scheme = facts.expect(key, ("gptq", "gptq_v2"), "gptq")
    if facts.get("format") not in (None, scheme):
        raise facts.refuse("format", f"checkpoint_format is {scheme!r}")
    if scheme == "gptq" and _made_by_gptqmodel(facts):
        scheme = "gptq_carried"
    return Quantization("gptq", scheme, group_size, desc_act)


def _made_by_gptqmodel(facts: _Facts) -> bool:
    """Such files have their first version's zero points made from those of the second, a word at a time."""
    meta = facts.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, dict) else None
    if isinstance(makers, str):
        makers = [makers]
    return isinstance(makers, list) and any(isinstance(name, str) and name.startswith("gptqmodel") for name in makers)


def _compressed_tensors(facts: _Facts) -> Quantization:
    facts.only(_TENSORS_NEUTRAL | {"config_groups", "format", "kv_cache_scheme", "quant_method", "sparsity_config"})
    facts.expect("format", ("float-quantized", "naive-quantized"))
    if facts.get("sparsity_config"):
        sparsity = facts.inner("sparsity_config")
        sparsity.expect("format", ("dense",), "dense")
    if facts.get("kv_cache_scheme") is not None:
        raise facts.refuse("kv_cache_scheme", "keys and values are stored as kv_dtype says")
    groups = facts.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise FormatError(f"{facts.name_of('config_groups')} = {groups!r}, expected an object with entries")
    for name in groups:
        group = facts.inner("config_groups").inner(name)
        group.only({"format", "input_activations", "output_activations", "targets", "weights"})
        if group.get("output_activations") is not None:
            raise group.refuse("output_activations", "outputs are not quantized")
        group.expect("format", ("float-quantized", "naive-quantized"), "float-quantized")
        weights = group.inner("weights")
        weights.expect("num_bits", (8,))
        weights.expect("type", ("float",))
        weights.expect("strategy", ("tensor", "channel"))
        weights.expect("symmetric", (True,), True)
        weights.expect("dynamic", (False,), False)
        weights.expect("actorder", (None,))
        weights.expect("block_structure", (None,))
    return Quantization("fp8", "fp8")


def _fp8(facts: _Facts) -> Quantization:
    facts.only(_FP8_NEUTRAL | {"kv_cache_scheme", "quant_method", "weight_block_size"})
    facts.expect("fmt", ("e4m3",), "e4m3")
    facts.expect("activation_scheme", ("dynamic", "static"), "dynamic")
    if facts.get("weight_block_size") is not None:
        raise facts.refuse("weight_block_size", "there is one scale for a tensor or one for each row")
    if facts.get("kv_cache_scheme") is not None:
        raise facts.refuse("kv_cache_scheme", "keys and values are stored as kv_dtype says")
    return Quantization("fp8", "fp8")
