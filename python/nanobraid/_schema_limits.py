"""What a JSON schema may ask for, checked before a grammar is made of it.

llguidance takes seconds to minutes for some schemas of a few kilobytes and refuses others only when the answer is being
written. Both are found here, in time linear in the schema's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from nanobraid.errors import InvalidArgumentError

MAX_PROPERTIES = 1000
MAX_SCHEMA_BYTES = 256 << 10
_MAX_DEPTH = 120
_MAX_NODES = 50_000
_MAX_VALUES = 10_000
_MAX_MERGED_PATTERNS = 8  # two to their number are compared


class _Refusal(Exception):
    pass


def check_schema(schema: Any, where: str) -> int:
    """Returns the number of properties that a JSON schema describes.

    Args:
        schema: Made of JSON values.
        where: What a message calls it.

    Raises:
        InvalidArgumentError: It is larger or nested deeper than allowed, its references lead nowhere or in a circle, or
            no finite value fits it because something required contains itself.
    """
    try:
        totals = _count(schema)
        _check_finite(schema)
    except _Refusal as error:
        raise InvalidArgumentError(f"{where} {error}") from None
    return totals


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        yield from node.values()
    elif isinstance(node, list):
        yield from node


def _count(schema: Any) -> int:
    properties = nodes = values = patterns = 0
    merges = False
    level = [schema]
    depth = 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise _Refusal(f"is nested deeper than {_MAX_DEPTH} levels")
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                for key in ("properties", "patternProperties"):
                    if isinstance(node.get(key), dict):
                        properties += len(node[key])
                if isinstance(node.get("enum"), list):
                    values += len(node["enum"])
                patterns += isinstance(node.get("pattern"), str) + ("patternProperties" in node)
                merges = merges or "allOf" in node
            below += _children(node)
        nodes += len(below)
        for number, most, what in (
            (properties, MAX_PROPERTIES, "properties"),
            (values, _MAX_VALUES, "values in enum"),
            (nodes, _MAX_NODES, "parts"),
        ):
            if number > most:
                raise _Refusal(f"has {number} {what}; at most {most} are allowed")
        level = below
    if merges and patterns > _MAX_MERGED_PATTERNS:
        raise _Refusal(f"has {patterns} patterns and allOf; at most {_MAX_MERGED_PATTERNS} are allowed together")
    return properties


def _target(schema: Any, reference: str) -> Any:
    """What a reference within the schema means; None where llguidance has to say."""
    if not reference.startswith("#") or (len(reference) > 1 and reference[1] != "/"):
        return None
    node = schema
    for part in unquote(reference[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        else:
            raise _Refusal(f"has a $ref to {reference!r}, which leads nowhere")
    return node


def _check_finite(schema: Any) -> None:
    """Refuses a schema without finite values: the least fixed point of 'has one' must contain what it begins with."""
    needs: dict[int, list[tuple[bool, list[int]]]] = {}  # node: groups of nodes, all or any of which it needs
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if id(node) in needs:
            continue
        needs[id(node)] = groups = []
        if not isinstance(node, dict):
            continue
        for every, parts in _needed(schema, node):
            groups.append((every, [id(part) for part in parts]))
            waiting += parts
    users: dict[int, list[int]] = {}
    for node_id, groups in needs.items():
        for _, parts in groups:
            for part in parts:
                users.setdefault(part, []).append(node_id)
    finite: set[int] = set()
    to_check = list(needs)
    while to_check:
        node_id = to_check.pop()
        if node_id in finite:
            continue
        if all((all if every else any)(part in finite for part in parts) for every, parts in needs[node_id]):
            finite.add(node_id)
            to_check += users.get(node_id, ())
    if id(schema) not in finite:
        raise _Refusal("describes no finite value: a $ref or something required leads back to itself")


def _needed(schema: Any, node: dict[str, Any]) -> Iterator[tuple[bool, list[Any]]]:
    """Which other schemas must have values for this one to have some; True: all of them, False: one of them."""
    if isinstance(node.get("$ref"), str):
        yield True, [_target(schema, node["$ref"])]
    if isinstance(node.get("allOf"), list):
        yield True, node["allOf"]
    for key in ("anyOf", "oneOf"):
        if isinstance(node.get(key), list) and node[key]:
            yield False, node[key]
    properties, required = node.get("properties"), node.get("required")
    if isinstance(properties, dict) and isinstance(required, list):
        yield True, [properties[name] for name in required if isinstance(name, str) and name in properties]
    if isinstance(node.get("minItems"), int) and node["minItems"] > 0:
        prefix = node.get("prefixItems")
        count = len(prefix) if isinstance(prefix, list) else 0
        yield True, [*(prefix[: node["minItems"]] if isinstance(prefix, list) else ())]
        if isinstance(node.get("items"), dict) and node["minItems"] > count:
            yield True, [node["items"]]
