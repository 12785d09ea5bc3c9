// Repacking into the tiles that tile16.cpp draws, close to the speed of memory with any compiler.
//
// Codes move four at a time: a row's 32 codes of a group are rearranged within a few 32-bit words, one for each vector
// of the tile, and each word is stored into the row's lane. No code is looked at alone. Reading a tile back, in
// tile16.cpp, takes the other way, code by code, so that each can be tested by the other.
#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "quant/format.h"
#include "quant/tile16.h"
#include "quant/tile_shape.h"

namespace nb::quant {
namespace {

constexpr int kLaneBytes = 4;
constexpr int kVectorBytes = kTileRows * kLaneBytes;
constexpr int kMostWords = 32;  // of a group: f32
constexpr std::uint32_t kSignBits = 0x80808080, kLowNibbles = 0x0f0f0f0f;

std::uint32_t load_u32(const std::uint8_t* bytes) {
  std::uint32_t value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

std::uint64_t load_u64(const std::uint8_t* bytes) {
  std::uint64_t value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

// ---- 32 codes of one row as words: word j goes to vector j of the piece ----

// Codes as bytes, signed ones becoming codes around 128.
void signed_words(const std::uint8_t* bytes, std::uint32_t* words) {
  for (int j = 0; j < 8; ++j) words[j] = load_u32(bytes + 4 * j) ^ kSignBits;
}

// The low (shift 0) or high (shift 4) nibbles of 32 bytes: the first 16 become low nibbles, the others high ones.
void nibble_words(const std::uint8_t* bytes, int shift, std::uint32_t* words) {
  constexpr std::uint64_t kLow = 0x0101010101010101u * 15;
  for (int j = 0; j < 4; j += 2) {
    const std::uint64_t low = load_u64(bytes + 4 * j) >> shift & kLow;
    const std::uint64_t high = load_u64(bytes + 16 + 4 * j) >> shift & kLow;
    const std::uint64_t both = low | high << 4;
    std::memcpy(words + j, &both, sizeof(both));
  }
}

// Bits 0..3 of `bits` become the low nibble of byte 0, bits 4..7 that of byte 1, and so on.
std::uint32_t spread_nibbles(std::uint32_t bits) {
  return (bits & 0xf) | (bits & 0xf0) << 4 | (bits & 0xf00) << 8 | (bits & 0xf000) << 12;
}

// The vector of fifth bits from a mask with a bit for each code: two 4 x 4 matrices of bits are transposed, in which a
// row is a vector of nibbles and a column a byte of it.
std::uint32_t fifth_bits_word(std::uint32_t mask) {
  std::uint32_t t = (mask & 0xa5a5a5a5) | (mask & 0x0a0a0a0a) << 3 | (mask >> 3 & 0x0a0a0a0a);
  t = (t & 0xcc33cc33) | (t & 0x00cc00cc) << 6 | (t >> 6 & 0x00cc00cc);
  return spread_nibbles(t & 0xffff) << 4 | spread_nibbles(t >> 16);
}

// Words of `extra` (1 or 2) upper bits a code, which stand at bit `shift` of 32 bytes.
void upper_words(const std::uint8_t* bytes, int shift, int extra, std::uint32_t* words) {
  const std::uint32_t mask = extra == 1 ? 0x01010101 : 0x03030303;
  const int per_word = 4 / extra;
  for (int word = 0; word < extra; ++word) {
    std::uint32_t out = 0;
    for (int i = 0; i < per_word; ++i) {
      const int j = word * per_word + i;
      out |= (load_u32(bytes + 4 * j) >> shift & mask) << (4 + i * extra);
      out |= (load_u32(bytes + 16 + 4 * j) >> shift & mask) << (i * extra);
    }
    words[word] = out;
  }
}

// The codes of group g of what a tile covers of one row; layouts in format.cpp.
template <Format F>
void read_words(const std::uint8_t* block, int g, std::uint32_t* words) {
  if constexpr (F == Format::q4_0) {
    std::memcpy(words, block + 2, 16);  // the nibbles are in tile order already
  } else if constexpr (F == Format::q4_1) {
    std::memcpy(words, block + 4, 16);
  } else if constexpr (F == Format::q5_0) {
    std::memcpy(words, block + 6, 16);
    words[4] = fifth_bits_word(load_u32(block + 2));
  } else if constexpr (F == Format::q5_1) {
    std::memcpy(words, block + 8, 16);
    words[4] = fifth_bits_word(load_u32(block + 4));
  } else if constexpr (F == Format::q8_0) {
    signed_words(block + 2, words);
  } else if constexpr (F == Format::w8) {
    signed_words(block + 2 + 32 * g, words);
  } else if constexpr (F == Format::w8_channel) {
    signed_words(block, words);
  } else if constexpr (F == Format::w4) {
    nibble_words(block + 4, 4 * g, words);
  } else if constexpr (tile_shape(F).has_zeros) {
    std::memcpy(words, block + 3 + 16 * g, 16);  // in tile order, too
  } else if constexpr (F == Format::fp8_e4m3) {
    std::memcpy(words, block, 32);
  } else if constexpr (F == Format::q4_k) {
    nibble_words(block + 16 + g / 2 * 32, g % 2 * 4, words);
  } else if constexpr (F == Format::q5_k) {
    nibble_words(block + 48 + g / 2 * 32, g % 2 * 4, words);
    upper_words(block + 16, g, 1, words + 4);
  } else if constexpr (F == Format::q6_k) {
    nibble_words(block + g / 4 * 64 + g % 2 * 32, g % 4 / 2 * 4, words);
    upper_words(block + 128 + g / 4 * 32, g % 4 * 2, 2, words + 4);
  } else {
    static_assert(F == Format::f32 || F == Format::bf16);
    std::memcpy(words, block, F == Format::f32 ? 128 : 64);
  }
}

// Word j of a row that is not there: codes that mean zero, so that padding never contributes.
constexpr std::uint32_t zero_word(const TileShape& shape, int j) {
  const auto zero = static_cast<std::uint32_t>(shape.zero);
  if (shape.code_bits >= 8) return zero * 0x01010101u;
  if (j < 4) return (zero & 15) * 0x11111111u;
  return (zero >> 4) * (0xffffffffu / ((1u << (shape.code_bits - 4)) - 1));
}

// ---- scales ----

void copy_f16(const std::uint8_t* source, int row, std::uint8_t* lanes) { std::memcpy(lanes + row * 2, source, 2); }

// 16 bytes of one row, to 16 vectors of bytes.
void scatter_bytes(const std::uint8_t* bytes, int row, std::uint8_t* vectors) {
  for (int i = 0; i < 16; ++i) vectors[i * kTileRows + row] = bytes[i];
}

// The 6-bit scales and minima of q4_k and q5_k as bytes, eight of each.
void read_k_scales(const std::uint8_t* block, std::uint8_t* bytes) {
  constexpr std::uint32_t kSixBits = 0x3f3f3f3f, kTwoBits = 0x03030303;
  const std::uint32_t s0 = load_u32(block + 4), s1 = load_u32(block + 8), s2 = load_u32(block + 12);
  const std::uint32_t words[4] = {s0 & kSixBits, (s2 & kLowNibbles) | (s0 >> 6 & kTwoBits) << 4, s1 & kSixBits,
                                  (s2 >> 4 & kLowNibbles) | (s1 >> 6 & kTwoBits) << 4};
  std::memcpy(bytes, words, sizeof(words));
}

template <Format F>
void pack_scales(const std::uint8_t* block, int row, std::uint8_t* scales) {
  if constexpr (F == Format::q4_k || F == Format::q5_k) {
    std::uint8_t bytes[16];
    read_k_scales(block, bytes);
    scatter_bytes(bytes, row, scales);
    copy_f16(block, row, scales + 256);
    copy_f16(block + 2, row, scales + 288);
  } else if constexpr (F == Format::q6_k) {
    scatter_bytes(block + 192, row, scales);
    copy_f16(block + 208, row, scales + 256);
  } else if constexpr (tile_shape(F).scale_bytes > 0) {
    copy_f16(block, row, scales);
    if constexpr (tile_shape(F).has_minimum) copy_f16(block + 2, row, scales + 32);
    if constexpr (tile_shape(F).has_zeros) scales[32 + row] = block[2];
  }
}

// ---- tiles ----

// What one tile covers of each row: from the row itself or, of columns that end within a tile, from a copy that zeros
// fill up. Only formats without blocks end so.
class TileBlocks {
 public:
  TileBlocks(const FormatInfo& info, const TileShape& shape, const std::uint8_t* const rows[kTileRows],
             std::int64_t cols)
      : rows_(rows), header_(info.row_header_bytes), tile_bytes_(bytes_of(info, shape.cols)) {
    const std::int64_t num_full = cols / shape.cols;
    partial_ = cols % shape.cols == 0 ? -1 : num_full;
    partial_bytes_ = static_cast<std::size_t>(partial_ < 0 ? 0 : bytes_of(info, cols % shape.cols));
    NB_ASSERT(partial_ < 0 || (info.block_elements == 1 && tile_bytes_ <= static_cast<std::int64_t>(sizeof(tail_[0]))));
  }

  /// Null if there is no such row.
  const std::uint8_t* block(std::int64_t tile, int row) {
    if (rows_[row] == nullptr) return nullptr;
    const std::uint8_t* block = rows_[row] + header_ + tile * tile_bytes_;
    if (tile != partial_) return block;
    std::uint8_t* const tail = tail_[row % 2];  // f16 takes two rows at a time
    std::memset(tail, 0, sizeof(tail_[0]));
    std::memcpy(tail, block, partial_bytes_);
    return tail;
  }

 private:
  static std::int64_t bytes_of(const FormatInfo& info, std::int64_t cols) {
    return cols / info.block_elements * info.block_bytes;
  }

  const std::uint8_t* const* rows_;
  std::int64_t header_, tile_bytes_, partial_;
  std::size_t partial_bytes_;
  std::uint8_t tail_[2][4 * kGroupCols];
};

template <Format F>
void pack_tile(TileBlocks& blocks, std::int64_t index, std::uint8_t* tile) {
  constexpr TileShape kShape = tile_shape(F);
  constexpr int kWords = kShape.code_bits;  // 32 codes
  static_assert(kWords <= kMostWords);
  std::uint32_t words[kWords];
  for (int row = 0; row < kTileRows; ++row) {
    const std::uint8_t* const block = blocks.block(index, row);
    if (block == nullptr) {
      for (int j = 0; j < kWords; ++j) words[j] = zero_word(kShape, j);
    }
#pragma GCC unroll 8  // so that shifts are by constants
    for (int g = 0; g < kShape.groups; ++g) {
      if (block != nullptr) read_words<F>(block, g, words);
      std::uint8_t* const lanes = tile + g * kShape.group_bytes + row * kLaneBytes;
      for (int j = 0; j < kWords; ++j) std::memcpy(lanes + j * kVectorBytes, words + j, kLaneBytes);
    }
    constexpr std::uint8_t kNoScales[256] = {};
    pack_scales<F>(block == nullptr ? kNoScales : block, row, tile + kShape.groups * kShape.group_bytes);
  }
}

// f16 has vectors of 16 half words: two rows share a word.
template <>
void pack_tile<Format::f16>(TileBlocks& blocks, std::int64_t index, std::uint8_t* tile) {
  constexpr std::uint8_t kZeros[2 * kGroupCols] = {};
  for (int row = 0; row < kTileRows; row += 2) {
    const std::uint8_t* a = blocks.block(index, row);
    const std::uint8_t* b = blocks.block(index, row + 1);
    if (a == nullptr) a = kZeros;
    if (b == nullptr) b = kZeros;
    for (int k = 0; k < kGroupCols; k += 2) {
      const std::uint32_t of_a = load_u32(a + 2 * k), of_b = load_u32(b + 2 * k);
      const std::uint32_t even = (of_a & 0xffff) | of_b << 16, odd = of_a >> 16 | (of_b & 0xffff0000);
      std::memcpy(tile + (k * kTileRows + row) * 2, &even, sizeof(even));
      std::memcpy(tile + ((k + 1) * kTileRows + row) * 2, &odd, sizeof(odd));
    }
  }
}

template <Format F>
void pack_tiles(const std::uint8_t* const rows[kTileRows], std::int64_t cols, std::uint8_t* strip) {
  constexpr TileShape kShape = tile_shape(F);
  TileBlocks blocks(format_info(F), kShape, rows, cols);
  std::uint8_t* tile = strip + kShape.header_bytes;
  for (std::int64_t index = 0; index * kShape.cols < cols; ++index, tile += kShape.tile_bytes) {
    pack_tile<F>(blocks, index, tile);
  }
}

}  // namespace

void pack_strip(Format format, const std::uint8_t* const rows[kTileRows], std::int64_t cols, std::uint8_t* strip) {
  using Pack = void (*)(const std::uint8_t* const*, std::int64_t, std::uint8_t*);
  constexpr Pack kPack[kNumFormats] = {
      pack_tiles<Format::f32>,
      pack_tiles<Format::bf16>,
      pack_tiles<Format::f16>,
      pack_tiles<Format::q4_0>,
      pack_tiles<Format::q4_1>,
      pack_tiles<Format::q8_0>,
      pack_tiles<Format::q5_0>,
      pack_tiles<Format::q5_1>,
      pack_tiles<Format::q4_k>,
      pack_tiles<Format::q5_k>,
      pack_tiles<Format::q6_k>,
      pack_tiles<Format::w8>,
      pack_tiles<Format::w8_channel>,
      pack_tiles<Format::w4>,
      pack_tiles<Format::awq_int4>,
      pack_tiles<Format::awq_int4_g64>,
      pack_tiles<Format::awq_int4_g32>,
      nullptr,
      nullptr,
      nullptr,  // kernel_format() is another
      pack_tiles<Format::fp8_e4m3>,
  };
  format = kernel_format(format);
  if (const int bytes = tile_shape(format).header_bytes; bytes > 0) {
    const auto scale_bytes = static_cast<std::size_t>(bytes / kTileRows);
    std::memset(strip, 0, static_cast<std::size_t>(bytes));
    for (std::size_t row = 0; row < kTileRows; ++row) {
      if (rows[row] != nullptr) std::memcpy(strip + row * scale_bytes, rows[row], scale_bytes);
    }
  }
  kPack[static_cast<int>(format)](rows, cols, strip);
}

}  // namespace nb::quant
