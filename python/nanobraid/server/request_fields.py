"""Reads a JSON object of a request field by field, so that none is accepted and ignored.

Every field of an interface is taken or refused by name, as its table says (`request_shapes`); `Fields.close` finds
those that the interface does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nanobraid._logging import logger
from nanobraid.server import errors
from nanobraid.server.request_shapes import Entry, Shape, choice

#: Fields of nanobraid's chat completions that neither OpenAI's Responses nor Anthropic's Messages have. Requests to
#: those carry them under the same names.
EXTENSIONS = (
    "allowed_token_ids",
    "cache_salt",
    "chunks",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "kv_policy",
    "logit_bias",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "repetition_penalty",
    "reuse",
    "seed",
    "speculative",
    "stop_token_ids",
    "structured_outputs",
    "timeout_s",
    "top_k",
)

_NAMES: dict[type, str] = {str: "a string", bool: "a boolean", int: "an integer", list: "an array", dict: "an object"}


class Fields:
    """One object of a request, read by its table.

    Args:
        value: What stands at `path`.
        entry: What the objects at this place may be. One of several kinds is read after `narrow`.
        path: Where the object stands, as ``input[0].content[1]``; empty for the body.
        strict: Refuse fields that the interface does not have, instead of ignoring them.

    Raises:
        ApiError: `value` is not an object.
    """

    def __init__(self, value: Any, entry: Entry, path: str = "", *, strict: bool = False) -> None:
        self._values: dict[str, Any] = typed(value, dict, path)
        self._entry = entry
        self._shape = entry.kinds.get("") or Shape({entry.key: choice(*entry.kinds)}, (entry.key,))
        self.path = path
        self.strict = strict
        self._taken: set[str] = set()

    @property
    def kinds(self) -> tuple[str, ...]:
        """What kinds of objects are served here."""
        return tuple(self._entry.kinds)

    def narrow(self, kind: str) -> None:
        """Goes on with the table of one kind; what tells the kinds apart has been read."""
        self._shape = self._entry.kinds[kind]
        self._taken.add(self._entry.key)

    def at(self, name: str) -> str:
        """Path of a field, as errors name it."""
        return f"{self.path}.{name}" if self.path else name

    def _of(self, name: str, kind: str = "") -> Entry:
        """The field's entry in the table."""
        entry = self._shape.fields[name]
        if kind and entry.schema.get("type") != kind:
            raise LookupError(f"{self.at(name)} is read as {kind}, which is not in its table")
        return entry

    def peek(self, name: str) -> Any:
        """A member, whether it is in the table or not: to find out which table it is."""
        return self._values.get(name)

    def take(self, name: str) -> Any:
        """The field's value, whatever its type; None if it is null or not there."""
        self._of(name)
        return self._take(name)

    def _take(self, name: str) -> Any:
        self._taken.add(name)
        return self._values.get(name)

    def need(self, name: str) -> Any:
        """The field's value.

        Raises:
            ApiError: It is null or not there.
        """
        if name not in self._shape.need:
            raise LookupError(f"{self.at(name)} is needed, which is not in its table")
        value = self.take(name)
        if value is None:
            raise errors.missing(self.at(name))
        return value

    def text(self, name: str) -> str | None:
        """A string, or None."""
        self._of(name, "string")
        value = self.take(name)
        return None if value is None else str(typed(value, str, self.at(name)))

    def need_text(self, name: str) -> str:
        """A string that has to be there."""
        self._of(name, "string")
        return str(typed(self.need(name), str, self.at(name)))

    def flag(self, name: str) -> bool | None:
        """A boolean, or None."""
        self._of(name, "boolean")
        value = self.take(name)
        return None if value is None else bool(typed(value, bool, self.at(name)))

    def integer(self, name: str) -> int | None:
        """An integer that is not less than the table says, or None."""
        least: int = self._of(name, "integer").schema["minimum"]
        value = whole(self.take(name))
        if value is None:
            return None
        number = int(typed(value, int, self.at(name)))
        if number < least:
            raise errors.invalid_value(self.at(name), f"{self.at(name)} must be at least {least}, not {number}")
        return number

    def choice(self, name: str) -> str | None:
        """One of the strings of the table, or None."""
        allowed = tuple(self._of(name, "string").schema["enum"])
        value = self.text(name)
        if value is not None and value not in allowed:
            raise errors.invalid_value(
                self.at(name), f"{self.at(name)} must be one of {listed(allowed)}, not {value!r:.100}"
            )
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object that is handed on as it is, or None."""
        self._of(name, "object")
        value = self.take(name)
        return None if value is None else dict(typed(value, dict, self.at(name)))

    def child(self, name: str) -> Fields | None:
        """An object to be read field by field, or None."""
        entry = self._of(name, "object")
        value = self.take(name)
        return None if value is None else Fields(value, entry, self.at(name), strict=self.strict)

    def array(self, name: str) -> list[Any] | None:
        """An array, or None."""
        self._of(name, "array")
        value = self.take(name)
        return None if value is None else list(typed(value, list, self.at(name)))

    def children(self, name: str) -> Iterator[Fields]:
        """The objects of an array, one by one; none if the array is not there."""
        entry = self._of(name)
        values = self.take(name)
        for index, value in enumerate([] if values is None else typed(values, list, self.at(name))):
            yield Fields(value, entry, f"{self.at(name)}[{index}]", strict=self.strict)

    def refuse(self) -> None:
        """Refuses fields that nanobraid does not implement, each with its reason."""
        for name, reason in self._shape.refused.items():
            if self._take(name) is not None:
                raise errors.unsupported(self.at(name), reason)

    def serve(self, name: str) -> None:
        """Refuses a field unless its value asks for what is done anyway."""
        entry = self._of(name)
        if not entry.served:
            raise LookupError(f"{self.at(name)} has no values in its table that are served")
        value = self.take(name)
        if value is not None and not any(
            value is one or (value == one and type(value) is type(one)) for one in entry.served
        ):
            ours = " or ".join(
                "true" if one is True else "false" if one is False else repr(one) for one in entry.served
            )
            raise errors.unsupported(self.at(name), "; ".join(filter(None, (f"only {ours} is served", entry.reason))))

    def close(self) -> None:
        """Says which fields are left.

        Raises:
            ApiError: There is one, and the object is read strictly.
        """
        for name, value in self._values.items():
            if name in self._taken or value is None:
                continue
            if self.strict:
                raise errors.unknown_parameter(errors.cut(self.at(name), 200))
            logger.debug("request: ignored the unknown field %s", errors.cut(repr(self.at(name)), 200))


def typed(value: Any, kind: type, path: str) -> Any:
    """Returns a value if it has the type that is wanted; an integer is not a boolean here, and the other way round.

    Raises:
        ApiError: It has another type.
    """
    if type(value) is not kind:
        where = path or "the request body"
        raise errors.invalid_type(path or None, f"{where} must be {_NAMES[kind]}, not {_kind(value)}")
    return value


def whole(value: Any) -> Any:
    """A number without a fraction as an integer, as JSON Schema has it: 2.0 is one. Other values as they are."""
    return int(value) if type(value) is float and value.is_integer() else value


def whole_numbers(values: Any) -> Any:
    """A list in which numbers without a fraction are integers."""
    if isinstance(values, list) and float in {*map(type, values)}:
        return [whole(value) for value in values]
    return values


def listed(names: tuple[str, ...]) -> str:
    """Names as an error lists them."""
    return ", ".join(repr(name) for name in names)


def template_kwargs(fields: Fields, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Variables for the chat template: those of the extension ``chat_template_kwargs`` and those a field stands for.

    Raises:
        ApiError: Both set one variable, to different values.
    """
    kwargs = fields.mapping("chat_template_kwargs") or {}
    for name, value in wanted.items():
        if kwargs.setdefault(name, value) != value:
            path = f"chat_template_kwargs.{name}"
            raise errors.invalid_value(path, f"{path} contradicts another field of the request")
    return kwargs


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return "a number" if type(value) is float else _NAMES.get(type(value), "something else")
