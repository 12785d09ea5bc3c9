"""Connects the core's log lines to Python's logger ``nanobraid``.

As a library should, nanobraid shows nothing by itself: configure `logging` to see its lines. The environment variable
NANOBRAID_LOG (error, warning, info, debug) prints them to stderr without any code.
"""

from __future__ import annotations

import atexit
import logging
import os
from pathlib import Path

from nanobraid import _core

logger = logging.getLogger("nanobraid")

LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}

#: How the core's lines begin that say how far the loading of a model has come.
LOADING = "loading "

_FORMAT = "nanobraid: %(levelname)s: %(message)s"
_handler = logging.StreamHandler()
_handler.setFormatter(logging.Formatter(_FORMAT))


def _sink(level: str, line: str) -> None:
    logger.log(LEVELS.get(level, logging.INFO), "%s", line)


def follow_python_level() -> None:
    """Gives the core the level of the Python logger, so that lines nobody wants are not even made."""
    level = logger.getEffectiveLevel()
    name = next((name for name, value in reversed(LEVELS.items()) if value >= level), "error")
    _core.set_log_level(name)


def log_loaded(path: Path, model: _core.Model, kv_dtype: str) -> None:
    """Says what was loaded and how it runs."""
    logger.info(
        "loaded %s in %.2f s: %s kernels, %s activations, %s KV, %d threads, %.1f MB of weights",
        path,
        model.load_seconds,
        model.backend,
        model.dtype,
        kv_dtype,
        model.num_threads,
        model.weight_bytes / 1e6,
    )


def show_on_stderr(level: str, *, loading: bool = False) -> None:
    """Prints lines of this level and above to stderr.

    Args:
        level: error, warning, info or debug.
        loading: Print also, whatever the level, how far loading has come when it takes long.
    """

    def is_wanted(record: logging.LogRecord) -> bool:
        return record.levelno >= LEVELS[level] or (loading and record.getMessage().startswith(LOADING))

    _handler.filters[:] = [is_wanted]
    if _handler not in logger.handlers:
        logger.addHandler(_handler)
    logger.setLevel(min(LEVELS[level], logging.INFO) if loading else LEVELS[level])
    follow_python_level()


def connect() -> None:
    """Sends the core's lines to the logger; called once, when the package is imported."""
    logger.addHandler(logging.NullHandler())
    _core.set_log_sink(_sink)
    # A thread of the core must not call into an interpreter that is gone.
    atexit.register(_core.set_log_sink, None)
    wanted = os.environ.get("NANOBRAID_LOG", "")
    if wanted in LEVELS:
        show_on_stderr(wanted)
    else:
        follow_python_level()
