// safetensors_source.cpp: two files as one model.
#include "io/safetensors_source.h"

#include <gtest/gtest.h>

#include <cstring>

#include "io/expect_error.h"
#include "io/scratch_file.h"
#include "io/tensor_rows.h"

namespace nb::io {
namespace {

using test::expect_error;

std::string write(const test::ScratchDir& dir, const std::string& name, const std::string& header,
                  const std::vector<float>& data) {
  std::vector<std::byte> bytes(8 + header.size() + data.size() * 4);
  const std::uint64_t length = header.size();
  std::memcpy(bytes.data(), &length, 8);
  std::memcpy(bytes.data() + 8, header.data(), header.size());
  std::memcpy(bytes.data() + 8 + header.size(), data.data(), data.size() * 4);
  return dir.write(name, bytes);
}

TEST(SafetensorsSource, IsAModelUnderOtherNames) {
  const test::ScratchDir dir;
  const std::vector<std::string> files = {
      write(dir, "1.safetensors", R"({"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})", {1, 2, 3, 4}),
      write(dir, "2.safetensors", R"({"n":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                                      "i":{"dtype":"I32","shape":[1],"data_offsets":[4,8]}})",
            {5, 6})};
  MetadataWriter metadata;
  metadata.string("general.architecture", "llama");
  metadata.u32("n", 7);
  const auto source =
      open_safetensors("folder", files, {{"norm", 1, "n"}, {"matrix", 0, "w"}, {"odd", 1, "i"}}, metadata);
  EXPECT_EQ(source->kind(), FileKind::safetensors);
  EXPECT_STREQ(to_string(source->kind()), "safetensors");
  EXPECT_EQ(source->metadata().string("general.architecture"), "llama");
  EXPECT_EQ(source->metadata().u64("n"), 7u);
  EXPECT_EQ(source->path(), "folder");
  EXPECT_EQ(source->parts(), files);
  ASSERT_EQ(source->tensors().size(), 3u);
  EXPECT_EQ(source->tensors()[0].name, "norm");
  EXPECT_EQ(source->find("w"), nullptr);
  const TensorInfo* matrix = source->find("matrix");
  ASSERT_NE(matrix, nullptr);
  std::vector<float> row(2);
  read_rows(*source, *matrix, 1, 1, row.data());
  EXPECT_EQ(row, (std::vector<float>{3, 4}));
  read_rows(*source, *source->find("norm"), 0, 1, row.data());
  EXPECT_EQ(row[0], 5.0f);
  std::vector<std::byte> out(8);
  expect_error(
      ErrorCode::invalid_argument, [&] { source->read(*matrix, 12, out); }, "8 bytes at offset 12", "\"matrix\"");
  expect_error(
      ErrorCode::unsupported, [&] { static_cast<void>(source->find("odd")); }, files[1], "\"odd\"", "I32");
  expect_error(
      ErrorCode::format,
      [&] {
        open_safetensors("f", files, {{"x", 0, "n"}}, metadata);
      },
      files[0], "\"n\"");
  expect_error(
      ErrorCode::invalid_argument,
      [&] {
        open_safetensors("f", files, {{"x", 2, "n"}}, metadata);
      },
      "file 2");
  expect_error(
      ErrorCode::invalid_argument,
      [&] {
        open_safetensors("f", files, {{"x", 0, "w"}, {"x", 1, "n"}}, metadata);
      },
      "\"x\" is given twice");
}

}  // namespace
}  // namespace nb::io
