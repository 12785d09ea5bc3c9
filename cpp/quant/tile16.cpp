// One tile, 16 rows (lanes r) by 32 columns k. One 'vector' is 64 bytes: 16 lanes of 4 bytes.
//
//   q4_0, q4_1   4 vectors of nibbles: byte b of lane r of vector j holds k = 4j+b (low) and k = 16+4j+b (high)
//                then 16 f16 scales d[r];  q4_1: then 16 f16 minima m[r]
//   q8_0         8 vectors of bytes: byte b of lane r of vector j holds code + 128 of k = 4j+b; then 16 f16 scales
//   bf16         16 vectors: lane r of vector j holds the pair k = 2j (low half), k = 2j+1 (high half)
//   f16          32 half vectors: lane r of half vector k holds weight k (2 bytes)
//   f32          32 vectors: lane r of vector k holds weight k
#include "quant/tile16.h"

#include <algorithm>
#include <cstring>

#include "base/align.h"
#include "base/dtype.h"

namespace nb::quant {
namespace {

constexpr int kLaneBytes = 4;
constexpr int kVectorBytes = kTileRows * kLaneBytes;

std::uint16_t load_u16(const std::uint8_t* bytes) {
  std::uint16_t value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

// Scatters `num_dwords` consecutive dwords of one row, one per vector, into lane `row`.
void scatter_dwords(const std::uint8_t* source, int num_dwords, int row, std::uint8_t* tile) {
  for (int j = 0; j < num_dwords; ++j) {
    std::memcpy(tile + j * kVectorBytes + row * kLaneBytes, source + j * kLaneBytes, kLaneBytes);
  }
}

// Writes one row's 32 weights, given in file layout, into a tile. `count` < 32 only for the unblocked formats.
void pack_tile_row(Format format, const std::uint8_t* source, int count, int row, std::uint8_t* tile) {
  switch (format) {
    case Format::f32:
      scatter_dwords(source, count, row, tile);
      break;
    case Format::bf16:
      for (int k = 0; k < count; ++k) {
        std::memcpy(tile + k / 2 * kVectorBytes + row * kLaneBytes + k % 2 * 2, source + k * 2, 2);
      }
      break;
    case Format::f16:
      for (int k = 0; k < count; ++k) std::memcpy(tile + (k * kTileRows + row) * 2, source + k * 2, 2);
      break;
    case Format::q4_0:
      scatter_dwords(source + 2, 4, row, tile);
      std::memcpy(tile + 256 + row * 2, source, 2);
      break;
    case Format::q4_1:
      scatter_dwords(source + 4, 4, row, tile);
      std::memcpy(tile + 256 + row * 2, source, 2);
      std::memcpy(tile + 288 + row * 2, source + 2, 2);
      break;
    case Format::q8_0: {
      std::uint8_t biased[kTileCols];
      for (int k = 0; k < kTileCols; ++k) biased[k] = source[2 + k] ^ 0x80u;
      scatter_dwords(biased, 8, row, tile);
      std::memcpy(tile + 512 + row * 2, source, 2);
      break;
    }
  }
}

// A row of zeros: codes that mean zero in every format, so padding never contributes.
void clear_tile(Format format, std::uint8_t* tile) {
  std::memset(tile, 0, static_cast<std::size_t>(format_info(format).tile_bytes));
  if (format == Format::q4_0) std::memset(tile, 0x88, 256);
  if (format == Format::q8_0) std::memset(tile, 0x80, 512);
}

}  // namespace

std::int64_t strip_bytes(Format format, std::int64_t cols) {
  return ceil_div<std::int64_t>(cols, kTileCols) * format_info(format).tile_bytes;
}

void pack_strip(Format format, const std::uint8_t* const rows[kTileRows], std::int64_t cols, std::uint8_t* strip) {
  const FormatInfo& info = format_info(format);
  for (std::int64_t begin = 0; begin < cols; begin += kTileCols, strip += info.tile_bytes) {
    clear_tile(format, strip);
    const int count = static_cast<int>(std::min<std::int64_t>(kTileCols, cols - begin));
    const std::int64_t offset = begin / info.block_elements * info.block_bytes;
    for (int row = 0; row < kTileRows; ++row) {
      if (rows[row] != nullptr) pack_tile_row(format, rows[row] + offset, count, row, strip);
    }
  }
}

void unpack_tile_row(Format format, const std::uint8_t* tile, int row, float* out) {
  const auto code_byte = [&](int vector, int byte) { return tile[vector * kVectorBytes + row * kLaneBytes + byte]; };
  const auto scale = [&](int offset) { return f16_to_f32(load_u16(tile + offset + row * 2)); };
  switch (format) {
    case Format::f32:
      for (int k = 0; k < kTileCols; ++k) std::memcpy(out + k, tile + k * kVectorBytes + row * kLaneBytes, 4);
      break;
    case Format::bf16:
      for (int k = 0; k < kTileCols; ++k) {
        out[k] = bf16_to_f32(load_u16(tile + k / 2 * kVectorBytes + row * kLaneBytes + k % 2 * 2));
      }
      break;
    case Format::f16:
      for (int k = 0; k < kTileCols; ++k) out[k] = f16_to_f32(load_u16(tile + (k * kTileRows + row) * 2));
      break;
    case Format::q4_0:
    case Format::q4_1: {
      const float d = scale(256);
      const float m = format == Format::q4_1 ? scale(288) : 0.0f;
      for (int k = 0; k < 16; ++k) {
        const int low = code_byte(k / 4, k % 4) & 15;
        const int high = code_byte(k / 4, k % 4) >> 4;
        out[k] = format == Format::q4_1 ? d * static_cast<float>(low) + m : d * static_cast<float>(low - 8);
        out[k + 16] = format == Format::q4_1 ? d * static_cast<float>(high) + m : d * static_cast<float>(high - 8);
      }
      break;
    }
    case Format::q8_0: {
      const float d = scale(512);
      for (int k = 0; k < kTileCols; ++k) out[k] = d * static_cast<float>(code_byte(k / 4, k % 4) - 128);
      break;
    }
  }
}

}  // namespace nb::quant
