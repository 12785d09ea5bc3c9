#include "quant/format.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "base/error.h"
#include "quant/kv_format.h"

namespace nb::quant {
namespace {

// A block written by hand, byte by byte from the layout in format.cpp, against values computed on paper.
TEST(Format, UnpacksQ4BlocksWrittenByHand) {
  std::vector<std::uint8_t> block(20, 0);
  block[1] = 0x38;  // d = 0.5 in f16
  block[2] = 0x9f;  // q4_0: first byte of codes; low nibble 15 = w0, high nibble 9 = w16
  float out[32];
  unpack_row(Format::q4_0, block.data(), 32, out);
  EXPECT_EQ(out[0], 0.5f * 7);
  EXPECT_EQ(out[16], 0.5f * 1);
  EXPECT_EQ(out[1], 0.5f * -8);
  block[2] = 0x00, block[3] = 0xbc;  // q4_1: m = -1
  block[4] = 0x3a;
  unpack_row(Format::q4_1, block.data(), 32, out);
  EXPECT_EQ(out[0], 0.5f * 10 - 1.0f);
  EXPECT_EQ(out[16], 0.5f * 3 - 1.0f);
  EXPECT_EQ(out[31], -1.0f);
}

TEST(Format, UnpacksQ8BlockWrittenByHand) {
  std::vector<std::uint8_t> block(34, 0);
  block[1] = 0x34;  // d = 0.25
  block[2] = 0x80, block[33] = 0x7f;
  float out[32];
  unpack_row(Format::q8_0, block.data(), 32, out);
  EXPECT_EQ(out[0], -32.0f);
  EXPECT_EQ(out[31], 31.75f);
}

TEST(Format, PackingErrsByAtMostHalfAStep) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  for (Format format : {Format::q4_0, Format::q4_1, Format::q8_0, Format::f16, Format::bf16, Format::f32}) {
    std::vector<float> values(320), back(320);
    for (float& value : values) value = normal(random);
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(row_bytes(format, 320)));
    pack_row(format, values.data(), 320, bytes.data());
    unpack_row(format, bytes.data(), 320, back.data());
    for (std::size_t begin = 0; begin < 320; begin += 32) {
      float lowest = values[begin], highest = values[begin];
      for (std::size_t i = begin; i < begin + 32; ++i) {
        lowest = std::min(lowest, values[i]), highest = std::max(highest, values[i]);
      }
      const float peak = std::max(std::fabs(lowest), std::fabs(highest));
      float bound = 0.0f;
      if (format == Format::q4_0) bound = peak / 8 * 1.01f;  // the far end of the range may clip by one step
      if (format == Format::q4_1) bound = (highest - lowest) / 30 * 1.05f;
      if (format == Format::q8_0) bound = peak / 254 * 1.05f;
      if (format == Format::f16) bound = peak * 0x1p-11f;
      if (format == Format::bf16) bound = peak * 0x1p-8f;
      for (std::size_t i = begin; i < begin + 32; ++i) {
        EXPECT_LE(std::fabs(values[i] - back[i]), bound) << to_string(format) << " element " << i;
      }
    }
  }
}

TEST(Format, RefusesPartialBlocksAndUnknownNames) {
  EXPECT_THROW(row_bytes(Format::q4_0, 33), Error);
  EXPECT_THROW(parse_format("q3_k"), Error);
  for (int i = 0; i < kNumFormats; ++i) {
    const auto format = static_cast<Format>(i);
    EXPECT_EQ(parse_format(to_string(format)), format);
  }
}

TEST(KvFormat, TableNamesAndCells) {
  EXPECT_EQ(parse_kv_format("bf16"), KvFormat::bf16);
  EXPECT_EQ(kv_cell_bytes(KvFormat::bf16, 64), 2048);
  EXPECT_EQ(kv_cell_bytes(KvFormat::f32, 64), 4096);
  try {
    parse_kv_format("int3");
    FAIL() << "int3 was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_NE(std::string(error.what()).find("int3"), std::string::npos);
  }
}

}  // namespace
}  // namespace nb::quant
