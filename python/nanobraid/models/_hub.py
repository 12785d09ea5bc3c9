"""Downloads from a Hugging Face hub into our own cache; only when huggingface_hub is installed.

huggingface_hub lists a repository and knows endpoint and token (HF_ENDPOINT, HF_TOKEN, ``hf auth login``). The files
themselves come through here: a download that was cut off goes on where it ended, and a file appears under its name only
after its size and checksum were compared with those the hub lists. Weights come last, so that a folder with all its
weights is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanobraid._logging import logger
from nanobraid.errors import DownloadError, ModelNotFoundError
from nanobraid.models._cache import Progress, hub_dir, hub_offline_reason, locked, sync_folder
from nanobraid.models._repo import Choice, Repo, choose

_HUB = "https://huggingface.co"
_TIMEOUT_S = 60.0  # without a single byte
_ATTEMPTS = 4  # without progress
_BLOCK = 1 << 20
_MAX_REDIRECTS = 5
_NEEDS = "downloading from a hub needs huggingface_hub: pip install 'nanobraid[hub]'"


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it.

    Attributes:
        name: Path inside the repository.
        num_bytes: Its size.
        sha256: SHA-256 of a large file, else None.
        git_id: SHA-1 that git gives a small file, else None.
    """

    name: str
    num_bytes: int
    sha256: str | None
    git_id: str | None


@dataclass(frozen=True)
class Offer:
    """A download that could be made: what a person is asked about.

    Attributes:
        repo: The name that was asked for.
        endpoint: Address of the hub.
        commit: The version that would be fetched.
        files: What would be fetched, weights last.
        choice: The same files by name, and which of them is opened.
        license: What the repository states, or None.
    """

    repo: Repo
    endpoint: str
    commit: str
    files: tuple[RemoteFile, ...]
    choice: Choice
    license: str | None

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.num_bytes for file in self.files)

    @property
    def snapshot(self) -> Path:
        """The folder that will hold the files."""
        return hub_dir() / self.repo.folder / "snapshots" / self.commit

    def __str__(self) -> str:
        count = f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        return (
            f"{self.repo} ({count}, {self.num_bytes / 1e6:,.1f} MB, license {self.license or 'not stated'}) "
            f"from {self.endpoint} to {self.snapshot}"
        )


Confirm = Callable[[Offer], None]
"""Asked before a download; raises to refuse it."""


def unavailable_reason() -> str | None:
    """Why nothing can be downloaded from a hub, in words; None if it can be tried."""
    if name := hub_offline_reason():
        return f"{name} forbids downloads"
    return _NEEDS if importlib.util.find_spec("huggingface_hub") is None else None


def endpoint() -> str:
    """Address of the hub: HF_ENDPOINT, else huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or _HUB).rstrip("/")


def find_offer(repo: Repo) -> Offer:
    """Asks the hub what a name means.

    Raises:
        ModelNotFoundError: The hub has no such repository or file.
        DownloadError: The hub cannot be asked, or wants a token.
        InvalidArgumentError: Several files fit the name.
    """
    if reason := unavailable_reason():
        raise DownloadError(f"{repo} is not on this machine, and {reason}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    where = endpoint()
    try:
        info = HfApi(endpoint=where).model_info(repo.id, revision="main", files_metadata=True, timeout=_TIMEOUT_S)
    except GatedRepoError:
        raise DownloadError(_gated(repo, where)) from None
    except RepositoryNotFoundError:
        raise ModelNotFoundError(
            f"{where} has no repository {repo.id}, or it is private: HF_TOKEN must then hold a token that may read it"
        ) from None
    except Exception as error:  # what it raises when there is no network depends on the version of huggingface_hub
        reason = " ".join(str(error).split())[:400]
        raise DownloadError(f"cannot ask {where} for {repo.id}: {type(error).__name__}: {reason}") from None
    files = {file.name: file for file in map(_remote_file, info.siblings or ()) if file is not None}
    choice = choose(files, repo)
    if not info.sha:
        raise DownloadError(f"{where} does not say which version of {repo.id} it has")
    stated = getattr(info.card_data, "license", None)
    chosen = tuple(files[name] for name in choice.files)
    return Offer(repo, where, _plain(info.sha), chosen, choice, stated if isinstance(stated, str) else None)


def _remote_file(sibling: Any) -> RemoteFile | None:
    name = str(sibling.rfilename)
    if name.startswith("/") or "\\" in name or ".." in name.split("/") or sibling.size is None:
        return None  # never written outside the folder
    lfs = sibling.lfs
    sha256 = None
    if lfs is not None:
        sha256 = lfs.get("sha256") if isinstance(lfs, Mapping) else lfs.sha256
    return RemoteFile(name, int(sibling.size), sha256, sibling.blob_id if lfs is None else None)


def _plain(commit: str) -> str:
    if not commit.isalnum():
        raise DownloadError(f"the hub names a version {commit!r}, which is no commit")
    return commit


def _gated(repo: Repo, where: str) -> str:
    return (
        f"{repo.id} is gated: accept its conditions at {where}/{repo.id}, then set HF_TOKEN to a token of that account "
        "(or log in with 'hf auth login')"
    )


def fetch(offer: Offer, progress: Progress | None = None) -> Path:
    """Downloads the files of an offer that are not there yet, and returns the model file or folder.

    Several processes may do this at once: one downloads, the others wait.

    Raises:
        DownloadError: A file could not be had, is not what the hub listed, or cannot be stored.
    """
    report = progress or (lambda done, total: None)
    folder = hub_dir() / offer.repo.folder
    snapshot = offer.snapshot
    try:
        snapshot.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            _require_space(offer)
            done = 0
            for file in offer.files:
                before = done

                def advance(count: int, before: int = before) -> None:
                    report(before + count, offer.num_bytes)

                target = snapshot / file.name
                if not (target.is_file() and target.stat().st_size == file.num_bytes):
                    _fetch_file(offer, file, folder / "incomplete", target, advance)
                done += file.num_bytes
                report(done, offer.num_bytes)
            (folder / "refs").mkdir(exist_ok=True)
            temporary = folder / "refs" / ".main"
            temporary.write_text(offer.commit)
            os.replace(temporary, folder / "refs" / "main")
            with contextlib.suppress(OSError):
                (folder / "incomplete").rmdir()  # only if nothing is left to be resumed
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(f"cannot store {offer.repo} in {hub_dir()}: {error}") from error
    return snapshot if offer.choice.opened is None else snapshot / offer.choice.opened


def _require_space(offer: Offer) -> None:
    needed = sum(file.num_bytes for file in offer.files if not (offer.snapshot / file.name).is_file())
    free = shutil.disk_usage(offer.snapshot).free
    if needed > free:
        raise DownloadError(
            f"{offer.repo} needs {needed / 1e6:,.0f} MB in {hub_dir()}, where {free / 1e6:,.0f} MB are free"
        )


def _fetch_file(offer: Offer, file: RemoteFile, partial: Path, target: Path, advance: Callable[[int], None]) -> None:
    partial.mkdir(exist_ok=True)
    identity = file.sha256 or file.git_id or f"{offer.commit}/{file.name}"
    temporary = partial / hashlib.sha256(identity.encode()).hexdigest()[:32]
    logger.info("downloading %s of %s (%d bytes)", file.name, offer.repo.id, file.num_bytes)
    attempts = 0
    have = _size_of(temporary)
    if have > file.num_bytes:
        temporary.unlink()
        have = 0
    while have < file.num_bytes or not temporary.exists():
        try:
            _receive(offer, file, temporary, advance)
            reason = "the connection ended"
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            _raise_if_final(offer, file, error)
            reason = str(error)
        attempts = attempts + 1 if _size_of(temporary) <= have else 0
        have = _size_of(temporary)
        if have < file.num_bytes and attempts >= _ATTEMPTS:
            raise DownloadError(
                f"{file.name} of {offer.repo.id}: {reason} after {have} of {file.num_bytes} bytes; what came is kept, "
                "and the next attempt goes on from there"
            )
        if have < file.num_bytes:
            time.sleep(0.2 * attempts)
    _check(offer, file, temporary)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, target)
    sync_folder(target.parent)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _receive(offer: Offer, file: RemoteFile, temporary: Path, advance: Callable[[int], None]) -> None:
    """Appends what the hub sends to what is there; returns when the connection ends."""
    have = _size_of(temporary)
    with _open(offer, file, have) as response:
        if response.status != http.client.PARTIAL_CONTENT:
            have = 0  # all of it comes again
        with temporary.open("ab" if have else "wb") as out:
            while block := response.read(_BLOCK):
                have += len(block)
                if have > file.num_bytes:
                    out.close()
                    temporary.unlink()
                    raise DownloadError(f"{file.name} of {offer.repo.id} is longer than the {file.num_bytes} bytes "
                                        "that the hub lists; nothing of it was kept")  # fmt: skip
                out.write(block)
                advance(have)
            out.flush()
            os.fsync(out.fileno())


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _open(offer: Offer, file: RemoteFile, have: int) -> http.client.HTTPResponse:
    """Opens a file from byte `have` on. Redirects are followed here: the token goes to the hub and to no other host."""
    from huggingface_hub import get_token, hf_hub_url

    url = hf_hub_url(offer.repo.id, file.name, revision=offer.commit, endpoint=offer.endpoint)
    home = urllib.parse.urlsplit(url).netloc
    opener = urllib.request.build_opener(_NoRedirect)
    token = get_token()
    for _ in range(_MAX_REDIRECTS):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https"):
            break
        request = urllib.request.Request(url, headers={"User-Agent": "nanobraid", "Accept-Encoding": "identity"})
        if have:
            request.add_header("Range", f"bytes={have}-")
        if token and parts.netloc == home:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            response: http.client.HTTPResponse = opener.open(request, timeout=_TIMEOUT_S)
            return response
        except urllib.error.HTTPError as error:
            location = error.headers.get("Location")
            if error.code not in (301, 302, 303, 307, 308) or not location:
                raise
            error.close()
            url = urllib.parse.urljoin(url, location)
    raise DownloadError(f"{file.name} of {offer.repo.id}: the hub's redirects lead nowhere")


def _raise_if_final(offer: Offer, file: RemoteFile, error: Exception) -> None:
    """Raises unless trying again can help."""
    if isinstance(error, urllib.error.HTTPError):
        if error.code in (401, 403):
            raise DownloadError(_gated(offer.repo, offer.endpoint)) from None
        if error.code < 500 and error.code not in (408, 429):
            raise DownloadError(
                f"{file.name} of {offer.repo.id}: the hub answers {error.code} {error.reason}"
            ) from None


def _check(offer: Offer, file: RemoteFile, temporary: Path) -> None:
    if file.sha256 is not None:
        digest, expected = hashlib.sha256(), file.sha256
    elif file.git_id is not None:
        digest, expected = hashlib.sha1(b"blob %d\0" % file.num_bytes, usedforsecurity=False), file.git_id
    else:
        return
    with temporary.open("rb") as source:
        while block := source.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != expected:
        temporary.unlink()
        raise DownloadError(
            f"{file.name} of {offer.repo.id} is not the file that the hub lists: its checksum is {digest.hexdigest()}, "
            f"expected {expected}; nothing of it was kept"
        )
