"""Guided decoding: answers that a JSON schema, a regular expression, a list of choices or a grammar describes.

The grammars are those of the package ``llguidance``, which is optional. It says for every token of a vocabulary whether
it may come next; the engine masks the others before it draws.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from nanobraid._logging import logger
from nanobraid._schema_limits import check_schema
from nanobraid.errors import InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from nanobraid.tokenizer import Tokenizer

_MAX_BYTES = 1 << 20
_MAX_COMPILED = 64
_WORD_BITS = 32
# Without a limit a model may fill its answer with spaces and never come to the point.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \t\r\n]{1,40}"}


@dataclass(frozen=True)
class Guided:
    """What an answer must look like. Made by one of the class methods, given to `SamplingParams`.

    Attributes:
        kind: ``json_schema``, ``json_object``, ``regex``, ``choice`` or ``grammar``.
        source: What it was made from, as text; of choices a JSON list.
        control_tokens: Ids of the control tokens that answers may have.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    source: str
    _grammar: str = field(repr=False, compare=False)
    control_tokens: tuple[int, ...] = ()

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> Guided:
        """Answers are JSON values that fit a JSON schema.

        Between the parts of a value there may be up to 40 characters of whitespace, before and behind it none.

        Args:
            schema: The schema as a mapping or as JSON text.

        Raises:
            InvalidArgumentError: It is not a schema, has a keyword that llguidance does not implement, is too large or
                too deep, or no finite value fits it.
            UnsupportedError: The package ``llguidance`` is not installed.
        """
        if isinstance(schema, Mapping):
            try:
                text = json.dumps(schema, ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise InvalidArgumentError(f"guided: the JSON schema is not JSON: {error}") from None
        else:
            text = _checked_text("the JSON schema", schema, "a mapping or JSON text")
            try:
                json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InvalidArgumentError(f"guided: the JSON schema is not JSON: {error}") from None
        _checked_text("the JSON schema", text, "Unicode text")
        check_schema(json.loads(text), "guided: the JSON schema")
        return cls._checked("json_schema", text)

    @classmethod
    def json_object(cls) -> Guided:
        """Answers are JSON objects with any members.

        Raises:
            UnsupportedError: The package ``llguidance`` is not installed.
        """
        return cls._checked("json_object", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> Guided:
        r"""Answers match a regular expression from beginning to end.

        The syntax is that of Rust's ``regex`` crate, without look-around and back references; ``\d``, ``\w`` and ``\s``
        know all of Unicode.

        Raises:
            InvalidArgumentError: It is not a regular expression of that kind; the message is llguidance's.
            UnsupportedError: The package ``llguidance`` is not installed.
        """
        return cls._checked("regex", _checked_text("the regular expression", pattern, "a string"))

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Guided:
        """Answers are one of some strings.

        Raises:
            InvalidArgumentError: There are none, or one is not a string or empty.
            UnsupportedError: The package ``llguidance`` is not installed.
        """
        allowed = "a sequence of one or more strings, none of them empty"
        if isinstance(choices, str | bytes) or not isinstance(choices, Sequence) or not choices:
            raise InvalidArgumentError(f"guided: choices must be {allowed}, got {choices!r}")
        for i, text in enumerate(choices):
            if not _checked_text(f"choice {i}", text, "a string"):
                raise InvalidArgumentError(f"guided: choices must be {allowed}, but choice {i} is empty")
        return cls._checked("choice", _checked_text("choices", json.dumps(choices, ensure_ascii=False), "text"))

    @classmethod
    def grammar(cls, lark: str, *, control_tokens: Sequence[int] = ()) -> Guided:
        """Answers are what a grammar in llguidance's variant of Lark's notation generates.

        Args:
            lark: The grammar.
            control_tokens: Ids of those control tokens of the model that it may name, as ``<[5]>``. Whatever it names
                besides never comes up, and none that ends an answer can be among them: a request with one is refused.

        Raises:
            InvalidArgumentError: It is not such a grammar; the message is llguidance's.
            UnsupportedError: The package ``llguidance`` is not installed.
        """
        if isinstance(control_tokens, str | bytes) or not isinstance(control_tokens, Sequence):
            raise InvalidArgumentError(
                f"guided: control_tokens must be a sequence of token ids, got {control_tokens!r}"
            )
        for token_id in control_tokens:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise InvalidArgumentError(f"guided: control_tokens must be token ids >= 0, got {token_id!r}")
        return cls._checked("grammar", _checked_text("the grammar", lark, "a string"), tuple(control_tokens))

    def preceded_by(self, lark: str, *, control_tokens: Sequence[int] = ()) -> Guided:
        """Returns a grammar of which this one is a part.

        Args:
            lark: As for `grammar`; ``@answer`` stands for this one.
            control_tokens: As for `grammar`; those of this one may come up too.

        Raises:
            InvalidArgumentError: As `grammar`; or this one has been made by `preceded_by`.
            UnsupportedError: The package ``llguidance`` is not installed.
        """
        _checked_text("the grammar", lark, "a string")
        if "\n# answer: " in self.source:
            raise InvalidArgumentError("guided: a grammar is already in front of this one")
        # llguidance takes a grammar as JSON, or in Lark's notation.
        is_json = self._grammar.startswith("{")
        inner = json.loads(self._grammar)["grammars"] if is_json else [{"lark_grammar": self._grammar}]
        inner = [{**inner[0], "name": "answer"}, *inner[1:]]
        ids = (*control_tokens, *self.control_tokens)
        combined = json.dumps({"grammars": [{"lark_grammar": lark}, *inner]}, ensure_ascii=False)
        return self._validated("grammar", f"{lark}\n# answer: {self.kind} {self.source}", combined, ids)

    @classmethod
    def _checked(cls, kind: Any, source: str, control_tokens: tuple[int, ...] = ()) -> Guided:
        library = _llguidance()
        matcher = library.LLMatcher
        if kind == "regex":
            grammar = matcher.grammar_from_regex(source)
        elif kind == "grammar":
            grammar = matcher.grammar_from_lark(source)
        elif kind == "choice":
            literals = " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(source))
            grammar = matcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {literals}\n")
        else:
            try:
                grammar = matcher.grammar_from_json_schema(source, defaults=_JSON_OPTIONS)
            except ValueError as error:
                raise InvalidArgumentError(f"guided: llguidance refuses the JSON schema: {_line(str(error))}") from None
        return cls._validated(kind, source, grammar, control_tokens)

    @classmethod
    def _validated(cls, kind: Any, source: str, grammar: str, control_tokens: tuple[int, ...]) -> Guided:
        matcher = _llguidance().LLMatcher
        is_error, messages = matcher.validate_grammar_with_warnings(grammar, limits=_limits())
        if is_error:
            raise InvalidArgumentError(f"guided: llguidance refuses the {_NAMES[kind]}: {_line('; '.join(messages))}")
        for message in messages:
            if control_tokens and message.startswith("no tokenizer"):
                continue  # which tokens there are is known when a model is
            logger.warning("guided: llguidance says of the %s: %s", _NAMES[kind], _line(message))
        return cls(kind, source, grammar, control_tokens)


_NAMES = {
    "json_schema": "JSON schema",
    "json_object": "JSON schema",
    "regex": "regular expression",
    "choice": "choices",
    "grammar": "grammar",
}


class GuidedMatcher:
    """Follows one answer. The engine calls it, one call at a time, from any thread.

    Attributes:
        mask: uint32 words, a bit for each token of the vocabulary; `fill` writes them.
    """

    def __init__(self, matcher: Any, allowed_bits: NDArray[np.uint32], end_id: int) -> None:
        self._matcher = matcher
        self._allowed_bits = allowed_bits
        self._end_word, self._end_bit = end_id // _WORD_BITS, 1 << end_id % _WORD_BITS
        self.mask = allowed_bits ^ allowed_bits  # zeros of its type
        self._address, self._num_bytes = self.mask.ctypes.data, self.mask.nbytes

    def fill(self) -> bool:
        """Sets the bits of `mask` to the tokens that may come next; returns whether the answer may end here.

        Raises:
            InvalidArgumentError: The grammar has become too complex to follow.
        """
        self._matcher.unsafe_compute_mask_ptr(self._address, self._num_bytes)
        self._require_no_error()
        may_end = bool(int(self.mask[self._end_word]) & self._end_bit)
        self.mask &= self._allowed_bits
        return may_end

    def accept(self, token_id: int) -> bool:
        """Takes the next token; returns whether nothing may follow.

        Raises:
            InvalidArgumentError: The grammar does not allow the token, or has become too complex to follow.
        """
        self._matcher.consume_token(token_id)
        self._require_no_error()
        return bool(self._matcher.is_stopped())

    def _require_no_error(self) -> None:
        if self._matcher.is_error():
            raise InvalidArgumentError(f"guided: llguidance cannot go on: {_line(self._matcher.get_error())}")


class GuidedPlan:
    """A grammar prepared for a vocabulary. Safe to use from several threads."""

    def __init__(self, vocabulary: _Vocabulary, grammar: str, control_tokens: tuple[int, ...]) -> None:
        self._end_id = vocabulary.end_id
        self._allowed_bits = vocabulary.bits_with(control_tokens)
        self._prototype = _llguidance().LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=_limits())
        if self._prototype.is_error():
            raise InvalidArgumentError(f"guided: llguidance refuses the grammar: {_line(self._prototype.get_error())}")

    def matcher(self) -> GuidedMatcher:
        """Returns what follows one answer from its beginning."""
        return GuidedMatcher(self._prototype.deep_copy(), self._allowed_bits, self._end_id)


def plan_for(guided: Guided, tokenizer: Tokenizer) -> GuidedPlan:
    """Returns the grammar prepared for a model's vocabulary; what was asked for lately is remembered.

    Raises:
        InvalidArgumentError: The grammar needs what the vocabulary does not have.
        UnsupportedError: The package ``llguidance`` is not installed.
    """
    with _lock:
        vocabulary = _vocabularies.get(tokenizer)
        if vocabulary is None:
            vocabulary = _vocabularies[tokenizer] = _Vocabulary(tokenizer)
    return vocabulary.plan(guided._grammar, guided.control_tokens)


class _Vocabulary:
    """The tokens of a model as llguidance sees them: texts, and behind them one token that ends an answer.

    The model's own control tokens have no bytes there: no text makes them, a grammar has to name them by id. Which of
    them may end an answer is the engine's business.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        import numpy as np

        given = tokenizer.core.token_bytes()
        is_text = np.array([bool(token) for token in given])
        self.end_id = len(given)
        num_words = self.end_id // _WORD_BITS + 1
        bits = np.zeros(num_words * _WORD_BITS, dtype=bool)
        bits[: self.end_id] = is_text
        self.text_bits: NDArray[np.uint32] = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
        self._control_ids = frozenset(tokenizer.special_tokens.values()).difference(tokenizer.eos_token_ids)
        tokens = [token or b"" for token in given]
        self.tokenizer = _llguidance().LLTokenizer(_Wrapper(tokenizer, tokens, self.end_id))
        self._plans: OrderedDict[tuple[str, tuple[int, ...]], GuidedPlan] = OrderedDict()
        self._lock = threading.Lock()

    def bits_with(self, control_tokens: tuple[int, ...]) -> NDArray[np.uint32]:
        """A bit for each token that is text or one of these.

        Raises:
            InvalidArgumentError: One is not a control token, or ends answers.
        """
        bits: NDArray[np.uint32] = self.text_bits.copy()
        for token_id in control_tokens:
            if token_id not in self._control_ids:
                raise InvalidArgumentError(
                    f"guided: control_tokens must be control tokens of the model that end no answer, got {token_id}"
                )
            bits[token_id // _WORD_BITS] |= 1 << token_id % _WORD_BITS
        return bits

    def plan(self, grammar: str, control_tokens: tuple[int, ...]) -> GuidedPlan:
        key = grammar, control_tokens
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
        plan = GuidedPlan(self, grammar, control_tokens)
        with self._lock:
            self._plans[key] = plan
            if len(self._plans) > _MAX_COMPILED:
                self._plans.popitem(last=False)
        return plan


class _Wrapper:
    """What llguidance asks of a tokenizer. It encodes text that a grammar forces, so that its tokens are the usual."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], end_id: int) -> None:
        self._core = tokenizer.core  # not the tokenizer itself, whose end is the end of this
        self._text_tokens = tokens
        self._ids = {token: i for i, token in enumerate(tokens) if token}
        self._longest = max(map(len, tokens), default=0)
        self.eos_token_id = end_id
        self.special_token_ids = [end_id]
        self.tokens = [*tokens, b"<|end of the answer|>"]

    def __call__(self, text: str | bytes) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        ids = list(self._core.encode(data.decode(), False, False, False))
        if b"".join(self._text_tokens[i] for i in ids) == data:
            return ids
        return self._longest_tokens(data)  # normalisation has changed the text, or put a space in front of it

    def _longest_tokens(self, data: bytes) -> list[int]:
        ids = []
        begin = 0
        while begin < len(data):
            for end in range(min(len(data), begin + self._longest), begin, -1):
                if (token_id := self._ids.get(data[begin:end])) is not None:
                    ids.append(token_id)
                    break
            else:
                break  # no token spells the byte: what comes before it is all there is
            begin = end
        return ids


_lock = threading.Lock()
_vocabularies: WeakKeyDictionary[Tokenizer, _Vocabulary] = WeakKeyDictionary()


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise UnsupportedError(
            "guided decoding needs the package llguidance: pip install 'nanobraid[guided]'"
        ) from None
    return llguidance


def _limits() -> Any:
    """Other than llguidance's own: what a grammar may cost before the first token, and at each."""
    return _llguidance().LLParserLimits(
        max_grammar_size=100_000,
        initial_lexer_fuel=200_000,
        step_lexer_fuel=100_000,
        max_items_in_row=5000,  # four for each property that may come next
    )


def _line(message: str) -> str:
    """A message of several lines, in which places are marked by position, as one line."""
    return " ".join(message.split())


def _checked_text(what: str, text: object, allowed: str) -> str:
    if not isinstance(text, str):
        raise InvalidArgumentError(f"guided: {what} must be {allowed}, got {type(text).__name__}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"guided: {what} must be Unicode text, got {text[:50]!r}") from None
    if size > _MAX_BYTES:
        raise InvalidArgumentError(f"guided: {what} has {size} bytes; at most {_MAX_BYTES} are allowed")
    return text
