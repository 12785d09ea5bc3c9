#include <gtest/gtest.h>

#include "io/gguf_builder.h"
#include "io/gguf_file.h"

namespace nb::io {
namespace {

std::string described(const test::GgufBuilder& builder, std::string_view key, int max_items = 8) {
  const test::Bytes bytes = builder.build();
  const GgufFile file(bytes, "memory");
  return file.metadata().describe(*file.metadata().find(key), max_items);
}

TEST(MetadataDescribe, EveryType) {
  const test::GgufBuilder small = test::small_file();
  EXPECT_EQ(described(small, "general.architecture"), "\"llama\"");
  EXPECT_EQ(described(small, "a.u8"), "200");
  EXPECT_EQ(described(small, "a.i8"), "-100");
  EXPECT_EQ(described(small, "a.u16"), "60000");
  EXPECT_EQ(described(small, "a.i16"), "-30000");
  EXPECT_EQ(described(small, "a.u32"), "4000000000");
  EXPECT_EQ(described(small, "a.i32"), "-2000000000");
  EXPECT_EQ(described(small, "a.f32"), "1.5");
  EXPECT_EQ(described(small, "a.true"), "true");
  EXPECT_EQ(described(small, "a.false"), "false");
  EXPECT_EQ(described(small, "a.u64"), "18446744073709551615");
  EXPECT_EQ(described(small, "a.i64"), "-5");
  EXPECT_EQ(described(small, "a.f64"), "0.25");
  EXPECT_EQ(described(small, "a.texts"), "[\"one\", \"\", \"three\"]");
  EXPECT_EQ(described(small, "a.numbers"), "[1, -2, 3]");
  EXPECT_EQ(described(small, "a.floats"), "[]");
  EXPECT_EQ(described(small, "a.flags"), "[true, false]");
}

TEST(MetadataDescribe, CutsLongValues) {
  const test::GgufBuilder small = test::small_file();
  EXPECT_EQ(described(small, "a.numbers", 2), "[1, -2, ... (3 i32)]");
  EXPECT_EQ(described(small, "a.texts", 0), "[... (3 string)]");
  EXPECT_EQ(described(small, "a.texts", -1), "[... (3 string)]");
  test::GgufBuilder builder;
  builder.string("x", std::string(201, 'a')).string("y", std::string(200, 'b'));
  EXPECT_EQ(described(builder, "x"), "\"" + std::string(200, 'a') + "\"... (201 bytes)");
  EXPECT_EQ(described(builder, "y"), "\"" + std::string(200, 'b') + "\"");
}

TEST(MetadataDescribe, IsUtf8WhateverTheFileHolds) {
  test::GgufBuilder builder;
  builder.string("x", std::string("a\"b\\c\n\x1b[2J\x00\x7f", 12) + "\xff\xc3 \xc3\xa9\xc2\x9b");
  EXPECT_EQ(described(builder, "x"), R"("a\"b\\c\n\x1b[2J\x00\x7f\xff\xc3 é\xc2\x9b")");
}

}  // namespace
}  // namespace nb::io
