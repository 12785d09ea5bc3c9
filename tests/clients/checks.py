"""Runs the checks of one client library against servers that are running.

NANOBRAID_URL        a server with its defaults
NANOBRAID_SMALL_URL  a server with the API key `KEY` that computes one request and lets one wait
NANOBRAID_PYTHON     an interpreter that has nanobraid; NANOBRAID_PYTHONPATH is its PYTHONPATH
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

KEY = "a-key-of-the-tests"
MODEL = "smollm2-135m"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CITY_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 99999999},
    },
    "required": ["name", "inhabitants"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "Name the capital of France."}]
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]


def url() -> str:
    """The server with its defaults."""
    return os.environ["NANOBRAID_URL"]


def small_url() -> str:
    """The server that is soon full."""
    return os.environ["NANOBRAID_SMALL_URL"]


def with_nanobraid(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """A command of Python that has nanobraid, and the environment to run it in."""
    environment = {**os.environ, "PYTHONPATH": os.environ.get("NANOBRAID_PYTHONPATH", "")}
    return [os.environ["NANOBRAID_PYTHON"], *arguments], environment


@contextmanager
def raises(kind: type[BaseException]) -> Iterator[list[Any]]:
    """Fails unless the block raises; the list then holds the error."""
    caught: list[Any] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


def main(package: str, module: dict[str, Any]) -> int:
    """Runs every function of a module that is called ``check_...``; says which version did how many."""
    checks: list[Callable[[], None]] = [value for name, value in module.items() if name.startswith("check_")]
    failed = []
    for check in checks:
        try:
            check()
        except Exception:
            failed.append(check.__name__)
            print(f"--- {check.__name__}", file=sys.stderr)
            traceback.print_exc()
    result = f"FAILED: {', '.join(failed)}" if failed else f"{len(checks)} checks passed"
    print(f"{package} {version(package)}: {result}")
    return 1 if failed else 0
