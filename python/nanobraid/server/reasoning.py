"""Separates what a model thinks from what it answers, while it writes: ``<think>...</think>`` and then the answer.

A server asks `detect_reasoning` once per model. Per request: `prompt_opens_thinking` for the prompt, the option
`SamplingParams.keep_special_token_ids` from `keep_special_token_ids` (where the tags are control tokens they are then
in the text), `with_reasoning` around a grammar, and a `ThinkSplitter` for each answer; a `ToolParser` reads what that
calls content.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from nanobraid.guided import Guided
from nanobraid.tokenizer import Tokenizer

BEGIN, END = "<think>", "</think>"
_SPACE = " \t\r\n"
_TAIL = 32  # tokens at a prompt's end that a tag and the whitespace behind it may have

Part = tuple[Literal["reasoning", "content"], str]


def detect_reasoning(tokenizer: Tokenizer) -> bool:
    """Whether a model thinks in ``<think>`` tags: its template speaks of them, or they are tokens of its own."""
    return END in (tokenizer.chat_template or "") or tokenizer.find_token(END) is not None


def keep_special_token_ids(tokenizer: Tokenizer) -> list[int]:
    """The tags among the control tokens, to be kept in the text (`SamplingParams.keep_special_token_ids`)."""
    return [tokenizer.special_tokens[tag] for tag in (BEGIN, END) if tag in tokenizer.special_tokens]


def prompt_opens_thinking(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> bool:
    r"""Whether a rendered prompt ends inside the model's thoughts: with ``<think>`` and nothing but whitespace behind.

    Templates of DeepSeek-R1 and of Qwen3's thinking models end with ``<think>\n``; with thinking switched off they end
    with a closed block. No message can be at the end, except the assistant's with ``continue_final_message``.
    """
    tail = tokenizer.decode(list(prompt_token_ids[-_TAIL:]), skip_special_tokens=False)
    return tail.rstrip(_SPACE).endswith(BEGIN)


class ThinkSplitter:
    """Reads one answer. However its text is cut into pieces, the parts joined are the same.

    Thoughts are at the beginning of an answer or nowhere: behind whitespace at most, or at once if the prompt opened
    them. Newlines right behind either tag are left out, the tags too. Text is held back only while it may be a tag.

    Args:
        tokenizer: The model's, to count tokens.
        opened: Whether the prompt ends inside the thoughts, see `prompt_opens_thinking`.

    Attributes:
        reasoning_tokens: Tokens of the thoughts so far, the tags not among them: OpenAI's
            ``usage.completion_tokens_details.reasoning_tokens``. Exact where the tags are tokens of their own.
            Otherwise the tokens of pieces that have text of thoughts, those of tags within such pieces among them.
    """

    def __init__(self, tokenizer: Tokenizer, *, opened: bool = False) -> None:
        self.reasoning_tokens = 0
        self._state: Literal["before", "reasoning", "content"] = "reasoning" if opened else "before"
        self._drops_newlines = opened
        self._held = ""
        self._begin_id, self._end_id = tokenizer.find_token(BEGIN), tokenizer.find_token(END)
        self._counts_ids = self._begin_id is not None and self._end_id is not None
        self._in_thoughts: bool | None = True if opened else None  # by ids; None before anything but whitespace
        self._tokenizer = tokenizer

    def feed(self, text: str, token_ids: Sequence[int] = ()) -> list[Part]:
        """Takes the next piece of the answer, text and tokens (`StreamPiece`); returns what is certain now."""
        if self._counts_ids:
            for token_id in token_ids:
                self._count(token_id)
        self._held += text
        parts = self._split(ended=False)
        if not self._counts_ids and any(kind == "reasoning" for kind, _ in parts):
            self.reasoning_tokens += len(token_ids)
        return parts

    def finish(self) -> list[Part]:
        """Ends the answer; returns what was held back."""
        return self._split(ended=True)

    def _count(self, token_id: int) -> None:
        if self._in_thoughts is None:
            if token_id == self._begin_id:
                self._in_thoughts = True
            elif self._tokenizer.decode([token_id]).strip(_SPACE):
                self._in_thoughts = False
        elif self._in_thoughts:
            if token_id == self._end_id:
                self._in_thoughts = False
            else:
                self.reasoning_tokens += 1

    def _split(self, *, ended: bool) -> list[Part]:
        parts: list[Part] = []
        if self._state == "before":
            rest = self._held.lstrip(_SPACE)
            if rest.startswith(BEGIN):
                self._held = rest[len(BEGIN) :]
                self._state, self._drops_newlines = "reasoning", True
            elif BEGIN.startswith(rest) and not ended:
                return parts
            else:
                self._state = "content"
        if self._state == "reasoning":
            self._drop_newlines()
            thoughts, tag, rest = self._held.partition(END)
            if tag:
                self._held = rest
            else:
                size = 0 if ended else _held_back(thoughts)
                self._held = thoughts[len(thoughts) - size :]
                thoughts = thoughts[: len(thoughts) - size]
            if thoughts:
                parts.append(("reasoning", thoughts))
            if tag:
                self._state, self._drops_newlines = "content", True
        if self._state == "content":
            self._drop_newlines()
            if self._held:
                parts.append(("content", self._held))
                self._held = ""
        return parts

    def _drop_newlines(self) -> None:
        if self._drops_newlines:
            self._held = self._held.lstrip("\n")
            self._drops_newlines = not self._held


def _held_back(text: str) -> int:
    """Length of the longest end of the text with which the closing tag could begin."""
    return next((size for size in range(len(END) - 1, 0, -1) if text.endswith(END[:size])), 0)


def with_reasoning(guided: Guided, tokenizer: Tokenizer, *, opened: bool) -> Guided:
    """Returns a grammar that lets the model think before an answer that fits `guided`.

    Args:
        guided: What the answer must look like.
        tokenizer: The model's.
        opened: Whether the prompt ends inside the thoughts, see `prompt_opens_thinking`. They must be closed then;
            otherwise the model may begin with ``<think>`` or with the answer.
    """
    ids = tokenizer.special_tokens
    begin = f"<[{ids[BEGIN]}]>" if BEGIN in ids else json.dumps(BEGIN)
    thoughts = f"TEXT <[{ids[END]}]>" if END in ids else "thoughts"
    lark = f"start: {thoughts} SPACE @answer\n" if opened else f"start: ({begin} {thoughts} SPACE)? @answer\n"
    if END not in ids:
        lark += f"thoughts[lazy]: TEXT {json.dumps(END)}\n"
    lark += "SPACE: /[ \\t\\r\\n]{0,4}/\nTEXT: /(?s:.*)/\n"
    tags = [ids[tag] for tag in (BEGIN, END) if tag in ids and f"<[{ids[tag]}]>" in lark]
    return guided.preceded_by(lark, control_tokens=tags)
