"""tools/export_models.sh against a loopback hub: ``nanobraid export`` is replaced, ``nanobraid pull`` is real."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, serve

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "export_models.sh"
TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
LLAMA = "meta-llama/Llama-3.2-1B"
MODELS = {
    *("llama-2-7b", "llama-2-7b-chat", "tinyllama-1.1b-chat", "mistral-7b-instruct-v0.3"),
    *("llama-3.2-1b", "llama-3.2-1b-instruct", "llama-3.2-3b", "llama-3.2-3b-instruct"),
    *("qwen2.5-0.5b-instruct", "qwen2.5-1.5b-instruct", "qwen2.5-7b-instruct"),
    *("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b"),
    *("smollm2-135m-instruct", "smollm2-360m-instruct", "smollm2-1.7b-instruct"),
}
FAKE = """#!{python}
import os, sys
if sys.argv[1] == "export":
    assert sys.argv[3::2] == ["-o", "--dtype"] and len(sys.argv) == 7, sys.argv
    assert os.path.isfile(os.path.join(sys.argv[2], "model.safetensors"))
    if sys.argv[6] == os.environ.get("FAIL"):
        sys.exit("nanobraid: error: no such format")
    open(sys.argv[4], "w").write(sys.argv[6])
    sys.exit(0)
from nanobraid.cli import main
sys.exit(main())
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"x" * 100}
    with serve(Hub(repos={TINYLLAMA: files, LLAMA: files}, gated={LLAMA})) as hub:
        yield hub


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    program = tmp_path / "bin" / "nanobraid"
    program.parent.mkdir()
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(0o755)
    return program.parent


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "NANOBRAID_"))}
    own = {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "NANOBRAID_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
        "MODELS_DIR": str(folder / "models"),
        "no_proxy": "127.0.0.1,localhost",
    }
    environment = clean | own | variables
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, cwd=folder, check=False
    )


def test_help_lists_every_sub_command(tmp_path: Path) -> None:
    done = run(tmp_path, "help")
    assert done.returncode == 0
    assert set(re.findall(r"^  download-(\S+) ", done.stdout, re.MULTILINE)) == MODELS
    exports = set(re.findall(r"^  export-(\S+)$", done.stdout, re.MULTILINE))
    assert {f"{model}-{dtype}" for model in MODELS for dtype in ("bf16", "w8", "w4")} <= exports
    assert run(tmp_path).returncode == 2


def test_download_prints_the_folder(tmp_path: Path, hub: Hub, bin_folder: Path) -> None:
    done = run(tmp_path, "download-tinyllama-1.1b-chat", HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == b"x" * 100


def test_export_downloads_once_and_exports_once(tmp_path: Path, hub: Hub, bin_folder: Path) -> None:
    names = ["export-tinyllama-1.1b-chat-w8", "export-tinyllama-1.1b-chat-bf16"]
    done = run(tmp_path, *names, HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stderr
    for dtype in ("w8", "bf16"):
        assert (tmp_path / "models" / f"tinyllama-1.1b-chat-{dtype}.braid").read_text() == dtype
    assert hub.fetched().count("config.json") == 1
    (tmp_path / "models" / "tinyllama-1.1b-chat-w8.braid").write_text("mine")
    again = run(tmp_path, *names, HF_ENDPOINT="http://127.0.0.1:1")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "models" / "tinyllama-1.1b-chat-w8.braid").read_text() == "mine"


def test_a_gated_model(tmp_path: Path, hub: Hub, bin_folder: Path) -> None:
    done = run(tmp_path, "export-llama-3.2-1b-w4", HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 1
    assert "meta-llama/Llama-3.2-1B is gated" in done.stderr
    assert "cannot get meta-llama/Llama-3.2-1B" in done.stderr
    done = run(tmp_path, "export-llama-3.2-1b-w4", HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variables", [{"HF_ENDPOINT": "http://127.0.0.1:1"}, {"HF_HUB_OFFLINE": "1"}])
def test_no_network(tmp_path: Path, bin_folder: Path, variables: dict[str, str]) -> None:
    done = run(tmp_path, "export-qwen3-0.6b-bf16", **variables)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2, done.stderr
    assert "cannot get Qwen/Qwen3-0.6B" in done.stderr
    assert not (tmp_path / "models").exists()


def test_all_goes_on_after_a_failure(tmp_path: Path, hub: Hub, bin_folder: Path) -> None:
    done = run(tmp_path, "all", HF_ENDPOINT=hub.endpoint, FAIL="w8")
    assert done.returncode == 1
    assert {path.name for path in (tmp_path / "models").iterdir()} == {
        "tinyllama-1.1b-chat-bf16.braid",
        "tinyllama-1.1b-chat-w4.braid",
    }
    assert "cannot export TinyLlama" in done.stderr
    assert done.stderr.count("cannot get Qwen/Qwen3-8B") == 1


def test_wrong_arguments(tmp_path: Path) -> None:
    done = run(tmp_path, "export-gpt-4-w4")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no sub-command export-gpt-4-w4" in done.stderr
    done = run(tmp_path, "download-qwen3-8b", NANOBRAID="no-such-program")
    assert done.returncode == 1
    assert "no program no-such-program" in done.stderr


def test_shellcheck_is_content() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
