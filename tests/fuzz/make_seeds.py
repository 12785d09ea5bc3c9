"""Writes the seeds of a fuzz target: small valid files, one per feature. Usage: make_seeds.py TARGET FOLDER

A target without seeds of its own gets an empty folder.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

U8, I32, F32, BOOL, STRING, ARRAY, U32, U64 = 0, 5, 6, 7, 8, 9, 4, 10
SCALARS = {U8: "<B", I32: "<i", F32: "<f", BOOL: "<B", U32: "<I", U64: "<Q"}


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value: object) -> bytes:
    return text(str(value)) if kind == STRING else struct.pack(SCALARS[kind], value)


def entry(key: str, kind: int, value: object) -> bytes:
    return text(key) + struct.pack("<I", kind) + scalar(kind, value)


def array(key: str, kind: int, values: list[object]) -> bytes:
    head = text(key) + struct.pack("<IIQ", ARRAY, kind, len(values))
    return head + b"".join(scalar(kind, value) for value in values)


Tensor = tuple[str, list[int], int, int]  # name, dims, type, bytes of data


def gguf(entries: list[bytes], tensors: list[Tensor], version: int = 3, align: int = 32) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join(entries)
    offset = 0
    for name, dims, kind, size in tensors:
        out += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        offset += -(-size // align) * align
    for _, _, _, size in tensors:
        out += b"\0" * (-len(out) % align) + bytes(i % 256 for i in range(size))
    return out


def tokenizer_entries() -> list[bytes]:
    return [
        entry("tokenizer.ggml.model", STRING, "gpt2"),
        entry("tokenizer.ggml.pre", STRING, "smollm"),
        array("tokenizer.ggml.tokens", STRING, ["<u>", "a", "b", "ab", "Ġ"]),
        array("tokenizer.ggml.token_type", I32, [3, 1, 1, 1, 1]),
        array("tokenizer.ggml.merges", STRING, ["a b"]),
        entry("tokenizer.ggml.bos_token_id", U32, 0),
        entry("tokenizer.ggml.eos_token_id", U32, 0),
        entry("tokenizer.ggml.add_bos_token", BOOL, 1),
        entry("tokenizer.chat_template", STRING, "{{ messages }}"),
    ]


def gguf_seeds() -> dict[str, bytes]:
    facts = [entry("general.architecture", STRING, "llama"), entry("n", U32, 1), entry("eps", F32, 1e-5)]
    tensors = [("a", [8], 0, 32), ("b", [32, 2], 2, 36), ("c", [32], 3, 20), ("d", [32], 8, 34), ("e", [256], 12, 144)]
    wide = [
        entry("general.alignment", U32, 64),
        entry("n", U64, 2**63),
        array("flags", BOOL, [0, 1]),
        array("none", U8, []),
    ]
    return {
        "empty": gguf([], []),
        "version2": gguf(facts, tensors[:1], version=2),
        "tokenizer": gguf(tokenizer_entries(), []),
        "tensors": gguf(facts, tensors),
        "aligned": gguf(wide, tensors[:2], align=64),
        "dims": gguf([], [("x", [2, 3, 2, 1], 1, 24), ("y", [4], 99, 16)]),
    }


def braid(entries: list[bytes], tensors: list[Tensor]) -> bytes:
    """A .braid file as ARCHITECTURE.md describes it; the target makes the checksums right. Dims outermost first."""
    metadata = struct.pack("<Q", len(entries)) + b"".join(entries)
    at = 128 + 3 * 32
    tensors_at = -(-(at + len(metadata)) // 8) * 8
    size = 8 + sum(8 + len(name.encode()) + 8 + 8 * len(dims) + 20 for name, dims, _, _ in tensors)
    data_at = -(-(tensors_at + size) // 4096) * 4096
    directory, data = struct.pack("<Q", len(tensors)), b""
    for name, dims, kind, length in tensors:
        directory += text(name) + struct.pack(f"<II{len(dims)}Q", kind, len(dims), *dims)
        directory += struct.pack("<QQI", data_at + len(data), length, 0)
        data += bytes(i % 256 for i in range(length)) + b"\0" * (-length % 4096)
    rows = ((1, at, len(metadata)), (2, tensors_at, len(directory)), (3, data_at, len(data)))
    sections = b"".join(struct.pack("<IIQQII", kind, 0, offset, length, 0, 0) for kind, offset, length in rows)
    head = b"\x89BRAID\r\n" + struct.pack("<IIQQII", 1, 0, data_at + len(data), 128, 3, 0) + bytes(88)
    head = (head + sections + metadata).ljust(tensors_at, b"\0") + directory
    return head.ljust(data_at, b"\0") + data


def braid_seeds() -> dict[str, bytes]:
    facts = [entry("general.architecture", STRING, "llama"), entry("n", U32, 1), array("flags", BOOL, [0, 1])]
    tensors = [("a", [8], 0, 32), ("b", [2, 32], 16, 36), ("c", [3, 1, 2], 1, 12), ("later", [64], 4, 40)]
    return {
        "empty": braid([], []),
        "tokenizer": braid(tokenizer_entries(), []),
        "tensors": braid(facts, tensors[:2]),
        "formats": braid([], tensors),
    }


def tokenizer(settings: bytes, lines: list[str], given: str | bytes) -> bytes:
    """A tokenizer and a text as tokenizer_fuzz.cpp describes them; settings: kind, flags, special, strip, damage."""
    data = given if isinstance(given, bytes) else given.encode()
    return settings + b"\n" + "".join(line + "\n" for line in lines).encode() + b"\n" + data


def tokenizer_seeds() -> dict[str, bytes]:
    spelled = ["1aab", "1aabc", "1aĠa", "4a<m>", "3a<|end|>", "+a b", "+ab c", "+Ġ a"]
    pieces = ["1aa", "1ab", "1b▁", "1cab", "5dabc", "1eabcab", "1c▁a", "4a<m>", "3a</s>", "1aé"]
    prose = "ab abc, a  b\n<m> 123 it's<|end|>é中😀"
    seeds = {f"gpt2_{row}": tokenizer(bytes([2 * row, 0, 0, 0, 0]), spelled, prose) for row in range(12)}
    seeds |= {f"llama_{flags}": tokenizer(bytes([1, flags, 0, 0, 0]), pieces, "  " + prose) for flags in range(16)}
    return seeds | {
        "nfc": tokenizer(bytes([0, 48, 0, 0, 0]), spelled, "ae\u0301\u0323 \u1100\u1161 ab"),
        "strip": tokenizer(bytes([0, 0, 0, 14, 0]), spelled, "ab \n<m>  ab"),
        "ends": tokenizer(bytes([1, 2, 0x8B, 0, 0]), pieces, "abc</s>a"),
        "missing": tokenizer(bytes([0, 192, 0, 0, 6]), [*spelled, "1aa!b"], "a!b!a!!b"),
        "unspelled": tokenizer(bytes([0, 0, 0, 0, 0]), [*spelled, "4aĠb", "5aba", "+Ġ b", "+b a"], "ba b Ġb"),
        "invalid": tokenizer(bytes([1, 0, 0, 0, 0]), pieces, b"a\xff\xc3b\xe4\xb8"),
        "bare": tokenizer(bytes([0, 0, 0, 0, 1]), ["1aa", "1ab", "1aab", "+a b"], "abab c"),
    }


def utf8_stream_seeds() -> dict[str, bytes]:
    prose = "aé中😀\ufffd".encode()
    broken = b"a\xc3\xe4\xb8b\xed\xa0\x80\xf0\x9f\x98\xf4\x90\xc0\x80\xff\xe2\x96"
    return {"whole": b"\0" + prose, "cut": b"\3\1\2\3" + prose + broken, "broken": b"\2\1\5" + broken}


def store_record(kind: int, tokens: int, metadata: bytes, block_bytes: int) -> bytes:
    """A record without its checksums, which the target fills in."""
    blocks = -(-tokens // 16)
    out = b"NBKVREC\n" + struct.pack("<6IQ", 1, 0x01020304, kind, tokens, 0, len(metadata), block_bytes)
    out += bytes(range(128)) + bytes(4) + struct.pack(f"<{tokens}i", *range(tokens)) + metadata + bytes(4 * blocks + 4)
    return out + bytes(-len(out) % 4096) + bytes(blocks * block_bytes)


def store_record_seeds() -> dict[str, bytes]:
    return {
        "chunk": store_record(2, 40, b"a name", 10),
        "long": store_record(2, 2000, b"", 1),
        "prefix": store_record(1, 256, b"", 64),
        "short": store_record(1, 16, b"", 4096),
    }


SEEDS = {
    "gguf": gguf_seeds,
    "braid": braid_seeds,
    "store_record": store_record_seeds,
    "tokenizer": tokenizer_seeds,
    "utf8_stream": utf8_stream_seeds,
}


def main() -> int:
    target, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in SEEDS.get(target, dict)().items():
        (folder / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
