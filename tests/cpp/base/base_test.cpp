// error, env, log, dtype, align: small pieces, one test each.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "base/align.h"
#include "base/dtype.h"
#include "base/env.h"
#include "base/error.h"
#include "base/log.h"

namespace nb {
namespace {

TEST(Error, CarriesCodeAndMessage) {
  try {
    NB_CHECK(1 == 2, out_of_memory, "need ", 3, " blocks, have ", 2.5);
    FAIL() << "the check passed";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::out_of_memory);
    EXPECT_STREQ(error.what(), "need 3 blocks, have 2.5");
    EXPECT_STREQ(to_string(error.code()), "out_of_memory");
  }
}

TEST(Error, AssertNamesTheCondition) {
  try {
    NB_ASSERT(2 + 2 == 5);
    FAIL() << "the assertion passed";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::internal);
    EXPECT_NE(std::string(error.what()).find("2 + 2 == 5"), std::string::npos);
  }
}

TEST(Environment, UnsetAndEmptyAreNothing) {
  unsetenv("NANOBRAID_TEST_VARIABLE");
  EXPECT_FALSE(environment("NANOBRAID_TEST_VARIABLE").has_value());
  setenv("NANOBRAID_TEST_VARIABLE", "", 1);
  EXPECT_FALSE(environment("NANOBRAID_TEST_VARIABLE").has_value());
  setenv("NANOBRAID_TEST_VARIABLE", "yes", 1);
  EXPECT_EQ(environment("NANOBRAID_TEST_VARIABLE"), "yes");
}

TEST(Log, FiltersByLevelAndReachesTheSink) {
  std::vector<std::string> lines;
  set_log_sink([&](LogLevel, const std::string& line) { lines.push_back(line); });
  set_log_level(LogLevel::info);
  log(LogLevel::info, "kept ", 1);
  log(LogLevel::debug, "dropped");
  set_log_level(parse_log_level("debug"));
  log(LogLevel::debug, "kept 2");
  set_log_level(LogLevel::warning);
  set_log_sink({});
  EXPECT_EQ(lines, (std::vector<std::string>{"kept 1", "kept 2"}));
  EXPECT_THROW(parse_log_level("loud"), Error);
}

// All 65,536 halves: widening is checked against the definition, narrowing must invert it.
TEST(DType, EveryHalfRoundTrips) {
  for (int i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const int exponent = (i >> 10) & 31, mantissa = i & 1023;
    const float value = f16_to_f32(bits);
    if (exponent == 31 && mantissa != 0) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(value))));
      continue;
    }
    double expected = exponent == 0    ? std::ldexp(mantissa, -24)
                      : exponent == 31 ? std::numeric_limits<double>::infinity()
                                       : std::ldexp(1024 + mantissa, exponent - 25);
    if (i & 0x8000) expected = -expected;
    EXPECT_EQ(static_cast<double>(value), expected) << i;
    EXPECT_EQ(f32_to_f16(value), bits) << i;
  }
}

TEST(DType, NarrowingRoundsToNearestEven) {
  EXPECT_EQ(f32_to_f16(1.0f + 0x1p-11f), f32_to_f16(1.0f));                // a tie, down to even
  EXPECT_EQ(f32_to_f16(1.0f + 3 * 0x1p-11f), f32_to_f16(1.0f + 0x1p-9f));  // a tie, up to even
  EXPECT_EQ(f32_to_f16(65519.0f), 0x7bff);
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(f32_to_f16(0x1p-25f), 0);  // half of the smallest subnormal, to even
  EXPECT_EQ(f32_to_f16(0x1.8p-25f), 1);
  EXPECT_EQ(f32_to_bf16(1.0f + 0x1p-8f), f32_to_bf16(1.0f));
  EXPECT_EQ(bf16_to_f32(f32_to_bf16(1.0f + 3 * 0x1p-8f)), 1.0f + 0x1p-6f);
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_EQ(dtype_bytes(DType::bf16), 2u);
  EXPECT_STREQ(to_string(DType::i32), "i32");
}

TEST(Align, Rounds) {
  EXPECT_EQ(round_up(0, 16), 0);
  EXPECT_EQ(round_up(17, 16), 32);
  EXPECT_EQ(ceil_div(33, 32), 2);
}

// Every code goes there and back; what lies between two goes to the nearer, in a tie to the even one.
TEST(DType, Fp8RoundsToNearestEven) {
  for (int code = 0; code < 0x7f; ++code) {
    const float value = e4m3_to_f32(static_cast<std::uint8_t>(code));
    EXPECT_EQ(f32_to_e4m3(value), code);
    EXPECT_EQ(f32_to_e4m3(-value), code | 0x80);
    if (code == 0x7e) continue;
    const float middle = (value + e4m3_to_f32(static_cast<std::uint8_t>(code + 1))) / 2;
    EXPECT_EQ(f32_to_e4m3(middle), code + code % 2) << code;
    EXPECT_EQ(f32_to_e4m3(std::nextafter(middle, 0.0f)), code) << code;
    EXPECT_EQ(f32_to_e4m3(std::nextafter(middle, 1e9f)), code + 1) << code;
  }
  EXPECT_EQ(e4m3_to_f32(0x7e), 448.0f);
  EXPECT_EQ(f32_to_e4m3(1e30f), 0x7e);
  EXPECT_EQ(f32_to_e4m3(-std::numeric_limits<float>::infinity()), 0xfe);
  EXPECT_TRUE(std::isnan(e4m3_to_f32(f32_to_e4m3(std::numeric_limits<float>::quiet_NaN()))));
}

}  // namespace
}  // namespace nb
