"""Reads a JSON object character by character and says at once where it stops being one."""

from __future__ import annotations

_SPACE = " \t\r\n"
_MAX_DEPTH = 200  # what is to read it afterwards has limits too
_WORDS = {"t": "true", "f": "false", "n": "null"}
# What may follow in a number, by its state; states that a number may end in are upper case.
_NUMBER: dict[str, dict[str, str]] = {
    "minus": {"0": "ZERO", **dict.fromkeys("123456789", "INT")},
    "ZERO": {".": "point", "e": "exp", "E": "exp"},
    "INT": {**dict.fromkeys("0123456789", "INT"), ".": "point", "e": "exp", "E": "exp"},
    "point": dict.fromkeys("0123456789", "FRACTION"),
    "FRACTION": {**dict.fromkeys("0123456789", "FRACTION"), "e": "exp", "E": "exp"},
    "exp": {**dict.fromkeys("0123456789", "EXP"), "+": "sign", "-": "sign"},
    "sign": dict.fromkeys("0123456789", "EXP"),
    "EXP": dict.fromkeys("0123456789", "EXP"),
}


class JsonScanner:
    """Follows one JSON object from its opening brace; RFC 8259, nested at most 200 deep.

    Attributes:
        depth: Open objects and lists.
        done: The object has been closed.
        key: The last key of the outermost object.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.done = False
        self.key = ""
        self._state = "begin"  # or what is expected: value, first (value or ]), key, first_key, colon, after; or inside
        self._stack: list[str] = []
        self._is_key = False
        self._key_text = ""
        self._rest = ""  # of a word, or hexadecimal digits to come
        self._number = ""

    @property
    def awaits_value(self) -> bool:
        """Whether the next character that is no space begins a value."""
        return self._state in ("value", "first")

    @property
    def after_value(self) -> bool:
        """Whether a value has just ended, other than a number, whose end only the next character shows."""
        return self._state == "after"

    def step(self, char: str) -> bool:
        """Takes the next character; False, and nothing changed, if it cannot come next."""
        return bool(getattr(self, "_in_" + self._state)(char))

    def _in_begin(self, char: str) -> bool:
        return char == "{" and self._open(char)

    def _in_end(self, _: str) -> bool:
        return False

    def _open(self, char: str) -> bool:
        if self.depth == _MAX_DEPTH:
            return False
        self._stack.append(char)
        self.depth += 1
        self._state = "first_key" if char == "{" else "first"
        return True

    def _close(self, char: str) -> bool:
        if self._stack[-1] + char not in ("{}", "[]"):
            return False
        self._stack.pop()
        self.depth -= 1
        self.done = not self.depth
        self._state = "end" if self.done else "after"
        return True

    def _in_first_key(self, char: str) -> bool:
        return (char == "}" and self._close(char)) or self._in_key(char)

    def _in_key(self, char: str) -> bool:
        if char == '"':
            self._state, self._is_key, self._key_text = "string", True, ""
            return True
        return char in _SPACE

    def _in_colon(self, char: str) -> bool:
        if char == ":":
            self._state = "value"
            return True
        return char in _SPACE

    def _in_first(self, char: str) -> bool:
        return (char == "]" and self._close(char)) or self._in_value(char)

    def _in_value(self, char: str) -> bool:
        if char in _SPACE:
            return True
        if char in "{[":
            return self._open(char)
        if char == '"':
            self._state, self._is_key = "string", False
        elif char in _WORDS:
            self._state, self._rest = "word", _WORDS[char][1:]
        elif char == "-":
            self._state, self._number = "number", "minus"
        elif char in _NUMBER["minus"]:
            self._state, self._number = "number", _NUMBER["minus"][char]
        else:
            return False
        return True

    def _in_after(self, char: str) -> bool:
        if char == ",":
            self._state = "key" if self._stack[-1] == "{" else "value"
            return True
        if char in "}]":
            return self._close(char)
        return char in _SPACE

    def _in_word(self, char: str) -> bool:
        if char != self._rest[0]:
            return False
        self._rest = self._rest[1:]
        if not self._rest:
            self._state = "after"
        return True

    def _in_number(self, char: str) -> bool:
        following = _NUMBER[self._number].get(char)
        if following is not None:
            self._number = following
            return True
        if not self._number.isupper() or not self._in_after(char):
            return False
        if char in _SPACE:
            self._state = "after"
        return True

    def _in_string(self, char: str) -> bool:
        if char < " ":
            return False
        if char == '"':
            if self._is_key and self.depth == 1:
                self.key = self._key_text
            self._state = "colon" if self._is_key else "after"
        elif char == "\\":
            self._state = "escape"
        elif self._is_key and self.depth == 1 and len(self._key_text) < 64:
            self._key_text += char
        return True

    def _in_escape(self, char: str) -> bool:
        if char == "u":
            self._state, self._rest = "hex", "0000"
        elif char in '"\\/bfnrt':
            self._state = "string"
        else:
            return False
        self._key_text += "\\"  # no key that is looked for is spelled with escapes
        return True

    def _in_hex(self, char: str) -> bool:
        if char not in "0123456789abcdefABCDEF":
            return False
        self._rest = self._rest[1:]
        if not self._rest:
            self._state = "string"
        return True
