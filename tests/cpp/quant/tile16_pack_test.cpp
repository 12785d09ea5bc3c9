// tile16_pack.cpp: every bit of a code stands where tile16.cpp draws it, for rows that are there and for those that are
// not. That packing loses nothing, tails included, is tile16_test.cpp's business.
#include <gtest/gtest.h>

#include <algorithm>

#include <random>
#include <vector>

#include "quant/format.h"
#include "quant/tile16.h"
#include "quant/tile_shape.h"

namespace nb::quant {
namespace {

class Tile16Pack : public testing::TestWithParam<Format> {};

// Bit `bit` of the code of column k (0 .. 31) of a row, in the drawing's words.
int drawn_bit(int bits, const std::uint8_t* piece, int row, int k, int bit) {
  const auto byte_of = [&](int vector, int byte) { return piece[vector * 64 + row * 4 + byte]; };
  const bool is_low = k < 16;
  const int j = k % 16 / 4, b = k % 4;
  if (bits == 8) return byte_of(k / 4, b) >> bit & 1;
  if (bit < 4) return byte_of(j, b) >> (bit + (is_low ? 0 : 4)) & 1;
  if (bits == 5) return byte_of(4, b) >> (is_low ? 4 + j : j) & 1;
  const int v = j / 2, i = j % 2;
  return byte_of(4 + v, b) >> ((is_low ? 4 : 0) + 2 * i + bit - 4) & 1;
}

TEST_P(Tile16Pack, BitsStandWhereTheyAreDrawn) {
  const FormatInfo& info = format_info(GetParam());
  const TileShape shape = tile_shape(GetParam());
  constexpr int kCols = 512, kRows = 13;
  std::mt19937 random(4);
  std::vector<std::vector<std::uint8_t>> rows(kRows);
  const std::uint8_t* pointers[kTileRows] = {};
  for (std::size_t r = 0; r < rows.size(); ++r) {
    rows[r].resize(static_cast<std::size_t>(row_bytes(info.format, kCols)));
    for (std::uint8_t& byte : rows[r]) byte = static_cast<std::uint8_t>(random());
    pointers[r] = rows[r].data();
  }
  std::vector<std::uint8_t> strip(static_cast<std::size_t>(strip_bytes(info.format, kCols)), 0xa5);
  pack_strip(info.format, pointers, kCols, strip.data());
  CodeGroup group;
  for (int r = 0; r < kTileRows; ++r) {
    for (int g = 0; g < kCols / kGroupCols; ++g) {
      std::fill_n(group.codes, kGroupCols, static_cast<std::uint8_t>(info.zero));
      if (r < kRows) info.read_group(pointers[r], g, kGroupCols, group);
      const std::uint8_t* piece = strip.data() + shape.header_bytes + g / shape.groups * shape.tile_bytes +
                                  g % shape.groups * shape.group_bytes;
      for (int k = 0; k < kGroupCols; ++k) {
        int code = 0;
        for (int bit = 0; bit < shape.code_bits; ++bit) code |= drawn_bit(shape.code_bits, piece, r, k, bit) << bit;
        ASSERT_EQ(code, group.codes[k]) << "row " << r << ", column " << g * kGroupCols + k;
      }
    }
  }
}

std::vector<Format> formats_with_codes() {
  std::vector<Format> formats;
  for (int i = 0; i < kNumFormats; ++i) {
    if (format_info(static_cast<Format>(i)).is_quantized()) formats.push_back(static_cast<Format>(i));
  }
  return formats;
}

INSTANTIATE_TEST_SUITE_P(Formats, Tile16Pack, testing::ValuesIn(formats_with_codes()),
                         [](const auto& test) { return std::string(to_string(test.param)); });

}  // namespace
}  // namespace nb::quant
