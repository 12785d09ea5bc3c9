#include "quant/format.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/dtype.h"
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

// Every value of the 8-bit floats, from the fields of their definition.
TEST(Format, UnpacksEveryFp8Code) {
  std::vector<std::uint8_t> row(4 + 256);
  const float scale = 0.37f;
  std::memcpy(row.data(), &scale, 4);
  for (int code = 0; code < 256; ++code) row[static_cast<std::size_t>(4 + code)] = static_cast<std::uint8_t>(code);
  std::vector<float> out(256);
  unpack_row(Format::fp8_e4m3, row.data(), 256, out.data());
  for (int code = 0; code < 256; ++code) {
    const int exponent = code / 8 % 16, mantissa = code % 8;
    const double magnitude = exponent == 0 ? mantissa * std::exp2(-9) : (8 + mantissa) * std::exp2(exponent - 10);
    const float expected = static_cast<float>(code < 128 ? magnitude : -magnitude) * scale;
    const float actual = out[static_cast<std::size_t>(code)];
    if (code % 128 == 127) {
      EXPECT_TRUE(std::isnan(actual)) << code;
    } else {
      EXPECT_EQ(std::bit_cast<std::uint32_t>(actual), std::bit_cast<std::uint32_t>(expected)) << code;
    }
  }
}

// The value of weight k of a row, written out from the layouts one weight at a time: slow, and shares no code with
// format.cpp. `row` points at the row, `f16` reads a half.
float f16(const std::uint8_t* bytes) { return f16_to_f32(static_cast<std::uint16_t>(bytes[0] + 256 * bytes[1])); }
int as_signed(std::uint8_t byte) { return byte < 128 ? byte : byte - 256; }
int bit(const std::uint8_t* bytes, int index) { return bytes[index / 8] / (1 << index % 8) % 2; }

float weight_of(Format format, const std::uint8_t* row, int k) {
  switch (format) {
    case Format::q4_0: {
      const std::uint8_t* b = row + 18 * (k / 32) + 2;
      const int i = k % 32;
      return f16(b - 2) * static_cast<float>((i < 16 ? b[i] % 16 : b[i - 16] / 16) - 8);
    }
    case Format::q4_1: {
      const std::uint8_t* b = row + 20 * (k / 32) + 4;
      const int i = k % 32;
      return f16(b - 4) * static_cast<float>(i < 16 ? b[i] % 16 : b[i - 16] / 16) + f16(b - 2);
    }
    case Format::q8_0:
      return f16(row + 34 * (k / 32)) * static_cast<float>(as_signed(row[34 * (k / 32) + 2 + k % 32]));
    case Format::q5_0: {
      const std::uint8_t* b = row + 22 * (k / 32);
      const int i = k % 32;
      const int nibble = i < 16 ? b[6 + i] % 16 : b[6 + i - 16] / 16;
      return f16(b) * static_cast<float>(nibble + 16 * bit(b + 2, i) - 16);
    }
    case Format::q5_1: {
      const std::uint8_t* b = row + 24 * (k / 32);
      const int i = k % 32;
      const int nibble = i < 16 ? b[8 + i] % 16 : b[8 + i - 16] / 16;
      return f16(b) * static_cast<float>(nibble + 16 * bit(b + 4, i)) + f16(b + 2);
    }
    case Format::q4_k:
    case Format::q5_k: {
      const bool five = format == Format::q5_k;
      const std::uint8_t* b = row + (five ? 176 : 144) * (k / 256);
      const int g = k % 256 / 32, i = k % 32;
      // The 12 bytes of scales, bit by bit: bits 0-5 of bytes 0-3 and 4-7 are scales and minima of groups 0-3; nibbles
      // of bytes 8-11 are the low bits of those of groups 4-7, bits 6-7 of bytes 0-3 and 4-7 the high ones.
      const std::uint8_t* s = b + 4;
      const int scale = g < 4 ? s[g] % 64 : s[8 + g - 4] % 16 + 16 * (s[g - 4] / 64);
      const int minimum = g < 4 ? s[4 + g] % 64 : s[8 + g - 4] / 16 + 16 * (s[4 + g - 4] / 64);
      const std::uint8_t byte = b[(five ? 48 : 16) + 32 * (g / 2) + i];
      const int code = (g % 2 == 0 ? byte % 16 : byte / 16) + (five ? 16 * bit(b + 16 + i, g) : 0);
      const float d = f16(b) * static_cast<float>(scale), m = f16(b + 2) * static_cast<float>(minimum);
      return d * static_cast<float>(code) - m;
    }
    case Format::q6_k: {
      const std::uint8_t* b = row + 210 * (k / 256);
      const int in_block = k % 256, half = in_block / 128, quarter = in_block % 128 / 32, i = k % 32;
      const std::uint8_t low = b[64 * half + 32 * (quarter % 2) + i];
      const int nibble = quarter < 2 ? low % 16 : low / 16;
      const int high = bit(b + 128 + 32 * half + i, 2 * quarter) + 2 * bit(b + 128 + 32 * half + i, 2 * quarter + 1);
      const float d = f16(b + 208) * static_cast<float>(as_signed(b[192 + in_block / 16]));
      return d * static_cast<float>(nibble + 16 * high - 32);
    }
    case Format::w8:
      return f16(row + 66 * (k / 64)) * static_cast<float>(as_signed(row[66 * (k / 64) + 2 + k % 64]));
    case Format::w8_channel:
      return f16(row) * static_cast<float>(as_signed(row[2 + k]));
    case Format::w4: {
      const std::uint8_t* b = row + 36 * (k / 64);
      const int i = k % 64;
      return f16(b) * static_cast<float>(i < 32 ? b[4 + i] % 16 : b[4 + i - 32] / 16) + f16(b + 2);
    }
    case Format::awq_int4:
    case Format::awq_int4_g64:
    case Format::awq_int4_g32:
    case Format::gptq_int4:
    case Format::gptq_int4_g64:
    case Format::gptq_int4_g32: {
      const int size = format_info(format).block_elements;
      const std::uint8_t* b = row + (size / 2 + 3) * (k / size);
      const int i = k % size % 32;
      const std::uint8_t byte = b[3 + k % size / 32 * 16 + i % 16];
      return f16(b) * static_cast<float>((i < 16 ? byte % 16 : byte / 16) - b[2]);
    }
    case Format::f32:
    case Format::bf16:
    case Format::f16:
    case Format::fp8_e4m3:
      break;
  }
  ADD_FAILURE() << "no oracle for " << to_string(format);
  return 0.0f;
}

// Random bits, so every code and scale occurs, subnormal and infinite ones too.
TEST(Format, UnpackingEqualsTheWrittenOutOracle) {
  std::mt19937 random(11);
  for (int id = 0; id < kNumFormats; ++id) {
    const auto format = static_cast<Format>(id);
    if (!format_info(format).is_quantized()) continue;
    const int cols = format == Format::w8_channel ? 77 : 1024;
    std::vector<std::uint8_t> row(static_cast<std::size_t>(row_bytes(format, cols)));
    std::vector<float> out(static_cast<std::size_t>(cols));
    for (int trial = 0; trial < 50; ++trial) {
      for (std::uint8_t& byte : row) byte = static_cast<std::uint8_t>(random());
      unpack_row(format, row.data(), cols, out.data());
      for (int k = 0; k < cols; ++k) {
        const float expected = weight_of(format, row.data(), k), actual = out[static_cast<std::size_t>(k)];
        if (std::isnan(expected) && std::isnan(actual)) continue;
        ASSERT_EQ(std::bit_cast<std::uint32_t>(actual), std::bit_cast<std::uint32_t>(expected))
            << to_string(format) << " weight " << k << ": " << actual << " for " << expected;
      }
    }
  }
}

TEST(Format, SizesOfRows) {
  EXPECT_EQ(row_bytes(Format::w8, 128), 132);
  EXPECT_EQ(row_bytes(Format::w8_channel, 45), 47);
  EXPECT_EQ(row_bytes(Format::w4, 128), 72);
  EXPECT_EQ(row_bytes(Format::q6_k, 512), 420);
  EXPECT_EQ(row_bytes(Format::awq_int4, 256), 134);
  EXPECT_EQ(row_bytes(Format::gptq_int4_g32, 256), 8 * 19);
  EXPECT_EQ(row_bytes(Format::fp8_e4m3, 45), 49);
  EXPECT_THROW(row_bytes(Format::gptq_int4, 192), Error);
  EXPECT_THROW(row_bytes(Format::w4, 96), Error);
  EXPECT_THROW(row_bytes(Format::q4_k, 576), Error);
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
  const auto expect_cells = [](KvFormat format, int head_dim, std::int64_t key, std::int64_t value) {
    EXPECT_EQ(kv_format_info(format).key_cell_bytes(head_dim), key) << to_string(format) << ", " << head_dim;
    EXPECT_EQ(kv_format_info(format).value_cell_bytes(head_dim), value) << to_string(format) << ", " << head_dim;
  };
  expect_cells(KvFormat::bf16, 64, 2048, 2048);
  expect_cells(KvFormat::f32, 64, 4096, 4096);
  expect_cells(KvFormat::f16, 80, 2560, 2560);
  expect_cells(KvFormat::int8, 64, 16 * 66, 16 * 66);
  expect_cells(KvFormat::mixed, 64, 16 * 66, 16 * (32 + 2 * 4));
  expect_cells(KvFormat::mixed, 80, 16 * 82, 16 * (40 + 3 * 4));  // the last group has 16 dimensions
  expect_cells(KvFormat::mixed, 16, 16 * 18, 16 * (8 + 4));
  EXPECT_EQ(kv_format_info(KvFormat::f32).bits_per_element(64), 32.0);
  EXPECT_EQ(kv_format_info(KvFormat::bf16).bits_per_element(80), 16.0);
  EXPECT_EQ(kv_format_info(KvFormat::int8).bits_per_element(64), 8.25);
  EXPECT_EQ(kv_format_info(KvFormat::mixed).bits_per_element(64), (8.25 + 5.0) / 2);
  for (int i = 0; i < kNumKvFormats; ++i) {
    const KvFormatInfo& info = kv_format_info(static_cast<KvFormat>(i));
    EXPECT_EQ(info.format, static_cast<KvFormat>(i));
    EXPECT_EQ(parse_kv_format(info.name), info.format);
  }
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
