"""The page at `/`, and what it reads: requests that are there now and the figures of the engine."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nanobraid.async_engine import AsyncEngine

#: The page shows no more requests than these, the oldest first.
MAX_REQUESTS: Final = 50


class LiveRequest:
    """A request that has not ended.

    Attributes:
        request_id: As the client knows it.
        prompt_tokens: Of its prompt.
        tokens: Generated so far; whoever reads the pieces adds to it.
        running: Whether its first token is there; before that it waits or its prompt is computed.
    """

    __slots__ = ("_since", "prompt_tokens", "request_id", "running", "tokens")

    def __init__(self, request_id: str, prompt_tokens: int) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.tokens = 0
        self.running = False
        self._since = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since it was added."""
        return time.monotonic() - self._since


class LiveRequests:
    """The requests that have not ended. Belongs to the thread of the event loop."""

    def __init__(self) -> None:
        self._requests: dict[int, LiveRequest] = {}  # by identity: clients may give two requests one id
        self.started = time.monotonic()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[LiveRequest]:
        """The oldest first."""
        return iter(self._requests.values())

    def add(self, request_id: str, prompt_tokens: int) -> LiveRequest:
        """Adds a request; what is returned is to be kept up to date, and given to `remove`."""
        request = LiveRequest(request_id, prompt_tokens)
        self._requests[id(request)] = request
        return request

    def remove(self, request: LiveRequest) -> None:
        """Takes a request out. May be repeated."""
        self._requests.pop(id(request), None)


def state(engine: AsyncEngine, live: LiveRequests, model: str) -> dict[str, Any]:
    """What the page shows, as JSON values: no texts of requests are among them.

    Args:
        engine: Asked for its figures, which waits for no step.
        live: The requests.
        model: What clients call the model.

    Raises:
        InvalidArgumentError: The engine was closed.
    """
    requests = [
        {
            "id": request.request_id,
            "state": "running" if request.running else "waiting",
            "prompt_tokens": request.prompt_tokens,
            "generated_tokens": request.tokens,
            "age_s": round(request.age_s, 3),
        }
        for request, _ in zip(live, range(MAX_REQUESTS), strict=False)
    ]
    return {
        "model": model,
        "uptime_s": round(time.monotonic() - live.started, 3),
        "num_requests": len(live),
        "requests": requests,
        "stats": engine.stats(),
    }


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers.

    They let nothing run but the one script of the page and let it talk to nobody but this server.
    """
    body = resources.files(__package__).joinpath("page.html").read_bytes()
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of(body, b'script')}",
            f"style-src {_hash_of(body, b'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return body, headers


def _hash_of(body: bytes, tag: bytes) -> str:
    """Names the one element of this tag, for the content security policy."""
    (content,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), body, flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
