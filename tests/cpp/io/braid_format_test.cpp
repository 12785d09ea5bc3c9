#include "io/braid_format.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

namespace nb::io {
namespace {

TEST(BraidFormat, TheMagicIsEightBytesThatAreNotText) {
  EXPECT_EQ(kBraidMagic.size(), 8u);
  EXPECT_EQ(static_cast<unsigned char>(kBraidMagic[0]), 0x89);
  EXPECT_EQ(kBraidMagic.substr(1), "BRAID\r\n");
}

// Numbers in files never change: these stand in files already.
TEST(BraidFormat, NumbersAreFixed) {
  EXPECT_EQ(braid_code(quant::Format::f32), 0u);
  EXPECT_EQ(braid_code(quant::Format::f16), 1u);
  EXPECT_EQ(braid_code(quant::Format::bf16), 2u);
  EXPECT_EQ(braid_code(quant::Format::q4_0), 16u);
  EXPECT_EQ(braid_code(quant::Format::q4_1), 17u);
  EXPECT_EQ(braid_code(quant::Format::q8_0), 20u);
  const std::pair<std::uint32_t, const char*> names[] = {
      {18, "q5_0"},          {19, "q5_1"},         {24, "q4_k"},         {25, "q5_k"},
      {26, "q6_k"},          {32, "w8"},           {33, "w8_channel"},   {34, "w4"},
      {40, "awq_int4"},      {3, "fp8_e4m3"},      {41, "gptq_int4"},    {42, "awq_int4_g64"},
      {43, "gptq_int4_g64"}, {44, "awq_int4_g32"}, {45, "gptq_int4_g32"}};
  for (const auto& [code, name] : names) EXPECT_EQ(braid_format_name(code), name);
}

TEST(BraidFormat, EveryFormatHasANumberOfItsOwn) {
  std::set<std::uint32_t> codes;
  for (int i = 0; i < quant::kNumFormats; ++i) {
    const auto format = static_cast<quant::Format>(i);
    const std::uint32_t code = braid_code(format);
    EXPECT_TRUE(codes.insert(code).second) << code;
    EXPECT_EQ(braid_format(code), format);
    EXPECT_EQ(braid_format_name(code), quant::to_string(format));
  }
}

TEST(BraidFormat, ReservedNumbersHaveANameAndNothingReadsThem) {
  for (const std::uint32_t code : {4u, 256u + 17u, 256u + 34u, 256u + 40u}) {
    EXPECT_EQ(braid_format(code), std::nullopt) << code;
  }
  EXPECT_EQ(braid_format_name(4), "fp8_e5m2");
  EXPECT_EQ(braid_format_name(256 + 17), "q4_1 in 16-row tiles");
  EXPECT_EQ(braid_format_name(99), "format 99");
  EXPECT_EQ(braid_format_name(256 + 99), "format 355");
  EXPECT_EQ(braid_format(99), std::nullopt);
}

TEST(BraidFormat, SectionNames) {
  EXPECT_EQ(braid_section_name(1), "METADATA");
  EXPECT_EQ(braid_section_name(2), "TENSORS");
  EXPECT_EQ(braid_section_name(3), "DATA");
  EXPECT_EQ(braid_section_name(4), "kind 4");
}

}  // namespace
}  // namespace nb::io
