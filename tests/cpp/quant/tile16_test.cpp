#include "quant/tile16.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "base/align.h"

namespace nb::quant {
namespace {

class Tile16 : public testing::TestWithParam<Format> {};

// Rows of random bits: every code and scale, also ones that no packing recipe would choose. Halves are finite.
std::vector<std::uint8_t> random_row(Format format, int cols, std::mt19937& random) {
  std::vector<std::uint8_t> row(static_cast<std::size_t>(row_bytes(format, cols)));
  for (std::uint8_t& byte : row) byte = static_cast<std::uint8_t>(random());
  const FormatInfo& info = format_info(format);
  const auto make_finite = [&](std::size_t offset) {
    if ((row[offset + 1] & 0x7c) == 0x7c) row[offset + 1] ^= 0x40;
  };
  if (format == Format::w8_channel) make_finite(0);
  if (format == Format::fp8_e4m3) row[3] = 0x3d;  // of the f32 scale
  if (!info.is_quantized() || format == Format::w8_channel) return row;
  for (std::size_t begin = 0; begin < row.size(); begin += static_cast<std::size_t>(info.block_bytes)) {
    make_finite(begin + (format == Format::q6_k ? 208 : 0));
    if (info.has_minimum) make_finite(begin + 2);
  }
  return row;
}

// Every tail of rows and columns: unpack(pack(x)) must equal the file's own unpacking bit for bit.
TEST_P(Tile16, PackingIsLossless) {
  const Format format = GetParam();
  const int block = format_info(format).block_elements;
  std::mt19937 random(7);
  for (int cols : {1, 3, 18, 45, 576}) {
    if (block > 1) cols = round_up(cols, block);
    for (int rows : {1, 7, 16}) {
      std::vector<std::vector<std::uint8_t>> source;
      const std::uint8_t* pointers[kTileRows] = {};
      for (int r = 0; r < rows; ++r) source.push_back(random_row(format, cols, random));
      for (std::size_t r = 0; r < source.size(); ++r) pointers[r] = source[r].data();
      std::vector<std::uint8_t> strip(static_cast<std::size_t>(strip_bytes(format, cols)), 0xcd);
      pack_strip(format, pointers, cols, strip.data());
      for (int r = 0; r < kTileRows; ++r) {
        std::vector<float> expected(static_cast<std::size_t>(cols), 0.0f), unpacked(expected.size(), 3.0f);
        if (r < rows) unpack_row(format, pointers[r], cols, expected.data());
        unpack_strip_row(format, strip.data(), cols, r, unpacked.data());
        EXPECT_EQ(std::memcmp(unpacked.data(), expected.data(), expected.size() * sizeof(float)), 0)
            << "row " << r << " of " << rows << ", " << cols << " columns";
      }
    }
  }
}

// Nothing of what the memory held before stays in a strip, so equal weights give equal bytes.
TEST_P(Tile16, WritesEveryByte) {
  const Format format = GetParam();
  std::mt19937 random(8);
  const int cols = 512 + (format_info(format).block_elements == 1 ? 5 : 0);
  for (int rows : {5, 16}) {
    std::vector<std::vector<std::uint8_t>> source;
    const std::uint8_t* pointers[kTileRows] = {};
    for (int r = 0; r < rows; ++r) source.push_back(random_row(format, cols, random));
    for (std::size_t r = 0; r < source.size(); ++r) pointers[r] = source[r].data();
    std::vector<std::uint8_t> a(static_cast<std::size_t>(strip_bytes(format, cols)), 0x00), b(a.size(), 0xff);
    pack_strip(format, pointers, cols, a.data());
    pack_strip(format, pointers, cols, b.data());
    EXPECT_EQ(a, b) << rows << " rows";
  }
}

// A decode step reads the strips: they hold as many bytes as the file. Only the K-quants' 6-bit scales grow to bytes.
TEST_P(Tile16, TakesAsManyBytesAsTheFile) {
  const Format format = GetParam();
  const int blocks = format == Format::q4_k || format == Format::q5_k ? 6 : 0;
  EXPECT_EQ(strip_bytes(format, 1536), 16 * row_bytes(format, 1536) + 16 * 4 * blocks);
}

std::vector<Format> all_formats() {
  std::vector<Format> formats;
  for (int i = 0; i < kNumFormats; ++i) formats.push_back(static_cast<Format>(i));
  return formats;
}

INSTANTIATE_TEST_SUITE_P(Formats, Tile16, testing::ValuesIn(all_formats()),
                         [](const auto& test) { return std::string(to_string(test.param)); });

}  // namespace
}  // namespace nb::quant
