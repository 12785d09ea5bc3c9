"""Hugging Face folders become files in the cache, once. The exporter is replaced, but for the test that says so."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import nanobraid as nb
from nanobraid import _export_cache, models

HEADER = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "cache" / "exported"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "Tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + bytes(16))
    return folder


Export = Callable[..., None]


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """An exporter that writes what it was asked for; returns its calls."""
    calls: list[tuple[Path, str]] = []

    def export_model(source: Path, out: Path, dtype: str, *, progress: Callable[[str, int, int], None]) -> None:
        calls.append((source, dtype))
        progress("w", 1, 1)
        out.write_bytes(b"braid " + dtype.encode())

    use(monkeypatch, export_model)
    return calls


def use(monkeypatch: pytest.MonkeyPatch, export_model: Export) -> None:
    module = types.ModuleType("nanobraid.export")
    module.export_model = export_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nanobraid.export", module)


def visible(cache: Path) -> list[str]:
    return sorted(entry.name for entry in cache.iterdir() if not entry.name.startswith("."))


def test_the_second_start_uses_the_first_ones_file(
    folder: Path, cache: Path, exporter: list[tuple[Path, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = _export_cache.exported(folder, "bf16")
    assert path.read_bytes() == b"braid bf16"
    assert path.parent == cache
    assert path.name.startswith("Tiny-bf16-")
    said = capsys.readouterr()
    assert said.out == ""
    assert str(path) in said.err
    assert _export_cache.exported(folder, "bf16") == path
    assert exporter == [(folder, "bf16")]
    assert capsys.readouterr().err == ""
    assert visible(cache) == [path.name]


def test_the_second_start_reads_no_weights(folder: Path, exporter: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _export_cache.exported(folder)
    opened: list[str] = []
    plain_open = Path.open

    def watched(self: Path, *args: object, **kwargs: object) -> object:
        opened.append(self.name)
        return plain_open(self, *args, **kwargs)  # type: ignore[arg-type, call-overload]

    monkeypatch.setattr(Path, "open", watched)
    assert _export_cache.exported(folder) == path
    assert "model.safetensors" not in opened
    os.utime(folder / "model.safetensors", (1, 1))
    assert _export_cache.exported(folder) == path  # looked at again, and equal
    assert "model.safetensors" in opened


CHANGES: dict[str, Callable[[Path], object]] = {
    "config": lambda folder: (folder / "config.json").write_text("{}"),
    "tokenizer": lambda folder: (folder / "tokenizer.json").write_text("[]"),
    "a new tokenizer file": lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
    "chat template": lambda folder: (folder / "chat_template.jinja").write_text("x"),
    "weights": lambda folder: (folder / "model.safetensors").write_bytes(
        len(HEADER).to_bytes(8, "little") + HEADER + b"\1" * 16
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_exported_again(
    folder: Path, cache: Path, exporter: list[tuple[Path, str]], change: str
) -> None:
    before = _export_cache.exported(folder)
    CHANGES[change](folder)
    assert _export_cache.exported(folder) != before
    assert len(exporter) == 2
    assert len(visible(cache)) == 2


def test_what_does_not_matter(folder: Path, exporter: list[tuple[Path, str]], tmp_path: Path) -> None:
    before = _export_cache.exported(folder)
    for name in ("README.md", "pytorch_model.bin", "modeling.py"):
        (folder / name).write_text("x")
    assert _export_cache.exported(folder) == before
    os.rename(folder, tmp_path / "moved")
    (tmp_path / "moved").joinpath("sub").mkdir()
    assert _export_cache.exported(tmp_path / "moved").name.split("-")[-1] == before.name.split("-")[-1]


def test_the_version_and_the_dtype_are_in_the_key(
    folder: Path, exporter: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {_export_cache.exported(folder, dtype) for dtype in ("bf16", "w8", "w4")}
    assert len(paths) == 3
    assert sorted(_export_cache.find_exported(folder)) == sorted(paths)
    monkeypatch.setattr(_export_cache, "__version__", "99.0")
    assert _export_cache.find_exported(folder) == []
    assert _export_cache.exported(folder, "bf16") not in paths


def test_find_exported_reads_no_weights(folder: Path, exporter: object, tmp_path: Path) -> None:
    assert _export_cache.find_exported(folder) == []
    path = _export_cache.exported(folder)
    assert _export_cache.find_exported(folder) == [path]
    (folder / "model.safetensors").write_bytes(b"other")
    assert _export_cache.find_exported(folder) == []
    assert _export_cache.find_exported(tmp_path / "none") == []


def test_a_snapshot_is_called_after_its_repository(folder: Path, exporter: object, tmp_path: Path) -> None:
    snapshot = tmp_path / "hf" / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    os.rename(folder, snapshot)
    path = _export_cache.exported(snapshot)
    assert path.name.startswith("org--name-bf16-")
    (listed,) = models.list_models()
    assert (listed.name, listed.exported) == ("org/name", [path])


def test_damaged_memory_of_checksums_is_forgotten(folder: Path, exporter: list[object], cache: Path) -> None:
    path = _export_cache.exported(folder)
    (memory,) = (cache / ".digests").iterdir()
    for text in ("", "[]", '{"model.safetensors": 3}', '{"model.safetensors": []}', "{" * 100_000):
        memory.write_text(text)
        assert _export_cache.exported(folder) == path
    assert list(json.loads(memory.read_text())) == ["model.safetensors"]


@pytest.mark.parametrize("how", ["raises", "interrupted", "writes nothing", "disk full"])
def test_a_failed_export_leaves_nothing(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def export_model(source: Path, out: Path, dtype: str, *, progress: object) -> None:
        if how == "writes nothing":
            return
        out.write_bytes(b"half")
        if how == "disk full":
            raise OSError(28, "No space left on device")
        raise KeyboardInterrupt if how == "interrupted" else nb.UnsupportedError("no such architecture")

    use(monkeypatch, export_model)
    expected = {"raises": nb.UnsupportedError, "interrupted": KeyboardInterrupt}.get(how, nb.ModelIOError)
    with pytest.raises(expected):
        _export_cache.exported(folder)
    assert visible(cache) == []
    assert [p for p in cache.rglob("*") if p.is_file() and p.suffix == ".braid"] == []


SLOW = """
import sys, time, types
from pathlib import Path
module = types.ModuleType("nanobraid.export")
def export_model(source, out, dtype, *, progress):
    with open({log!r}, "a") as file: file.write("x")
    out.write_bytes(b"half")
    time.sleep({seconds})
    out.write_bytes(b"whole")
module.export_model = export_model
sys.modules["nanobraid.export"] = module
from nanobraid import _export_cache
print(_export_cache.exported(Path({folder!r})))
"""


def start(folder: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    code = SLOW.format(log=str(log), seconds=seconds, folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_processes_at_the_same_time_export_once(folder: Path, tmp_path: Path) -> None:
    processes = [start(folder, tmp_path / "log", 0.5) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == b"whole"
    assert (tmp_path / "log").read_text() == "x"


def test_a_killed_export_leaves_nothing_usable(folder: Path, cache: Path, tmp_path: Path, exporter: object) -> None:
    process = start(folder, tmp_path / "log", 60)
    deadline = time.monotonic() + 30
    while not list(cache.glob(".*tmp*/*.braid")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert visible(cache) == []
    assert _export_cache.find_exported(folder) == []
    path = _export_cache.exported(folder)
    assert path.read_bytes() == b"braid bf16"
    assert list(cache.glob(".*tmp*")) == []


BAD: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), nb.ModelNotFoundError, "no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), nb.ModelNotFoundError, "no safetensors"),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        nb.UnsupportedError,
        "pytorch_model.bin, a pickle",
    ),
    "a shard is missing": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        nb.ModelNotFoundError,
        "model-00002-of-00002.safetensors is missing",
    ),
    "an index that points elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../x"}}'),
        nb.ModelNotFoundError,
        r"\.\./x is missing",
    ),
    "an index that is none": (
        lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000),
        nb.ModelNotFoundError,
        "readable model.safetensors.index.json",
    ),
    "a huge config": (lambda f: os.truncate(f / "config.json", 1 << 40), nb.FormatError, "config.json: 1099511627776"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders(folder: Path, exporter: list[object], case: str) -> None:
    spoil, error, says = BAD[case]
    spoil(folder)
    with pytest.raises(error, match=says):
        _export_cache.exported(folder)
    assert exporter == []


def test_other_dtypes_are_refused(folder: Path, exporter: object) -> None:
    with pytest.raises(nb.UnsupportedError, match="'q4_0' is not offered"):
        _export_cache.exported(folder, "q4_0")


def test_too_little_space_is_said_before(folder: Path, exporter: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(free=10)
    monkeypatch.setattr(_export_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(nb.ModelIOError, match="0 MB free"):
        _export_cache.exported(folder)
    assert exporter == []


def test_progress_is_shown(folder: Path, exporter: object, capsys: pytest.CaptureFixture[str]) -> None:
    _export_cache.exported(folder, progress=True)
    assert "exporting" in capsys.readouterr().err


def test_llm_opens_what_was_exported(
    folder: Path, cache: Path, exporter: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        with pytest.raises(nb.NanobraidError, match=r"Tiny-bf16-\w+\.braid"):  # its content is no model
            nb.LLM(folder)
    assert exporter == [(folder, "bf16")]


def test_a_real_folder_runs(tmp_path: Path, cache: Path) -> None:
    """With the real exporter and a folder that transformers wrote."""
    torch = pytest.importorskip("torch", reason="torch writes the folder")
    transformers = pytest.importorskip("transformers", reason="transformers writes the folder")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers writes the tokenizer")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "He", "<|end|>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("H", "e")]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    end = vocabulary["<|end|>"]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    folder = tmp_path / "tiny"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    with nb.LLM(folder, dtype="f32", num_threads=1) as llm:
        first = llm.generate("Hello", nb.SamplingParams(temperature=0, max_tokens=4))[0].token_ids
    (exported,) = visible(cache)
    before = (cache / exported).stat().st_mtime_ns
    with nb.LLM(folder, dtype="f32", num_threads=1) as llm:
        assert llm.generate("Hello", nb.SamplingParams(temperature=0, max_tokens=4))[0].token_ids == first
    assert (cache / exported).stat().st_mtime_ns == before


def test_spawned_processes_see_the_same_key(folder: Path, exporter: object) -> None:
    path = _export_cache.exported(folder)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_export_cache.find_exported, (folder,)) == [path]
