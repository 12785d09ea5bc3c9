"""What every refusal of the server must be, over an HTTP client and over a bare socket."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
ANY = "any"  # a text, so that names of tests are the same in every process


def check_envelope(status: int, body: Any) -> dict[str, Any]:
    """Asserts that a body is the envelope of an error; returns its inside."""
    assert set(body) == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str) and 0 < len(error["message"]) <= 2000
    assert "\n" not in error["message"]
    assert error["type"] == TYPES[status], error
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error


def refused(response: Any, status: int = 400, param: Any = ANY, code: Any = ANY) -> dict[str, Any]:
    """Asserts that a response of httpx is a refusal; returns the inside of its envelope."""
    assert response.status_code == status, (response.status_code, response.text[:500])
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = check_envelope(status, response.json())
    if param is not ANY:
        assert error["param"] == param, error
    if code is not ANY:
        assert error["code"] == code, error
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return error


def connect(server: Any, seconds: float = 10.0) -> socket.socket:
    """A connection to the server."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=seconds)


def post_head(length: int | str, path: str = "/v1/chat/completions", *more: str) -> bytes:
    """The headers of a request with a body of so many bytes."""
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json", *more]
    return "\r\n".join([*lines, f"content-length: {length}", "", ""]).encode()


def chat_bytes(**fields: Any) -> bytes:
    """A whole chat request."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0, **fields}
    data = json.dumps(body).encode()
    return post_head(len(data)) + data


def read_answer(connection: socket.socket, seconds: float = 10.0) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer with a content-length; status 0 if the connection just ends."""
    connection.settimeout(seconds)
    data = b""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        head, found, body = data.partition(b"\r\n\r\n")
        if found:
            lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            if len(body) >= int(headers.get("content-length", 0)):
                return int(lines[0].split()[1]), headers, body
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            piece = b""
        if not piece:
            return 0, {}, data
        data += piece
    raise AssertionError(f"no answer within {seconds} s, only {data[:200]!r}")


def refused_on(connection: socket.socket, status: int, seconds: float = 10.0) -> dict[str, Any]:
    """Asserts that a refusal arrives and that the connection is closed behind it."""
    found, headers, body = read_answer(connection, seconds)
    assert found == status, (found, body)
    assert headers["x-request-id"]
    return check_envelope(status, json.loads(body))


def is_closed(connection: socket.socket, seconds: float = 5.0) -> bool:
    """Whether the server closes the connection within the time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True
