"""Names of the form ``org/name[:quant]``: which files of a repository they mean, and where a cache has them.

The same rules choose from the list of a hub and from a folder of a cache. Two folders are looked through, our own and
that of other Hugging Face programs; both have the layout ``models--org--name/{refs/main,snapshots/COMMIT/FILE}``.
Nothing here writes or uses the network.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nanobraid.errors import InvalidArgumentError, ModelNotFoundError
from nanobraid.models._cache import hub_dir, hugging_face_dir

DEFAULT_QUANT = "Q4_K_M"

_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART})/({_PART})(?::([\w.-]+))?", re.ASCII)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_INDEX = "model.safetensors.index.json"
_SMALL_FILES = re.compile(
    r"config\.json|quantize_config\.json|generation_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|tokenizer[\w.-]*\.(?:json|model)|tokenizer\.model[\w.-]*|chat_template[\w.-]*\.(?:jinja|json)",
    re.ASCII,
)
_MAX_INDEX_BYTES = 64 << 20
_MAX_FILES = 10_000  # in one snapshot; a folder that has more is no model


@dataclass(frozen=True)
class Repo:
    """A repository of a hub, and the quantization asked for.

    Attributes:
        org: User or organisation.
        name: Name of the repository.
        quant: What follows the colon (``Q4_K_M``), or None.
    """

    org: str
    name: str
    quant: str | None = None

    def __str__(self) -> str:
        return self.id if self.quant is None else f"{self.id}:{self.quant}"

    @property
    def id(self) -> str:
        """``org/name``."""
        return f"{self.org}/{self.name}"

    @property
    def folder(self) -> str:
        """Name of its folder in a cache."""
        return f"models--{self.org}--{self.name}"

    @staticmethod
    def parse(name: str) -> Repo | None:
        """Reads ``org/name[:quant]``; None for everything else, also for what a hub would refuse."""
        match = _NAME.fullmatch(name)
        if match is None or len(match[1]) + len(match[2]) > 95 or "--" in match[0] or ".." in match[0]:
            return None
        return Repo(match[1], match[2], match[3])


@dataclass(frozen=True)
class Choice:
    """The files that a name means.

    Attributes:
        files: Paths inside the repository, small ones first: when the last one is there, all are.
        opened: The file among them that the loader opens, the first part if there are several; None: the folder.
    """

    files: tuple[str, ...]
    opened: str | None


def choose(files: Iterable[str], repo: Repo) -> Choice:
    """Picks the files of a repository that a name means.

    With a quantization: the GGUF file of that name. Without: config, tokenizer and safetensors if there are
    safetensors, else the GGUF file Q4_K_M, else the first one.

    Args:
        files: Paths inside the repository, with slashes.
        repo: The name.

    Raises:
        ModelNotFoundError: The repository has no such file; the message lists what there is.
        InvalidArgumentError: Several files fit.
    """
    names = sorted(files)
    if repo.quant is None:
        weights = _safetensors(names)
        if weights and "config.json" in names:
            index = [_INDEX] if _INDEX in names and _SHARD.search(weights[0]) else []
            small = [name for name in names if _SMALL_FILES.fullmatch(name)]
            return Choice((*small, *index, *weights), None)
    groups = _gguf_groups(names)
    if not groups:
        kinds = sorted({Path(name).suffix for name in names} & {".bin", ".pt", ".pth", ".onnx", ".safetensors"})
        others = f" (it has {', '.join(kinds)} files)" if kinds else ""
        wanted = "GGUF files" if repo.quant else "safetensors files with a config.json, and no GGUF files"
        raise ModelNotFoundError(f"{repo.id} has no {wanted}{others}")
    group = _pick(groups, repo)
    return Choice(tuple(groups[group]), groups[group][0])


def _safetensors(names: list[str]) -> list[str]:
    """The weights in the main folder: what Transformers writes, else all there are."""
    files = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    if _INDEX in names and (shards := [name for name in files if re.fullmatch(r"model" + _SHARD.pattern, name)]):
        return shards
    if "model.safetensors" in files:
        return ["model.safetensors"]
    return [name for name in files if not name.startswith(("adapter_", "consolidated"))]


def _gguf_groups(names: list[str]) -> dict[str, list[str]]:
    """Model files by their path without ending and part number; files of vision encoders and the like are left out."""
    groups: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for name in names:
        if not name.lower().endswith(".gguf") or re.match(r"mmproj|imatrix", name.rsplit("/", 1)[-1], re.IGNORECASE):
            continue
        stem = name[: -len(".gguf")]
        split = _SPLIT.search(stem)
        key = stem[: split.start()] if split else stem
        groups.setdefault(key, []).append(name)
        sizes[key] = int(split[2]) if split else 1
    # A split file of which a part is missing is not there.
    return {key: parts for key, parts in groups.items() if len(parts) == sizes[key]}


def _pick(groups: dict[str, list[str]], repo: Repo) -> str:
    quant = repo.quant or DEFAULT_QUANT
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(quant)}(?=$|[-./])", re.IGNORECASE)
    fitting = [key for key in groups if pattern.search(key)]
    if len(fitting) > 1:  # Q4_K_M/model-Q4_K_M is one file; but several models in one repository are several
        raise InvalidArgumentError(f"{repo} could be any of {_listed(fitting)}: give the path of the file you mean")
    if fitting:
        return fitting[0]
    if repo.quant is not None:
        raise ModelNotFoundError(f"{repo.id} has no GGUF file {quant}; it has {_listed(groups)}")
    return min(groups)


def quants(files: Iterable[str], repo: Repo) -> list[tuple[str, list[str]]]:
    """The GGUF files that ``org/name:quant`` can open: for each the shortest quant, and its parts."""
    groups = _gguf_groups(sorted(files))
    found = []
    for key, parts in groups.items():
        pieces = re.split(r"[-.]", key.rsplit("/", 1)[-1])
        for i in range(len(pieces) - 1, -1, -1):
            quant = "-".join(pieces[i:])
            asked = Repo(repo.org, repo.name, quant)
            try:
                if _pick(groups, asked) == key:
                    found.append((quant, parts))
                    break
            except (ModelNotFoundError, InvalidArgumentError):
                continue
    return found


def _listed(keys: Iterable[str], limit: int = 40) -> str:
    names = sorted(keys)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def hub_folders() -> list[tuple[str, Path]]:
    """The caches to look through, in order, each with its name for people."""
    return [("cache", hub_dir()), ("HF cache", hugging_face_dir())]


def find_in_caches(repo: Repo) -> tuple[Path | None, list[str]]:
    """Looks for a repository on this machine.

    Returns:
        The model file or folder, or None; and what was tried, in words.

    Raises:
        InvalidArgumentError: It is there, and several of its files fit.
    """
    tried: list[str] = []
    for label, folder in hub_folders():
        reasons: list[str] = []
        for snapshot in snapshots(folder / repo.folder):
            try:
                return find_in_snapshot(snapshot, repo), tried
            except ModelNotFoundError as error:
                reasons.append(str(error))
        tried.append(f"the {label} {folder}" + (f" ({reasons[0]})" if reasons else ""))
    return None, tried


def find_in_snapshot(snapshot: Path, repo: Repo) -> Path:
    """The model file or folder that a name means in a snapshot.

    Raises:
        ModelNotFoundError: It is not there, or parts of it are missing.
        InvalidArgumentError: Several files fit.
    """
    choice = choose(files_of(snapshot), repo)
    if choice.opened is not None:
        return snapshot / choice.opened
    if missing := missing_shards(snapshot, choice.files):
        raise ModelNotFoundError(f"{snapshot} is incomplete: {missing} is missing")
    return snapshot


def snapshots(folder: Path) -> list[Path]:
    """The snapshots of a repository's folder in a cache: first that of the main branch, then newer ones first."""
    try:
        found = [entry for entry in (folder / "snapshots").iterdir() if entry.is_dir()]
        found.sort(key=lambda entry: (-entry.stat().st_mtime_ns, entry.name))
    except OSError:
        return []
    try:
        main = (folder / "refs" / "main").read_text(errors="replace").strip()
    except OSError:
        main = ""
    return sorted(found, key=lambda entry: entry.name != main)


def files_of(snapshot: Path) -> list[str]:
    """Files below a snapshot, at most three folders deep; links whose file is gone are left out."""
    found: list[str] = []
    for root, folders, files in os.walk(snapshot):
        place = Path(root).relative_to(snapshot)
        if len(place.parts) >= 3:
            folders.clear()
        found += [(place / name).as_posix() for name in files if os.path.isfile(os.path.join(root, name))]
        if len(found) > _MAX_FILES:
            break
    return found


def missing_shards(folder: Path, files: Iterable[str]) -> str | None:
    """The first weight file that the index of a folder names and that is not among `files`; None if all are there."""
    present = set(files)
    if _INDEX in present:
        try:
            with (folder / _INDEX).open("rb") as file:
                weight_map = json.loads(file.read(_MAX_INDEX_BYTES))["weight_map"]
            return next((str(name) for name in sorted(set(weight_map.values())) if name not in present), None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return f"a readable {_INDEX}"
    for name in sorted(present):
        if split := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.safetensors", name):
            parts = (f"{split[1]}-{i:05}-of-{split[2]}.safetensors" for i in range(1, int(split[2]) + 1))
            if lacking := next((part for part in parts if part not in present), None):
                return lacking
    return None
