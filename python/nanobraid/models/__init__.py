"""From a model's name to its file: what a name may be, what is on this machine, and downloads.

`resolve` looks on this machine only. `ensure` and `pull` may download, and say so. What a name means, first match wins:

1. an existing ``.braid`` or ``.gguf`` file;
2. an existing Hugging Face folder, that is one with a ``config.json``;
3. ``org/name[:quant]`` in our cache, then in the Hugging Face cache;
4. a known name (`KNOWN_MODELS`), or the name of a file in ``models/`` of our cache without its ending;
5. `ensure` and `pull` only: a download.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanobraid.errors import (
    DownloadError,
    InvalidArgumentError,
    ModelIOError,
    ModelNotFoundError,
    UnsupportedError,
)
from nanobraid.models import _known, _repo
from nanobraid.models._cache import (
    Progress,
    announce,
    byte_bar,
    cache_dir,
    digest_dir,
    hugging_face_dir,
    is_offline,
    models_dir,
    stream_dir,
)
from nanobraid.models._known import DEFAULT_MODEL, KNOWN_MODELS, KnownModel, announced
from nanobraid.models._listing import FoundModel, list_models

if TYPE_CHECKING:
    from nanobraid.models._hub import Confirm, Offer

__all__ = [
    "DEFAULT_MODEL",
    "KNOWN_MODELS",
    "Confirm",
    "FoundModel",
    "KnownModel",
    "Offer",
    "Progress",
    "announced",
    "cache_dir",
    "digest_dir",
    "ensure",
    "find_models",
    "hub_state",
    "hugging_face_dir",
    "is_offline",
    "list_models",
    "models_dir",
    "pull",
    "pull_announced",
    "resolve",
    "stream_dir",
]

_SUFFIXES = (".braid", ".gguf")
_REFUSED = (".safetensors", ".bin", ".pt", ".pth", ".onnx")


def find_models() -> list[Path]:
    """Models that need no download, as paths that can be opened."""
    return [model.path for model in list_models()]


def __getattr__(name: str) -> Any:
    if name in ("Confirm", "Offer"):
        from nanobraid.models import _hub  # what only downloads need takes time and memory to import

        return getattr(_hub, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def hub_state() -> str:
    """The hub that ``org/name`` is downloaded from, or why nothing is."""
    from nanobraid.models import _hub

    return _hub.unavailable_reason() or _hub.endpoint()


def resolve(model: str | os.PathLike[str]) -> Path:
    """Returns the file or the Hugging Face folder of a model, without downloading anything.

    Args:
        model: The path of a ``.braid`` or ``.gguf`` file or of a Hugging Face folder; ``org/name[:quant]``; a known
            name; or the name of a file in the cache, without its ending.

    Raises:
        ModelNotFoundError: Nothing was found; the message lists what was tried and similar names.
        UnsupportedError: The path is a file of a kind that is not opened.
        ModelIOError: The path exists but cannot be used.
        InvalidArgumentError: The name is empty, contains a zero byte, or fits several files of a repository.
    """
    name = _checked(model)
    path = Path(name).expanduser()
    mode = _mode_of(path)
    if mode is not None and stat.S_ISREG(mode) and path.suffix.lower() in _SUFFIXES:
        return path
    if mode is not None and stat.S_ISDIR(mode) and (path / "config.json").is_file():
        return path
    tried = [f"the file {path.absolute()}"]
    found = None
    repo = _repo.Repo.parse(name)
    if repo is not None:
        found, places = _repo.find_in_caches(repo)
        tried += places
    elif path.suffix.lower() not in _SUFFIXES and "/" not in name:
        found = _find_by_name(name)
        tried.append(f"the known names ({', '.join(KNOWN_MODELS)}) and the cache {models_dir()}")
    if found is not None:
        return found
    if mode is not None:
        return _check_existing(path, mode)
    raise ModelNotFoundError(_what_was_tried(name, path, repo, tried))


def _checked(model: str | os.PathLike[str]) -> str:
    name = os.fspath(model)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise InvalidArgumentError(f"model must be a file or a name, got {model!r}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"model must be a file whose name is UTF-8, got {model!r}") from None
    return name


def _mode_of(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ModelIOError(f"{path}: {error.strerror}") from None


def _find_by_name(name: str) -> Path | None:
    known = KNOWN_MODELS.get(name.lower())
    if known is not None:
        return _known.find_local(known)
    return next((path for suffix in _SUFFIXES if (path := models_dir() / f"{name}{suffix}").is_file()), None)


def _check_existing(path: Path, mode: int) -> Path:
    """What to do with a path that is neither a model file nor a Hugging Face folder by its name."""
    if stat.S_ISDIR(mode):
        files = sorted(file.name for suffix in _SUFFIXES for file in path.glob(f"*{suffix}"))
        hint = f"; it contains {', '.join(files[:3])}" if files else " and has no config.json"
        raise ModelNotFoundError(f"{path} is a folder, not a model file{hint}")
    if not stat.S_ISREG(mode):
        raise ModelIOError(f"{path} is not a regular file")
    suffix = path.suffix.lower()
    if suffix in _REFUSED:
        hint = ": give its folder" if suffix == ".safetensors" else ""
        raise UnsupportedError(f"{path}: {suffix} files are not supported, only GGUF and .braid files{hint}")
    return path  # the loader looks at the content


def _what_was_tried(name: str, path: Path, repo: _repo.Repo | None, tried: list[str]) -> str:
    import difflib

    from nanobraid.models import _hub

    message = f"no model {name!r}: tried {', '.join(tried)}"
    if name.lower() in KNOWN_MODELS:
        message += f" and the installed packages; 'nanobraid pull {name}' downloads it"
    elif repo is not None:
        message += "; " + (_hub.unavailable_reason() or f"'nanobraid pull {name}' downloads it")
    candidates = [*KNOWN_MODELS, *(model.name for model in list_models())]
    target = name.lower() if repo else path.stem.lower()
    close = [match for match in difflib.get_close_matches(target, candidates, n=3) if match != name.lower()]
    if close:
        message += f"; did you mean {' or '.join(repr(match) for match in dict.fromkeys(close))}?"
    return message


def ensure(model: str | os.PathLike[str], confirm: Confirm | None = None) -> Path:
    """Returns the file or folder of a model; one that is missing is downloaded, which is announced on stderr.

    Args:
        model: As for `resolve`.
        confirm: Called before a download from a hub, with what would be fetched; raises to refuse it.

    Raises:
        DownloadError: It could not be downloaded, or is not allowed to be.
        NanobraidError: As `resolve`.
    """
    try:
        return resolve(model)
    except ModelNotFoundError as missing:
        name = os.fspath(model)
        known = KNOWN_MODELS.get(name.lower())
        if known is not None:
            with announced(known) as progress:
                return _known.pull_known(known, progress)
        repo = _repo.Repo.parse(name)
        if repo is None or Path(name).exists():
            raise
        from nanobraid.models import _hub

        if _hub.unavailable_reason():
            raise DownloadError(str(missing)) from None
    return _download(repo, confirm)


def _download(repo: _repo.Repo, confirm: Confirm | None) -> Path:
    from nanobraid.models import _hub

    offer = _hub.find_offer(repo)
    if confirm is not None:
        confirm(offer)
    announce(f"downloading {offer}")
    with byte_bar(str(repo), offer.num_bytes) as progress:
        return _hub.fetch(offer, progress)


def pull(name: str, progress: Progress | None = None) -> Path:
    """Puts a model into the cache, downloading it if it is not on this machine, and checks it.

    A file appears under its name only when it is complete and correct. Several processes may do this at once: one
    downloads, the others wait. What is on this machine already is not asked for again.

    Args:
        name: A key of `KNOWN_MODELS`, or ``org/name[:quant]`` of a Hugging Face hub.
        progress: Called during the download with (bytes done, bytes in all).

    Returns:
        The path of the file, or of the folder of a repository with safetensors.

    Raises:
        ModelNotFoundError: The name is not known, here or to the hub.
        DownloadError: The download failed, a checksum is wrong, or it is needed and not allowed.
        InvalidArgumentError: The name fits several files of the repository.
    """
    from nanobraid.models import _hub

    known = KNOWN_MODELS.get(name.lower())
    if known is not None:
        return _known.pull_known(known, progress)
    repo = _parsed(name)
    found, _ = _repo.find_in_caches(repo)
    return found or _hub.fetch(_hub.find_offer(repo), progress)


def pull_announced(name: str) -> Path:
    """As `pull` of ``org/name[:quant]``, with an announcement and a progress bar on stderr."""
    repo = _parsed(name)
    found, _ = _repo.find_in_caches(repo)
    return found or _download(repo, None)


def _parsed(name: str) -> _repo.Repo:
    repo = _repo.Repo.parse(name)
    if repo is not None:
        return repo
    import difflib

    close = difflib.get_close_matches(name.lower(), KNOWN_MODELS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ModelNotFoundError(
        f"no known model {name!r}: the known names are {', '.join(KNOWN_MODELS)}, others are written "
        f"org/name[:quant]{hint}"
    )
