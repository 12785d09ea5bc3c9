"""Tables of what objects of a request hold: `request_fields` reads by them, and ``/openapi.json`` is made from them.

For interfaces that are translated (`responses`, `messages`). A reader can take no field that is not in the table of its
object, with no other type and no other values than the table says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

#: Schemas in this document, which `Entry.of_chat` refers to.
CHAT = "#/components/schemas/ChatRequest/properties/"


@dataclass(frozen=True)
class Entry:
    """A field of an object.

    Attributes:
        schema: JSON schema of its values but null.
        kinds: What the objects in it may be, by the value of the member that tells them apart; one that needs no
            telling has the name "". What follows a space tells apart objects in which that member is the same.
        key: That member.
        served: The only values that are taken, if they are few because others ask for what is not done.
        reason: Why there are no others.
        of_chat: The field of chat completions that says what is allowed, and checks it.
    """

    schema: Json = field(default_factory=dict)
    kinds: Mapping[str, Shape] = field(default_factory=dict)
    key: str = "type"
    served: tuple[Any, ...] = ()
    reason: str = ""
    of_chat: str = ""

    def document(self, strict: bool) -> Json:
        """The JSON schema of its values but null."""
        if self.of_chat:
            return {"$ref": CHAT + self.of_chat}
        if self.served:
            return {"enum": [*self.served], **({"description": self.reason} if self.reason else {})}
        if not self.kinds:
            return self.schema
        objects = [shape.document(strict, self.key, kind) for kind, shape in self.kinds.items()]
        one = objects[0] if len(objects) == 1 else {"anyOf": objects}
        if self.schema.get("type") == "array":
            return {**self.schema, "items": one}
        if self.schema.get("type") == "string":
            return {"anyOf": [{"type": "string"}, {"type": "array", "items": one, **self.schema.get("limits", {})}]}
        return one


@dataclass(frozen=True)
class Shape:
    """What an object may hold.

    Attributes:
        fields: Those that are read.
        need: Those of them that must be there.
        refused: Those that the interface has and nanobraid has not, with the reason.
        told: Whether the member that tells kinds of objects apart must be there.
        notes: JSON schema of what fields must be together.
    """

    fields: Mapping[str, Entry]
    need: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    told: bool = True
    notes: Mapping[str, Any] = field(default_factory=dict)

    def document(self, strict: bool, key: str = "", kind: str = "") -> Json:
        """The JSON schema of the object; of one kind, if it is one of several."""
        properties: Json = {}
        for name, entry in self.fields.items():
            made = entry.document(strict)
            properties[name] = made if name in self.need or entry.of_chat else {"anyOf": [made, {"type": "null"}]}
        for name, reason in self.refused.items():
            properties[name] = {"type": "null", "description": f"Not supported: {reason}."}
        need = [*self.need]
        if kind:
            properties = {key: {"const": kind.partition(" ")[0]}, **properties}
            if self.told:
                need = [key, *need]
        made = {"type": "object", "properties": properties, "required": need, **self.notes}
        return {**made, "additionalProperties": False} if strict else made


TEXT = Entry({"type": "string"})
NAME = Entry({"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"})
PARAMETERS = Entry({"type": "object", "properties": {"type": {"const": "object"}}})
FLAG = Entry({"type": "boolean"})
OBJECT = Entry({"type": "object"})
ANYTHING = Entry({})


def integer(least: int) -> Entry:
    """An integer of at least `least`."""
    return Entry({"type": "integer", "minimum": least})


def choice(*allowed: str) -> Entry:
    """One of a few strings."""
    return Entry({"type": "string", "enum": [*allowed]})


def served(*values: Any, reason: str = "") -> Entry:
    """A field of which only these values are taken: those that ask for what is done anyway."""
    return Entry(served=values, reason=reason)


def of_chat(*names: str) -> dict[str, Entry]:
    """Fields that are handed on to chat completions, which has them under the same names."""
    return {name: Entry(of_chat=name) for name in names}


def an_object(shape: Shape) -> Entry:
    """An object."""
    return Entry({"type": "object"}, {"": shape})


def objects(*, least: int = 0, **kinds: Shape) -> Entry:
    """An array of objects of several kinds, or of one called ``only``."""
    schema: Json = {"type": "array", "minItems": least} if least else {"type": "array"}
    return Entry(schema, {"" if kind == "only" else kind: shape for kind, shape in kinds.items()})


def text_or(*, least: int = 0, **kinds: Shape) -> Entry:
    """A string, or an array of at least so many objects."""
    return Entry({"type": "string", "limits": {"minItems": least} if least else {}}, kinds)


def one_of(**kinds: Shape) -> Entry:
    """An object of one of several kinds."""
    return Entry({"type": "object"}, kinds)


def array_of(schema: Json, **limits: Any) -> Entry:
    """An array of plain values."""
    return Entry({"type": "array", "items": schema, **limits})


def is_given(name: str, value: Json | None = None) -> Json:
    """JSON schema of objects that have a field which is not null."""
    return {"required": [name], "properties": {name: value or {"not": {"type": "null"}}}}


def is_absent(name: str) -> Json:
    """JSON schema of objects that do not have a field, or have it with null."""
    return {"properties": {name: {"type": "null"}}}
