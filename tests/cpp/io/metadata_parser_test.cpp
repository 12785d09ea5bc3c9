// What GGUF's parser shares with others; hostile entries are tested through it (gguf_parser_test.cpp).
#include "io/metadata_parser.h"

#include <gtest/gtest.h>

#include <vector>

#include "io/expect_error.h"

namespace nb::io {
namespace {

using test::expect_error;

std::vector<std::byte> bytes_of(std::initializer_list<int> values) {
  std::vector<std::byte> bytes;
  for (const int value : values) bytes.push_back(static_cast<std::byte>(value));
  return bytes;
}

TEST(MetadataParser, TakesEntriesAndStops) {
  // "k": u8 7, then "b": boolean true, then bytes of something else.
  const auto bytes = bytes_of({1, 0, 0, 0, 0, 0, 0, 0, 'k', 0, 0, 0, 0, 7,  //
                               1, 0, 0, 0, 0, 0, 0, 0, 'b', 7, 0, 0, 0, 1, 99, 99});
  const std::string path = "two";
  ByteCursor in(bytes, path);
  const Metadata metadata(path, parse_entries(in, 2));
  EXPECT_EQ(in.at(), bytes.size() - 2);
  EXPECT_EQ(metadata.u64("k"), 7u);
  EXPECT_TRUE(metadata.boolean("b"));
  EXPECT_EQ(metadata.find("b")->offset, 27u);
}

TEST(MetadataParser, AnEndTooEarlyNamesTheEntry) {
  const auto bytes = bytes_of({1, 0, 0, 0, 0, 0, 0, 0, 'k', 4, 0, 0, 0, 7});
  const std::string path = "short";
  ByteCursor in(bytes, path);
  expect_error(
      ErrorCode::format, [&] { parse_entries(in, 1); }, "short", "at offset 13", "\"k\"");
}

}  // namespace
}  // namespace nb::io
