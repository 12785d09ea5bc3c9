"""Where models are kept, and the rules that several processes follow when they write there.

Our own folder (`cache_dir`) holds ``models/`` (single files), ``hub/`` (downloads from a Hugging Face hub) and
``exported/`` (see `nanobraid._export_cache`). The hub cache of other programs is only ever read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanobraid.errors import ModelIOError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) during a download."""

_OFF = ("", "0", "false", "no", "off")


def cache_dir() -> Path:
    """Folder of all that nanobraid keeps: NANOBRAID_CACHE, else XDG_CACHE_HOME/nanobraid, else ~/.cache/nanobraid."""
    if own := os.environ.get("NANOBRAID_CACHE"):
        return Path(own).expanduser().absolute()
    return _user_cache("set NANOBRAID_CACHE") / "nanobraid"


def models_dir() -> Path:
    """Folder of the cache that holds model files."""
    return cache_dir() / "models"


def digest_dir() -> str:
    """Folder of the cache that remembers the identity of model files; empty if it cannot be made."""
    try:
        folder = cache_dir() / "digests"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ModelIOError):
        return ""
    return str(folder)


def kv_selftest_dir() -> Path:
    """Folder of the cache that remembers what formats of keys and values cost which model; it need not exist."""
    return cache_dir() / "kv_selftests"


def stream_dir() -> Path:
    """Folder of the cache that holds packed layers of models that are streamed; it need not exist."""
    return cache_dir() / "streamed"


def hub_dir() -> Path:
    """Folder of the cache that holds what was downloaded from a hub, in the layout of the Hugging Face cache."""
    return cache_dir() / "hub"


def hugging_face_dir() -> Path:
    """The Hugging Face cache of this user, which other programs fill; the variables are those of huggingface_hub."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(name):
            return Path(os.path.expandvars(value)).expanduser().absolute()
    if home := os.environ.get("HF_HOME"):
        return Path(os.path.expandvars(home)).expanduser().absolute() / "hub"
    return _user_cache("set HF_HOME") / "huggingface" / "hub"


def _user_cache(hint: str) -> Path:
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute()
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise ModelIOError(f"no home directory to keep models in ({error}): {hint}") from None


def is_offline() -> bool:
    """Whether NANOBRAID_OFFLINE forbids downloads (any value but empty, 0, false, no, off)."""
    return _is_set("NANOBRAID_OFFLINE")


def hub_offline_reason() -> str | None:
    """The variable that forbids to ask a hub, if one does: HF_HUB_OFFLINE or NANOBRAID_OFFLINE."""
    return next((name for name in ("NANOBRAID_OFFLINE", "HF_HUB_OFFLINE") if _is_set(name)), None)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in _OFF


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes; it is released when the process ends, however it ends."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def byte_bar(label: str, total: int, show: bool | None = None) -> Iterator[Progress]:
    """A progress bar of bytes on stderr.

    Args:
        label: What is being done.
        total: Bytes in all, until the first report says otherwise.
        show: None: if stderr is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def announce(text: str) -> None:
    """Says on stderr what is about to be written to this machine."""
    print(f"nanobraid: {text}", file=sys.stderr, flush=True)
