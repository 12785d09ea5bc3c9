"""Chat completions that say what a test wrote down, and a server that plays them through a translation.

The chunks have the shape that the interface of chat completions promises; nothing here knows a model.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nanobraid.server import errors

Json = dict[str, Any]
Event = tuple[str, Json]

ID, CREATED, MODEL = "chatcmpl-0a1b", 1_700_000_000, "smollm2-135m"
USAGE = {
    "prompt_tokens": 20,
    "completion_tokens": 7,
    "total_tokens": 27,
    "prompt_tokens_details": {"cached_tokens": 16},
    "completion_tokens_details": {"reasoning_tokens": 3},
}


def text(*pieces: str) -> list[Json]:
    return [{"content": piece} for piece in pieces]


def thought(*pieces: str) -> list[Json]:
    return [{"reasoning_content": piece} for piece in pieces]


def call(index: int, name: str, *pieces: str) -> list[Json]:
    head = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
    rest = [{"index": index, "function": {"arguments": piece}} for piece in pieces]
    return [{"tool_calls": [one]} for one in (head, *rest)]


def chunks(*deltas: list[Json], finish: str | None = "stop", **choice: Any) -> list[Json | errors.ApiError]:
    """The chunks of a completion; `choice` is added to the last choice."""
    flat = [{"role": "assistant", "content": ""}, *(one for group in deltas for one in group)]
    result: list[Json | errors.ApiError] = [chunk(delta) for delta in flat]
    if finish is not None:
        result += [chunk({}, finish_reason=finish, **choice), {**head(), "choices": [], "usage": USAGE}]
    return result


def head(kind: str = "chat.completion.chunk") -> Json:
    return {"id": ID, "object": kind, "created": CREATED, "model": MODEL}


def chunk(delta: Json, finish_reason: str | None = None, **choice: Any) -> Json:
    return {
        **head(),
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason, **choice}],
        "usage": None,
    }


def completion(script: list[Json | errors.ApiError]) -> Json:
    """What the chunks are as one ``chat.completion``."""
    message: Json = {"role": "assistant", "content": ""}
    choice: Json = {"index": 0, "message": message, "logprobs": None}
    result: Json = {**head("chat.completion"), "choices": [choice]}
    for one in script:
        if isinstance(one, errors.ApiError):
            raise one
        result["usage"] = one["usage"]
        for found in one["choices"]:
            delta = found["delta"]
            for name in ("content", "reasoning_content"):
                if delta.get(name):
                    message[name] = message.get(name, "") + delta[name]
            for piece in delta.get("tool_calls", []):
                calls = message.setdefault("tool_calls", [])
                if piece["index"] == len(calls):
                    calls.append({"id": piece["id"], "type": "function", "function": dict(piece["function"])})
                else:
                    calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
            if found.get("logprobs"):
                choice["logprobs"] = choice["logprobs"] or {"content": []}
                choice["logprobs"]["content"] += found["logprobs"]["content"]
            choice |= {name: found[name] for name in ("finish_reason", "stop_reason") if name in found}
    return result


def events(translator: Any, script: list[Json | errors.ApiError]) -> list[Event]:
    """What a server sends that plays a script."""
    result = list(translator.begin())
    for one in script:
        try:
            if isinstance(one, errors.ApiError):
                raise one
            result += translator.feed(one)
        except errors.ApiError as error:
            return [*result, *translator.fail(error)]
    try:
        return [*result, *translator.finish()]
    except errors.ApiError as error:
        return [*result, *translator.fail(error)]


@dataclass
class Route:
    """How one interface is translated."""

    to_chat: Callable[[Any], Json]
    from_chat: Callable[[Json, Json], Json]
    translator: Callable[[Json], Any]
    error: Callable[[errors.ApiError], Json]


@dataclass
class Playing:
    """A server at work; `script` is played to whoever asks, `asked` are the translated requests."""

    url: str
    script: list[Json | errors.ApiError] = field(default_factory=list)
    asked: list[Json] = field(default_factory=list)


@contextmanager
def serving(routes: dict[str, Route], answers: dict[str, Callable[[Any], Json]] | None = None) -> Iterator[Playing]:
    """Serves translations on a port of its own; `answers` are routes that answer at once."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            path = self.path.partition("?")[0]
            if answers and path in answers:
                self._json(200, answers[path](body))
                return
            route = routes[path]
            try:
                chat = route.to_chat(body)
                playing.asked.append(chat)
                if chat.get("stream"):
                    self._stream(events(route.translator(body), playing.script))
                else:
                    self._json(200, route.from_chat(completion(playing.script), body))
            except errors.ApiError as error:
                self._json(error.status, route.error(error))

        def _json(self, status: int, body: Json) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, sent: list[Event]) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            for name, data in sent:
                self.wfile.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    playing = Playing(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield playing
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
