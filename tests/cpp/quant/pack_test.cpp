#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "base/error.h"
#include "quant/format.h"

namespace nb::quant {
namespace {

// What one weight may be off by, for weights of one block or group within [lowest, highest] whose magnitude is at most
// `peak`: half a step of the code, a little more for the rounding of scales.
float error_bound(Format format, float lowest, float highest, float peak) {
  switch (format) {
    case Format::f32:
      return 0.0f;
    case Format::bf16:
      return peak * 0x1p-8f;
    case Format::f16:
      return peak * 0x1p-11f;
    case Format::q4_0:
      return peak / 8 * 1.01f;  // the far end of the range may clip by one step
    case Format::q5_0:
      return peak / 16 * 1.01f;
    case Format::q4_1:
    case Format::w4:
      return (highest - lowest) / 30 * 1.05f;
    case Format::q5_1:
      return (highest - lowest) / 62 * 1.05f;
    case Format::q8_0:
    case Format::w8:
    case Format::w8_channel:
      return peak / 254 * 1.05f;
    // One step where the range clips; scales and minima are off by up to half of a 63rd (6 bits) or 127th.
    case Format::q4_k:
      return (highest - lowest) / 30 + 2 * peak * 2 / 126;
    case Format::q5_k:
      return (highest - lowest) / 62 + 2 * peak * 2 / 126;
    // The zero point is rounded, which may cut off half a step at an end of the range.
    case Format::awq_int4:
    case Format::awq_int4_g64:
    case Format::awq_int4_g32:
    case Format::gptq_int4:
    case Format::gptq_int4_g64:
    case Format::gptq_int4_g32:
      return (std::max(highest, 0.0f) - std::min(lowest, 0.0f)) / 15 * 1.01f;
    case Format::fp8_e4m3:
      return peak / 28 * 1.01f;  // half of 32 of 448
    case Format::q6_k:
      return peak / 32 * 1.01f + peak / 254;
  }
  return 0.0f;
}

TEST(Pack, ErrsByAtMostHalfAStep) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  constexpr std::size_t kCols = 512;
  for (int id = 0; id < kNumFormats; ++id) {
    const auto format = static_cast<Format>(id);
    const FormatInfo& info = format_info(format);
    std::vector<float> values(kCols), back(kCols);
    for (float& value : values) value = normal(random);
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(row_bytes(format, kCols)));
    pack_row(format, values.data(), kCols, bytes.data());
    unpack_row(format, bytes.data(), kCols, back.data());
    const std::size_t span = info.row_header_bytes > 0  ? kCols
                             : info.block_elements == 1 ? 1
                                                        : static_cast<std::size_t>(info.block_elements);
    for (std::size_t begin = 0; begin < kCols; begin += span) {
      const auto first = values.begin() + static_cast<std::ptrdiff_t>(begin);
      const auto [lowest, highest] = std::minmax_element(first, first + static_cast<std::ptrdiff_t>(span));
      const float peak = std::max(std::fabs(*lowest), std::fabs(*highest));
      for (std::size_t i = begin; i < begin + span; ++i) {
        EXPECT_LE(std::fabs(values[i] - back[i]), error_bound(format, *lowest, *highest, peak))
            << to_string(format) << " element " << i;
      }
    }
  }
}

// Rows of zeros, of one constant and of values near the smallest f16 give finite weights of the right size.
TEST(Pack, SurvivesDegenerateRows) {
  for (int id = 0; id < kNumFormats; ++id) {
    const auto format = static_cast<Format>(id);
    for (float value : {0.0f, 1.0f, -3.0f, 1e-7f, -1e-9f, 1e-30f}) {
      const std::vector<float> values(256, value);
      std::vector<float> back(256);
      std::vector<std::uint8_t> bytes(static_cast<std::size_t>(row_bytes(format, 256)));
      pack_row(format, values.data(), 256, bytes.data());
      unpack_row(format, bytes.data(), 256, back.data());
      for (float restored : back) {
        EXPECT_LE(std::fabs(restored - value), std::fabs(value) * 0.05f + 1e-6f) << to_string(format) << " " << value;
      }
    }
  }
}

TEST(Pack, RefusesWhatAQuantizedFormatCannotHold) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int id = 0; id < kNumFormats; ++id) {
    const auto format = static_cast<Format>(id);
    if (!format_info(format).is_quantized()) continue;
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(row_bytes(format, 256)));
    for (float bad : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN(), 3e38f}) {
      std::vector<float> values(256, 0.5f);
      values[77] = bad;
      try {
        pack_row(format, values.data(), 256, bytes.data());
        ADD_FAILURE() << to_string(format) << " packed " << bad;
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      }
    }
  }
}

}  // namespace
}  // namespace nb::quant
