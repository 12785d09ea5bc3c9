"""What a model writes, taken apart: thoughts, text and tool calls, as OpenAI's deltas."""

from __future__ import annotations

from typing import Any

from nanobraid.outputs import StreamPiece
from nanobraid.server.reasoning import ThinkSplitter
from nanobraid.server.tool_stream import ArgumentsDelta, CallStart, ContentDelta, ToolParser
from nanobraid.server.tool_stream import Delta as ToolDelta

Delta = dict[str, Any]


class Channel:
    """One answer.

    Args:
        splitter: Takes thoughts out; None if the model has none.
        parser: Takes tool calls out; None if there may be none.
        reasoning_field: Send thoughts as ``reasoning`` too.

    Attributes:
        num_calls: Tool calls so far.
    """

    def __init__(self, splitter: ThinkSplitter | None, parser: ToolParser | None, *, reasoning_field: bool) -> None:
        self._splitter = splitter
        self._parser = parser
        self._reasoning_field = reasoning_field
        self.num_calls = 0

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of thoughts so far."""
        return 0 if self._splitter is None else self._splitter.reasoning_tokens

    def feed(self, piece: StreamPiece) -> list[Delta]:
        """What a piece adds; with the last one, what was held back too."""
        ended = piece.finish_reason is not None
        if self._splitter is None:
            return self._content(piece.text, ended)
        parts = self._splitter.feed(piece.text, piece.token_ids)
        if ended:
            parts += self._splitter.finish()
        deltas: list[Delta] = []
        for kind, text in parts:
            if kind == "reasoning":
                deltas.append({"reasoning_content": text} | ({"reasoning": text} if self._reasoning_field else {}))
            else:
                deltas += self._content(text, False)
        return deltas + self._content("", True) if ended else deltas

    def _content(self, text: str, ended: bool) -> list[Delta]:
        if self._parser is None:
            return [{"content": text}] if text else []
        found = self._parser.feed(text) if text else []
        if ended:
            found += self._parser.finish()
        return [self._delta(delta) for delta in found]

    def _delta(self, delta: ToolDelta) -> Delta:
        match delta:
            case ContentDelta():
                return {"content": delta.text}
            case CallStart():
                self.num_calls += 1
                call: Delta = {"index": delta.index, "id": delta.id, "type": "function"}
                return {"tool_calls": [call | {"function": {"name": delta.name, "arguments": ""}}]}
            case ArgumentsDelta():
                return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
