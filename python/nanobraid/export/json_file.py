"""JSON files of untrusted folders, bounded in size and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanobraid.errors import FormatError, ModelIOError

MAX_JSON_BYTES = 256 << 20
MAX_NESTING = 64


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, refusing what only a hostile file has.

    Raises:
        FormatError: Not JSON, not UTF-8, no object, a key twice, too large or nested too deep, a number that is none.
        ModelIOError: The file cannot be read.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = _first_repeated([key for key, _ in pairs])
            raise FormatError(f"{path}: the key {twice!r} occurs twice in one object")
        return found

    def refuse(constant: str) -> Any:
        raise FormatError(f"{path}: {constant} is no JSON value")

    try:
        if not path.is_file():
            raise ModelIOError(f"{path} is not a regular file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FormatError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB")
        text = path.read_bytes().decode()
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except OSError as error:
        raise ModelIOError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: at offset {error.start}: not UTF-8") from None
    except RecursionError:
        raise FormatError(f"{path}: nested deeper than {MAX_NESTING}") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path}: not JSON: {error}") from None
    if _is_nested_deeper(value, MAX_NESTING):
        raise FormatError(f"{path}: nested deeper than {MAX_NESTING}")
    if not isinstance(value, dict):
        raise FormatError(f"{path}: the file is a JSON {type(value).__name__}, expected an object")
    return value


def _is_nested_deeper(value: object, levels: int) -> bool:
    outer = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        inner = [item for box in outer for item in (box.values() if isinstance(box, dict) else box)]
        outer = [item for item in inner if isinstance(item, (dict, list))]
    return bool(outer)


def _first_repeated(keys: list[str]) -> str:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError
