"""A streamed answer of chat completions as the events of OpenAI's Responses."""

from __future__ import annotations

from typing import Any

from nanobraid.server import errors, responses

Json = dict[str, Any]
Event = tuple[str, Json]


class StreamTranslator:
    """Takes the chunks of one completion and makes the events of one response; not to be used twice.

    An item is done before the next one is added, so its events are never mixed with another's.

    Args:
        request: The body that `responses.to_chat` translated.
        id: The completion's, as its chunks have it.
        created: Likewise.
        model: Likewise.
    """

    def __init__(self, request: Json, *, id: str, created: int, model: str) -> None:
        self._name = responses.stem(id)
        self._response = responses.frame(request, id, created, model)
        self._output: list[Json] = []
        self._item: Json | None = None  # being written; its text grows in _text
        self._text: list[str] = []
        self._logprobs: list[Json] = []
        self._sent_logprobs = 0
        self._call = -1  # index of the tool call being written, as chat counts them
        self._finish_reason: str | None = None
        self._usage: Json | None = None
        self._sequence = 0
        self._closed = False

    def begin(self) -> list[Event]:
        """The events before the first chunk."""
        return [
            self._event("response.created", response=dict(self._response)),
            self._event("response.in_progress", response=dict(self._response)),
        ]

    def feed(self, chunk: Json) -> list[Event]:
        """The events that a ``chat.completion.chunk`` becomes; often one, sometimes none."""
        self._usage = chunk.get("usage") or self._usage
        if "nanobraid" in chunk:
            self._response["nanobraid"] = chunk["nanobraid"]
        events: list[Event] = []
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            if delta.get("reasoning_content"):
                events += self._reasoning(delta["reasoning_content"])
            else:
                self._logprobs += (choice.get("logprobs") or {}).get("content") or []
            if delta.get("content"):
                events += self._content(delta["content"])
            for call in delta.get("tool_calls") or []:
                events += self._tool_call(call)
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
        return events

    def finish(self) -> list[Event]:
        """The events after the last chunk."""
        if self._closed:
            return []
        if self._finish_reason is None:
            return self.fail(errors.internal())  # nobody may take half an answer for a whole one
        cut = self._finish_reason == "length"
        events: list[Event] = []
        if self._item is None and not self._output:
            events += self._open_message()
        events += self._close("incomplete" if cut else "completed")
        response = responses.ended(self._response, self._output, self._finish_reason, self._usage)
        self._closed = True
        return [*events, self._event("response.incomplete" if cut else "response.completed", response=response)]

    def fail(self, error: errors.ApiError) -> list[Event]:
        """The events of a stream that breaks; nothing may follow.

        The response fails, and an error event follows that has its fields both flat, as they are documented, and in the
        envelope of every other route: clients that do not know the first event raise on that.
        """
        if self._closed:
            return []
        self._closed = True
        if self._item is not None:
            self._output.append(self._written("incomplete"))
        failure = {"code": _failure(error), "message": error.message}
        response = {**self._response, "status": "failed", "error": failure, "output": self._output}
        flat = {"code": error.code, "message": error.message, "param": error.param}
        return [self._event("response.failed", response=response), self._event("error", **flat, **error.envelope())]

    def _event(self, kind: str, **data: Any) -> Event:
        event = kind, {"type": kind, "sequence_number": self._sequence, **data}
        self._sequence += 1
        return event

    def _place(self, content_index: int | None = 0) -> Json:
        assert self._item is not None
        place: Json = {"item_id": self._item["id"], "output_index": len(self._output)}
        return place if content_index is None else {**place, "content_index": content_index}

    def _open(self, item: Json) -> list[Event]:
        events = self._close("completed")
        self._item = item
        return [*events, self._event("response.output_item.added", output_index=len(self._output), item=dict(item))]

    def _reasoning(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self._item is None or self._item["type"] != "reasoning":
            item_id = f"rs_{self._name}_{self._position()}"
            events += self._open(responses.reasoning_item(item_id, None, "in_progress"))
            part = {"type": "reasoning_text", "text": ""}
            events.append(self._event("response.content_part.added", **self._place(), part=part))
        self._text.append(text)
        return [*events, self._event("response.reasoning_text.delta", **self._place(), delta=text)]

    def _open_message(self) -> list[Event]:
        events = self._open(responses.message_item(f"msg_{self._name}_{self._position()}", [], "in_progress"))
        part = responses.text_part("", [])
        return [*events, self._event("response.content_part.added", **self._place(), part=part)]

    def _content(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self._item is None or self._item["type"] != "message":
            # Of tokens whose text was held back until now, unless they were those of a call.
            waiting = [] if self._item is not None and self._item["type"] == "function_call" else self._logprobs
            events += self._open_message()
            self._logprobs = waiting
        self._text.append(text)
        new = responses.text_part("", self._logprobs[self._sent_logprobs :])["logprobs"]
        self._sent_logprobs = len(self._logprobs)
        delta = self._event("response.output_text.delta", **self._place(), delta=text, logprobs=new)
        return [*events, delta]

    def _tool_call(self, call: Json) -> list[Event]:
        events: list[Event] = []
        function = call.get("function") or {}
        if call["index"] != self._call:
            if call["index"] < self._call:
                raise ValueError(f"tool call {call['index']} goes on after tool call {self._call} has begun")
            self._call = call["index"]
            item_id = f"fc_{self._name}_{self._position()}"
            events += self._open(responses.call_item(item_id, call["id"], function["name"], "", "in_progress"))
        text = function.get("arguments")
        if not text:
            return events
        self._text.append(text)
        place = self._place(None)
        return [*events, self._event("response.function_call_arguments.delta", **place, delta=text)]

    def _position(self) -> int:
        """Place among the output of the item that comes next."""
        return len(self._output) + (self._item is not None)

    def _written(self, status: str) -> Json:
        """The open item with all that has been written of it."""
        assert self._item is not None
        text = "".join(self._text)
        item_id = self._item["id"]
        match self._item["type"]:
            case "reasoning":
                return responses.reasoning_item(item_id, text, status)
            case "message":
                return responses.message_item(item_id, [responses.text_part(text, self._logprobs)], status)
        return responses.call_item(item_id, self._item["call_id"], self._item["name"], text, status)

    def _close(self, status: str) -> list[Event]:
        """Ends the open item, if there is one."""
        if self._item is None:
            return []
        item = self._written(status)
        if item["type"] == "function_call":
            arguments = {"arguments": item["arguments"], "name": item["name"]}
            events = [self._event("response.function_call_arguments.done", **self._place(None), **arguments)]
        else:
            part = item["content"][0]
            done = {"text": part["text"]}
            kind = "response.reasoning_text.done"
            if item["type"] == "message":
                done["logprobs"] = part["logprobs"]
                kind = "response.output_text.done"
            events = [
                self._event(kind, **self._place(), **done),
                self._event("response.content_part.done", **self._place(), part=part),
            ]
        events.append(self._event("response.output_item.done", output_index=len(self._output), item=item))
        self._output.append(item)
        self._item = None
        self._text, self._logprobs, self._sent_logprobs = [], [], 0
        return events


def _failure(error: errors.ApiError) -> str:
    """The interface's name for what failed; it has few."""
    if error.status == 429:
        return "rate_limit_exceeded"
    return "invalid_prompt" if error.status < 500 else "server_error"
