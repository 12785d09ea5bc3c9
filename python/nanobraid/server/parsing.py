"""Request bodies: bytes to JSON, strictly. Whatever the bytes are, what is wrong with them is said in one line.

And the way back, for whatever JSON a request or a model may hold.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

import orjson

from nanobraid.server.errors import ApiError, cut

_MAX_DEPTH = 200


def to_json(value: Any) -> bytes:
    """JSON of a value, also if a client or the model brought numbers beyond 64 bits or half surrogates into it."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def parse_object(body: bytes) -> dict[str, Any]:
    """Returns the JSON object of a request.

    Stricter than `json.loads`: no NaN or infinity, no member twice, no byte order mark, no lone surrogate, no nesting
    beyond 200.

    Raises:
        ApiError: 400, for everything else.
    """
    if not body.strip():
        raise _refusal("the request has no body; a JSON object is needed")
    if body.startswith(b"\xef\xbb\xbf"):
        raise _refusal("the body begins with a byte order mark")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _refusal(f"the body is not UTF-8: invalid byte at {error.start}") from None
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise _refusal(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _refusal("the body nests too deeply") from None
    except ValueError:  # an integer of thousands of digits
        raise _refusal("the body has a number that is too long") from None
    if not isinstance(value, dict):
        raise _refusal("the body must be a JSON object")
    _check(value)
    return value


def _refusal(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _refusal(f"the body has the member {cut(name, 100)!r} twice in one object")
            seen.add(name)
    return members


def _constant(name: str) -> NoReturn:
    raise _refusal(f"the body has {name}, which is not JSON")


def _check(value: Any) -> None:
    """Refuses text that is not Unicode, infinite numbers (1e999) and deep nesting, without recursion."""
    pending: list[tuple[Any, int]] = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise _refusal(f"the body nests deeper than {_MAX_DEPTH}")
        if isinstance(item, str):
            if not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError:
                    raise _refusal("the body has a lone surrogate, which is not Unicode text") from None
        elif isinstance(item, list):
            if set(map(type, item)) == {int}:
                continue  # token ids, of which there may be many
            pending.extend((x, depth + 1) for x in item if not isinstance(x, int) or isinstance(x, bool))
        elif isinstance(item, dict):
            pending.extend((key, depth) for key in item)
            pending.extend((x, depth + 1) for x in item.values())
        elif isinstance(item, float) and item in (float("inf"), float("-inf")):
            raise _refusal("the body has a number that is too large")
