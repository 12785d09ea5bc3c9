// json.cpp: what it gives back, and what it refuses where.
#include "io/json.h"

#include <gtest/gtest.h>

#include "io/expect_error.h"

namespace nb::io {
namespace {

using test::expect_error;

const std::string kPath = "x.json";

TEST(JsonCursor, ReadsWhatItIsAskedFor) {
  const std::string text = R"( {"a" : [1, 20 , 18446744073709551615], "\u00e9\ud83d\ude00\n\/": "\"x\\", "skip": {"b":
      [null, true, false, -1.5e+3, 0, "]"], "c": {}} , "last":0} )";
  JsonCursor json(text, kPath);
  std::string key;
  json.begin_object();
  ASSERT_TRUE(json.next_key(key));
  EXPECT_EQ(key, "a");
  std::vector<std::uint64_t> numbers;
  for (json.begin_array(); json.next_element();) numbers.push_back(json.unsigned_integer());
  EXPECT_EQ(numbers, (std::vector<std::uint64_t>{1, 20, ~std::uint64_t{0}}));
  ASSERT_TRUE(json.next_key(key));
  EXPECT_EQ(key, "é😀\n/");
  EXPECT_EQ(json.string(), "\"x\\");
  ASSERT_TRUE(json.next_key(key));
  json.skip_value();
  ASSERT_TRUE(json.next_key(key));
  EXPECT_EQ(key, "last");
  EXPECT_EQ(json.unsigned_integer(), 0u);
  EXPECT_FALSE(json.next_key(key));
  json.finish();
}

void skip(const std::string& text) {
  JsonCursor json(text, kPath, 100);
  json.skip_value();
  json.finish();
}

TEST(JsonCursor, RefusesWhatIsNoJson) {
  for (const char* text : {"",
                           " ",
                           "{",
                           "[",
                           "[1",
                           "[1,",
                           "[1,]",
                           "[,1]",
                           "{\"a\"}",
                           "{\"a\":}",
                           "{\"a\":1,}",
                           "{a:1}",
                           "{'a':1}",
                           "[1 2]",
                           "01",
                           "-",
                           "1.",
                           ".5",
                           "1e",
                           "+1",
                           "tru",
                           "nul",
                           "NaN",
                           "\"",
                           "\"\\x\"",
                           "\"\\u12g4\"",
                           "\"\\ud800\"",
                           "\"\\ud800\\u0041\"",
                           "\"\\udc00\"",
                           "\"a\nb\"",
                           "1 1",
                           "{} x",
                           "[1]]",
                           "// c\n1"}) {
    SCOPED_TRACE(text);
    expect_error(
        ErrorCode::format, [&] { skip(text); }, "x.json: at offset 1");
  }
  expect_error(
      ErrorCode::format, [] { skip("\"\xff\""); }, "not UTF-8");
  expect_error(
      ErrorCode::format, [] { skip(std::string(100'000, '[')); }, "32 levels", "at offset 13");
  skip(std::string(32, '[') + std::string(32, ']'));
}

TEST(JsonCursor, NumbersAreWholeAndFit) {
  const auto number = [](const char* text) {
    const std::string copy = text;
    return JsonCursor(copy, kPath).unsigned_integer();
  };
  EXPECT_EQ(number("7"), 7u);
  for (const char* text : {"-1", "1.0", "1e3", "1E3", "007", "18446744073709551616", "99999999999999999999", "x", ""}) {
    SCOPED_TRACE(text);
    expect_error(
        ErrorCode::format, [&] { static_cast<void>(number(text)); }, "x.json: at offset");
  }
}

}  // namespace
}  // namespace nb::io
