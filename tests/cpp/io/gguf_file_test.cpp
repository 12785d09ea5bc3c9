#include "io/gguf_file.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "io/expect_error.h"
#include "io/gguf_builder.h"
#include "io/scratch_file.h"

namespace nb::io {
namespace {

using test::Bytes;
using test::expect_error;
using test::GgufBuilder;

// ---- valid files ----

TEST(GgufFile, ReadsWhatWasWritten) {
  const Bytes bytes = test::small_file().build();
  const GgufFile file(bytes, "small");
  EXPECT_EQ(file.path(), "small");
  EXPECT_EQ(file.version(), 3u);
  EXPECT_EQ(file.file_bytes(), bytes.size());
  ASSERT_EQ(file.metadata().size(), 17u);
  EXPECT_EQ(file.metadata()[0].first, "general.architecture");
  EXPECT_EQ(file.metadata()[16].first, "a.flags");
  EXPECT_EQ(file.string("general.architecture"), "llama");
  EXPECT_EQ(file.u64("a.u8"), 200u);
  EXPECT_EQ(file.i64("a.i8"), -100);
  EXPECT_EQ(file.u64("a.u16"), 60000u);
  EXPECT_EQ(file.i64("a.i16"), -30000);
  EXPECT_EQ(file.u64("a.u32"), 4000000000u);
  EXPECT_EQ(file.i64("a.u32"), 4000000000);
  EXPECT_EQ(file.i64("a.i32"), -2000000000);
  EXPECT_EQ(file.f32("a.f32"), 1.5f);
  EXPECT_TRUE(file.boolean("a.true"));
  EXPECT_FALSE(file.boolean("a.false"));
  EXPECT_EQ(file.u64("a.u64"), ~std::uint64_t{0});
  EXPECT_EQ(file.i64("a.i64"), -5);
  EXPECT_EQ(file.f32("a.f64"), 0.25f);
  EXPECT_EQ(file.strings("a.texts"), (std::vector<std::string_view>{"one", "", "three"}));
  EXPECT_EQ(file.integers("a.numbers"), (std::vector<std::int64_t>{1, -2, 3}));
  EXPECT_EQ(file.find("a.floats")->count, 0u);
  EXPECT_TRUE(file.has("a.u8"));
  EXPECT_FALSE(file.has("a.u"));
  EXPECT_FALSE(file.has(""));

  const GgufValue* text = file.find("general.architecture");
  EXPECT_EQ(static_cast<const void*>(text->bytes.data()), bytes.data() + text->offset);  // a view, not a copy
  std::string_view last;
  GgufStringCursor cursor(*file.find("a.texts"));
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(cursor.next(last));
  EXPECT_EQ(last, "three");
  EXPECT_FALSE(cursor.next(last));
}

TEST(GgufFile, ListsTensors) {
  const Bytes bytes = test::small_file().build();
  const GgufFile file(bytes, "small");
  ASSERT_EQ(file.tensors().size(), 5u);
  const GgufTensor* matrix = file.find_tensor("matrix");
  ASSERT_EQ(matrix, &file.tensors()[1]);
  EXPECT_EQ(matrix->type, 2u);
  EXPECT_EQ(matrix->dims, (std::vector<std::uint64_t>{32, 3}));
  EXPECT_EQ(matrix->bytes, 54u);
  EXPECT_EQ(matrix->offset % 32, 0u);
  Bytes out(54);
  file.read(matrix->offset, out);
  for (std::size_t i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], static_cast<std::byte>(7 + i));
  EXPECT_EQ(file.find_tensor("odd")->bytes, 0u);
  EXPECT_EQ(file.find_tensor("odd")->type, 31u);
  EXPECT_EQ(file.find_tensor("matri"), nullptr);
  EXPECT_EQ(file.find_tensor("matrixx"), nullptr);
}

TEST(GgufFile, FromDisk) {
  const test::ScratchDir dir;
  const Bytes bytes = test::small_file().build();
  const std::string path = dir.write("small.gguf", bytes);
  const GgufFile file(path);
  EXPECT_EQ(file.path(), path);
  EXPECT_EQ(file.string("general.architecture"), "llama");
  Bytes out(bytes.size());
  file.read(0, out);
  EXPECT_EQ(out, bytes);
  expect_error(
      ErrorCode::io, [&] { file.read(1, out); }, path, "at offset 1");
  expect_error(
      ErrorCode::io, [&] { GgufFile{dir.path("absent.gguf")}; }, "absent.gguf");
  expect_error(
      ErrorCode::format, [&] { GgufFile{dir.write("empty.gguf", {})}; }, "empty.gguf", "empty");
}

TEST(GgufFile, ReadingMemoryIsCheckedToo) {
  const Bytes bytes = test::small_file().build();
  const GgufFile file(bytes, "small");
  Bytes out(10);
  expect_error(
      ErrorCode::io, [&] { file.read(bytes.size() - 9, out); }, "small", "10 bytes at offset");
  expect_error(
      ErrorCode::io, [&] { file.read(~std::uint64_t{0}, out); }, "small");
}

TEST(GgufFile, Version2IsTheSame) {
  GgufBuilder builder = test::small_file();
  builder.version = 2;
  const Bytes bytes = builder.build();
  const GgufFile file(bytes, "old");
  EXPECT_EQ(file.version(), 2u);
  EXPECT_EQ(file.u64("a.u16"), 60000u);
}

TEST(GgufFile, AlignmentMovesTheData) {
  for (const std::uint32_t alignment : {8u, 64u, 4096u}) {
    GgufBuilder builder;
    builder.alignment = alignment;
    builder.number<std::uint32_t>("general.alignment", test::kU32, alignment)
        .tensor({.name = "a", .dims = {1}, .data_bytes = 4})
        .tensor({.name = "b", .dims = {1}, .data_bytes = 4});
    const Bytes bytes = builder.build();
    const GgufFile file(bytes, "aligned");
    EXPECT_EQ(file.find_tensor("a")->offset % alignment, 0u);
    EXPECT_EQ(file.find_tensor("b")->offset - file.find_tensor("a")->offset, alignment);
  }
}

TEST(GgufFile, MinimalFile) {
  const Bytes bytes = GgufBuilder().build();
  ASSERT_EQ(bytes.size(), 24u);
  const GgufFile file(bytes, "minimal");
  EXPECT_TRUE(file.metadata().empty());
  EXPECT_TRUE(file.tensors().empty());
  EXPECT_EQ(file.find_tensor("x"), nullptr);
}

// ---- typed access ----

TEST(GgufFile, MissingKeys) {
  const Bytes bytes = test::small_file().build();
  const GgufFile file(bytes, "small");
  EXPECT_EQ(file.u64("x", 7), 7u);
  EXPECT_EQ(file.i64("x", -7), -7);
  EXPECT_EQ(file.f32("x", 0.5f), 0.5f);
  EXPECT_EQ(file.boolean("x", true), true);
  EXPECT_EQ(file.string("x", "y"), "y");
  EXPECT_TRUE(file.strings("x").empty());
  EXPECT_TRUE(file.integers("x").empty());
  expect_error(
      ErrorCode::format, [&] { static_cast<void>(file.u64("x")); }, "small", "key \"x\" is missing");
  expect_error(
      ErrorCode::format, [&] { static_cast<void>(file.i64("x")); }, "key \"x\" is missing");
  expect_error(
      ErrorCode::format, [&] { static_cast<void>(file.f32("x")); }, "key \"x\" is missing");
  expect_error(
      ErrorCode::format, [&] { static_cast<void>(file.boolean("x")); }, "key \"x\" is missing");
  expect_error(
      ErrorCode::format, [&] { static_cast<void>(file.string("x")); }, "key \"x\" is missing");
}

TEST(GgufFile, WrongTypesNameKeyAndBothTypes) {
  const Bytes bytes = test::small_file().build();
  const GgufFile file(bytes, "small");
  const auto expect = [](const auto& read, const char* key, const char* found, const char* wanted) {
    SCOPED_TRACE(key);
    expect_error(ErrorCode::format, read, "small: at offset ", key, found, wanted);
  };
  expect([&] { static_cast<void>(file.u64("a.f32", 1)); }, "\"a.f32\"", "type f32", "expected an integer");
  expect([&] { static_cast<void>(file.u64("a.texts")); }, "\"a.texts\"", "array of string", "expected an integer");
  expect([&] { static_cast<void>(file.u64("a.true")); }, "\"a.true\"", "type boolean", "expected an integer");
  expect([&] { static_cast<void>(file.u64("a.i64")); }, "\"a.i64\"", "is -5", "expected u64");
  expect([&] { static_cast<void>(file.i64("a.u64")); }, "\"a.u64\"", "is 18446744073709551615", "expected i64");
  expect([&] { static_cast<void>(file.f32("a.u32")); }, "\"a.u32\"", "type u32", "expected f32");
  expect([&] { static_cast<void>(file.boolean("a.u8")); }, "\"a.u8\"", "type u8", "expected boolean");
  expect([&] { static_cast<void>(file.string("a.u8")); }, "\"a.u8\"", "type u8", "expected string");
  expect([&] { static_cast<void>(file.string("a.texts")); }, "\"a.texts\"", "array of string", "expected string");
  expect([&] { file.strings("a.numbers"); }, "\"a.numbers\"", "array of i32", "array of strings");
  expect([&] { file.strings("general.architecture"); }, "architecture", "type string", "array of strings");
  expect([&] { file.integers("a.floats"); }, "\"a.floats\"", "array of f32", "array of integers");
  expect([&] { file.integers("a.u8"); }, "\"a.u8\"", "type u8", "array of integers");
}

TEST(GgufFile, NumbersAtTheEdges) {
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
      ErrorCode::format, [&] { static_cast<void>(file.f32("big")); }, "\"big\"", "1e+39");
  EXPECT_EQ(file.f32("infinite"), -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(file.f32("nan")));
  EXPECT_EQ(file.f32("largest"), std::numeric_limits<float>::max());
  expect_error(
      ErrorCode::format, [&] { file.integers("wide"); }, "\"wide\"", "18446744073709551615");
}

}  // namespace
}  // namespace nb::io
