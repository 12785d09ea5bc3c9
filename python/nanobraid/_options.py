"""Checks of the options of an `LLM`, and their forms in the core."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from nanobraid import _core
from nanobraid.errors import InvalidArgumentError, UnsupportedError
from nanobraid.sampling_params import require_int

MAX_INT = 2**31 - 1
FUSION = ("auto", "on", "off")
KV_STORE_BYTES = 8 << 30
X86_BACKENDS = ("avx2", "avxvnni", "avx512", "avx512bf16")
ARM_BACKENDS = ("neon", "neon_dotprod", "neon_i8mm")
CPU_BACKENDS = ("reference", "scalar", *X86_BACKENDS, *ARM_BACKENDS)


def require_one_of(field: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InvalidArgumentError(f"{field} must be one of {', '.join(allowed)}, got {value!r}")


def require_flag(field: str, value: bool | None, default: bool) -> bool:
    if value not in (None, False, True):
        raise InvalidArgumentError(f"{field} must be True, False or None, got {value!r}")
    return default if value is None else bool(value)


def trace_file(path: str | os.PathLike[str] | None) -> str:
    """The core's convention: empty for no trace."""
    return path_name("trace_path", "a file", path)


def kv_store(path: str | os.PathLike[str] | None, num_bytes: int | None) -> tuple[str, int]:
    """The core's path and bytes of a store of keys and values; empty and 0 for no store."""
    name = path_name("kv_store_path", "a directory", path)
    quota = optional_size("kv_store_bytes", num_bytes, 2**62)
    if not name:
        if quota:
            raise InvalidArgumentError("kv_store_bytes is given without a kv_store_path")
        return "", 0
    return name, quota or KV_STORE_BYTES


def path_name(field: str, what: str, path: str | os.PathLike[str] | None) -> str:
    """The path as text; empty for None."""
    if path is None:
        return ""
    try:
        name = os.fspath(path)
    except TypeError:
        name = ""
    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidArgumentError(f"{field} must be the path of {what}, or None, got {path!r}")
    return name


def optional_size(field: str, value: int | None, high: int = MAX_INT) -> int:
    """The core's convention: 0 stands for its own default."""
    allowed = "an integer >= 1, or None" if high >= MAX_INT else f"an integer in [1, {high}], or None"
    return 0 if value is None else require_int(field, value, 1, high, allowed)


def backend_of(device: str) -> str:
    """The name of the kernel table for a device; 'cpu' and empty let the core choose (or NANOBRAID_BACKEND)."""
    if not isinstance(device, str):
        raise InvalidArgumentError(f"device must be a string, got {device!r}")
    if device == "auto":
        return ""
    if device == "cpu":
        return device
    available = _core.available_backends()
    name = "cuda:0" if device == "cuda" else device.removeprefix("cpu:")
    if name in available:
        return name
    if device == "cuda" or device.startswith("cuda:"):
        why = _core.cuda_status().removeprefix("not usable: ")
        raise UnsupportedError(f"device {device!r} is not available: {why}")
    if name in CPU_BACKENDS:
        raise UnsupportedError(f"device {device!r} is not available on this machine, which has {', '.join(available)}")
    raise InvalidArgumentError(f"device must be auto, cpu, cuda or one of {', '.join(available)}, got {device!r}")


def fusion_lines(fusion: dict[str, Any]) -> list[str]:
    """One line for each operator of `Model.fusion`: what was decided and, if measured, the errors."""
    lines = []
    for name, decision in fusion["operators"].items():
        errors = [_fusion_error(row) for row in fusion["errors"] if row["operator"] == name]
        lines.append(f"{name} {decision}" + (f" ({', '.join(errors)})" if errors else ""))
    return lines


def _fusion_error(row: dict[str, Any]) -> str:
    where = "" if row["layer"] is None else f" in layer {row['layer']}"
    return f"{row['quantity']} off by {row['error']:.2g}{where}, bound {row['bound']:.2g}"
