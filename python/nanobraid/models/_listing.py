"""What `nanobraid models` shows: every model on this machine that a name or a path opens without a download."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanobraid.errors import NanobraidError
from nanobraid.models import _known, _repo
from nanobraid.models._cache import models_dir

Kind = Literal["gguf", "braid", "hf folder"]


@dataclass(frozen=True)
class FoundModel:
    """A model on this machine.

    Attributes:
        name: What to write in ``LLM(name)``.
        kind: ``gguf``, ``braid`` or ``hf folder``.
        num_bytes: Size of its files together.
        where: ``cache``, ``HF cache`` or ``bundled`` (inside an installed package).
        path: The file that is opened (the first part of several), or the folder.
    """

    name: str
    kind: Kind
    num_bytes: int
    where: str
    path: Path

    @property
    def exported(self) -> list[Path]:
        """The files that ``LLM(folder)`` made of a Hugging Face folder and would use again; empty for other kinds."""
        from nanobraid import _export_cache

        return _export_cache.find_exported(self.path) if self.kind == "hf folder" else []


def list_models() -> list[FoundModel]:
    """The models on this machine: those in our cache, in installed packages, and in the Hugging Face cache.

    Of several with one name, only the first is listed: the one that the name opens.
    """
    found: dict[str, FoundModel] = {}
    for model in (*_single_files(), *_bundled(), *_repositories()):
        found.setdefault(model.name, model)
    return list(found.values())


def _single_files() -> Iterator[FoundModel]:
    folder = models_dir()
    files = [file for suffix in ("braid", "gguf") for file in folder.glob(f"*.{suffix}")] if folder.is_dir() else []
    for path in sorted(files):
        size = _size_of(path)
        known = _known.KNOWN_MODELS.get(path.stem)
        if size is None or (known is not None and _known.find_local(known) != path):
            continue  # a broken link, or a damaged copy of a known model
        yield FoundModel(path.stem, "braid" if path.suffix == ".braid" else "gguf", size, "cache", path)


def _bundled() -> Iterator[FoundModel]:
    for known in _known.KNOWN_MODELS.values():
        if path := _known.installed_file(known):
            yield FoundModel(known.name, "gguf", known.num_bytes, "bundled", path)


def _repositories() -> Iterator[FoundModel]:
    for label, folder in _repo.hub_folders():
        try:
            names = sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("models--"))
        except OSError:
            continue
        for name in names:
            repo = _repo.Repo.parse(name.removeprefix("models--").replace("--", "/", 1))
            if repo is not None:
                for snapshot in _repo.snapshots(folder / name):
                    yield from _in_snapshot(repo, snapshot, label)


def _in_snapshot(repo: _repo.Repo, snapshot: Path, label: str) -> Iterator[FoundModel]:
    files = _repo.files_of(snapshot)
    try:
        path = _repo.find_in_snapshot(snapshot, repo)
        if path == snapshot:
            chosen = _repo.choose(files, repo).files
            yield FoundModel(repo.id, "hf folder", _total(snapshot, chosen), label, snapshot)
    except NanobraidError:
        pass  # incomplete, or several files fit: then only those with a name of their own are listed
    for quant, parts in _repo.quants(files, repo):
        yield FoundModel(f"{repo.id}:{quant}", "gguf", _total(snapshot, parts), label, snapshot / parts[0])


def _total(folder: Path, names: tuple[str, ...] | list[str]) -> int:
    return sum(_size_of(folder / name) or 0 for name in names)


def _size_of(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None
