"""Hugging Face folders: `config.json` and safetensors, sharded or not, opened as one model file.

Which tensors there must be follows from the configuration; one too many or too few is an error that names it. Pickled
checkpoints are refused: reading them would run code from the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanobraid import _core
from nanobraid.errors import FormatError, ModelIOError, UnsupportedError, core_errors
from nanobraid.export.hf_config import (
    MetadataValue,
    architecture_of,
    has_qkv_bias,
    read_hf_config,
    ties_embeddings,
)
from nanobraid.export.hf_quantization import BESIDE, KEY, Matrix, Quantization, read_quantization
from nanobraid.export.hf_tokenizer import TOKENIZER_FILES, has_hf_tokenizer, read_hf_tokenizer
from nanobraid.export.json_file import read_json

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_LAYERS = 4096
_AUTOGPTQ_FILES = "gptq_model-*.safetensors"  # what it calls the weights if nobody says a name
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_PARTS = ("vocab.json", "merges.txt", "tokenizer_config.json")

# Buffers of older versions that follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "attn.bias", "attn.masked_bias")

_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_BIASES = {f"self_attn.{x}_proj.bias": f"attn_{x}.bias" for x in "qkv"}
_QK_NORMS = {f"self_attn.{x}_norm.weight": f"attn_{x}_norm.weight" for x in "qk"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def is_hf_folder(path: Path) -> bool:
    """A folder is taken for a Hugging Face checkpoint; what it lacks is then said by name."""
    return path.is_dir()


def open_hf_folder(folder: Path) -> _core.ModelFile:
    """Opens a folder without reading its tensors.

    Args:
        folder: With `config.json`, `model.safetensors` or its shards and index, and the tokenizer's files.

    Returns:
        The model under our names, with our metadata.

    Raises:
        ModelIOError: A file is missing or cannot be read.
        FormatError: A file is damaged, or tensors are missing.
        UnsupportedError: Something that the engine does not do, or tensors that are no part of the model.
    """
    config_path = folder / CONFIG
    if not config_path.exists():
        raise ModelIOError(f"{folder}: there is no {CONFIG}")
    config = read_json(config_path)
    metadata = read_hf_config(config, str(config_path))
    metadata["general.name"] = _model_name(folder, config)
    metadata.update(_tokenizer(folder))
    files, places = _stored_tensors(folder)
    names = _names(config, str(config_path))
    beside = read_json(folder / BESIDE) if (folder / BESIDE).exists() else None
    quantization = read_quantization(config, str(config_path), beside, str(folder / BESIDE))
    matrices: list[Matrix] = []
    if quantization is None and any(name.endswith(".qweight") for name in places):
        raise UnsupportedError(
            f"{folder}: holds quantized weights, but {CONFIG} has no {KEY} that says of which kind, "
            f"and there is no {BESIDE}"
        )
    if quantization is not None:
        matrices = _take_matrices(folder, files, places, names, quantization)
        metadata["braid.quantization.method"] = quantization.method
    _drop_harmless(folder, files, places, names, config)
    missing = [stored for stored in names if stored not in places]
    if missing:
        raise FormatError(f"{folder}: {_count(len(missing), 'tensor')} missing: {_some(missing)}")
    unknown = sorted(stored for stored in places if stored not in names)
    if unknown:
        raise UnsupportedError(
            f"{folder}: {_count(len(unknown), 'tensor')} no part of a {metadata['general.architecture']} model of "
            f"{config['num_hidden_layers']} layers as nanobraid knows it: {_some(unknown)}"
        )
    tensors = [(ours, places[stored], stored) for stored, ours in names.items()]
    with core_errors():
        return _core.open_safetensors(str(folder), [str(folder / name) for name in files], tensors, metadata, matrices)


def is_quantized_folder(folder: Path) -> bool:
    """Whether the folder's configuration speaks of quantized weights. False if there is none that can be read."""
    try:
        return read_json(folder / CONFIG).get(KEY) is not None or (folder / BESIDE).exists()
    except (ModelIOError, FormatError):
        return False  # opening the folder says why


def _take_matrices(
    folder: Path, files: list[str], places: dict[str, int], names: dict[str, str], quantization: Quantization
) -> list[Matrix]:
    """The quantized matrices; their names and tensors leave `names` and `places`."""
    matrices: list[Matrix] = []
    with core_errors():
        listed = [_core.list_safetensors(str(folder / name)) for name in files]
    dtypes = {name: dtype for tensors in listed for name, dtype, *_ in tensors}
    for stored in [name for name in names if name.endswith(".weight")]:
        stem = stored.removesuffix(".weight")
        try:
            parts = quantization.parts(stem, dtypes)
        except FormatError as error:
            raise FormatError(f"{folder}: {error}") from None
        if not parts:
            continue
        placed = {part: (places[name], name) for part, name in parts.items()}
        matrices.append((names.pop(stored), quantization.scheme, quantization.group_size, placed))
        # input_scale is for inputs rounded to 8 bits, which they are not here.
        for name in (*parts.values(), f"{stem}.input_scale"):
            places.pop(name, None)
        bias = f"{stem}.bias"
        if bias in places and bias not in names and _is_zero(folder / files[places[bias]], bias):
            del places[bias]  # some quantizers write one for every matrix
    if not matrices:
        raise FormatError(f"{folder}: the configuration speaks of {quantization.method}, but no matrix is quantized so")
    return matrices


def _is_zero(path: Path, name: str) -> bool:
    with core_errors():
        size = next(size for tensor, _, _, size in _core.list_safetensors(str(path)) if tensor == name)
        file = _core.open_safetensors(str(path), [str(path)], [("bias", 0, name)], {})
        return not any(file.read("bias", 0, size))


def _model_name(folder: Path, config: dict[str, Any]) -> str:
    name = config.get("_name_or_path")
    return Path(name).name if isinstance(name, str) and name.strip("./") else folder.resolve().name


def _tokenizer(folder: Path) -> dict[str, MetadataValue]:
    """Empty if the folder holds no file of a tokenizer: such a model takes and gives token ids."""
    if has_hf_tokenizer(folder):
        return read_hf_tokenizer(folder)
    lone = [name for name in _TOKENIZER_PARTS if (folder / name).exists()]
    if lone:
        raise UnsupportedError(
            f"{folder}: there is {_some(lone)}, but neither {' nor '.join(TOKENIZER_FILES)}, from which nanobraid "
            "reads a tokenizer; without any of these files a folder is exported as a model of token ids"
        )
    return {}


def _stored_tensors(folder: Path) -> tuple[list[str], dict[str, int]]:
    """Names of the files, and of each tensor in them the file's index."""
    if (folder / INDEX).exists():
        return _sharded(folder)
    if (folder / SINGLE).exists():
        return [SINGLE], dict.fromkeys(_tensors_of(folder / SINGLE), 0)
    named = sorted(path.name for path in folder.glob(_AUTOGPTQ_FILES))
    if len(named) > 1:
        raise UnsupportedError(f"{folder}: there are {_some(named)}, of which one can be {SINGLE}: remove the others")
    if named:
        return named, dict.fromkeys(_tensors_of(folder / named[0]), 0)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UnsupportedError(
            f"{folder}: no {SINGLE}, only {_some(pickles)}: pickled checkpoints are refused, since reading them runs "
            "code from the file; convert it to safetensors"
        )
    raise ModelIOError(f"{folder}: there is neither {SINGLE} nor {INDEX}")


def _sharded(folder: Path) -> tuple[list[str], dict[str, int]]:
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: weight_map is no object with entries")
    for name, file in weight_map.items():
        # A plain name: nothing outside the folder may be named.
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\\" in file:
            raise FormatError(f"{path}: tensor {name!r} is in {file!r}, which is no name of a safetensors file")
    files = sorted(set(weight_map.values()))
    places: dict[str, int] = {}
    for index, file in enumerate(files):
        if not (folder / file).exists():
            raise ModelIOError(f"{folder}: shard {file} is missing, which {INDEX} names")
        for name in _tensors_of(folder / file):
            if weight_map.get(name) != file:
                where = weight_map.get(name)
                says = f"says it is in {where}" if where else "does not name it"
                raise FormatError(f"{folder / file}: holds tensor {name!r}, but {INDEX} {says}")
            places[name] = index
    missing = sorted(name for name in weight_map if name not in places)
    if missing:
        raise FormatError(f"{path}: names {_count(len(missing), 'tensor')} that no shard holds: {_some(missing)}")
    return files, places


def _tensors_of(path: Path) -> list[str]:
    with core_errors():
        return [name for name, *_ in _core.list_safetensors(str(path))]


def _names(config: dict[str, Any], where: str) -> dict[str, str]:
    """Stored name -> our name, in order of execution."""
    architecture = architecture_of(config, where)
    layers = config["num_hidden_layers"]
    if layers > MAX_LAYERS:
        raise FormatError(f"{where}: num_hidden_layers = {layers}, more than {MAX_LAYERS}")
    of_layer = dict(_LAYER_NAMES)
    if has_qkv_bias(config, architecture):
        of_layer.update(_BIASES)
    if architecture == "qwen3":
        of_layer.update(_QK_NORMS)
    names = {_EMBEDDING: "token_embd.weight"}
    for layer in range(layers):
        names.update((f"model.layers.{layer}.{theirs}", f"blk.{layer}.{ours}") for theirs, ours in of_layer.items())
    names["model.norm.weight"] = "output_norm.weight"
    if not ties_embeddings(config, where):
        names[_HEAD] = "output.weight"
    return names


def _drop_harmless(
    folder: Path, files: list[str], places: dict[str, int], names: dict[str, str], config: dict[str, Any]
) -> None:
    for name in [name for name in places if name.endswith(_DERIVED) and name not in names]:
        del places[name]
    if _HEAD in places and _HEAD not in names and _EMBEDDING in places:
        both = [("embedding", places[_EMBEDDING], _EMBEDDING), ("head", places[_HEAD], _HEAD)]
        with core_errors():
            pair = _core.open_safetensors(str(folder), [str(folder / name) for name in files], both, {})
        if not _are_equal(pair, "embedding", "head"):
            raise UnsupportedError(
                f"{folder}: tie_word_embeddings = {config.get('tie_word_embeddings')!r}, but {_HEAD} differs from "
                f"{_EMBEDDING}"
            )
        del places[_HEAD]


def _are_equal(file: _core.ModelFile, first: str, second: str) -> bool:
    shapes = {name: (kind, shape, size) for name, kind, shape, size in file.tensors()}
    if shapes[first] != shapes[second]:
        return False
    size, piece = shapes[first][2], 16 << 20
    with core_errors():
        return all(
            file.read(first, at, min(piece, size - at)) == file.read(second, at, min(piece, size - at))
            for at in range(0, size, piece)
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what} is" if number == 1 else f"{number} {what}s are"


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
