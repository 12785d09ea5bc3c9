"""Checks dictionaries against the types of a client library, more strictly than the library itself does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

from nanobraid.server.errors import ApiError
from nanobraid.server.request_fields import EXTENSIONS
from nanobraid.server.schema import ChatRequest, parse

Json = dict[str, Any]


def checked(kind: Any, data: Json, extras: frozenset[str] = frozenset()) -> Any:
    """Returns the data as the library's type; every field is one it knows, or one of `extras`."""
    value = _adapter(kind).validate_python(data, strict=True)
    unknown = set(_unknown(value)) - extras
    assert not unknown, f"{type(value).__name__} does not know {sorted(unknown)}"
    return value


def assert_extensions_reach_chat(to_chat: Callable[[Any], Json], body: Json) -> None:
    """Every field that chat has beyond the interface can be used, and is one that chat has."""
    for name in EXTENSIONS:
        assert name in ChatRequest.model_fields
        assert to_chat({**body, name: 1})[name] == 1


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _unknown(value: Any) -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield from value.model_extra or {}
        for name in type(value).model_fields:
            yield from _unknown(getattr(value, name))
    elif isinstance(value, list):
        for one in value:
            yield from _unknown(one)


def assert_refused(to_chat: Callable[[Any], Json], body: Json, param: str, code: str = "unsupported_parameter") -> None:
    """The request is answered with 400, naming the field."""
    with pytest.raises(ApiError) as caught:
        to_chat(body)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)
    assert param in caught.value.message


@dataclass
class Object:
    """One kind of object in requests: its fields are honoured, served with some values, of no matter, or refused."""

    kinds: tuple[Any, ...]  # the library's types of it
    place: Callable[[Json], Json]  # puts such an object into a request
    path: str  # where it stands there
    base: Json  # fields that it always has
    honoured: Json  # fields with a value that changes the translated request
    # Fields with the values that ask for what is done anyway, and one that does not.
    served: dict[str, tuple[list[Any], Any]] = field(default_factory=dict)
    dropped: Json = field(default_factory=dict)  # what an earlier answer of ours has, but what is no part of a prompt
    together: dict[str, Json] = field(default_factory=dict)  # what else has to be there for a field to mean something

    def fields(self) -> list[str]:
        """All that the installed version of the library has, and those of other versions that we know."""
        return sorted({*(name for kind in self.kinds for name in kind.__annotations__), *self.honoured, *self.served})

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def check(self, to_chat: Callable[[Any], Json], name: str) -> None:
        """Asserts that a field is honoured or refused, and that null is as good as not there."""
        base = {**self.base, **self.together.get(name, {})}
        bare = {key: value for key, value in base.items() if key != name}

        def send(value: Any) -> Json:
            return self.place({**base, name: value})

        if name in self.honoured:
            chat = to_chat(send(self.honoured[name]))
            assert chat != _translated(to_chat, self.place(bare))
            parse(ChatRequest, chat, strict=True)  # chat knows whatever it is asked
        elif name in self.served:
            same, other = self.served[name]
            for value in same:
                assert to_chat(send(value)) == to_chat(self.place(base))
            assert_refused(to_chat, send(other), self.at(name))
        elif name in self.dropped:
            assert to_chat(send(self.dropped[name])) == to_chat(self.place(base))
        else:
            for value in (True, "x", 1, 0.5, {"a": 1}, ["a"]):
                assert_refused(to_chat, send(value), self.at(name))
        if name not in self.base:
            assert to_chat(send(None)) == to_chat(self.place(base))


def _translated(to_chat: Callable[[Any], Json], body: Json) -> Json | None:
    """None if the field that is missing is needed."""
    try:
        return to_chat(body)
    except ApiError as error:
        assert error.code == "missing_required_parameter"
        return None
