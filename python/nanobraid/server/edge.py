"""The outermost layer: request ids, keys, origins, hosts, limits of bodies, and the access log."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from nanobraid.server import errors
from nanobraid.server.errors import ApiError
from nanobraid.server.messages import anthropic_error
from nanobraid.server.parsing import to_json
from nanobraid.server.service import Caller, Service
from nanobraid.server.sse import Message, Receive, Scope, Send, error_of

access_log = logging.getLogger("nanobraid.access")

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}\Z")
_OPEN = ("/health", "/")  # the page holds nothing but itself
_CORS_METHODS = b"GET, POST, DELETE, OPTIONS"
_CORS_HEADERS = b"authorization, content-type, x-api-key, x-request-id, anthropic-version, anthropic-beta"

Headers = dict[bytes, list[bytes]]


def json_answer(status: int, body: Any, headers: dict[str, str] | None = None) -> Any:
    """An ASGI answer of JSON."""
    return plain_answer(status, to_json(body), {"content-type": "application/json", **(headers or {})})


def plain_answer(status: int, data: bytes, headers: dict[str, str]) -> Any:
    """An ASGI answer of bytes."""
    head = [(b"content-length", str(len(data)).encode())]
    head += [(name.encode(), value.encode()) for name, value in headers.items()]

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": data})

    return answer


def is_anthropic(path: str) -> bool:
    """Whether a route speaks Anthropic's language, errors included."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def error_answer(error: ApiError, path: str = "") -> Any:
    """An ASGI answer that says what is wrong."""
    body = error.envelope()
    if is_anthropic(path):
        body = anthropic_error(error)
    return json_answer(error.status, body, error.headers())


class Edge:
    """The ASGI application around the routes.

    Args:
        app: The routes.
        service: The model.
        allowed_hosts: Names in the header ``Host`` that are served; None is all. A server on loopback without keys has
            them, so that no web page can reach it by a name of its own (DNS rebinding).
        patterns: What answers a path, to the pattern of such paths, for the metrics.

    Attributes:
        service: The model.
    """

    def __init__(
        self,
        app: Any,
        service: Service,
        allowed_hosts: frozenset[str] | None = None,
        patterns: Mapping[Any, str] | None = None,
    ) -> None:
        self._app = app
        self._patterns = patterns or {}
        self.service = service
        self._hosts = allowed_hosts
        settings = service.settings
        self._keys = [(hashlib.sha256(key.encode()).digest(), service.namespace_of(key)) for key in settings.api_keys]
        self._origins = frozenset(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1003})
            return
        headers: Headers = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        given = headers.get(b"x-request-id", [b""])[0]
        request_id = given if _REQUEST_ID.match(given) else b"req-" + secrets.token_hex(12).encode()
        caller = Caller(request_id.decode())
        scope["nanobraid"] = caller
        scope["nanobraid.send"] = send  # without the layers between, see EventStream
        extra = [(b"x-request-id", request_id), *self._cors(headers)]
        status = 0
        begin = time.perf_counter()

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        path = scope["path"]
        is_work = scope["method"] == "POST" and path.startswith("/v1/")
        entered = False
        try:
            refusal = self._refusal(scope["method"], path, headers, caller)
            if refusal is None and is_work:
                try:
                    self.service.enter()
                    entered = True
                except ApiError as error:
                    refusal = error_answer(error, path)
            await (refusal or self._app)(scope, receive, send_with_headers)
        except Exception as error:
            answer = error_of(error)
            if status:
                raise  # it has begun: all that can be done is to cut it off
            await error_answer(answer, path)(scope, receive, send_with_headers)
        finally:
            if entered:
                self.service.leave()
            pattern = self._patterns.get(scope.get("endpoint"))
            self.service.metrics.http_request(pattern, scope["method"], status or 499)
            self._log(scope, caller, status, time.perf_counter() - begin)

    def _refusal(self, method: str, path: str, headers: Headers, caller: Caller) -> Any:
        """What is answered instead of going on, if anything."""
        if self._hosts is not None:
            host = headers.get(b"host", [b""])[0].decode("latin-1").lower()
            name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
            if name not in self._hosts:
                return error_answer(ApiError(403, "this server is for this machine only; --host opens it"), path)
        if method == "OPTIONS" and b"access-control-request-method" in headers and self._cors(headers):
            return _preflight
        if self._keys and path not in _OPEN:
            namespace = self._checked_key(headers)
            if namespace is None:
                return error_answer(errors.invalid_api_key(), path)
            caller.namespace = namespace
        length = headers.get(b"content-length", [b"0"])[0]
        if length.isdigit() and int(length) > self.service.settings.max_body_bytes:
            return error_answer(errors.too_large(self.service.settings.max_body_bytes), path)
        return None

    def _checked_key(self, headers: Headers) -> str | None:
        """The namespace of the caller's key. Compares with every key, in constant time."""
        given = headers.get(b"authorization", []) + headers.get(b"x-api-key", [])
        if len(given) != 1:
            return None
        value = given[0]
        if b"authorization" in headers:
            scheme, _, value = value.partition(b" ")
            if scheme.lower() != b"bearer":
                return None
        digest = hashlib.sha256(value.strip()).digest()
        found = None
        for known, namespace in self._keys:
            if hmac.compare_digest(known, digest):
                found = namespace
        return found

    def _cors(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        origin = headers.get(b"origin", [b""])[0]
        if not origin or not self._origins:
            return []
        if "*" in self._origins:
            return [(b"access-control-allow-origin", b"*")]
        if origin.decode("latin-1") not in self._origins:
            return []
        return [(b"access-control-allow-origin", origin), (b"vary", b"origin")]

    def _log(self, scope: Scope, caller: Caller, status: int, seconds: float) -> None:
        if not self.service.settings.log_requests or not access_log.isEnabledFor(logging.INFO):
            return
        client = scope.get("client")
        access_log.info(
            "request",
            extra={
                "access": {
                    "client": f"{client[0]}:{client[1]}" if client else "",
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status or 499,  # the client left before an answer
                    "ms": round(1e3 * seconds, 1),
                    "request_id": caller.request_id,
                    **caller.log,
                }
            },
        )


async def _preflight(scope: Scope, receive: Receive, send: Send) -> None:
    head = [
        (b"access-control-allow-methods", _CORS_METHODS),
        (b"access-control-allow-headers", _CORS_HEADERS),
        (b"access-control-max-age", b"600"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": head})
    await send({"type": "http.response.body", "body": b""})
