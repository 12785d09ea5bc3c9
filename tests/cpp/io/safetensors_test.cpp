// safetensors.cpp: good headers, and every lie that a header can tell.
#include "io/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>

#include "io/expect_error.h"
#include "io/scratch_file.h"

namespace nb::io {
namespace {

using test::expect_error;
using Bytes = std::vector<std::byte>;

Bytes file(const std::string& header, std::size_t data_bytes) {
  Bytes out(8 + header.size() + data_bytes);
  const std::uint64_t length = header.size();
  std::memcpy(out.data(), &length, 8);
  std::memcpy(out.data() + 8, header.data(), header.size());
  for (std::size_t i = 0; i < data_bytes; ++i) out[8 + header.size() + i] = static_cast<std::byte>(i);
  return out;
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

std::vector<SafetensorsTensor> parse(const Bytes& bytes) { return parse_safetensors(bytes, bytes.size(), "f"); }

TEST(Safetensors, ListsTensorsInTheOrderOfTheData) {
  const std::string header = R"({"__metadata__":{"format":"pt"},)" + entry("b", "BF16", "[2,3]", "[4,16]") + "," +
                             entry("a", "F32", "[]", "[0,4]") + "," + entry("none", "F16", "[0,5]", "[16,16]") + "," +
                             entry("codes", "I8", "[2]", "[16,18]") + "}   ";
  const Bytes bytes = file(header, 18);
  const auto tensors = parse(bytes);
  ASSERT_EQ(tensors.size(), 4u);
  EXPECT_EQ(tensors[0].name, "a");
  EXPECT_EQ(tensors[0].format, quant::Format::f32);
  EXPECT_TRUE(tensors[0].shape.empty());
  EXPECT_EQ(tensors[1].name, "b");
  EXPECT_EQ(tensors[1].dtype, "BF16");
  EXPECT_EQ(tensors[1].format, quant::Format::bf16);
  EXPECT_EQ(tensors[1].shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(tensors[1].offset, 8 + header.size() + 4);
  EXPECT_EQ(tensors[1].bytes, 12u);
  EXPECT_EQ(tensors[2].name, "none");
  EXPECT_EQ(tensors[3].dtype, "I8");
  EXPECT_FALSE(tensors[3].format.has_value());
  EXPECT_TRUE(parse(file("{}", 0)).empty());

  const test::ScratchDir dir;
  const SafetensorsFile opened(dir.write("x.safetensors", bytes));
  ASSERT_NE(opened.find("b"), nullptr);
  EXPECT_EQ(opened.find("c"), nullptr);
  Bytes data(3);
  opened.read(opened.find("b")->offset + 1, data);
  EXPECT_EQ(data, (Bytes{std::byte{5}, std::byte{6}, std::byte{7}}));
}

TEST(Safetensors, RefusesLies) {
  struct Case {
    std::string header;
    std::size_t data_bytes;
    const char* says;
  };
  const auto one = [](const char* dtype, const char* shape, const char* offsets) {
    return "{" + entry("t", dtype, shape, offsets) + "}";
  };
  const std::string a = entry("a", "F32", "[1]", "[0,4]");
  const Case cases[] = {
      {"", 0, "begin with '{'"},
      {"[]", 0, "begin with '{'"},
      {" {}", 0, "begin with '{'"},
      {"{} x", 0, "follows the end"},
      {"{" + a + "," + a + "}", 4, "\"a\" occurs twice"},
      {R"({"__metadata__":{},"__metadata__":{}})", 0, "__metadata__ occurs twice"},
      {R"({"__metadata__":{"a":1}})", 0, "a string"},
      {R"({"":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4, "without a name"},
      {one("Q4", "[1]", "[0,4]"), 4, "unknown dtype \"Q4\""},
      {one("F32", "[1]", "[0]"), 4, "two data_offsets"},
      {one("F32", "[1]", "[0,4,4]"), 4, "two data_offsets"},
      {one("F32", "[1]", "[4,0]"), 4, "outside"},
      {one("F32", "[1]", "[0,8]"), 4, "outside"},
      {one("F32", "[1]", "[0,18446744073709551615]"), 4, "outside"},
      {one("F32", "[-1]", "[0,4]"), 4, "without sign"},
      {one("F32", "[2]", "[0,4]"), 4, "want 8"},
      {one("F32", "[4294967296,4294967296]", "[0,0]"), 0, "more than 2^64"},
      {one("F32", "[9223372036854775808]", "[0,0]"), 0, "dimension of 9223372036854775808"},
      {one("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "8 dimensions"},
      {one("F4", "[3]", "[0,1]"), 1, "want 1"},
      {R"({"t":{"dtype":"F32","shape":[1]}})", 4, "lacks"},
      {R"({"t":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4, "occurs twice"},
      {R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}})", 4, "\"x\""},
      {"{" + a + "}", 8, "4 bytes at the end belong to no tensor"},
      {"{" + a + "," + entry("b", "F32", "[1]", "[8,12]") + "}", 12, "\"b\" leaves a hole"},
      {"{" + a + "," + entry("b", "F32", "[1]", "[2,6]") + "}", 6, "\"b\" overlaps"},
      {"{" + a + "," + entry("b", "F32", "[1]", "[0,4]") + "}", 4, "\"b\" overlaps"},
      {"{" + entry("a", "F32", "[2]", "[0,8]") + "," + entry("z", "F32", "[0]", "[4,4]") + "}", 8, "\"z\" overlaps"},
      {"{}", 1, "belong to no tensor"},
  };
  for (const Case& item : cases) {
    SCOPED_TRACE(item.header);
    expect_error(
        ErrorCode::format, [&] { parse(file(item.header, item.data_bytes)); }, "f: at offset ", item.says);
  }
}

TEST(Safetensors, ChecksTheLengthOfTheHeaderBeforeItReads) {
  for (const std::uint64_t length : {std::uint64_t{1} << 63, ~std::uint64_t{0}, std::uint64_t{3}}) {
    Bytes bytes = file("{}", 0);
    std::memcpy(bytes.data(), &length, 8);
    const test::ScratchDir dir;
    const std::string path = dir.write("x.safetensors", bytes);
    expect_error(
        ErrorCode::format, [&] { SafetensorsFile opened(path); }, path, "a header of " + std::to_string(length));
  }
  const Bytes big = file("{}", 0);
  Bytes head = big;
  const std::uint64_t length = 100'000'001;
  std::memcpy(head.data(), &length, 8);
  expect_error(
      ErrorCode::format, [&] { parse_safetensors(head, std::uint64_t{1} << 40, "f"); }, "more than 100000000");
}

TEST(Safetensors, EveryTruncationIsAnError) {
  const Bytes whole = file("{" + entry("a", "F32", "[2]", "[0,8]") + "}", 8);
  const test::ScratchDir dir;
  for (std::size_t size = 0; size < whole.size(); ++size) {
    const std::string path = dir.write("x.safetensors", std::span(whole).first(size));
    expect_error(
        ErrorCode::format, [&] { SafetensorsFile opened(path); }, path);
  }
}

}  // namespace
}  // namespace nb::io
