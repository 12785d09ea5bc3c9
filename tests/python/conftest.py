"""Fixtures that the tests of the package share. The default model is fetched once into the user's cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_threads import THREADS

import nanobraid as nb
from nanobraid import models


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The file of the default model, its checksum verified."""
    return models.pull(models.DEFAULT_MODEL)


@pytest.fixture(scope="session")
def llm(model_path: Path) -> Iterator[nb.LLM]:
    """One engine for all tests that leave it as they found it."""
    with nb.LLM(model_path, num_threads=THREADS, max_model_len=1024) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that uses the shared engine, every block of keys and values is free again."""
    yield
    if "llm" in request.fixturenames:
        stats = request.getfixturevalue("llm").stats()
        assert stats["running"] == 0
        assert stats["waiting"] == 0
        assert stats["blocks_owned"] == 0
