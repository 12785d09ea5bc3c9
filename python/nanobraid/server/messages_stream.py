"""A streamed answer of chat completions as the events of Anthropic's Messages."""

from __future__ import annotations

from typing import Any

from nanobraid.server import errors, messages

Json = dict[str, Any]
Event = tuple[str, Json]


class StreamTranslator:
    """Takes the chunks of one completion and makes the events of one message; not to be used twice.

    Args:
        request: The body that `messages.to_chat` translated.
        id: The completion's, as its chunks have it.
        model: Likewise.
        input_tokens: Length of the prompt if it is known before the first chunk; the last event has it anyway.
    """

    def __init__(self, request: Json, *, id: str, model: str, input_tokens: int = 0) -> None:
        self._message = messages.frame(id, model)
        self._message["usage"]["input_tokens"] = input_tokens
        self._omits_thinking = messages.omits_thinking(request)
        self._index = -1  # of the block that was opened last
        self._open: str | None = None  # its type, while it is open
        self._call = -1  # index of the tool call being written, as chat counts them
        self._name = ""
        self._arguments: list[str] = []
        self._choice: Json | None = None  # the one that says why the answer ended
        self._usage: Json = {}
        self._nanobraid: Json | None = None
        self._closed = False

    def begin(self) -> list[Event]:
        """The events before the first chunk."""
        return [_event("message_start", message=self._message), self.ping()]

    def ping(self) -> Event:
        """An event that keeps the connection alive; allowed at any time after `begin`."""
        return _event("ping")

    def feed(self, chunk: Json) -> list[Event]:
        """The events that a ``chat.completion.chunk`` becomes; often one, sometimes none.

        Raises:
            ApiError: The model called a tool with something that is not a JSON object; hand it to `fail`.
        """
        self._usage = chunk.get("usage") or self._usage
        self._nanobraid = chunk.get("nanobraid", self._nanobraid)
        events: list[Event] = []
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            if delta.get("reasoning_content"):
                events += self._thinking(delta["reasoning_content"])
            if delta.get("content"):
                events += self._start("text", {"type": "text", "text": ""})
                events.append(self._delta("text_delta", text=delta["content"]))
            for call in delta.get("tool_calls") or []:
                events += self._tool_call(call)
            if choice.get("finish_reason"):
                self._choice = choice
        return events

    def finish(self) -> list[Event]:
        """The events after the last chunk.

        Raises:
            ApiError: As `feed`.
        """
        if self._closed:
            return []
        if self._choice is None:
            return self.fail(errors.internal())  # nobody may take half an answer for a whole one
        events = self._stop()
        extra = {} if self._nanobraid is None else {"nanobraid": self._nanobraid}
        end = messages.stop(self._choice, self._call >= 0)
        self._closed = True
        return [
            *events,
            _event("message_delta", delta=end, usage=messages.usage_from_chat(self._usage), **extra),
            _event("message_stop"),
        ]

    def fail(self, error: errors.ApiError) -> list[Event]:
        """The event of a stream that breaks; nothing may follow."""
        if self._closed:
            return []
        self._closed = True
        return [("error", messages.anthropic_error(error))]

    def _thinking(self, text: str) -> list[Event]:
        events = self._start("thinking", messages.thinking_block(""))
        return events if self._omits_thinking else [*events, self._delta("thinking_delta", thinking=text)]

    def _tool_call(self, call: Json) -> list[Event]:
        events: list[Event] = []
        function = call.get("function") or {}
        if call["index"] != self._call:
            if call["index"] < self._call:
                raise ValueError(f"tool call {call['index']} goes on after tool call {self._call} has begun")
            events += self._stop()
            self._call, self._name = call["index"], function["name"]
            events += self._start("tool_use", messages.tool_block(call["id"], self._name, {}))
        text = function.get("arguments")
        if not text:
            return events
        self._arguments.append(text)
        return [*events, self._delta("input_json_delta", partial_json=text)]

    def _start(self, kind: str, block: Json) -> list[Event]:
        if self._open == kind:
            return []
        events = self._stop()
        self._open = kind
        self._index += 1
        return [*events, _event("content_block_start", index=self._index, content_block=block)]

    def _delta(self, kind: str, **data: str) -> Event:
        return _event("content_block_delta", index=self._index, delta={"type": kind, **data})

    def _stop(self) -> list[Event]:
        """Ends the open block, if there is one."""
        if self._open is None:
            return []
        if self._open == "tool_use":
            cut = self._choice is not None and self._choice["finish_reason"] == "length"
            if not cut and messages.parsed_arguments("".join(self._arguments)) is None:
                raise messages.malformed_call(self._name)
            self._arguments = []
        self._open = None
        return [_event("content_block_stop", index=self._index)]


def _event(kind: str, **data: Any) -> Event:
    return kind, {"type": kind, **data}
