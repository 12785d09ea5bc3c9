"""Metadata as a GGUF file in memory, so that a tokenizer from elsewhere is read as one from a file is.

Not for model files: there are no tensors. Source of the format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanobraid.export.hf_tokenizer import MetadataValue

_F32, _BOOL, _STRING, _ARRAY, _I64 = 6, 7, 8, 9, 11


def gguf_bytes(metadata: Mapping[str, MetadataValue]) -> bytes:
    """Returns a GGUF file (version 3) with these keys and no tensors.

    Args:
        metadata: Keys and values; integers are stored as i64, floats as f32; a list has values of one type.
    """
    parts = [b"GGUF", struct.pack("<IQQ", 3, 0, len(metadata))]
    for key, value in metadata.items():
        parts.append(_string(key))
        if isinstance(value, list):
            kind = _type_of(value[0]) if value else _STRING
            parts.append(struct.pack("<IIQ", _ARRAY, kind, len(value)))
            parts.append(_elements(kind, value))
        else:
            kind = _type_of(value)
            parts.append(struct.pack("<I", kind))
            parts.append(_elements(kind, [value]))
    return b"".join(parts)


def _type_of(value: object) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _I64
    return _F32 if isinstance(value, float) else _STRING


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _elements(kind: int, values: Sequence[object]) -> bytes:
    if kind == _STRING:
        return b"".join(_string(str(value)) for value in values)
    return struct.pack(f"<{len(values)}{ {_BOOL: '?', _I64: 'q', _F32: 'f'}[kind] }", *values)
