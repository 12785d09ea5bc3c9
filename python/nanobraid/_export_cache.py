"""``LLM(folder)``: a Hugging Face folder becomes a ``.braid`` file in the cache, once.

The file's name holds a key over everything it is made of: the small files, the weights by their SHA-256, the version of
the exporter and the type of the weights. So a changed folder is exported again and an equal one, wherever it stands,
is not. Checksums of weights are remembered with size, times and inode of the file, which makes the second start fast.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanobraid import __version__
from nanobraid._logging import logger
from nanobraid.errors import FormatError, ModelIOError, ModelNotFoundError, UnsupportedError
from nanobraid.models import _repo
from nanobraid.models._cache import announce, byte_bar, cache_dir, locked, sync_folder

DEFAULT_DTYPE = "bf16"
DTYPES = ("f32", "bf16", "f16", "w8", "w4", "keep")

_LAYOUT = 1  # raised when equal input must be exported again although the version is the same
_BLOCK = 1 << 20
_MAX_SMALL_BYTES = 256 << 20  # config and tokenizer files
_Facts = dict[str, list[int | str]]  # file name -> size, mtime_ns, ctime_ns, inode, SHA-256


def exported_dir() -> Path:
    """Folder of the cache that holds what was exported."""
    return cache_dir() / "exported"


def exported(folder: Path, dtype: str = DEFAULT_DTYPE, progress: bool = False) -> Path:
    """Returns the ``.braid`` file of a Hugging Face folder, exporting it if the cache does not have it.

    The file appears under its name only when it is complete. Several processes may do this at once: one exports, the
    others wait.

    Args:
        folder: A folder with config.json, tokenizer and safetensors.
        dtype: Type of the weights, as for ``nanobraid export --dtype``.
        progress: Show progress bars on stderr.

    Raises:
        ModelNotFoundError: The folder lacks files.
        UnsupportedError: The folder has no safetensors, or the exporter does not support the model.
        FormatError: A file of the folder is damaged, or changed while it was read.
        ModelIOError: A file cannot be read, or the result cannot be stored.
    """
    if dtype not in DTYPES:
        raise UnsupportedError(f"dtype {dtype!r} is not offered: {', '.join(DTYPES)}")
    try:
        files = _files_of(folder)
        key = _key(folder, files, dtype, _Digests(folder, progress))
        target = exported_dir() / f"{_name_of(folder)}-{dtype}-{key[:16]}.braid"
        if target.is_file():
            return target
        exported_dir().mkdir(parents=True, exist_ok=True)
        with locked(exported_dir() / f".{target.stem}.lock"):
            if not target.is_file():  # else another process was faster
                _export(folder, files, target, dtype, progress)
    except OSError as error:
        if isinstance(error, ModelIOError):
            raise
        raise ModelIOError(f"cannot export {folder} to {exported_dir()}: {error}") from error
    return target


def model_file(path: Path, *, progress: bool | None = None) -> Path:
    """The file to load for what `nanobraid.models.ensure` returned: a file as it is, a folder exported.

    Args:
        path: A model file or a Hugging Face folder.
        progress: Show progress bars. None: if stderr is a terminal.
    """
    if not path.is_dir():
        return path
    from nanobraid.export.hf_folder import is_quantized_folder

    # What is quantized is taken over as it is.
    dtype = "keep" if is_quantized_folder(path) else DEFAULT_DTYPE
    return exported(path, dtype, sys.stderr.isatty() if progress is None else progress)


def find_exported(folder: Path) -> list[Path]:
    """The exported files of a folder that are in the cache and up to date. Reads no weights."""
    found = []
    try:
        files = _files_of(folder)
        for dtype in DTYPES:
            key = _key(folder, files, dtype, _Digests(folder, False, only_known=True))
            path = exported_dir() / f"{_name_of(folder)}-{dtype}-{key[:16]}.braid"
            if path.is_file():
                found.append(path)
    except (OSError, FormatError, UnsupportedError):
        return []  # not exported with these contents, or no folder that could be
    return found


def _files_of(folder: Path) -> tuple[str, ...]:
    present = [entry.name for entry in folder.iterdir() if entry.is_file()]
    if "config.json" not in present:
        raise ModelNotFoundError(f"{folder} has no config.json")
    if not any(name.endswith(".safetensors") for name in present):
        pickled = sorted(name for name in present if name.endswith((".bin", ".pt", ".pth")))
        if pickled:
            raise UnsupportedError(
                f"{folder} has its weights in {pickled[0]}, a pickle, which can run code when it is opened and is "
                "never read: convert it to safetensors"
            )
    if missing := _repo.missing_shards(folder, present):
        raise ModelNotFoundError(f"{folder} is incomplete: {missing} is missing")
    choice = _repo.choose(present, _repo.Repo("folder", folder.name))
    if choice.opened is not None:
        raise ModelNotFoundError(f"{folder} has no safetensors; give the path of {choice.opened}")
    return choice.files


def _name_of(folder: Path) -> str:
    """A folder's name for people; a snapshot in a hub's cache is called after its repository, not its commit."""
    absolute = folder.absolute()
    repository = absolute.parent.parent.name
    name = absolute.name
    if absolute.parent.name == "snapshots" and repository.startswith("models--"):
        name = repository.removeprefix("models--")
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:100] or "model"


def _key(folder: Path, files: tuple[str, ...], dtype: str, digests: _Digests) -> str:
    """SHA-256 over everything the export depends on, hexadecimal; each part with its length, so that none can merge."""
    digest = hashlib.sha256()
    parts = [b"nanobraid export", __version__.encode(), str(_LAYOUT).encode(), dtype.encode()]
    weights = digests.of([name for name in files if name.endswith(".safetensors")])
    for name in files:
        parts += [name.encode(), weights[name].encode() if name in weights else _read_small(folder / name)]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _read_small(path: Path) -> bytes:
    if path.stat().st_size > _MAX_SMALL_BYTES:
        raise FormatError(f"{path}: {path.stat().st_size} bytes are too many for a file of its kind")
    return path.read_bytes()


class _Digests:
    """SHA-256 of a folder's weight files (header and all), remembered until a file changes."""

    def __init__(self, folder: Path, progress: bool, *, only_known: bool = False) -> None:
        place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
        self._folder = folder
        self._memory = exported_dir() / ".digests" / f"{place}.json"
        self._progress = progress
        self._only_known = only_known

    def of(self, names: list[str]) -> dict[str, str]:
        known = self._load()
        facts = {name: _identity(self._folder / name) for name in names}
        stale = [name for name in names if known.get(name, [])[:-1] != facts[name]]
        if stale and self._only_known:
            raise ModelNotFoundError(f"{self._folder}: {stale[0]} was not seen before")
        if stale:
            total = sum(int(facts[name][0]) for name in stale)
            done = 0
            with byte_bar("reading", total, self._progress) as report:
                for name in stale:
                    digest = hashlib.sha256()
                    with (self._folder / name).open("rb") as file:
                        while block := file.read(_BLOCK):
                            digest.update(block)
                            done += len(block)
                            report(done, total)
                    if _identity(self._folder / name) != facts[name]:
                        raise FormatError(f"{self._folder / name} changed while it was read")
                    known[name] = [*facts[name], digest.hexdigest()]
            self._save({name: known[name] for name in names})
        return {name: str(known[name][-1]) for name in names}

    def _load(self) -> _Facts:
        try:
            facts = json.loads(self._memory.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        usable = isinstance(facts, dict) and all(isinstance(v, list) and len(v) == 5 for v in facts.values())
        return facts if usable else {}

    def _save(self, facts: _Facts) -> None:
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._memory.parent)
        with os.fdopen(descriptor, "w") as file:
            json.dump(facts, file)
        os.replace(temporary, self._memory)


def _identity(path: Path) -> list[int | str]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _export(folder: Path, files: tuple[str, ...], target: Path, dtype: str, progress: bool) -> None:
    from nanobraid.export import export_model

    # We hold the lock, so what an earlier, killed export left behind belongs to nobody.
    for leftover in target.parent.glob(f".{target.stem}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    needed = sum((folder / name).stat().st_size for name in files) * (2 if dtype == "f32" else 1)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise ModelIOError(
            f"{target.parent} has {free / 1e6:,.0f} MB free; {target.name} may need {needed / 1e6:,.0f} MB"
        )
    announce(f"exporting {folder} to {target} ({dtype}; once)")
    with tempfile.TemporaryDirectory(prefix=f".{target.stem}.tmp-", dir=target.parent) as scratch:
        temporary = Path(scratch) / target.name
        with _step_bar(progress) as report:
            export_model(folder, temporary, dtype, progress=report)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    sync_folder(target.parent)
    logger.info("exported %s to %s", folder, target)


@contextmanager
def _step_bar(show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for steps that are named as they come: called with (name, number done, number in all)."""
    if not show:
        yield lambda name, done, total: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    columns = ("exporting", BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), "{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, done, total: bar.update(task, description=escape(name), completed=done, total=total)
