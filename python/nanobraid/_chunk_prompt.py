"""From messages to a prompt in which pieces of the messages are chunks.

The prompt is what the model's chat template makes of the messages. Where its tokens contain those of a chunk, exactly
where the chunk's text stands, they are left as they are and marked. Text at a seam may have been merged with the
chunk's own (a full stop with a line break, say). Such tokens are not part of the chunk to begin with (see `core_of`),
so this is rare; where it happens all the same, the chunk keeps its tokens and the text on both sides is encoded alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nanobraid.chat_template import ChatTemplate, Message, check_messages
from nanobraid.composition import Segment
from nanobraid.errors import UnsupportedError
from nanobraid.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nanobraid._chat_inputs import ChatOptions

#: What stands between the contexts, and between them and the query, in the user's message.
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Core:
    """Tokens of a text that are the same whatever paragraphs stand around it.

    Attributes:
        begin: First character that they stand for.
        end: Past the last one.
        token_ids: The tokens.
        anchor: Tokens that stand before them while they are computed.
        slice_len: A chunk for each so many tokens; 0 is one for all.
    """

    begin: int
    end: int
    token_ids: tuple[int, ...]
    anchor: tuple[int, ...] = ()
    slice_len: int = 0

    def slices(self) -> list[tuple[int, ...]]:
        """The tokens of each chunk."""
        step = self.slice_len or len(self.token_ids)
        return [self.token_ids[i : i + step] for i in range(0, len(self.token_ids), step)]


def moved(core: Core, shift: int, anchor: Sequence[int] | None = None) -> Core:
    """The same tokens for other characters."""
    return replace(
        core,
        begin=core.begin + shift,
        end=core.end + shift,
        anchor=core.anchor if anchor is None else tuple(anchor),
    )


def core_of(tokenizer: Tokenizer, text: str) -> Core:
    """Returns the tokens of a text that are within it when it is a paragraph between others.

    White space at its ends, with a token that begins in it, is left out: templates may cut it off, and it is encoded
    together with what stands beside it. So there may be no tokens.

    Raises:
        InvalidArgumentError: It is not a string, or not Unicode.
    """
    before, after = SEPARATOR, SEPARATOR + "A"
    encoding = tokenizer.encode_with_offsets(before + text + after, add_special_tokens=False)
    low = len(before) + len(text) - len(text.lstrip())
    high = len(before) + len(text.rstrip())
    inside = [
        (token, begin - len(before), end - len(before))
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
        if low <= begin < end <= high
    ]
    if not inside:
        return Core(0, 0, ())
    return Core(inside[0][1], inside[-1][2], tuple(token for token, _, _ in inside))


@dataclass(frozen=True)
class Piece:
    """Tokens of a prompt; with a core, chunks."""

    token_ids: tuple[int, ...]
    core: Core | None = None


def place(tokenizer: Tokenizer, text: str, cores: Sequence[Core], *, at_start: bool) -> list[Piece]:
    """Encodes a text of which some characters have given tokens.

    Args:
        tokenizer: The model's.
        text: The text.
        cores: In order, none overlapping; their `begin` and `end` are characters of `text`.
        at_start: As for `Tokenizer.encode`.
    """
    pieces: list[Piece] = []
    while text:
        placed, failed = _place_all(tokenizer, text, cores, at_start)
        if failed is None:
            return pieces + placed
        core = cores[failed]
        pieces += place(tokenizer, text[: core.begin], cores[:failed], at_start=at_start)
        pieces.append(Piece(core.token_ids, core))
        text, cores, at_start = text[core.end :], [moved(c, -core.end) for c in cores[failed + 1 :]], False
    return pieces


def _place_all(
    tokenizer: Tokenizer, text: str, cores: Sequence[Core], at_start: bool
) -> tuple[list[Piece], int | None]:
    """The text's own tokens in pieces; or the index of the first core that they do not contain."""
    ids = tokenizer.encode(text, add_special_tokens=False, at_start=at_start)
    pieces: list[Piece] = []
    token, char = 0, 0
    for i, core in enumerate(cores):
        begin = _find(tokenizer, ids, token, core.token_ids, text[char : core.begin])
        if begin is None:
            return [], i
        if begin > token:
            pieces.append(Piece(tuple(ids[token:begin])))
        pieces.append(Piece(core.token_ids, core))
        token, char = begin + len(core.token_ids), core.end
    if token < len(ids):
        pieces.append(Piece(tuple(ids[token:])))
    return pieces, None


def _find(tokenizer: Tokenizer, ids: list[int], start: int, wanted: tuple[int, ...], gap: str) -> int | None:
    """Where the wanted tokens stand in `ids`, behind tokens from `start` on that spell `gap`."""
    size = len(wanted)
    for i in range(start, len(ids) - size + 1):
        if ids[i] == wanted[0] and tuple(ids[i : i + size]) == wanted:
            # The space that SentencePiece begins a text with may be missing in what tokens spell.
            spelled = tokenizer.decode(ids[start:i], skip_special_tokens=False)
            if spelled.lstrip(" ") == gap.lstrip(" "):
                return i
    return None


def compose_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    cores: Sequence[Sequence[Core]],
    **options: Unpack[ChatOptions],
) -> list[Piece]:
    """Returns a conversation's prompt, ready to be answered, in pieces.

    Args:
        template: The model's.
        tokenizer: The model's.
        messages: The conversation.
        cores: For each message the chunks in its content.
        options: As for `ChatTemplate.encode`.

    Raises:
        UnsupportedError: The template changes the text of a message that has chunks.
        InvalidArgumentError, ChatTemplateError: As `ChatTemplate.encode`.
    """
    parts = template.parts(messages, tokenizer, **options)
    placed: dict[int, list[Core]] = {}
    part, end = len(parts) - 1, None
    for i, message in reversed(list(enumerate(check_messages(messages)))):
        content = message["content"] or ""
        wanted = content.strip()
        if not wanted:
            continue
        found = _rfind(parts, part, end, wanted)
        if found is None:
            if cores[i]:
                raise UnsupportedError(f"the chat template changes the text of message {i}, which has chunks")
            continue
        part, end = found
        text = parts[part]
        assert isinstance(text, str)
        shift = end - (len(content) - len(content.lstrip()))
        # A core with white space that the template has cut off is not there as a whole.
        whole = [
            moved(core, shift)
            for core in cores[i]
            if core.begin + shift >= 0 and text[core.begin + shift : core.end + shift] == content[core.begin : core.end]
        ]
        placed[part] = whole + placed.get(part, [])
    pieces: list[Piece] = []
    for i, what in enumerate(parts):
        if isinstance(what, int):
            pieces.append(Piece((what,)))
        else:
            pieces += place(tokenizer, what, placed.get(i, []), at_start=not pieces)
    return pieces


def _rfind(parts: list[int | str], part: int, end: int | None, wanted: str) -> tuple[int, int] | None:
    """The last place of a text in the parts before (part, end)."""
    for i in range(part, -1, -1):
        text = parts[i]
        if isinstance(text, str):
            at = text.rfind(wanted, 0, end if i == part else None)
            if at >= 0:
                return i, at
    return None


def segments_of(
    pieces: Sequence[Piece], wanted: Callable[[tuple[tuple[int, ...], tuple[int, ...]]], bool] | None = None
) -> list[Segment]:
    """The pieces for `LLM.compose`, neighbours without a chunk as one.

    Args:
        pieces: The prompt.
        wanted: Whether tokens with this anchor are to be a chunk; None is always.
    """
    segments: list[Segment] = []
    plain: list[int] = []
    for piece in pieces:
        anchor = piece.core.anchor if piece.core is not None else ()
        for ids in [piece.token_ids] if piece.core is None else piece.core.slices():
            if piece.core is None or (wanted is not None and not wanted((ids, anchor))):
                plain += ids
                continue
            if plain:
                segments.append(Segment(plain))
                plain = []
            segments.append(Segment(ids, chunk=True, anchor=anchor))
    if plain:
        segments.append(Segment(plain))
    return segments
