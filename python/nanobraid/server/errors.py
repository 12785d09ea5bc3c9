"""Errors of the HTTP interface: one envelope, one table, on every path.

What a client sees is one of the messages that this module or a check of the request made. The text of an exception that
nobody foresaw stays in the log.
"""

from __future__ import annotations

from typing import Any

from nanobraid import errors as core

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
_MAX_MESSAGE = 2000


class ApiError(Exception):
    """An answer that is not 2xx.

    Args:
        status: HTTP status.
        message: For the user; one line.
        type: OpenAI's class of error.
        param: Path of the field that is wrong, as ``messages[0].role``; None if it is none.
        code: OpenAI's name of the error, or None.
        retry_after: Seconds after which trying again makes sense, sent as ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        message = cut(" ".join(message.split()), _MAX_MESSAGE)
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def envelope(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that belong to the answer."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (408, 413):
            headers["connection"] = "close"  # the rest of the request is not read
        if self.status == 504:
            headers["x-should-retry"] = "false"  # clients would, and it would take as long again
        return headers


def cut(text: str, most: int) -> str:
    """A text of at most so many characters, which says so if it was longer."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def invalid_value(param: str | None, message: str) -> ApiError:
    """A field has a value that is not allowed."""
    return ApiError(400, message, param=param, code="invalid_value")


def invalid_type(param: str | None, message: str) -> ApiError:
    """A field has a value of another type."""
    return ApiError(400, message, param=param, code="invalid_type")


def missing(param: str) -> ApiError:
    """A field that is needed is not there."""
    return ApiError(400, f"you must provide the parameter {param}", param=param, code="missing_required_parameter")


def unsupported(param: str, reason: str = "") -> ApiError:
    """A field of the interface that nanobraid does not implement, or not with this value."""
    why = f": {reason}" if reason else ""
    return ApiError(400, f"{param} is not supported{why}", param=param, code="unsupported_parameter")


def unknown_parameter(param: str) -> ApiError:
    """A field that is in no interface, where only known ones are allowed (``--strict``)."""
    return ApiError(400, f"unknown parameter {param}", param=param, code="unknown_parameter")


def model_not_found(model: str) -> ApiError:
    """There is no such model here."""
    return ApiError(404, f"the model {cut(model, 200)!r} does not exist", param="model", code="model_not_found")


def context_length_exceeded(param: str, num_prompt: int, num_new: int, max_model_len: int) -> ApiError:
    """Prompt and answer do not fit the context.

    Args:
        param: The field that holds the prompt.
        num_prompt: Its tokens.
        num_new: Tokens wanted besides.
        max_model_len: Tokens that fit.
    """
    total = num_prompt + num_new
    return ApiError(
        400,
        f"this model's maximum context length is {max_model_len} tokens, but you requested {total} tokens "
        f"({num_prompt} in the {param}, {num_new} in the completion)",
        param=param,
        code="context_length_exceeded",
    )


def invalid_api_key() -> ApiError:
    """No key, a wrong one, or something else than a key."""
    return ApiError(
        401, "missing or invalid API key: send the header 'Authorization: Bearer KEY'", code="invalid_api_key"
    )


def not_found() -> ApiError:
    """No such route."""
    return ApiError(404, "there is no such route")


def method_not_allowed() -> ApiError:
    """A route that takes other methods."""
    return ApiError(405, "this route does not take that method")


def unsupported_media_type() -> ApiError:
    """A body that does not say that it is JSON."""
    return ApiError(415, "the content-type of the request must be application/json")


def too_large(most: int) -> ApiError:
    """A body beyond the limit."""
    return ApiError(413, f"the request is larger than {most} bytes", code="request_too_large")


def overloaded(message: str, retry_after: int) -> ApiError:
    """The queue is full, or the server is shutting down."""
    return ApiError(503, message, type=SERVER_ERROR, code="server_is_overloaded", retry_after=retry_after)


def timed_out() -> ApiError:
    """A request took longer than the server gives it, and has nothing to show."""
    return ApiError(504, "the request took longer than this server allows", type=SERVER_ERROR)


def internal() -> ApiError:
    """A defect of nanobraid."""
    return ApiError(500, "internal error; the server's log says more", type=SERVER_ERROR)


def of(error: core.NanobraidError, param: str | None = None, *, retry_after: int = 1) -> ApiError:
    """Returns the answer for an error of the engine or of a check outside this package.

    Args:
        error: What was raised while a request was prepared or computed.
        param: The field whose checking raised it, if that is known.
        retry_after: For errors that pass.
    """
    match error:
        case core.OverloadedError():
            return overloaded(str(error), retry_after)
        case core.OutOfMemoryError():
            return overloaded("there is no memory left for this request now", retry_after)
        case core.UnsupportedError():
            if param is None and str(error).startswith("kv_policy "):  # what the engine says of it
                param = "kv_policy"
            return ApiError(400, str(error), param=param, code="unsupported_parameter")
        case core.ChunkNotFoundError():
            return ApiError(404, str(error), param=param, code="chunk_not_found")
        case core.InvalidArgumentError():
            if param is None and str(error).startswith("speculative "):  # likewise
                param = "speculative"
            return invalid_value(param, str(error))
    return internal()  # paths and addresses are nobody's business
