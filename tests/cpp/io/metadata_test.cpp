#include "io/metadata.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "io/expect_error.h"
#include "io/gguf_builder.h"
#include "io/gguf_file.h"
#include "io/scratch_file.h"

namespace nb::io {
namespace {

using test::Bytes;
using test::expect_error;
using test::GgufBuilder;

TEST(Metadata, NamesAndSizesOfTypes) {
  EXPECT_STREQ(to_string(ValueType::u8), "u8");
  EXPECT_STREQ(to_string(ValueType::boolean), "boolean");
  EXPECT_STREQ(to_string(ValueType::f64), "f64");
  EXPECT_STREQ(to_string(static_cast<ValueType>(13)), "unknown");
  const std::uint32_t bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  for (std::uint32_t i = 0; i < 13; ++i) EXPECT_EQ(value_type_bytes(static_cast<ValueType>(i)), bytes[i]) << i;
  EXPECT_EQ(value_type_bytes(static_cast<ValueType>(99)), 0u);
}

TEST(Metadata, MissingKeys) {
  const Bytes bytes = test::small_file().build();
  const GgufFile file(bytes, "small");
  EXPECT_EQ(file.metadata().u64("x", 7), 7u);
  EXPECT_EQ(file.metadata().i64("x", -7), -7);
  EXPECT_EQ(file.metadata().f32("x", 0.5f), 0.5f);
  EXPECT_EQ(file.metadata().boolean("x", true), true);
  EXPECT_EQ(file.metadata().string("x", "y"), "y");
  EXPECT_TRUE(file.metadata().strings("x").empty());
  EXPECT_TRUE(file.metadata().integers("x").empty());
  expect_error(
      ErrorCode::format, [&] { static_cast<void>(file.metadata().u64("x")); }, "small", "key \"x\" is missing");
  expect_error(
      ErrorCode::format, [&] { static_cast<void>(file.metadata().i64("x")); }, "key \"x\" is missing");
  expect_error(
      ErrorCode::format, [&] { static_cast<void>(file.metadata().f32("x")); }, "key \"x\" is missing");
  expect_error(
      ErrorCode::format, [&] { static_cast<void>(file.metadata().boolean("x")); }, "key \"x\" is missing");
  expect_error(
      ErrorCode::format, [&] { static_cast<void>(file.metadata().string("x")); }, "key \"x\" is missing");
}

TEST(Metadata, WrongTypesNameKeyAndBothTypes) {
  const Bytes bytes = test::small_file().build();
  const GgufFile file(bytes, "small");
  const auto expect = [](const auto& read, const char* key, const char* found, const char* wanted) {
    SCOPED_TRACE(key);
    expect_error(ErrorCode::format, read, "small: at offset ", key, found, wanted);
  };
  expect([&] { static_cast<void>(file.metadata().u64("a.f32", 1)); }, "\"a.f32\"", "type f32", "expected an integer");
  expect([&] { static_cast<void>(file.metadata().u64("a.texts")); }, "\"a.texts\"", "array of string",
         "expected an integer");
  expect([&] { static_cast<void>(file.metadata().u64("a.true")); }, "\"a.true\"", "type boolean",
         "expected an integer");
  expect([&] { static_cast<void>(file.metadata().u64("a.i64")); }, "\"a.i64\"", "is -5", "expected u64");
  expect([&] { static_cast<void>(file.metadata().i64("a.u64")); }, "\"a.u64\"", "is 18446744073709551615",
         "expected i64");
  expect([&] { static_cast<void>(file.metadata().f32("a.u32")); }, "\"a.u32\"", "type u32", "expected f32");
  expect([&] { static_cast<void>(file.metadata().boolean("a.u8")); }, "\"a.u8\"", "type u8", "expected boolean");
  expect([&] { static_cast<void>(file.metadata().string("a.u8")); }, "\"a.u8\"", "type u8", "expected string");
  expect([&] { static_cast<void>(file.metadata().string("a.texts")); }, "\"a.texts\"", "array of string",
         "expected string");
  expect([&] { file.metadata().strings("a.numbers"); }, "\"a.numbers\"", "array of i32", "array of strings");
  expect([&] { file.metadata().strings("general.architecture"); }, "architecture", "type string", "array of strings");
  expect([&] { file.metadata().integers("a.floats"); }, "\"a.floats\"", "array of f32", "array of integers");
  expect([&] { file.metadata().integers("a.u8"); }, "\"a.u8\"", "type u8", "array of integers");
}

TEST(Metadata, NumbersAtTheEdges) {
  GgufBuilder builder;
  const double infinity = std::numeric_limits<double>::infinity();
  builder.number<double>("big", test::kF64, 1e39)
      .number<double>("infinite", test::kF64, -infinity)
      .number<double>("nan", test::kF64, std::nan(""))
      .number<double>("largest", test::kF64, static_cast<double>(std::numeric_limits<float>::max()))
      .array<std::uint64_t>("wide", test::kU64, {1, ~std::uint64_t{0}});
  const Bytes bytes = builder.build();
  const GgufFile file(bytes, "edges");
  expect_error(
      ErrorCode::format, [&] { static_cast<void>(file.metadata().f32("big")); }, "\"big\"", "1e+39");
  EXPECT_EQ(file.metadata().f32("infinite"), -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(file.metadata().f32("nan")));
  EXPECT_EQ(file.metadata().f32("largest"), std::numeric_limits<float>::max());
  expect_error(
      ErrorCode::format, [&] { file.metadata().integers("wide"); }, "\"wide\"", "18446744073709551615");
}

TEST(Metadata, RefusesAKeyThatOccursTwice) {
  const std::byte one{1};
  const MetadataValue value{
      .type = ValueType::u8, .element_type = ValueType::u8, .count = 1, .offset = 77, .bytes = {&one, 1}};
  EXPECT_EQ(Metadata("once", {{"b", value}, {"a", value}}).u64("a"), 1u);
  expect_error(
      ErrorCode::format,
      [&] {
        Metadata("twice", {{"a", value}, {"b", value}, {"a", value}});
      },
      "twice", "at offset 77", "\"a\"");
}

}  // namespace
}  // namespace nb::io
