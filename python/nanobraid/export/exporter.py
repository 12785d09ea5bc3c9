"""Writes a `.braid` file tensor by tensor: a few rows in memory at a time, and one layer while calibrating."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nanobraid
from nanobraid import _core
from nanobraid.errors import (
    FormatError,
    InvalidArgumentError,
    ModelIOError,
    UnsupportedError,
    core_errors,
    map_core_error,
)
from nanobraid.export.calibration import Calibration, calibrate
from nanobraid.export.hf_folder import is_hf_folder, open_hf_folder
from nanobraid.export.summary import DTYPES, ExportSummary, Progress, TensorSummary

_PIECE_WEIGHTS = 1 << 19  # unpacked at a time
_SEARCHED = ("w4", "w8", "w8_channel")
_GROUP = 64
_ORDER_SUFFIX = ".order"  # of tensors that say in which order a matrix has its columns
_DOWN = ".ffn_down.weight"
_HEADS = ("token_embd.weight", "output.weight")  # matrices with a row for each token
# Keys of the container rather than of the model.
_DROPPED_KEYS = ("general.alignment", "general.file_type", "general.quantization_version")
_DROPPED_PREFIXES = ("split.", "braid.", "quantize.imatrix.")


@dataclass(frozen=True)
class _Plan:
    """One tensor to write."""

    name: str
    shape: list[int]
    source_format: str
    format: str
    head_dim: int = 0  # rows of this tensor stand interleaved within heads of this many rows; 0 = they do not
    note: str = ""


def open_source(source: Path) -> _core.ModelFile:
    """Opens what can be exported: a Hugging Face folder, a GGUF file or a `.braid` file."""
    if is_hf_folder(source):
        return open_hf_folder(source)
    if source.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UnsupportedError(f"{source}: pickled checkpoints are refused, since reading them runs code from the file")
    if source.suffix == ".safetensors":
        raise UnsupportedError(f"{source}: give the folder with its config.json instead")
    with core_errors():
        return _core.ModelFile(str(source))


def export_model(
    source: Path,
    out: Path,
    dtype: str,
    *,
    progress: Progress | None = None,
    force: bool = False,
    w8_per_channel: bool = False,
    head_dtype: str | None = None,
) -> ExportSummary:
    """Exports a model to a `.braid` file, which appears when it is complete.

    Args:
        source: A Hugging Face folder, a GGUF file (any part of a split one) or a `.braid` file.
        out: The file to write.
        dtype: Format of the matrices: one of `DTYPES`. `keep` leaves every tensor as it is. Norms and biases are f32
            in every other case.
        progress: Called with (what, done, all): layers of calibration, then bytes written.
        force: Replace `out` if it is there.
        w8_per_channel: Scales of w8 matrices per row instead of per 64 weights of a row.
        head_dtype: Format of the embedding and the head, when it shall be another than `dtype` says (w8 for w4).

    Raises:
        NanobraidError: The subclass says what kind: InvalidArgumentError for arguments, ModelIOError, FormatError and
            UnsupportedError for the source. Nothing is left behind.
    """
    begin = time.perf_counter()
    source, out = Path(source), Path(out)
    _check_arguments(source, out, dtype, force, w8_per_channel, head_dtype)
    file = open_source(source)
    with core_errors():
        _core.check_model(file)
    metadata = file.metadata()
    _check_shapes(file, metadata)
    matrix, head = _formats(dtype, w8_per_channel, head_dtype)
    plans = _plan(file, metadata, matrix, head)
    calibration, calibration_seconds, calibration_rss = None, 0.0, 0
    if any(plan.format in _SEARCHED and plan.format != plan.source_format for plan in plans):
        calibration_begin = time.perf_counter()
        tell = None if progress is None else (lambda done, everything: progress("calibrating", done, everything))
        architecture = metadata["general.architecture"]
        vocab_size = next(plan.shape[0] for plan in plans if plan.name == "token_embd.weight")
        calibration = calibrate(file, metadata[f"{architecture}.context_length"], vocab_size, tell)
        calibration_seconds = time.perf_counter() - calibration_begin
        calibration_rss = _core.memory_status()["peak_rss_bytes"]
    tensors = _write(file, out, _new_metadata(source, file, metadata, dtype, calibration), plans, calibration, progress)
    return ExportSummary(
        source=source,
        out=out,
        dtype=dtype,
        tensors=tensors,
        source_bytes=file.file_bytes,
        file_bytes=out.stat().st_size,
        seconds=time.perf_counter() - begin,
        peak_rss_bytes=_core.memory_status()["peak_rss_bytes"],
        calibration_text=calibration.text if calibration else "",
        calibration_tokens=calibration.num_tokens if calibration else 0,
        calibration_seconds=calibration_seconds,
        calibration_rss_bytes=calibration_rss,
        notes=tuple(f"{tensor.name}: {tensor.note}" for tensor in tensors if tensor.note),
    )


def _check_arguments(  # noqa: PLR0917 - the arguments of export_model
    source: Path, out: Path, dtype: str, force: bool, w8_per_channel: bool, head_dtype: str | None
) -> None:
    if dtype not in DTYPES:
        raise InvalidArgumentError(f"dtype = {dtype!r}, expected one of {', '.join(DTYPES)}")
    if head_dtype is not None and (head_dtype not in DTYPES or head_dtype == "keep"):
        raise InvalidArgumentError(f"head_dtype = {head_dtype!r}, expected one of {', '.join(DTYPES[:-1])}")
    if head_dtype is not None and dtype == "keep":
        raise InvalidArgumentError("head_dtype has no meaning with dtype = 'keep'")
    if w8_per_channel and "w8" not in (dtype, head_dtype) and dtype != "w4":
        raise InvalidArgumentError(f"w8_per_channel has no meaning with dtype = {dtype!r}")
    if not source.exists():
        raise ModelIOError(f"{source}: no such file or folder")
    if out.is_dir():
        raise ModelIOError(f"{out}: is a folder, expected the name of a file")
    if out.exists() and out.samefile(source):
        raise InvalidArgumentError(f"{out}: source and target are the same file")
    if out.exists() and not force:
        raise ModelIOError(f"{out}: exists already; --force replaces it")
    if not out.resolve().parent.is_dir():
        raise ModelIOError(f"{out.parent}: no such folder")


def _check_shapes(file: _core.ModelFile, metadata: dict[str, Any]) -> None:
    """What loading would refuse is not written; quantities of the file are those that check_model has accepted."""
    prefix = metadata["general.architecture"] + "."
    hidden, heads = metadata[prefix + "embedding_length"], metadata[prefix + "attention.head_count"]
    inner = metadata[prefix + "feed_forward_length"]
    dim = metadata.get(prefix + "attention.key_length", hidden // heads)
    q, kv = heads * dim, metadata.get(prefix + "attention.head_count_kv", heads) * dim
    shapes = {
        "attn_norm.weight": [hidden], "attn_q.weight": [q, hidden], "attn_k.weight": [kv, hidden],
        "attn_v.weight": [kv, hidden], "attn_q.bias": [q], "attn_k.bias": [kv], "attn_v.bias": [kv],
        "attn_q_norm.weight": [dim], "attn_k_norm.weight": [dim], "attn_output.weight": [hidden, q],
        "ffn_norm.weight": [hidden], "ffn_gate.weight": [inner, hidden], "ffn_up.weight": [inner, hidden],
        "ffn_down.weight": [hidden, inner], "output_norm.weight": [hidden],
    }  # fmt: skip
    found = {name: shape for name, _, shape, _ in file.tensors()}
    vocab_size = found["token_embd.weight"][0]
    shapes["token_embd.weight"] = shapes["output.weight"] = [vocab_size, hidden]
    if file.kind == "safetensors" and vocab_size != metadata[prefix + "vocab_size"]:
        raise FormatError(
            f"{file.path}: token_embd.weight has {vocab_size} rows, vocab_size is {metadata[prefix + 'vocab_size']}"
        )
    for name, shape in found.items():
        parts = name.split(".", 2)
        wanted = shapes.get(parts[2] if parts[0] == "blk" and len(parts) == 3 else name)
        if wanted is not None and shape != wanted:
            raise FormatError(f"{file.path}: tensor {name} has shape {shape}, expected {wanted}")
    for layer in range(metadata[prefix + "block_count"]):
        for name in _REQUIRED:
            if f"blk.{layer}.{name}.weight" not in found:
                raise FormatError(f"{file.path}: there is no tensor blk.{layer}.{name}.weight")


def _formats(dtype: str, w8_per_channel: bool, head_dtype: str | None) -> tuple[str | None, str | None]:
    """Formats of body matrices and of embedding and head; None keeps the source's."""
    if dtype == "keep":
        return None, None
    head = head_dtype or ("w8" if dtype == "w4" else dtype)

    def spelled(name: str) -> str:
        return "w8_channel" if name == "w8" and w8_per_channel else name

    return spelled(dtype), spelled(head)


def _plan(file: _core.ModelFile, metadata: dict[str, Any], matrix: str | None, head: str | None) -> list[_Plan]:
    plans = []
    interleaves = file.kind == "GGUF" and metadata["general.architecture"] == "llama"
    for name, source_format, shape, _ in sorted(file.tensors(), key=lambda item: _execution_order(item[0])):
        if name.endswith(_ORDER_SUFFIX) and matrix is not None:
            continue  # rows are read in the order of the input
        wanted = head if name in _HEADS else matrix
        if wanted is None:
            format_, note = source_format, ""
        elif len(shape) != 2:
            format_, note = "f32", ""
        else:
            format_, note = _fitting(wanted, shape[1])
        head_dim = _interleaved_head(name, metadata) if interleaves else 0
        plans.append(_Plan(name, shape, source_format, format_, head_dim, note))
    return plans


def _fitting(wanted: str, cols: int) -> tuple[str, str]:
    if wanted in ("w4", "w8") and cols % _GROUP != 0:
        return "bf16", f"bf16 instead of {wanted}: {cols} columns are no multiple of {_GROUP}"
    return wanted, ""


_REQUIRED = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
_ORDER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm", "attn_output", "ffn_norm",
          "ffn_gate", "ffn_up", "ffn_down")  # fmt: skip


def _execution_order(name: str) -> tuple[int, int, int, str]:
    """The embedding, the layers in order, each in order of execution, then what follows them."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit():
        place = _ORDER.index(parts[2]) if parts[2] in _ORDER else len(_ORDER)
        return (1, int(parts[1]), place, name)
    first = {"token_embd.weight": 0, "rope_freqs.weight": 0, "output_norm.weight": 2}
    return (first.get(name, 3), 0, int(name == "rope_freqs.weight"), name)


def _interleaved_head(name: str, metadata: dict[str, Any]) -> int:
    parts = name.split(".")
    if len(parts) != 4 or parts[2] not in ("attn_q", "attn_k", "attn_q_norm", "attn_k_norm"):
        return 0
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return int(metadata.get("llama.attention.key_length", hidden // heads))


def _new_metadata(
    source: Path, file: _core.ModelFile, metadata: dict[str, Any], dtype: str, calibration: Calibration | None
) -> dict[str, Any]:
    out = {
        key: value
        for key, value in metadata.items()
        if key not in _DROPPED_KEYS and not key.startswith(_DROPPED_PREFIXES)
    }
    out["braid.exporter"] = f"nanobraid {nanobraid.__version__}"
    out["braid.source"] = source.resolve().name
    out["braid.source_kind"] = {"GGUF": "gguf", "safetensors": "hf"}.get(file.kind, file.kind)
    out["braid.dtype"] = dtype
    if calibration is not None:
        out["braid.calibration.text"] = calibration.text
        out["braid.calibration.tokens"] = calibration.num_tokens
    return out


def _write(  # noqa: PLR0917 - the parts of one call
    file: _core.ModelFile,
    out: Path,
    metadata: dict[str, Any],
    plans: list[_Plan],
    calibration: Calibration | None,
    progress: Progress | None,
) -> tuple[TensorSummary, ...]:
    specs = [(plan.name, plan.format, plan.shape) for plan in plans]
    total = sum(math.prod(plan.shape) for plan in plans)
    done = 0
    summaries = []
    with core_errors(), _core.BraidWriter(str(out), metadata, specs) as writer:
        for index, plan in enumerate(plans):
            size, squared_error, squared_norm = 0, 0.0, 0.0
            importance = calibration.importance(plan.name) if calibration else None
            if importance is not None and plan.name.endswith(_DOWN):
                importance = _in_input_order(file, plan.name, importance)
            for packed, weights, error, norm in _pieces(file, plan, importance):
                writer.write(index, packed)
                size += len(packed)
                squared_error += error
                squared_norm += norm
                done += weights
                if progress is not None:
                    progress("writing", done, total)
            error = math.sqrt(squared_error / squared_norm) if squared_norm > 0.0 else 0.0
            summaries.append(TensorSummary(plan.name, plan.format, tuple(plan.shape), size, error, plan.note))
        writer.finish()
    return tuple(summaries)


def _in_input_order(file: _core.ModelFile, name: str, importance: NDArray[np.float32]) -> NDArray[np.float32]:
    """The importance of a down matrix's columns: it was measured in the order in which they are packed."""
    order_name = name.removesuffix(".weight") + _ORDER_SUFFIX
    if all(tensor != order_name for tensor, *_ in file.tensors()):
        return importance
    out = np.empty_like(importance)
    out[file.read_rows(order_name).reshape(-1).astype(np.int64)] = importance
    return out


def _pieces(
    file: _core.ModelFile, plan: _Plan, importance: NDArray[np.float32] | None
) -> Iterator[tuple[bytes, int, float, float]]:
    """Packed pieces of a tensor in order: (bytes, weights, squared error, squared norm)."""
    cols = plan.shape[-1]
    rows = math.prod(plan.shape[:-1])
    if len(plan.shape) == 1 and plan.head_dim:  # one value a row of Q or K
        rows, cols = cols, 1
    unit = plan.head_dim or 1
    step = max(_PIECE_WEIGHTS // cols // unit, 1) * unit
    for begin in range(0, rows, step):
        count = min(step, rows - begin)
        order = _half_split(count, plan.head_dim) if plan.head_dim else None
        if plan.format == plan.source_format:  # of matrices with an order only where that is kept, too
            yield _reordered(_raw_rows(file, plan, begin, count, rows), order, count), count * cols, 0.0, 0.0
            continue
        if len(plan.shape) == 1:
            values = file.read_rows(plan.name).reshape(-1)[begin * cols : (begin + count) * cols].reshape(count, cols)
        else:
            values = file.read_rows(plan.name, begin, count)
        if order is not None:
            values = np.ascontiguousarray(values[order])
        packed = _pack(file, plan, begin, values, importance)
        error, norm = _core.packing_error(plan.format, values, packed)
        yield packed, count * cols, error, norm


def _pack(
    file: _core.ModelFile, plan: _Plan, begin: int, values: NDArray[np.float32], importance: NDArray[np.float32] | None
) -> bytes:
    try:
        return _core.quantize(plan.format, values, importance)
    except _core.CoreError as error:
        mapped = map_core_error(error)
        raise type(mapped)(f"{file.path}: tensor {plan.name}, from row {begin} on: {mapped}") from error


def _half_split(rows: int, head_dim: int) -> NDArray[np.int64]:
    """Where each of `rows` rows of whole heads stands in a file that interleaves the two halves of a head."""
    order: NDArray[np.int64] = np.arange(rows).reshape(-1, head_dim // 2, 2).transpose(0, 2, 1).reshape(-1)
    return order


def _raw_rows(file: _core.ModelFile, plan: _Plan, begin: int, count: int, rows: int) -> bytes:
    size = next(size for name, _, _, size in file.tensors() if name == plan.name)
    row_bytes = size // rows
    return file.read(plan.name, begin * row_bytes, count * row_bytes)


def _reordered(raw: bytes, order: NDArray[np.int64] | None, rows: int) -> bytes:
    if order is None:
        return raw
    return np.frombuffer(raw, np.uint8).reshape(rows, -1)[order].tobytes()
