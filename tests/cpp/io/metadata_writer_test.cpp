#include "io/metadata_writer.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "io/expect_error.h"
#include "io/gguf_builder.h"
#include "io/gguf_file.h"
#include "io/metadata_parser.h"

namespace nb::io {
namespace {

using test::expect_error;

// The entries as the reader of files sees them.
Metadata parsed(const MetadataWriter& writer, const std::string& path) {
  ByteCursor in(writer.bytes(), path);
  Metadata metadata(path, parse_entries(in, writer.num_entries()));
  EXPECT_EQ(in.left(), 0u);
  return metadata;
}

TEST(MetadataWriter, TheReaderFindsEveryType) {
  MetadataWriter writer;
  writer.u32("u32", 4000000000u);
  writer.u64("u64", ~std::uint64_t{0});
  writer.i64("i64", -5);
  writer.f32("f32", 1.5f);
  writer.boolean("true", true);
  writer.boolean("false", false);
  writer.string("text", std::string_view("a\0\xff", 3));
  writer.u32s("u32s", std::vector<std::uint32_t>{1, 2});
  writer.u64s("u64s", std::vector<std::uint64_t>{std::uint64_t{1} << 63});
  writer.i64s("i64s", std::vector<std::int64_t>{-1, 2});
  writer.f32s("f32s", std::vector<float>{0.5f});
  writer.booleans("flags", std::vector<std::uint8_t>{1, 0});
  writer.strings("texts", std::vector<std::string>{"a", "", "b"});
  writer.u32s("none", {});
  EXPECT_EQ(writer.num_entries(), 14u);
  const std::string path = "written";
  const Metadata metadata = parsed(writer, path);
  EXPECT_EQ(metadata.entries()[0].first, "u32") << "in the order of writing";
  EXPECT_EQ(metadata.u64("u32"), 4000000000u);
  EXPECT_EQ(metadata.u64("u64"), ~std::uint64_t{0});
  EXPECT_EQ(metadata.i64("i64"), -5);
  EXPECT_EQ(metadata.f32("f32"), 1.5f);
  EXPECT_TRUE(metadata.boolean("true"));
  EXPECT_FALSE(metadata.boolean("false"));
  EXPECT_EQ(metadata.string("text"), std::string_view("a\0\xff", 3));
  EXPECT_EQ(metadata.integers("u32s"), (std::vector<std::int64_t>{1, 2}));
  EXPECT_EQ(metadata.find("u64s")->element_type, ValueType::u64);
  EXPECT_EQ(metadata.integers("i64s"), (std::vector<std::int64_t>{-1, 2}));
  EXPECT_EQ(metadata.describe(*metadata.find("f32s")), "[0.5]");
  EXPECT_EQ(metadata.describe(*metadata.find("flags")), "[true, false]");
  EXPECT_EQ(metadata.strings("texts"), (std::vector<std::string_view>{"a", "", "b"}));
  EXPECT_EQ(metadata.find("none")->count, 0u);
}

TEST(MetadataWriter, CopiesWhatAFileHolds) {
  const test::Bytes bytes = test::small_file().build();
  const GgufFile file(bytes, "source");
  MetadataWriter writer;
  for (const MetadataEntry& entry : file.metadata().entries()) writer.copy(entry);
  const std::string path = "copy";
  const Metadata copy = parsed(writer, path);
  ASSERT_EQ(copy.entries().size(), file.metadata().entries().size());
  for (std::size_t i = 0; i < copy.entries().size(); ++i) {
    const auto& [key, value] = copy.entries()[i];
    const auto& [wanted_key, wanted] = file.metadata().entries()[i];
    EXPECT_EQ(key, wanted_key);
    EXPECT_EQ(value.type, wanted.type);
    EXPECT_EQ(value.element_type, wanted.element_type);
    EXPECT_EQ(value.count, wanted.count);
    EXPECT_TRUE(std::equal(value.bytes.begin(), value.bytes.end(), wanted.bytes.begin(), wanted.bytes.end())) << key;
  }
  // A GGUF header has its entries in the same bytes, after 24 of its own.
  EXPECT_TRUE(std::equal(writer.bytes().begin(), writer.bytes().end(), bytes.begin() + 24));
}

TEST(MetadataWriter, RefusesWhatNoReaderTakes) {
  MetadataWriter writer;
  writer.u32("k", 1);
  const auto refuse = [](const auto& function, const auto&... pieces) {
    expect_error(ErrorCode::invalid_argument, function, pieces...);
  };
  refuse([&] { writer.u32("k", 2); }, "\"k\" occurs twice");
  refuse([&] { writer.string("", "x"); }, "empty");
  refuse([&] { writer.string("k\xff", "x"); }, "not UTF-8");
  refuse([&] { writer.boolean(std::string(65536, 'k'), true); }, "65536 bytes");
  refuse([&] { writer.booleans("b", std::vector<std::uint8_t>{2}); }, "\"b\"", "neither 0 nor 1");
  EXPECT_EQ(writer.num_entries(), 1u);
  EXPECT_EQ(writer.bytes().size(), 8u + 1 + 4 + 4) << "a refused entry leaves nothing";
  for (std::uint64_t i = 1; i < kMaxMetadataEntries; ++i) writer.boolean("k" + std::to_string(i), true);
  refuse([&] { writer.u32("last", 2); }, "\"last\"", "65536");
}

}  // namespace
}  // namespace nb::io
