"""A Hugging Face hub on the loopback interface, as far as downloads need one.

Speaks ``/api/models/{repo}/revision/{rev}`` and ``/{repo}/resolve/{rev}/{file}`` with HEAD, GET and Range, with the
headers that huggingface_hub looks at (ETag, X-Repo-Commit, X-Linked-Size, X-Linked-Etag, X-Error-Code). Large files
redirect to another host name, as the real hub does to its content network. Faults are attributes of `Hub`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_secret"
LARGE = (".safetensors", ".gguf", ".bin")


@dataclass
class Request:
    method: str
    path: str
    host: str
    authorization: str | None
    range: str | None


@dataclass
class Hub:
    """What the hub holds and how it misbehaves.

    Attributes:
        repos: Repository -> file -> content.
        gated: Repositories that want `TOKEN`.
        requests: Every request so far.
        cut_after: Close the connection after this many bytes of a file, as often as `cuts` says.
        corrupt: Files whose content is served with one bit flipped.
        without_range: Answer a Range request with the whole file.
        listed_size: Sizes that the listing states instead of the true ones.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)
    cut_after: int = 0
    cuts: int = 0
    corrupt: set[str] = field(default_factory=set)
    without_range: bool = False
    listed_size: dict[str, int] = field(default_factory=dict)
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def commit(self, repo: str) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.repos[repo].items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()

    def fetched(self) -> list[str]:
        """The files that were asked for with GET, in order."""
        return [r.path.rsplit("/resolve/", 1)[1].split("/", 1)[1] for r in self.requests if "/resolve/" in r.path]

    def copy_to_cache(self, repo: str, folder: Path, only: set[str] | None = None) -> Path:
        """Writes a repository as huggingface_hub would have it in its cache: blobs, and links in a snapshot."""
        base = folder / f"models--{repo.replace('/', '--')}"
        snapshot = base / "snapshots" / self.commit(repo)
        for name, content in self.repos[repo].items():
            if only is not None and name not in only:
                continue
            blob = base / "blobs" / etag(name, content)
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link = snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        (base / "refs").mkdir(exist_ok=True)
        (base / "refs" / "main").write_text(self.commit(repo))
        return snapshot


def is_large(name: str) -> bool:
    return name.endswith(LARGE)


def etag(name: str, content: bytes) -> str:
    if is_large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        host = str(self.headers["Host"]).partition(":")[0]
        authorization = self.headers.get("Authorization")
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, host, authorization, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if is_api else parts[:2])
        if repo not in self.hub.repos:
            self._error(401, "RepoNotFound")  # the hub does not tell strangers what exists
        elif repo in self.hub.gated and authorization != f"Bearer {TOKEN}" and (is_api or host == "127.0.0.1"):
            self._error(401, "GatedRepo")
        elif is_api:
            self._send(200, json.dumps(self._info(repo)).encode(), {"Content-Type": "application/json"})
        else:
            self._file(repo, "/".join(parts[4:]), host)

    def _info(self, repo: str) -> dict[str, object]:
        siblings = []
        for name, content in self.hub.repos[repo].items():
            size = self.hub.listed_size.get(name, len(content))
            entry: dict[str, object] = {"rfilename": name, "size": size}
            entry["blobId"] = hashlib.sha1(content).hexdigest() if is_large(name) else etag(name, content)
            if is_large(name):
                entry["lfs"] = {"sha256": etag(name, content), "size": size, "pointerSize": 130}
            siblings.append(entry)
        return {"id": repo, "sha": self.hub.commit(repo), "cardData": {"license": "mit"}, "siblings": siblings}

    def _file(self, repo: str, name: str, host: str) -> None:
        content = self.hub.repos[repo].get(name)
        if content is None:
            self._error(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": self.hub.commit(repo), "ETag": f'"{etag(name, content)}"'}
        if is_large(name) and host == "127.0.0.1":
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{etag(name, content)}"'}
            headers["Location"] = f"http://localhost:{self.hub.port}{self.path}"
            self._send(302, b"", headers)
            return
        if name in self.hub.corrupt:
            content = bytes([content[0] ^ 1]) + content[1:]
        start = 0
        wanted = self.headers.get("Range")
        if wanted and not self.hub.without_range:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if "Content-Range" in headers else 200, content[start:], headers)

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts and len(body) > self.hub.cut_after and status in (200, 206) and "ETag" in headers:
            self.hub.cuts -= 1
            self.wfile.write(body[: self.hub.cut_after])
            self.close_connection = True
            return
        self.wfile.write(body)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Runs the hub until the end of the block."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
