"""The exceptions of nanobraid.

Every one derives from `NanobraidError` and from the builtin that Python code would catch for the same reason, so both
``except nanobraid.NanobraidError`` and ``except ValueError`` work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nanobraid import _core


class NanobraidError(Exception):
    """Base of everything that nanobraid raises on purpose.

    Attributes:
        code: The stable name of the kind of error, the same in the core, in Python and in logs.
    """

    code: str = "internal"


class InvalidArgumentError(NanobraidError, ValueError):
    """A value of the caller's is outside what is allowed; the message names the field, the value and the range."""

    code = "invalid_argument"


class UnsupportedError(NanobraidError, NotImplementedError):
    """Something valid that this version, build or machine does not offer; the message names it."""

    code = "unsupported"


class FormatError(NanobraidError, ValueError):
    """A model file is damaged or not what it claims to be; the message names the file, the place and the defect."""

    code = "format"


class ModelIOError(NanobraidError, OSError):
    """The operating system refused to open or read a file."""

    code = "io"


class OutOfMemoryError(NanobraidError, MemoryError):
    """Memory for weights, keys and values, or a step could not be had."""

    code = "out_of_memory"


class OverloadedError(NanobraidError, RuntimeError):
    """The queue of waiting requests is full (`max_waiting`); try again later."""

    code = "overloaded"


class DeviceError(NanobraidError, RuntimeError):
    """An accelerator failed."""

    code = "device"


class InternalError(NanobraidError, RuntimeError):
    """A defect of nanobraid; please report it with the message."""

    code = "internal"


class ModelNotFoundError(ModelIOError, FileNotFoundError):
    """No model of that name or path; the message lists everything that was tried."""


class DownloadError(ModelIOError):
    """A model could not be downloaded or its checksum is wrong. Nothing half-written is left behind."""


class ChatTemplateError(InvalidArgumentError):
    """The chat template of the model is missing, is wrong, refuses the conversation, or exceeds its limits."""


class ChunkNotFoundError(InvalidArgumentError, KeyError):
    """There is no chunk, or no retained output, of that name; it may have been deleted or evicted."""

    __str__ = Exception.__str__  # a KeyError would show its message in quotes


class InvalidCompositionError(InvalidArgumentError):
    """Chunks that do not make a prompt: not one system prompt, contexts and one query; the message says which."""


_CLASS_OF_CODE: dict[str, type[NanobraidError]] = {
    cls.code: cls
    for cls in (
        InvalidArgumentError,
        UnsupportedError,
        FormatError,
        ModelIOError,
        OutOfMemoryError,
        OverloadedError,
        DeviceError,
        InternalError,
    )
}


def map_core_error(error: _core.CoreError) -> NanobraidError:
    """Returns the exception of this module for an error of the core.

    Args:
        error: What the core raised. A code this version does not know becomes `InternalError`.

    Returns:
        A new exception with the same message, not yet raised.
    """
    return error_of(getattr(error, "code", "internal"), str(error))


def error_of(code: str, message: str) -> NanobraidError:
    """Returns the exception for a code of the core, not yet raised. An unknown code gives `InternalError`."""
    return _CLASS_OF_CODE.get(code, InternalError)(message)


@contextmanager
def core_errors() -> Iterator[None]:
    """Turns the core's errors inside the ``with`` block into the classes of this module.

    Raises:
        NanobraidError: The subclass that belongs to the code of the core's error.
    """
    try:
        yield
    except _core.CoreError as error:
        raise map_core_error(error) from error
