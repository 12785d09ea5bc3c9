#include "quant/tile16.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "base/align.h"

namespace nb::quant {
namespace {

class Tile16 : public testing::TestWithParam<Format> {};

// Every tail of rows and columns: unpack(pack(x)) must equal the file's own unpacking bit for bit.
TEST_P(Tile16, PackingIsLossless) {
  const Format format = GetParam();
  std::mt19937 random(7);
  for (int cols : {32, 64, 576, format_info(format).is_quantized ? 96 : 45}) {
    for (int rows : {1, 7, 16}) {
      const std::int64_t bytes = row_bytes(format, cols);
      std::vector<std::vector<std::uint8_t>> source(16);
      const std::uint8_t* pointers[kTileRows] = {};
      std::normal_distribution<float> normal(0.0f, 0.1f);
      for (int r = 0; r < rows; ++r) {
        std::vector<float> values(static_cast<std::size_t>(cols));
        for (float& value : values) value = normal(random);
        source[static_cast<std::size_t>(r)].resize(static_cast<std::size_t>(bytes));
        pack_row(format, values.data(), cols, source[static_cast<std::size_t>(r)].data());
        pointers[r] = source[static_cast<std::size_t>(r)].data();
      }
      std::vector<std::uint8_t> strip(static_cast<std::size_t>(strip_bytes(format, cols)), 0xcd);
      pack_strip(format, pointers, cols, strip.data());
      for (int r = 0; r < kTileRows; ++r) {
        std::vector<float> expected(static_cast<std::size_t>(round_up(cols, kTileCols)), 0.0f);
        if (r < rows) unpack_row(format, pointers[r], cols, expected.data());
        std::vector<float> unpacked(expected.size());
        for (std::size_t begin = 0; begin < expected.size(); begin += kTileCols) {
          unpack_tile_row(format,
                          strip.data() + begin / kTileCols * static_cast<std::size_t>(format_info(format).tile_bytes),
                          r, unpacked.data() + begin);
        }
        EXPECT_EQ(std::memcmp(unpacked.data(), expected.data(), expected.size() * sizeof(float)), 0)
            << "row " << r << " of " << rows << ", " << cols << " columns";
      }
    }
  }
}

// The lossless formats keep the size of the file, so a decode step reads no more bytes than the file has.
TEST_P(Tile16, TakesAsManyBytesAsTheFile) { EXPECT_EQ(strip_bytes(GetParam(), 576), 16 * row_bytes(GetParam(), 576)); }

INSTANTIATE_TEST_SUITE_P(Formats, Tile16,
                         testing::Values(Format::f32, Format::bf16, Format::f16, Format::q4_0, Format::q4_1,
                                         Format::q8_0),
                         [](const auto& test) { return std::string(to_string(test.param)); });

}  // namespace
}  // namespace nb::quant
