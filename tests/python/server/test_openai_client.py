"""The checks of tests/clients/openai_client.py with the openai package of the test environment."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_threads import THREADS

import nanobraid as nb

pytest.importorskip("openai")
from nanobraid.server.settings import Settings

CLIENTS = Path(__file__).parents[2] / "clients"

# Names, because the module needs the servers' addresses only when its functions run.
CHECKS = [
    line.split("(")[0].removeprefix("def ")
    for line in (CLIENTS / "openai_client.py").read_text().splitlines()
    if line.startswith("def check_")
]


@pytest.fixture(scope="module")
def checks() -> Iterator[Any]:
    sys.path.insert(0, str(CLIENTS))
    try:
        yield importlib.import_module("openai_client")
    finally:
        sys.path.remove(str(CLIENTS))


@pytest.fixture(scope="module")
def small_url(model_path: Path) -> Iterator[str]:
    """A server that is full with two requests and wants the key of tests/clients/checks.py."""
    from conftest import running

    with nb.LLM(model_path, num_threads=THREADS, max_model_len=1024, max_num_seqs=1, max_waiting=1) as llm:
        settings = Settings(api_keys=("a-key-of-the-tests",), served_model_names=("smollm2-135m",))
        with running(nb.AsyncEngine(llm), settings) as server:
            yield server.url


def test_there_are_checks() -> None:
    assert len(CHECKS) >= 16


@pytest.mark.parametrize("check", CHECKS)
def test_openai(check: str, checks: Any, serve: Any, small_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Settings(served_model_names=("smollm2-135m",))) as server:
        monkeypatch.setenv("NANOBRAID_URL", server.url)
        monkeypatch.setenv("NANOBRAID_SMALL_URL", small_url)
        getattr(checks, check)()
        server.wait_idle()
