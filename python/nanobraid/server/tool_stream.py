"""Finds tool calls in an answer while it is written.

The text of an answer is given in pieces of any size; control tokens that mark calls are part of it (see
`SamplingParams.keep_special_token_ids`). However it is cut, the deltas joined are the same. Text is held back only
while it may still be the beginning of a call.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from nanobraid.server.json_scanner import JsonScanner

_SPACE = " \t\r\n"
_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
_MAX_NAME = 64


@dataclass(frozen=True)
class ContentDelta:
    """Text of the answer that belongs to no call."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins: its number from 0, its id, and the function. Its arguments follow as `ArgumentsDelta`."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """The next part of the JSON text of a call's arguments."""

    index: int
    text: str


Delta = ContentDelta | CallStart | ArgumentsDelta


@dataclass(frozen=True)
class ToolCall:
    """A whole call: its id, the function and the JSON text of its arguments, an object."""

    id: str
    name: str
    arguments: str


class Malformed(Exception):
    """What began like a call is none; or was one up to here, where `started`."""

    def __init__(self, *, started: bool) -> None:
        self.started = started


Steps = Generator[None, None, None]


class ToolParser:
    """Reads one answer. The formats are its subclasses.

    A call counts once its function's name is known and its arguments begin. What looks like a call before that and
    turns out to be none is content, all of it. If the JSON breaks later, or the answer ends inside it, the call stays
    cut short (`incomplete` says so) and the text from the wrong character on is content.

    Args:
        tools: OpenAI's tool objects, for formats whose values are read by the schema.

    Attributes:
        num_calls: Calls begun so far.
        incomplete: Indices of calls whose arguments did not end.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self.num_calls = 0
        self.incomplete: list[int] = []
        self._buffer = ""
        self._pos = 0  # what is before it has been read
        self._mark: int | None = None  # what is from it on may have to be given out as content
        self._ended = False
        self._deltas: list[Delta] = []
        self._steps = self._run()
        next(self._steps)

    def feed(self, text: str) -> list[Delta]:
        """Takes the next piece of the answer; returns what is certain now."""
        if not text or self._ended:
            return []
        consumed = self._pos if self._mark is None else min(self._mark, self._pos)
        self._buffer = self._buffer[consumed:] + text
        self._pos -= consumed
        if self._mark is not None:
            self._mark -= consumed
        next(self._steps, None)
        return self._take()

    def finish(self) -> list[Delta]:
        """Ends the answer; returns what was held back. To be called once."""
        self._ended = True
        next(self._steps, None)
        return self._take()

    def _take(self) -> list[Delta]:
        """The deltas since last time, neighbours of a kind joined."""
        joined: list[Delta] = []
        for delta in self._deltas:
            last = joined[-1] if joined else None
            if isinstance(delta, ContentDelta) and isinstance(last, ContentDelta):
                joined[-1] = ContentDelta(last.text + delta.text)
            elif isinstance(delta, ArgumentsDelta) and isinstance(last, ArgumentsDelta) and last.index == delta.index:
                joined[-1] = ArgumentsDelta(last.index, last.text + delta.text)
            else:
                joined.append(delta)
        self._deltas = []
        return joined

    # --- what the formats are made of: generators that pause where text is missing -----------------------------------

    def _run(self) -> Steps:
        """Reads the answer. A format says how."""
        raise NotImplementedError
        yield

    def _content(self, text: str) -> None:
        if text:
            self._deltas.append(ContentDelta(text))

    def _peek(self) -> Generator[None, None, str]:
        """The next character; an empty string at the end of the answer."""
        while self._pos == len(self._buffer):
            if self._ended:
                return ""
            yield
        return self._buffer[self._pos]

    def _spaces(self) -> Generator[None, None, str]:
        """Reads whitespace; the next character."""
        while True:
            char = yield from self._peek()
            if not char or char not in _SPACE:
                return char
            self._pos += 1

    def _literal(self, text: str) -> Generator[None, None, bool]:
        """Reads `text` if it comes next; otherwise nothing is read."""
        for read, wanted in enumerate(text):
            char = yield from self._peek()
            if char != wanted:
                self._pos -= read
                return False
            self._pos += 1
        return True

    def _word(self) -> Generator[None, None, str]:
        word = ""
        while len(word) <= _MAX_NAME and (char := (yield from self._peek())) in _NAME_CHARS:
            word += char
            self._pos += 1
        return word

    def _text_until(self, marker: str) -> Generator[None, None, bool]:
        """Gives out text up to the marker and reads that, with the mark in front of it; False at the end."""
        while True:
            found = self._buffer.find(marker, self._pos)
            if found >= 0:
                self._content(self._buffer[self._pos : found])
                self._mark, self._pos = found, found + len(marker)
                return True
            end = len(self._buffer)
            if not self._ended:
                end -= _overlap(self._buffer[self._pos :], marker)
            self._content(self._buffer[self._pos : end])
            self._pos = end
            if self._ended:
                return False
            yield

    def _give_back(self, error: Malformed, marker: str = "") -> None:
        """Goes on behind what was no call: that, or its marker at least, is content."""
        assert self._mark is not None
        if not error.started:
            self._pos = self._mark + len(marker)
        self._content(self._buffer[self._mark : self._pos])
        self._mark = None

    def _start(self, name: str) -> int:
        index = self.num_calls
        self.num_calls += 1
        self._mark = None
        self._deltas.append(CallStart(index, f"call_{secrets.token_hex(12)}", name))
        return index

    def _arguments(self, index: int, scanner: JsonScanner) -> Steps:
        """Reads and gives out the rest of a JSON object, up to the depth at which it began."""
        depth = scanner.depth
        while True:
            char = yield from self._peek()
            if not char or not scanner.step(char):
                self.incomplete.append(index)
                self._mark = self._pos
                raise Malformed(started=True)
            self._pos += 1
            self._deltas.append(ArgumentsDelta(index, char))
            if scanner.depth == depth:
                return

    def _call_object(self, keys: Sequence[str]) -> Steps:
        """Reads ``{"name": ..., "arguments": {...}}``, with the mark in front; its arguments have one of the keys."""
        scanner = JsonScanner()
        known = ("name", "type", "id", *keys)
        begin = self._pos - (self._mark or 0)
        name: str | None = None
        index: int | None = None
        value_begin: int | None = None  # counted from the mark, while there is one
        while not scanner.done:
            char = yield from self._peek()
            at_value = scanner.depth == 1 and scanner.awaits_value and char not in _SPACE
            if at_value and char == "{" and scanner.key in keys and name and index is None:
                index = self._start(name)
                yield from self._arguments(index, scanner)
                continue
            if not char or not scanner.step(char):
                if index is not None:
                    self._mark = self._pos
                raise Malformed(started=index is not None)
            self._pos += 1
            if index is not None:
                continue  # further members say nothing
            assert self._mark is not None
            if char == ":" and scanner.awaits_value and scanner.depth == 1 and scanner.key not in known:
                raise Malformed(started=False)  # some other object: it need not be held back to its end
            if at_value:
                value_begin = self._pos - 1 - self._mark
            elif value_begin is not None and char == '"' and scanner.after_value and scanner.depth == 1:
                if scanner.key == "name":
                    value = json.loads(self._buffer[self._mark + value_begin : self._pos])
                    name = value if _is_name(value) else None
                value_begin = None
        if index is None:
            self._whole_call(begin, keys)

    def _whole_call(self, begin: int, keys: Sequence[str]) -> None:
        """A call that could be seen only as a whole: with its name last, or its arguments as a string."""
        assert self._mark is not None
        try:
            call = json.loads(self._buffer[self._mark + begin : self._pos])
            name = call.get("name")
            arguments = next((call[key] for key in keys if key in call), None)
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (ValueError, RecursionError):  # numbers out of range and half surrogates among them
            raise Malformed(started=False) from None
        if not _is_name(name) or not isinstance(arguments, dict):
            raise Malformed(started=False)
        index = self._start(name)
        self._deltas.append(ArgumentsDelta(index, text))


def collect(deltas: Iterable[Delta]) -> tuple[str, list[ToolCall]]:
    """Returns the content and the calls of a whole answer."""
    content = []
    calls: list[tuple[CallStart, list[str]]] = []
    for delta in deltas:
        if isinstance(delta, ContentDelta):
            content.append(delta.text)
        elif isinstance(delta, CallStart):
            calls.append((delta, []))
        else:
            calls[delta.index][1].append(delta.text)
    return "".join(content), [ToolCall(start.id, start.name, "".join(parts)) for start, parts in calls]


def _is_name(value: object) -> TypeGuard[str]:
    if not isinstance(value, str) or not value:
        return False
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` with which the marker could begin."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


class TaggedParser(ToolParser):
    """Calls between ``<tool_call>`` and ``</tool_call>``, as often as there are any."""

    def _call(self) -> Steps:
        """Reads a call. A format says how."""
        raise NotImplementedError
        yield

    def _run(self) -> Steps:
        yield
        marker = "<tool_call>"
        while (yield from self._text_until(marker)):
            try:
                yield from self._call()
            except Malformed as error:
                self._give_back(error, marker)
                continue
            self._mark = self._pos
            char = yield from self._spaces()
            if (yield from self._literal("</tool_call>")):
                yield from self._between(marker)
            elif char:
                self._give_back(Malformed(started=True))

    def _between(self, marker: str) -> Steps:
        """Leaves out whitespace behind a call if another one or nothing follows."""
        self._mark = self._pos
        char = yield from self._spaces()
        if not char:
            return
        if (yield from self._literal(marker)):
            self._pos -= len(marker)
            self._mark = None
            return
        self._give_back(Malformed(started=True))


class HermesParser(TaggedParser):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

    def _call(self) -> Steps:
        if (yield from self._spaces()) != "{":
            raise Malformed(started=False)
        yield from self._call_object(("arguments",))


class Llama3Parser(ToolParser):
    """``{"name": ..., "parameters": {...}}`` as the whole answer or behind ``<|python_tag|>``, several with ``;``."""

    def _run(self) -> Steps:
        yield
        marker = "<|python_tag|>"
        keys = ("parameters", "arguments")
        self._mark = self._pos
        char = yield from self._spaces()
        used = ""
        begins = char == "{"
        if not begins:
            self._pos, self._mark = self._mark or 0, None
        while True:
            if not begins:
                if not (yield from self._text_until(marker)):
                    return
                used = marker
            begins = False
            try:
                while True:
                    if (yield from self._spaces()) != "{":
                        raise Malformed(started=False)
                    yield from self._call_object(keys)
                    self._mark = self._pos
                    used = ""
                    char = yield from self._spaces()
                    if char != ";":
                        break
                    self._pos += 1
            except Malformed as error:
                self._give_back(error, used)
                continue
            if not char:
                return
            self._give_back(Malformed(started=True))


class MistralParser(ToolParser):
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, and ``[TOOL_CALLS]name[ARGS]{...}`` repeated."""

    def _run(self) -> Steps:
        yield
        marker = "[TOOL_CALLS]"
        while (yield from self._text_until(marker)):
            first = self.num_calls
            try:
                if (yield from self._spaces()) == "[":
                    self._pos += 1
                    yield from self._list()
                else:
                    yield from self._named()
            except Malformed as error:
                self._give_back(error, "" if self.num_calls > first else marker)
                continue
            self._mark = self._pos
            char = yield from self._spaces()
            if not char:
                return
            self._give_back(Malformed(started=True))

    def _list(self) -> Steps:
        while True:
            if (yield from self._spaces()) != "{":
                raise Malformed(started=False)
            yield from self._call_object(("arguments",))
            self._mark = self._pos
            char = yield from self._spaces()
            if char not in (",", "]"):
                raise Malformed(started=True)
            self._pos += 1
            if char == "]":
                return

    def _named(self) -> Steps:
        name = yield from self._word()
        if (yield from self._literal("[CALL_ID]")):
            yield from self._word()
        yield from self._literal("[ARGS]")  # the newest templates leave it out
        if not name or (yield from self._spaces()) != "{":
            raise Malformed(started=False)
        yield from self._arguments(self._start(name), JsonScanner())
