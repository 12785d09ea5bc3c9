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
// Scales of a tile:
//   q4_0 q5_0 q8_0 w8   16 f16 scales d[r]
//   q4_1 q5_1 w4        16 f16 scales d[r], 16 f16 minima m[r]
//   q4_k q5_k           8 x 16 bytes S(g)[r], 8 x 16 bytes M(g)[r], 16 f16 d[r], 16 f16 dmin[r]
//   q6_k                16 x 16 signed bytes s(k/16)[r], 16 f16 d[r]
//   w8_channel          none; the header of the strip is 16 f16 scales d[r]
#include "quant/tile16.h"

#include <algorithm>
#include <cstring>

#include "base/align.h"
#include "base/dtype.h"
#include "quant/k_scale.h"
#include "quant/tile_shape.h"

namespace nb::quant {
namespace {

constexpr int kLaneBytes = 4;
constexpr int kVectorBytes = kTileRows * kLaneBytes;
constexpr int kPlaneOffset = 4 * kVectorBytes;

float load_f16(const std::uint8_t* bytes) {
  std::uint16_t value;
  std::memcpy(&value, bytes, sizeof(value));
  return f16_to_f32(value);
}

// Scatters `num_dwords` consecutive dwords of one row, one per vector, into lane `row`.
void scatter_dwords(const std::uint8_t* source, int num_dwords, int row, std::uint8_t* vectors) {
  for (int j = 0; j < num_dwords; ++j) {
    std::memcpy(vectors + j * kVectorBytes + row * kLaneBytes, source + j * kLaneBytes, kLaneBytes);
  }
}

// Writes the codes of 32 columns of one row into their piece of a tile.
void pack_codes(int bits, const std::uint8_t* codes, int row, std::uint8_t* piece) {
  if (bits == 8) {
    scatter_dwords(codes, 8, row, piece);
    return;
  }
  std::uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<std::uint8_t>((codes[i] & 15) | (codes[i + 16] & 15) << 4);
  scatter_dwords(bytes, 4, row, piece);
  if (bits == 4) return;
  const int extra = bits - 4, per_vector = 4 / extra;
  std::uint8_t planes[8] = {};
  for (int i = 0; i < 16; ++i) {
    const int j = i / 4, shift = j % per_vector * extra;
    std::uint8_t& byte = planes[j / per_vector * 4 + i % 4];
    byte = static_cast<std::uint8_t>(byte | codes[i] >> 4 << (4 + shift) | codes[i + 16] >> 4 << shift);
  }
  scatter_dwords(planes, extra, row, piece + kPlaneOffset);
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

void pack_unquantized(Format format, const std::uint8_t* source, int count, int row, std::uint8_t* tile) {
  if (format == Format::f32) {
    scatter_dwords(source, count, row, tile);
    return;
  }
  for (int k = 0; k < count; ++k) {
    const int offset =
        format == Format::bf16 ? k / 2 * kVectorBytes + row * kLaneBytes + k % 2 * 2 : (k * kTileRows + row) * 2;
    std::memcpy(tile + offset, source + k * 2, 2);
  }
}

void unpack_unquantized(Format format, const std::uint8_t* tile, int count, int row, float* out) {
  for (int k = 0; k < count; ++k) {
    if (format == Format::f32) {
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

void copy_f16(const std::uint8_t* source, int row, std::uint8_t* lanes) { std::memcpy(lanes + row * 2, source, 2); }

// Copies the scales of one row from the file block that a tile covers.
void pack_scales(Format format, const std::uint8_t* block, int row, std::uint8_t* scales) {
  switch (format) {
    case Format::q4_0:
    case Format::q5_0:
    case Format::q8_0:
    case Format::w8:
      copy_f16(block, row, scales);
      break;
    case Format::q4_1:
    case Format::q5_1:
    case Format::w4:
      copy_f16(block, row, scales);
      copy_f16(block + 2, row, scales + 32);
      break;
    case Format::q4_k:
    case Format::q5_k:
      for (int g = 0; g < 8; ++g) {
        const KScale k = k_scale(block, g);
        scales[g * kTileRows + row] = static_cast<std::uint8_t>(k.scale);
        scales[(8 + g) * kTileRows + row] = static_cast<std::uint8_t>(k.minimum);
      }
      copy_f16(block, row, scales + 256);
      copy_f16(block + 2, row, scales + 288);
      break;
    case Format::q6_k:
      for (int sub = 0; sub < 16; ++sub) scales[sub * kTileRows + row] = block[192 + sub];
      copy_f16(block + 208, row, scales + 256);
      break;
    case Format::w8_channel:
    case Format::f32:
    case Format::bf16:
    case Format::f16:
      break;
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
  }
}

// Columns [begin, begin + tile columns) of one row, clipped to `cols`.
void pack_tile_row(const FormatInfo& info, const TileShape& shape, const std::uint8_t* row_data, std::int64_t begin,
                   std::int64_t cols, int row, std::uint8_t* tile) {
  const std::uint8_t* block = row_data + info.row_header_bytes + begin / info.block_elements * info.block_bytes;
  for (int g = 0; g < shape.groups && begin + g * kGroupCols < cols; ++g) {
    const int count = static_cast<int>(std::min<std::int64_t>(kGroupCols, cols - begin - g * kGroupCols));
    std::uint8_t* piece = tile + g * shape.group_bytes;
    if (!info.is_quantized()) {
      pack_unquantized(info.format, block, count, row, piece);
    } else if (info.format == Format::q4_0 || info.format == Format::q4_1) {
      scatter_dwords(block + (info.has_minimum ? 4 : 2), 4, row, piece);  // the nibbles are in tile order already
    } else {
      CodeGroup group;
      info.read_group(row_data, begin / kGroupCols + g, count, group);
      pack_codes(shape.code_bits, group.codes, row, piece);
    }
  }
  pack_scales(info.format, block, row, tile + shape.groups * shape.group_bytes);
}

// A row of zeros: codes that mean zero in every format, so padding never contributes.
void clear_tile(const TileShape& shape, std::uint8_t* tile) {
  std::memset(tile, 0, static_cast<std::size_t>(shape.tile_bytes));
  if (shape.zero == 0) return;
  std::uint8_t codes[kGroupCols];
  std::memset(codes, shape.zero, sizeof(codes));
  for (int g = 0; g < shape.groups; ++g) {
    for (int row = 0; row < kTileRows; ++row) pack_codes(shape.code_bits, codes, row, tile + g * shape.group_bytes);
  }
}

}  // namespace

std::int64_t strip_bytes(Format format, std::int64_t cols) {
  const TileShape shape = tile_shape(format);
  return shape.header_bytes + ceil_div<std::int64_t>(cols, shape.cols) * shape.tile_bytes;
}

void pack_strip(Format format, const std::uint8_t* const rows[kTileRows], std::int64_t cols, std::uint8_t* strip) {
  const FormatInfo& info = format_info(format);
  const TileShape shape = tile_shape(format);
  std::memset(strip, 0, static_cast<std::size_t>(shape.header_bytes));
  for (int row = 0; row < kTileRows && shape.header_bytes > 0; ++row) {
    if (rows[row] != nullptr) copy_f16(rows[row], row, strip);
  }
  std::uint8_t* tile = strip + shape.header_bytes;
  for (std::int64_t begin = 0; begin < cols; begin += shape.cols, tile += shape.tile_bytes) {
    // A full tile is overwritten whole, so only a partial one is cleared first.
    const bool is_partial = begin + shape.cols > cols || std::find(rows, rows + kTileRows, nullptr) != rows + kTileRows;
    if (is_partial) clear_tile(shape, tile);
    for (int row = 0; row < kTileRows; ++row) {
      if (rows[row] != nullptr) pack_tile_row(info, shape, rows[row], begin, cols, row, tile);
    }
  }
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
      unpack_unquantized(format, piece, count, row, out + begin);
      continue;
    }
    CodeGroup group;
    unpack_scales(format, strip, tile + shape.groups * shape.group_bytes, g, row, group);
    for (int k = 0; k < count; ++k) {
      const int code = unpack_code(shape.code_bits, piece, row, k) - shape.zero;
      const float value = group.scales[k / 16] * static_cast<float>(code);
      out[begin + k] = shape.has_minimum ? value + group.minimum : value;
    }
  }
}

}  // namespace nb::quant
