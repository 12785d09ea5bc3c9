// A strip: the header of the format, then tiles of 16 rows (lanes r). A tile: for each 32 columns k one piece of codes,
// then scales. One 'vector' is 64 bytes: 16 lanes of 4 bytes.
//
// Codes of 32 columns:
//   4 bits   4 vectors of nibbles: byte b of lane r of vector j holds k = 4j+b (low) and k = 16+4j+b (high)
//   5 bits   the same 4 vectors, then 1 vector of fifth bits: in byte b of lane r, bit 4+j belongs to k = 4j+b and bit
//   j
//            to k = 16+4j+b
//   6 bits   the same 4 vectors, then 2 vectors of upper bits: in byte b of lane r of vector v, with j = 2v+i (i = 0,
//   1),
//            the bits 4+2i and 5+2i belong to k = 4j+b, the bits 2i and 2i+1 to k = 16+4j+b
//   8 bits   8 vectors of bytes: byte b of lane r of vector j holds signed code + 128 of k = 4j+b
//   bf16     16 vectors: lane r of vector j holds the pair k = 2j (low half), k = 2j+1 (high half)
//   f16      32 half vectors: lane r of half vector k holds weight k (2 bytes)
//   f32      32 vectors: lane r of vector k holds weight k
//   fp8      8 vectors of bytes: byte b of lane r of vector j holds k = 4j+b
// Scales of a tile:
//   q4_0 q5_0 q8_0 w8   16 f16 scales d[r]
//   q4_1 q5_1 w4        16 f16 scales d[r], 16 f16 minima m[r]
//   q4_k q5_k           8 x 16 bytes S(g)[r], 8 x 16 bytes M(g)[r], 16 f16 d[r], 16 f16 dmin[r]
//   q6_k                16 x 16 signed bytes s(k/16)[r], 16 f16 d[r]
//   w8_channel          none; the header of the strip is 16 f16 scales d[r]
//   awq_int4 gptq_int4  16 f16 scales d[r], 16 bytes z[r]
//   fp8_e4m3            none; the header of the strip is 16 f32 scales d[r]
#include "quant/tile16.h"

#include <algorithm>
#include <cstring>

#include "base/align.h"
#include "base/dtype.h"
#include "quant/tile_shape.h"

namespace nb::quant {
namespace {

constexpr int kLaneBytes = 4;
constexpr int kVectorBytes = kTileRows * kLaneBytes;

float load_f16(const std::uint8_t* bytes) {
  std::uint16_t value;
  std::memcpy(&value, bytes, sizeof(value));
  return f16_to_f32(value);
}

std::uint8_t unpack_code(int bits, const std::uint8_t* piece, int row, int k) {
  const auto byte_at = [&](int vector, int byte) { return piece[vector * kVectorBytes + row * kLaneBytes + byte]; };
  if (bits == 8) return byte_at(k / 4, k % 4);
  const int i = k % 16, j = i / 4;
  const int nibble = k < 16 ? byte_at(j, i % 4) & 15 : byte_at(j, i % 4) >> 4;
  if (bits == 4) return static_cast<std::uint8_t>(nibble);
  const int extra = bits - 4, per_vector = 4 / extra;
  const int plane = byte_at(4 + j / per_vector, i % 4) >> (j % per_vector * extra + (k < 16 ? 4 : 0));
  return static_cast<std::uint8_t>(nibble | (plane & ((1 << extra) - 1)) << 4);
}

void unpack_unquantized(Format format, const std::uint8_t* strip, const std::uint8_t* tile, int count, int row,
                        float* out) {
  for (int k = 0; k < count; ++k) {
    if (format == Format::fp8_e4m3) {
      float scale;
      std::memcpy(&scale, strip + row * 4, sizeof(scale));
      out[k] = e4m3_to_f32(tile[k / 4 * kVectorBytes + row * kLaneBytes + k % 4]) * scale;
    } else if (format == Format::f32) {
      std::memcpy(out + k, tile + k * kVectorBytes + row * kLaneBytes, 4);
    } else if (format == Format::bf16) {
      std::uint16_t bits;
      std::memcpy(&bits, tile + k / 2 * kVectorBytes + row * kLaneBytes + k % 2 * 2, 2);
      out[k] = bf16_to_f32(bits);
    } else {
      out[k] = load_f16(tile + (k * kTileRows + row) * 2);
    }
  }
}

// Scales and minimum of the 32 columns `g` of a tile, for one row.
void unpack_scales(Format format, const std::uint8_t* strip, const std::uint8_t* scales, int g, int row,
                   CodeGroup& out) {
  const auto scale_at = [&](int offset) { return load_f16(scales + offset + row * 2); };
  const auto byte_at = [&](int index) { return static_cast<float>(scales[index * kTileRows + row]); };
  out.minimum = 0.0f;
  if (format == Format::w8_channel) {
    out.scales[0] = out.scales[1] = load_f16(strip + row * 2);
  } else if (format == Format::q4_k || format == Format::q5_k) {
    out.scales[0] = out.scales[1] = scale_at(256) * byte_at(g);
    out.minimum = -(scale_at(288) * byte_at(8 + g));
  } else if (format == Format::q6_k) {
    for (int half = 0; half < 2; ++half) {
      const auto sub_scale = static_cast<std::int8_t>(scales[(2 * g + half) * kTileRows + row]);
      out.scales[half] = scale_at(256) * static_cast<float>(sub_scale);
    }
  } else {
    out.scales[0] = out.scales[1] = scale_at(0);
    if (tile_shape(format).has_minimum) out.minimum = scale_at(32);
    if (tile_shape(format).has_zeros) out.zero = scales[32 + row];
  }
}

}  // namespace

std::int64_t strip_bytes(Format format, std::int64_t cols) {
  const TileShape shape = tile_shape(format);
  return shape.header_bytes + ceil_div<std::int64_t>(cols, shape.cols) * shape.tile_bytes;
}

void unpack_strip_row(Format format, const std::uint8_t* strip, std::int64_t cols, int row, float* out) {
  const FormatInfo& info = format_info(format);
  const TileShape shape = tile_shape(format);
  for (std::int64_t begin = 0; begin < cols; begin += kGroupCols) {
    const std::uint8_t* tile = strip + shape.header_bytes + begin / shape.cols * shape.tile_bytes;
    const int g = static_cast<int>(begin % shape.cols / kGroupCols);
    const int count = static_cast<int>(std::min<std::int64_t>(kGroupCols, cols - begin));
    const std::uint8_t* piece = tile + g * shape.group_bytes;
    if (!info.is_quantized()) {
      unpack_unquantized(format, strip, piece, count, row, out + begin);
      continue;
    }
    CodeGroup group;
    unpack_scales(format, strip, tile + shape.groups * shape.group_bytes, g, row, group);
    for (int k = 0; k < count; ++k) {
      const int code = unpack_code(shape.code_bits, piece, row, k) - info.zero_of(group);
      const float value = group.scales[k / 16] * static_cast<float>(code);
      out[begin + k] = shape.has_minimum ? value + group.minimum : value;
    }
  }
}

}  // namespace nb::quant
