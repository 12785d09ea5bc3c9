"""Tables of requests: what they say is what is read, and what is read is in them."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

pytest.importorskip("starlette")

from nanobraid.server import messages, responses
from nanobraid.server.errors import ApiError
from nanobraid.server.request_fields import Fields
from nanobraid.server.request_shapes import FLAG, TEXT, Entry, Shape, an_object, choice, integer, one_of, served


def entries(shape: Shape) -> list[Entry]:
    """Those of a table and of all within it."""
    found = [*shape.fields.values()]
    return found + [inner for entry in found for table in entry.kinds.values() for inner in entries(table)]


TABLES = {"responses": responses.REQUEST, "messages": messages.REQUEST, "count": messages.COUNT}
READ = {"responses": responses.to_chat, "messages": messages.to_chat, "count": messages.to_count}


def sample(entry: Entry) -> Any:
    """A value that the table allows."""
    if entry.of_chat or entry.served:
        return entry.served[0] if entry.served else {} if entry.schema else "a"
    if entry.kinds and entry.schema.get("type") == "string":
        return "text"
    if entry.kinds:
        (kind, shape), *_ = entry.kinds.items()
        inner = {wanted: sample(shape.fields[wanted]) for wanted in shape.need}
        if kind:
            inner = {entry.key: kind.partition(" ")[0], **inner}
        return [inner] if entry.schema.get("type") == "array" else inner
    allowed = entry.schema.get("anyOf", [entry.schema])[0].get("enum")
    if allowed:
        return allowed[0]
    kinds: dict[Any, Any] = {
        "string": "a", "boolean": False, "integer": entry.schema.get("minimum"), "object": {}, "array": [], None: "a",
    }  # fmt: skip
    return kinds[entry.schema.get("type")]


def whole(dialect: str) -> dict[str, Any]:
    shape = TABLES[dialect]
    body = {name: sample(entry) for name, entry in shape.fields.items()}
    if dialect == "responses":
        body |= {"stream": True, "input": "x"}
    return body


@pytest.mark.parametrize("dialect", TABLES)
def test_every_field_of_a_table_is_read(dialect: str) -> None:
    """A strict server refuses what nobody reads."""
    body = whole(dialect)
    jsonschema.validate(body, {**TABLES[dialect].document(strict=True), "components": _chat_components()})
    READ[dialect](body, strict=True)
    with pytest.raises(ApiError) as caught:
        READ[dialect]({**body, "other": 1}, strict=True)
    assert (caught.value.param, caught.value.code) == ("other", "unknown_parameter")
    for name in TABLES[dialect].refused:
        with pytest.raises(ApiError) as caught:
            READ[dialect]({**body, name: 1})
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


def _chat_components() -> dict[str, Any]:
    names = {entry.of_chat for table in TABLES.values() for entry in entries(table)}
    return {"schemas": {"ChatRequest": {"properties": {name: {} for name in names if name}}}}


def test_what_is_in_no_table_cannot_be_read() -> None:
    table = Shape({"a": TEXT, "b": FLAG, "c": integer(3), "d": choice("x"), "e": served(1)}, ("a",))
    fields = Fields({"a": "x", "c": 3.0, "e": 1}, an_object(table))
    assert (fields.need_text("a"), fields.flag("b"), fields.integer("c"), fields.choice("d")) == ("x", None, 3, None)
    for read in (
        lambda: fields.take("z"),
        lambda: fields.text("b"),
        lambda: fields.integer("a"),
        lambda: fields.need("b"),
        lambda: fields.serve("a"),
        lambda: fields.children("z").__next__(),
    ):
        with pytest.raises(LookupError):
            read()
    with pytest.raises(ApiError, match="at least 3"):
        Fields({"c": 2}, an_object(table)).integer("c")
    with pytest.raises(ApiError, match="only 1 is served"):
        Fields({"e": True}, an_object(table)).serve("e")
    two = Fields({"type": "p", "n": "x"}, one_of(p=Shape({"n": TEXT}), q=Shape({})))
    with pytest.raises(LookupError):
        two.text("n")
    assert two.choice("type") == "p" and two.kinds == ("p", "q")
    two.narrow("p")
    assert two.text("n") == "x"


def test_the_schema_of_a_table_allows_what_its_reader_allows() -> None:
    kinds = one_of(p=Shape({"n": integer(1)}, ("n",)), q=Shape({"m": FLAG}, refused={"r": "no"}))
    schema = kinds.document(strict=True)
    good: list[Any] = [
        {"type": "p", "n": 1},
        {"type": "q"},
        {"type": "q", "m": None, "r": None},
        {"type": "q", "m": True},
    ]
    bad: list[Any] = [{"type": "p"}, {"type": "p", "n": 0}, {"type": "q", "r": 1}, {"type": "q", "n": 1}, {}, {"n": 1}]
    for value in good:
        jsonschema.validate(value, schema)
    for value in bad:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value, schema)
