"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from nanobraid.errors import InvalidArgumentError


@dataclass(frozen=True)
class Settings:
    """Options of a server. Names follow vLLM's flags where it has one.

    Attributes:
        served_model_names: Names by which requests may ask for the model; answers bear the first. Empty: the name it
            was loaded by, of a file its name without folder and ending.
        api_keys: With keys, every route but ``/health`` needs one. Each has its own namespace of the prefix cache and
            of chunks, if there are several.
        allowed_origins: Web pages from elsewhere that may use the server (CORS); ``("*",)`` is all. Empty: none.
        max_body_bytes: Longest request; a longer one is answered with 413.
        max_header_bytes: Longest headers, all together.
        max_headers: Most headers.
        max_prompts: Most answers that one request to ``/v1/completions`` may ask for, prompts times ``n``.
        header_timeout_s: Seconds in which the headers of a request must have arrived.
        body_timeout_s: Seconds in which a request must have arrived after its first byte.
        request_timeout_s: Seconds that a request may take, waiting included; None is any time. Requests may ask for
            less with ``timeout_s``.
        drain_timeout_s: Seconds that running requests are given when the server is told to end.
        ping_interval_s: A stream that has nothing to say for so long sends a comment, so that proxies keep it open.
        strict: Refuse fields that are in no interface, instead of ignoring them with a line in the debug log.
        tool_call_parser: Name of the model's format of tool calls; None: found from its chat template.
        reasoning: Whether text in think tags goes to ``reasoning_content``; None: if the model has such tags.
        reasoning_field: Send it as ``reasoning`` too.
        page: Serve the page at ``/``.
        log_requests: Write a line to the access log for every request.
        max_chunks: Most registered chunks, all namespaces together.
    """

    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    max_header_bytes: int = 64 << 10
    max_headers: int = 100
    max_prompts: int = 1024
    header_timeout_s: float = 20.0
    body_timeout_s: float = 30.0
    request_timeout_s: float | None = None
    drain_timeout_s: float = 30.0
    ping_interval_s: float = 15.0
    strict: bool = False
    tool_call_parser: str | None = None
    reasoning: bool | None = None
    reasoning_field: bool = False
    page: bool = True
    log_requests: bool = True
    max_chunks: int = 4096

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_header_bytes", "max_headers", "max_prompts", "max_chunks"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be an integer >= 1, got {getattr(self, name)!r}")
        for name in ("header_timeout_s", "body_timeout_s", "request_timeout_s", "ping_interval_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidArgumentError(f"{name} must be a number of seconds > 0, got {value!r}")
        if not self.drain_timeout_s >= 0:
            raise InvalidArgumentError(f"drain_timeout_s must be seconds >= 0, got {self.drain_timeout_s!r}")
        if any(not key or not key.isascii() or any(c.isspace() for c in key) for key in self.api_keys):
            raise InvalidArgumentError("an API key must be ASCII text without spaces, and not empty")
