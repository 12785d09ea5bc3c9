"""The load client of eval/: it must tell a whole answer from a broken one, and when its tokens came."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EVAL = Path(__file__).parents[2] / "eval"
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def http_load() -> Iterator[Any]:
    sys.path.insert(0, str(EVAL))
    try:
        yield importlib.import_module("http_load")
    finally:
        sys.path.remove(str(EVAL))


def event(**data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n" % len(data) + data + b"\r\n"


ROLE = chunk(event(choices=[{"delta": {"role": "assistant", "content": ""}}]))
ONE = chunk(event(choices=[{"delta": {"content": "a"}}]))
TWO = chunk(event(choices=[{"delta": {"content": "b"}}]))
LAST = chunk(event(choices=[], usage={"completion_tokens": 2}) + b"data: [DONE]\n\n")


def outcome(http_load: Any, pieces: list[bytes]) -> dict[str, Any]:
    exchange = http_load.Exchange(b"", begin=10.0, end=20.0)
    exchange.pieces = pieces
    exchange.times = [11.0 + i for i in range(len(pieces))]
    result: dict[str, Any] = http_load.outcome(exchange)
    return result


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_tokens_count_when_they_are_complete(http_load: Any, cut: int) -> None:
    result = outcome(http_load, [HEAD + ROLE + ONE[:cut], ONE[cut:], TWO + LAST + b"0\r\n\r\n"])
    assert result["error"] is None
    assert result["tokens"] == 2
    assert result["arrivals_s"] == [2.0, 3.0]
    assert result["ttft_s"] == 2.0


def test_broken_answers_are_errors(http_load: Any) -> None:
    assert "broke off" in outcome(http_load, [HEAD + ONE])["error"]
    assert "broke off" in outcome(http_load, [HEAD + ONE + TWO[:10]])["error"]
    assert outcome(http_load, [HEAD + ONE + b"0\r\n\r\n"])["error"] == "no [DONE]"
    failed = chunk(event(error={"message": "no memory"}))
    assert "no memory" in outcome(http_load, [HEAD + ONE + failed + b"0\r\n\r\n"])["error"]
    assert "503" in outcome(http_load, [b"HTTP/1.1 503 Busy\r\n\r\n{}"])["error"]
