"""BraidWriter and ModelFile: what is written is what is read, checked against an independent reader of the format."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanobraid import _core

ALIGNMENT = 4096
HEADER = struct.Struct("<8sIIQQII32s52sI")
SECTION = struct.Struct("<IIQQII")
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
CODES = {"f32": 0, "f16": 1, "bf16": 2, "q4_0": 16, "q4_1": 17, "q8_0": 20}

Tensor = tuple[str, str, list[int], bytes]


def crc32c(data: bytes) -> int:
    """Bit by bit, from the definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


class Reader:
    """Reads values from front to back."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        self.at += size
        assert self.at <= len(self.data)
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> bytes:
        return self.take(self.number("<Q"))

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.string()
        if kind == 9:
            element = self.number("<I")
            return element, [self.value(element) for _ in range(self.number("<Q"))]
        return self.number(SCALARS[kind])


def parse(data: bytes) -> dict[str, Any]:
    """Reads a file as ARCHITECTURE.md describes it, comparing every checksum."""
    magic, version, flags, size, directory_at, count, directory_crc, fingerprint, zeros, crc = HEADER.unpack_from(data)
    assert (magic, version, flags, size, zeros) == (b"\x89BRAID\r\n", 1, 0, len(data), bytes(52))
    assert crc == crc32c(data[:124])
    directory = data[directory_at : directory_at + 32 * count]
    assert crc32c(directory) == directory_crc
    sections = {}
    for kind, section_flags, offset, length, section_crc, unused in SECTION.iter_unpack(directory):
        assert (section_flags, unused) == (0, 0)
        sections[kind] = data[offset : offset + length]
        assert section_crc == (0 if kind == 3 else crc32c(sections[kind]))
    metadata, tensors = Reader(sections[1]), Reader(sections[2])
    entries = {}
    for _ in range(metadata.number("<Q")):
        key, kind = metadata.string(), metadata.number("<I")
        entries[key] = kind, metadata.value(kind)
    digest = hashlib.sha256(struct.pack("<Q", len(sections[1])) + sections[1])
    directory_of_tensors = []
    for _ in range(tensors.number("<Q")):
        name, code, rank = tensors.string().decode(), tensors.number("<I"), tensors.number("<I")
        dims = [tensors.number("<Q") for _ in range(rank)]
        offset, length, tensor_crc = tensors.number("<Q"), tensors.number("<Q"), tensors.number("<I")
        assert offset % ALIGNMENT == 0
        payload = data[offset : offset + length]
        assert crc32c(payload) == tensor_crc
        digest.update(payload)
        directory_of_tensors.append((name, code, dims, payload))
    assert metadata.at == len(sections[1])
    assert tensors.at == len(sections[2])
    digest.update(struct.pack("<Q", len(sections[2])) + sections[2])
    assert digest.digest() == fingerprint
    return {"metadata": entries, "tensors": directory_of_tensors, "fingerprint": fingerprint.hex()}


METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "yes": True,
    "no": False,
    "zero": 0,
    "u32": 2**32 - 1,
    "i64": 2**32,
    "negative": -1,
    "least": -(2**63),
    "u64": 2**64 - 1,
    "real": 1e-5,
    "inf": float("inf"),
    "text": "Grüße\n\0 \U0001f642",
    "raw": b"\xff\xfe a \xed\xa0\x80".decode("utf-8", "surrogateescape"),
    "nothing": [],
    "flags": [True, False],
    "numbers": [0, 1, 2**32 - 1],
    "signed": [1, -1],
    "wide": [1, 2**64 - 1],
    "reals": [0.5, -2.0],
    "texts": ["a", "", "\udcff"],
    "pair": (1, 2),
}
TYPES = dict.fromkeys(("general.architecture", "text", "raw"), 8)
TYPES |= {
    "yes": 7,
    "no": 7,
    "zero": 4,
    "u32": 4,
    "i64": 11,
    "negative": 11,
    "least": 11,
    "u64": 10,
    "real": 6,
    "inf": 6,
}
ELEMENTS = {"nothing": 4, "flags": 7, "numbers": 4, "signed": 11, "wide": 10, "reals": 6, "texts": 8, "pair": 4}


def make_tensors() -> list[Tensor]:
    rng = np.random.default_rng(7)
    q4_1 = np.concatenate(
        [rng.standard_normal((6, 2)).astype(np.float16).view(np.uint8), rng.integers(0, 256, (6, 16), np.uint8)], axis=1
    )
    return [
        ("norm", "f32", [5], rng.standard_normal(5).astype(np.float32).tobytes()),
        ("half", "f16", [2, 3], rng.standard_normal(6).astype(np.float16).tobytes()),
        ("matrix", "q4_1", [3, 64], q4_1.tobytes()),
        ("cube", "f32", [2, 2, 1024], rng.standard_normal(4096).astype(np.float32).tobytes()),
    ]


def write(path: Path, metadata: dict[str, Any], tensors: list[Tensor]) -> None:
    with _core.BraidWriter(str(path), metadata, [tensor[:3] for tensor in tensors]) as writer:
        for index, tensor in enumerate(tensors):
            writer.write(index, tensor[3])


def test_an_independent_reader_finds_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "model.braid", METADATA, make_tensors())
    contents = parse((tmp_path / "model.braid").read_bytes())
    assert [key.decode() for key in contents["metadata"]] == list(METADATA)
    for key, wanted in METADATA.items():
        kind, found = contents["metadata"][key.encode()]
        if kind == 9:
            assert found[0] == ELEMENTS[key], key
            found = found[1]
        else:
            assert kind == TYPES[key], key
        as_bytes: Callable[[Any], Any] = lambda v: v.encode("utf-8", "surrogateescape") if isinstance(v, str) else v  # noqa: E731
        if isinstance(wanted, (list, tuple)):
            assert found == [as_bytes(value) for value in wanted], key
        else:
            assert found == (np.float32(wanted) if kind == 6 else as_bytes(wanted)), key
    assert contents["tensors"] == [(name, CODES[form], shape, data) for name, form, shape, data in make_tensors()]
    assert _core.ModelFile(str(tmp_path / "model.braid")).fingerprint == contents["fingerprint"]


def test_write_read_write_gives_equal_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first.braid", tmp_path / "second.braid"
    write(first, METADATA, make_tensors())
    file = _core.ModelFile(str(first))
    assert (file.kind, file.version, file.path) == ("braid", 1, str(first))
    assert file.file_bytes == first.stat().st_size
    metadata = file.metadata()
    assert {key: type(value) for key, value in metadata.items()} == {
        key: list if isinstance(value, tuple) else type(value) for key, value in METADATA.items()
    }
    write(second, metadata, [(name, form, shape, file.read(name)) for name, form, shape, _ in file.tensors()])
    assert first.read_bytes() == second.read_bytes()
    write(second, {**metadata, "zero": 1}, make_tensors())
    assert first.read_bytes() != second.read_bytes()
    assert _core.ModelFile(str(second)).fingerprint != file.fingerprint


def test_rows_are_unpacked(tmp_path: Path) -> None:
    write(tmp_path / "model.braid", {}, make_tensors())
    file = _core.ModelFile(str(tmp_path / "model.braid"))
    tensors = {name: (form, shape, data) for name, form, shape, data in make_tensors()}
    np.testing.assert_array_equal(file.read_rows("norm"), np.frombuffer(tensors["norm"][2], np.float32)[None])
    cube = np.frombuffer(tensors["cube"][2], np.float32).reshape(4, 1024)
    np.testing.assert_array_equal(file.read_rows("cube", 1, 2), cube[1:3])
    np.testing.assert_array_equal(file.read_rows("cube", 3), cube[3:])
    assert file.read_rows("cube", 4).shape == (0, 1024)
    blocks = np.frombuffer(tensors["matrix"][2], np.uint8).reshape(6, 20)
    scale, least = (blocks[:, 2 * i : 2 * i + 2].copy().view(np.float16).astype(np.float32) for i in range(2))
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    np.testing.assert_array_equal(file.read_rows("matrix"), (scale * codes + least).reshape(3, 64))
    assert file.read("matrix", 20, 7) == tensors["matrix"][2][20:27]
    assert file.read("matrix", 120) == b""


def test_reading_refuses_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "model.braid", {}, make_tensors())
    file = _core.ModelFile(str(tmp_path / "model.braid"))
    for call in (
        lambda: file.read("absent"),
        lambda: file.read("norm", 21),
        lambda: file.read("norm", 0, 21),
        lambda: file.read("norm", 20, 2**64 - 1),
        lambda: file.read_rows("absent"),
        lambda: file.read_rows("cube", -1),
        lambda: file.read_rows("cube", 0, -1),
        lambda: file.read_rows("cube", 3, 2),
        lambda: file.read_rows("cube", 5),
        lambda: file.read_rows("cube", 0, 2**62),
    ):
        with pytest.raises(_core.CoreError, match=r"absent|outside") as error:
            call()
        assert error.value.code == "invalid_argument"


def check_refusal(code: str, message: str, path: Path, metadata: dict[str, Any], tensors: list[Any]) -> None:
    with pytest.raises(_core.CoreError, match=message) as error:
        _core.BraidWriter(str(path), metadata, tensors)
    assert error.value.code == code
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**64, "64 bits"),
        (-(2**63) - 1, "64 bits"),
        ([2**64], "64 bits"),
        ([-1, 2**63], "together"),
        (1e39, "f32"),
        ([1e39], "f32"),
        ([1, 1.0], "several types"),
        ([True, 1], "several types"),
        (["a", 1], "several types"),
        ([[1]], "something else"),
        (None, "NoneType"),
        (b"bytes", "bytes"),
        ({}, "dict"),
        ("\ud800", "UTF-8"),
        (["\ud800"], "UTF-8"),
    ],
)
def test_values_that_no_type_holds(tmp_path: Path, value: Any, message: str) -> None:
    check_refusal("invalid_argument", f'"some.key".*{message}', tmp_path / "x.braid", {"some.key": value}, [])


@pytest.mark.parametrize(
    ("key", "message"),
    [(1, "of type int, expected str"), (None, "NoneType"), ("", "empty"), ("\udcff", "UTF-8"), ("\ud800", "UTF-8")],
)
def test_keys_that_no_file_holds(tmp_path: Path, key: Any, message: str) -> None:
    check_refusal("invalid_argument", message, tmp_path / "x.braid", {key: 1}, [])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("", "f32", [1])], "empty"),
        ([("n" * 65, "f32", [1])], "65 bytes"),
        ([("a", "f32", [1]), ("a", "f32", [1])], "twice"),
        ([("a", "f32", [])], "0 dimensions"),
        ([("a", "f32", [1] * 5)], "5 dimensions"),
        ([("a", "f32", [0])], "dimension of 0"),
        ([("a", "f32", [-1])], "dimension of -1"),
        ([("a", "f32", [2**40, 2**40])], "dimension of"),
        ([("a", "q4_1", [2, 33])], "blocks of 32"),
        ([("a", "f32", [2**60]), ("b", "f32", [2**60])], "larger than a file"),
    ],
)
def test_tensors_that_no_file_holds(tmp_path: Path, tensors: list[Any], message: str) -> None:
    check_refusal("invalid_argument", message, tmp_path / "x.braid", {}, tensors)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    check_refusal("unsupported", "q9_9", tmp_path / "x.braid", {}, [("a", "q9_9", [1])])


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.braid"
    with pytest.raises(KeyError), _core.BraidWriter(str(path), {}, [("a", "f32", [1])]) as writer:
        writer.write(0, bytes(4))
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(_core.CoreError, match=r'"a" is incomplete: 3 of 4'),
        _core.BraidWriter(str(path), {}, [("a", "f32", [1])]) as writer,
    ):
        writer.write(0, bytes(3))
    assert list(tmp_path.iterdir()) == []
    writer = _core.BraidWriter(str(path), {}, [("a", "f32", [1])])
    del writer
    assert list(tmp_path.iterdir()) == []


def test_the_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.braid"
    path.write_text("before")
    with _core.BraidWriter(str(path), {}, [("a", "f32", [1])]) as writer:
        writer.write(0, np.float32([1.5]))
        assert path.read_text() == "before"
        writer.finish()
        assert path.stat().st_size == writer.file_bytes
        with pytest.raises(_core.CoreError, match="closed"):
            writer.finish()
        with pytest.raises(_core.CoreError, match="closed"):
            writer.write(0, b"")
    assert list(tmp_path.iterdir()) == [path]
    assert _core.ModelFile(str(path)).read_rows("a").tolist() == [[1.5]]


def test_a_buffer_must_be_contiguous_bytes(tmp_path: Path) -> None:
    with _core.BraidWriter(str(tmp_path / "x.braid"), {}, [("a", "f32", [4])]) as writer:
        with pytest.raises(TypeError):
            writer.write(0, "text")  # type: ignore[arg-type]
        with pytest.raises((BufferError, ValueError)):
            writer.write(0, np.zeros((4, 2), np.float32)[:, 0])
        writer.write(0, memoryview(bytearray(8)))
        writer.write(0, np.zeros(2, np.float32))


def test_a_gguf_file_has_the_same_interface(model_path: Path) -> None:
    file = _core.ModelFile(str(model_path))
    assert (file.kind, file.version, file.fingerprint) == ("GGUF", 3, "")
    metadata = file.metadata()
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 30
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert len(metadata["tokenizer.ggml.tokens"]) == 49152
    assert isinstance(metadata["llama.rope.freq_base"], float)
    tensors = {name: (form, shape, size) for name, form, shape, size in file.tensors()}
    form, shape, size = tensors["blk.0.ffn_down.weight"]
    assert (form, shape) == ("q4_1", [576, 1536])
    assert len(file.read("blk.0.ffn_down.weight")) == size
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(model_path)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    for name in ("blk.0.ffn_down.weight", "output_norm.weight", "blk.29.attn_q.weight"):
        wanted = gguf.dequantize(by_name[name].data, by_name[name].tensor_type)
        np.testing.assert_array_equal(file.read_rows(name), wanted.reshape(file.read_rows(name).shape))
