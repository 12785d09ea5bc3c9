#include "quant/finite.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "quant/format.h"

namespace nb::quant {
namespace {

// The definition: a row is finite if everything it unpacks to is.
bool naive(Format format, const std::vector<std::uint8_t>& row, std::int64_t size) {
  std::vector<float> values(static_cast<std::size_t>(size));
  unpack_row(format, row.data(), size, values.data());
  return std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); });
}

TEST(Finite, EqualsUnpackingWhateverTheBytes) {
  std::mt19937 random(5);
  for (int i = 0; i < kNumFormats; ++i) {
    const auto format = static_cast<Format>(i);
    const std::int64_t size = std::max(512, 2 * format_info(format).block_elements);
    std::vector<std::uint8_t> zeros(static_cast<std::size_t>(row_bytes(format, size)), 0);
    EXPECT_TRUE(is_finite_row(format, zeros.data(), size)) << to_string(format);
    int finite = 0, nonfinite = 0;
    for (int trial = 0; trial < 2000; ++trial) {
      std::vector<std::uint8_t> row = zeros;
      if (trial % 2 == 0) {  // two bytes somewhere are infinite or NaN as f16, bf16 or upper half of f32, or nearly
        const std::size_t at = random() % (row.size() / 2) * 2;
        row[at] = static_cast<std::uint8_t>(random() % 2 * 0x80);
        constexpr std::uint8_t kUpper[] = {0x7c, 0xff, 0x7b, 0x3c};
        row[at + 1] = kUpper[random() % 4];
      } else {  // most of the row is random
        for (std::uint8_t& byte : row) byte = static_cast<std::uint8_t>(random() % 4 == 0 ? 0 : random());
      }
      const bool wanted = naive(format, row, size);
      ASSERT_EQ(is_finite_row(format, row.data(), size), wanted) << to_string(format) << " trial " << trial;
      ++(wanted ? finite : nonfinite);
    }
    EXPECT_GT(nonfinite, 20) << to_string(format);
    EXPECT_GT(finite, 20) << to_string(format);
  }
}

}  // namespace
}  // namespace nb::quant
