"""`nanobraid inspect` on every kind of model file."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nanobraid as nb
from nanobraid import _core

HIDDEN = 256


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanobraid", "inspect", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def inspect(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.returncode in (0, 1), done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture
def braid_path(tmp_path: Path) -> Path:
    path = tmp_path / "model.braid"
    tensors = [("norm", "f32", [HIDDEN]), ("matrix", "q4_1", [64, HIDDEN]), ("other", "q4_1", [32, HIDDEN])]
    rng = np.random.default_rng(3)
    with _core.BraidWriter(str(path), {"general.architecture": "llama", "texts": ["a", "b"]}, tensors) as writer:
        writer.write(0, rng.standard_normal(HIDDEN).astype(np.float32))
        for index, rows in ((1, 64), (2, 32)):
            blocks = rng.integers(0, 128, (rows * HIDDEN // 32, 20), np.uint8)
            blocks[:, :4] = np.array([0, 60, 0, 60], np.uint8)  # scale and minimum 1.0
            writer.write(index, blocks)
    return path


def test_a_braid_file(braid_path: Path) -> None:
    info = inspect(braid_path)
    assert (info["format"], info["version"], info["file_bytes"]) == ("braid", 1, braid_path.stat().st_size)
    assert info["fingerprint"] == _core.ModelFile(str(braid_path)).fingerprint
    assert len(info["fingerprint"]) == 64
    assert [name for name, _, _ in info["sections"]] == ["METADATA", "TENSORS", "DATA"]
    assert info["sections"][2][1:] == [4096, braid_path.stat().st_size - 4096]
    assert info["metadata"] == [
        ["general.architecture", "string", '"llama"'],
        ["texts", "array of string", '["a", "b"]'],
    ]
    assert info["tensors"][1] == ["matrix", "q4_1", [64, HIDDEN], 64 * HIDDEN // 32 * 20]
    assert info["totals"]["q4_1"] == {"tensors": 2, "values": 24576, "bytes": 15360, "bits_per_weight": 5.0}
    assert info["totals"]["f32"]["bits_per_weight"] == 32.0
    assert info["totals"]["all"]["tensors"] == 3
    assert info["totals"]["all"]["bits_per_weight"] == round(8 * (1024 + 15360) / (HIDDEN + 24576), 4)
    text = run(braid_path).stdout
    for piece in ("braid version 1", info["fingerprint"], "TENSORS", "texts", "64 x 256", "5.00 bits per weight"):
        assert piece in text


def test_check_tensors(braid_path: Path) -> None:
    info = inspect(braid_path, "--check-tensors")
    assert info["check"] == {"checksums": "ok", "nonfinite": [], "skipped": []}
    data = bytearray(braid_path.read_bytes())
    data[4096 + 4096 + 7] ^= 1
    braid_path.write_bytes(data)
    assert run(braid_path).returncode == 0  # reads no tensor
    done = run(braid_path, "--check-tensors")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert f"{braid_path}: at offset 8192" in done.stderr
    assert 'tensor "matrix" does not have its checksum' in done.stderr


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "bad.braid"
    with _core.BraidWriter(str(path), {}, [("good", "f32", [4]), ("bad", "f16", [2, 3])]) as writer:
        writer.write(0, np.float32([1, 2, 3, 4]))
        writer.write(1, np.float16([1, np.nan, np.inf, -np.inf, np.nan, np.nan]))
    done = run(path, "--check-tensors")
    assert done.returncode == 1
    assert "bad: 3 NaN, 2 infinite" in done.stdout
    assert inspect(path, "--check-tensors")["check"]["nonfinite"] == [["bad", 3, 2]]


def test_weights_of_a_gguf_file_are_checked_too(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "bad.gguf", "llama")
    writer.add_tensor("good", np.ones((2, 32), np.float32))
    writer.add_tensor("bad", np.float32([1, np.inf]))
    writer.add_tensor("strange", np.arange(4, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = run(tmp_path / "bad.gguf", "--check-tensors")
    assert done.returncode == 1
    assert "checksums none in the file; 1 tensors with NaN or infinity" in done.stdout
    assert "bad: 0 NaN, 1 infinite" in done.stdout
    assert done.stderr == "nanobraid: tensor strange was not looked into: format I32\n"


def damaged(data: bytes) -> Iterator[tuple[str, bytes, str]]:
    """Files that are no models: a name, the bytes, and what the error says after the path."""

    def changed(at: int, value: bytes) -> bytes:
        return data[:at] + value + data[at + len(value) :]

    yield "empty", b"", "the file is empty"
    yield "one_byte", data[:1], "at offset 0: not a"
    yield "magic", changed(6, b"\n"), "at offset 0: not a .braid file"
    yield "cut_in_header", data[:100], "at offset"
    yield "cut_in_metadata", data[:300], "at offset 16: the file has 300 bytes"
    yield "cut_in_data", data[:-1], "incomplete"
    yield "longer", data + b"\0", "too long"
    yield "version_0", changed(8, b"\0"), "version 0 unsupported"
    yield "version_2", changed(8, b"\2"), "version 2 unsupported"
    yield "big_endian", changed(8, b"\0\0\0\1"), "big-endian"
    yield "header", changed(41, bytes([data[41] ^ 1])), "the header does not have its checksum"
    yield "directory", changed(130, b"\1"), "the section directory does not have its checksum"
    yield "metadata", changed(226, b"\1"), "section METADATA does not have its checksum"
    (tensors_at,) = struct.unpack_from("<Q", data, 128 + 32 + 8)
    yield "tensors", changed(tensors_at, b"\7"), "section TENSORS does not have its checksum"


def test_damaged_files(braid_path: Path, tmp_path: Path) -> None:
    for name, data, says in damaged(braid_path.read_bytes()):
        path = tmp_path / f"{name}.braid"
        path.write_bytes(data)
        for opening in (nb.LLM, nb.Tokenizer):
            with pytest.raises((nb.FormatError, nb.UnsupportedError), match=f"{re.escape(str(path))}: .*{says}"):
                opening(path)
    done = run(tmp_path / "metadata.braid")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "section METADATA does not have its checksum" in done.stderr


# 64 GB of data that are a hole: reading them would take minutes, holding them would fail.
def test_a_large_file_opens_at_once(tmp_path: Path) -> None:
    from test_files import HEADER, SECTION, crc32c

    rows = 1 << 20
    size = rows * 16384 * 4
    metadata = struct.pack("<Q", 0)
    tensors = struct.pack("<QQ", 1, 6) + b"matrix" + struct.pack("<IIQQQQI", 0, 2, rows, 16384, 4096, size, 0)
    sections = SECTION.pack(1, 0, 224, len(metadata), crc32c(metadata), 0)
    sections += SECTION.pack(2, 0, 232, len(tensors), crc32c(tensors), 0)
    sections += SECTION.pack(3, 0, 4096, size, 0, 0)
    header = HEADER.pack(b"\x89BRAID\r\n", 1, 0, 4096 + size, 128, 3, crc32c(sections), bytes(32), bytes(52), 0)
    header = header[:124] + struct.pack("<I", crc32c(header[:124]))
    path = tmp_path / "large.braid"
    with path.open("wb") as file:
        file.write(header + sections + metadata + tensors)
        file.truncate(4096 + size)
    before, started = _core.memory_status()["rss_bytes"], time.monotonic()
    model = _core.ModelFile(str(path))
    info = _core.inspect_file(str(path))
    assert time.monotonic() - started < 1.0
    assert _core.memory_status()["rss_bytes"] - before < 16 << 20
    assert info["file_bytes"] == 4096 + size
    assert model.read("matrix", size - 8) == bytes(8)
    assert inspect(path)["totals"]["all"]["bytes"] == size


def test_a_split_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(5)
    arrays = {f"blk.{i}.weight": rng.standard_normal((4, 32)).astype(np.float32) for i in range(7)}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=3)
    writer.add_block_count(7)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        file = _core.ModelFile(str(part))
        assert file.path == str(parts[0])
        assert file.metadata()["llama.block_count"] == 7
        assert [name for name, _, _, _ in file.tensors()] == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.read_rows(name), array)
    info = inspect(parts[1])
    assert info["parts"] == [str(part) for part in parts]
    assert info["file_bytes"] == sum(part.stat().st_size for part in parts)
    assert info["totals"]["all"]["tensors"] == 7
    assert "parts (3)" in run(parts[2]).stdout
    parts[1].unlink()
    done = run(parts[2])
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"{parts[1]}: cannot open" in done.stderr
    assert "part 2 of 3" in done.stderr
