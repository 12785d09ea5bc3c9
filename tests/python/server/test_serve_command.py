"""``nanobraid serve`` as a command: what it prints, takes and refuses."""

from __future__ import annotations

import argparse
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanobraid.commands import serve
from nanobraid.errors import InvalidArgumentError

SMALL = ["--max-model-len", "256", "--kv-cache-bytes", str(64 << 20)]


@contextmanager
def started(*arguments: str) -> Iterator[tuple[str, list[str]]]:
    """A server; its address and the lines it prints, all of them once it has ended."""
    command = [sys.executable, "-m", "nanobraid", "serve", "--port", "0", *SMALL, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if line.startswith("    -d "):  # the last line of what is printed at the start
                break
        found = re.search(r"Ready at (http://\S+:\d+)", "".join(lines))
        assert found, "".join(lines)
        yield found[1], lines
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        lines += err.splitlines(keepends=True)
        assert process.returncode == 0, "".join(lines)
        assert out == ""


def refused(*arguments: str) -> str:
    """What a command says that does not start."""
    command = [sys.executable, "-m", "nanobraid", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_the_printed_command_works(model_path: Path) -> None:
    with started("--json-log") as (url, lines):
        text = "".join(lines)
        assert "KV cache: " in text and "smollm2-135m" in text
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "One two", "user": "me"}, timeout=60)
        assert answer.status_code == 200
        httpx.get(f"{url}/nothing")
    logs = [line for line in lines if line.startswith("{")]
    first, second = (json.loads(line) for line in logs[:2])
    assert (first["path"], first["status"], first["user"]) == ("/v1/completions", 200, "me")
    assert first["request_id"] == answer.headers["x-request-id"]
    assert first["prompt_tokens"] == 2 and first["completion_tokens"] == 16
    assert second["status"] == 404
    printed = "".join(line for line in lines if not line.startswith("{"))
    assert "curl http://" in printed


def test_options_from_a_file(model_path: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text('served-model-name = ["one", "two"]\napi-key = "secret"\nno-page = true\nstrict = true\n')
    with started("--config", str(config), "--api-key", "other") as (url, _):
        headers = {"authorization": "Bearer other"}  # the command line comes first
        models = httpx.get(f"{url}/v1/models", headers=headers).json()["data"]
        assert [model["id"] for model in models] == ["one", "two"]
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 401
        assert httpx.get(f"{url}/", headers=headers).status_code == 404
        body = {"prompt": "x", "nonsense": 1}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).status_code == 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense = 1\n", "'nonsense', which is no option"),
        ("strict = 3\n", "strict must be true or false"),
        ("port = true\n", "port must be a text or a number"),
        ("port = \n", "cannot read"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(text)
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    with pytest.raises(InvalidArgumentError, match=re.escape(message)):
        serve.run(parser.parse_args(["--config", str(config)]))


def test_wrong_options(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "in use" in refused("--port", str(port))
    assert "--port must be from 0 to 65535" in refused("--port", "70000")
    assert "cannot listen at 192.0.2.1" in refused("--host", "192.0.2.1")
    assert "hermes, qwen3_coder, llama3_json, mistral" in refused("--tool-call-parser", "xml", "--port", "0", *SMALL)


def test_an_open_address_is_warned_about(model_path: Path) -> None:
    with started("--host", "0.0.0.0") as (url, lines):
        assert url.startswith("http://127.0.0.1:")
        assert any("no API key is set" in line for line in lines)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "orjson", None)
    options: Any = argparse.Namespace(config=None, served=None)
    with pytest.raises(NotImplementedError, match=r"orjson.*nanobraid\[server\]"):
        serve.run(options)
