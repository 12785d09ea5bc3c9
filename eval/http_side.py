"""`nanobraid serve` as a process that is measured, and the processor time of a process by thread."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any


def thread_seconds(pid: int) -> dict[int, tuple[str, float]]:
    """Of every thread of a process: its name and the seconds that it has run, to the nanosecond."""
    result = {}
    for folder in Path(f"/proc/{pid}/task").iterdir():
        try:
            name = (folder / "comm").read_text().strip()
            result[int(folder.name)] = (name, int((folder / "schedstat").read_text().split()[0]) / 1e9)
        except OSError:
            continue  # it has just ended
    return result


def spent(before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]]) -> dict[int, tuple[str, float]]:
    """The seconds between two calls of `thread_seconds`."""
    return {tid: (name, seconds - before.get(tid, ("", 0.0))[1]) for tid, (name, seconds) in after.items()}


class ServedNanobraid:
    """`nanobraid serve` on a free port, with no access log.

    Args:
        arguments: Further ones of the command line.
        program: What is run, instead of the command.

    Attributes:
        port: Where it listens.
        about: What it says of the model and the kernels.
        pid: Its process.
    """

    def __init__(self, *arguments: str, program: list[str] | None = None) -> None:
        self.port = 0
        self.about = ""
        self._command = program or [sys.executable, "-m", "nanobraid", "serve", "--port", "0", "--no-access-log"]
        self._command += arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> ServedNanobraid:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._log, env=os.environ
        )
        end = time.monotonic() + 120
        while time.monotonic() < end and self._process.poll() is None:
            self._log.seek(0)
            text = self._log.read().decode(errors="replace")
            if found := re.search(r"Ready at http://127\.0\.0\.1:(\d+)", text):
                self.port = int(found[1])
                self.about = text.split("\n", 1)[0]
                return self
            time.sleep(0.05)
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")
        self.__exit__()
        raise RuntimeError(f"the server did not start:\n{text[-2000:]}")

    def __exit__(self, *exception: Any) -> None:
        assert self._process is not None and self._log is not None
        self._process.terminate()
        killer = threading.Timer(20, self._process.kill)
        killer.start()
        self._process.wait()
        killer.cancel()
        self._log.close()
