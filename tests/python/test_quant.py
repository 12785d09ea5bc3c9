"""Unpacking of the GGUF weight formats against the `gguf` package, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from nanobraid import _core

gguf = pytest.importorskip("gguf", reason="the `gguf` package, the oracle, is not installed")

from gguf import quants  # noqa: E402

# Format -> offsets of the f16 scales in a block.
SCALES = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q8_0": [0],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
}
# Zeros, subnormals, the smallest and largest normal halves, and one.
EXTREME_HALVES = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0xBC00], dtype="<u2")
NUM_BLOCKS = 4000


@pytest.mark.parametrize("name", SCALES)
def test_random_blocks_unpack_like_the_gguf_package(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name.upper()]
    block_cols, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(5)
    blocks = random.integers(0, 256, (NUM_BLOCKS, block_bytes), dtype=np.uint8)
    for offset in SCALES[name]:
        halves = blocks[:, offset : offset + 2].copy().view("<u2")[:, 0]
        halves[(halves & 0x7C00) == 0x7C00] ^= 0x4000  # neither infinite nor NaN
        halves[::3] = random.choice(EXTREME_HALVES, halves[::3].shape)
        blocks[:, offset : offset + 2] = halves[:, None].view(np.uint8)
    expected = quants.dequantize(blocks, kind)
    actual = _core.unpack_weights(name, blocks.tobytes(), block_cols)
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual.view(np.uint32), expected.astype(np.float32).view(np.uint32))
    # One long row holds the same blocks.
    row = _core.unpack_weights(name, blocks[:8].tobytes(), 8 * block_cols)
    np.testing.assert_array_equal(row.view(np.uint32).ravel(), expected[:8].view(np.uint32).ravel())


def test_own_formats_unpack_as_documented() -> None:
    random = np.random.default_rng(6)
    codes = random.integers(-128, 128, 64, dtype=np.int8)
    scale, minimum = np.float16(0.37), np.float16(-1.9)
    values = np.float32(scale) * codes.astype(np.float32)
    data = scale.tobytes() + codes.tobytes()
    for name in ("w8", "w8_channel"):
        np.testing.assert_array_equal(_core.unpack_weights(name, data, 64)[0], values)
    nibbles = random.integers(0, 16, 64, dtype=np.uint8)
    data = scale.tobytes() + minimum.tobytes() + (nibbles[:32] | nibbles[32:] << 4).astype(np.uint8).tobytes()
    values = np.float32(scale) * nibbles.astype(np.float32) + np.float32(minimum)
    np.testing.assert_array_equal(_core.unpack_weights("w4", data, 64)[0], values)


def test_what_is_not_whole_or_not_known_is_refused() -> None:
    for name in ("q2_k", "q3_k", "iq4_xs"):
        with pytest.raises(_core.CoreError, match=name):
            _core.unpack_weights(name, b"", 256)
    with pytest.raises(_core.CoreError, match="300 weights"):
        _core.unpack_weights("q4_k", bytes(144), 300)
    with pytest.raises(_core.CoreError, match="143 bytes"):
        _core.unpack_weights("q4_k", bytes(143), 256)
    with pytest.raises(_core.CoreError, match="cols"):
        _core.unpack_weights("w8_channel", bytes(2), 0)
