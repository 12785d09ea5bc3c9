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

TEST(GgufFile, ReadsWhatWasWritten) {
  const Bytes bytes = test::small_file().build();
  const GgufFile file(bytes, "small");
  EXPECT_EQ(file.path(), "small");
  EXPECT_EQ(file.version(), 3u);
  EXPECT_EQ(file.file_bytes(), bytes.size());
  ASSERT_EQ(file.metadata().entries().size(), 17u);
  EXPECT_EQ(file.metadata().entries()[0].first, "general.architecture");
  EXPECT_EQ(file.metadata().entries()[16].first, "a.flags");
  EXPECT_EQ(file.metadata().string("general.architecture"), "llama");
  EXPECT_EQ(file.metadata().u64("a.u8"), 200u);
  EXPECT_EQ(file.metadata().i64("a.i8"), -100);
  EXPECT_EQ(file.metadata().u64("a.u16"), 60000u);
  EXPECT_EQ(file.metadata().i64("a.i16"), -30000);
  EXPECT_EQ(file.metadata().u64("a.u32"), 4000000000u);
  EXPECT_EQ(file.metadata().i64("a.u32"), 4000000000);
  EXPECT_EQ(file.metadata().i64("a.i32"), -2000000000);
  EXPECT_EQ(file.metadata().f32("a.f32"), 1.5f);
  EXPECT_TRUE(file.metadata().boolean("a.true"));
  EXPECT_FALSE(file.metadata().boolean("a.false"));
  EXPECT_EQ(file.metadata().u64("a.u64"), ~std::uint64_t{0});
  EXPECT_EQ(file.metadata().i64("a.i64"), -5);
  EXPECT_EQ(file.metadata().f32("a.f64"), 0.25f);
  EXPECT_EQ(file.metadata().strings("a.texts"), (std::vector<std::string_view>{"one", "", "three"}));
  EXPECT_EQ(file.metadata().integers("a.numbers"), (std::vector<std::int64_t>{1, -2, 3}));
  EXPECT_EQ(file.metadata().find("a.floats")->count, 0u);
  EXPECT_TRUE(file.metadata().has("a.u8"));
  EXPECT_FALSE(file.metadata().has("a.u"));
  EXPECT_FALSE(file.metadata().has(""));

  const MetadataValue* text = file.metadata().find("general.architecture");
  EXPECT_EQ(static_cast<const void*>(text->bytes.data()), bytes.data() + text->offset);  // a view, not a copy
  std::string_view last;
  StringCursor cursor(*file.metadata().find("a.texts"));
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
  EXPECT_EQ(file.metadata().string("general.architecture"), "llama");
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
  EXPECT_EQ(file.metadata().u64("a.u16"), 60000u);
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
  EXPECT_TRUE(file.metadata().entries().empty());
  EXPECT_TRUE(file.tensors().empty());
  EXPECT_EQ(file.find_tensor("x"), nullptr);
}

}  // namespace
}  // namespace nb::io
