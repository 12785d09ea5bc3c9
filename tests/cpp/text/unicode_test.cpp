#include "text/unicode.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>

namespace nb::text {
namespace {

std::string utf8(std::initializer_list<char32_t> code_points) {
  std::string out;
  for (const char32_t code_point : code_points) append_utf8(out, code_point);
  return out;
}

/// `count` times U+FFFD.
std::string replaced(int count) {
  std::string out;
  for (int i = 0; i < count; ++i) out += "\xEF\xBF\xBD";
  return out;
}

TEST(Unicode, ClassesOfKnownCharacters) {
  for (const char32_t c :
       std::u32string_view(U"azAZ\u00AA\u00E9\u01C5\u02B0\u0414\u05D0\u3042\u4E2D\uAC00\U00020000\U0001D400")) {
    EXPECT_TRUE(is_letter(c)) << static_cast<unsigned>(c);
  }
  for (const char32_t c : std::u32string_view(U"09\u00B2\u00BD\u0663\u2167\u2460\u3007\U0001D7CE\U00010107")) {
    EXPECT_TRUE(is_number(c)) << static_cast<unsigned>(c);
  }
  for (const char32_t c :
       std::u32string_view(U"\t\n\v\f\r \u0085\u00A0\u1680\u2000\u200A\u2028\u2029\u202F\u205F\u3000")) {
    EXPECT_TRUE(is_whitespace(c)) << static_cast<unsigned>(c);
  }
  for (const char32_t c : std::u32string_view(
           U"!_'\u0300\u200B\u200D\u2060\u180E\u001C\u001F\uFE0F\uFEFF\uFFFD\U0001F600\uE000\U000E0001")) {
    EXPECT_EQ(char_class(c), CharClass::other) << static_cast<unsigned>(c);
  }
}

TEST(Unicode, ClassesOutsideTheCodeSpaceAreOther) {
  EXPECT_EQ(char_class(0xD800), CharClass::other);
  EXPECT_EQ(char_class(0x10FFFF), CharClass::other);
  EXPECT_EQ(char_class(0x110000), CharClass::other);
  EXPECT_EQ(char_class(0xFFFFFFFF), CharClass::other);
}

TEST(Unicode, TablesAreThoseOfUnicode16) {
  int letters = 0;
  int numbers = 0;
  int whitespace = 0;
  for (char32_t c = 0; c < 0x110000; ++c) {
    letters += is_letter(c);
    numbers += is_number(c);
    whitespace += is_whitespace(c);
  }
  EXPECT_EQ(letters, 141028);
  EXPECT_EQ(numbers, 1911);
  EXPECT_EQ(whitespace, 25);
  EXPECT_TRUE(is_letter(0x10D4A));                   // new in 16.0
  EXPECT_EQ(char_class(0x11DE0), CharClass::other);  // a number only since 17.0
}

TEST(Unicode, EveryCodePointSurvivesEncodingAndDecoding) {
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    const std::string bytes = utf8({c});
    const DecodedChar decoded = decode_utf8(bytes.data(), bytes.data() + bytes.size());
    ASSERT_EQ(decoded.status, Utf8Status::valid);
    ASSERT_EQ(decoded.code_point, c);
    ASSERT_EQ(decoded.length, bytes.size());
    for (std::size_t cut = 1; cut < bytes.size(); ++cut) {
      const DecodedChar part = decode_utf8(bytes.data(), bytes.data() + cut);
      ASSERT_EQ(part.status, Utf8Status::incomplete);
      ASSERT_EQ(part.length, cut);
    }
  }
}

// Every sequence of two bytes after every lead byte, against the definition: what the strict decoder accepts is what
// encoding some code point gives.
TEST(Unicode, AcceptsExactlyTheShortestForms) {
  for (unsigned lead = 0x80; lead < 0x100; ++lead) {
    for (unsigned second = 0; second < 0x100; ++second) {
      const std::string bytes = {static_cast<char>(lead), static_cast<char>(second), '\x80', '\x80'};
      const DecodedChar decoded = decode_utf8(bytes.data(), bytes.data() + bytes.size());
      if (decoded.status == Utf8Status::valid) {
        EXPECT_EQ(utf8({decoded.code_point}), bytes.substr(0, decoded.length));
        EXPECT_FALSE(decoded.code_point >= 0xD800 && decoded.code_point < 0xE000);
        EXPECT_LT(decoded.code_point, 0x110000u);
      } else {
        EXPECT_EQ(decoded.status, Utf8Status::invalid);
        EXPECT_EQ(decoded.length, 1u) << lead << ' ' << second;
      }
    }
  }
}

// The examples of the Unicode standard, section 3.9.
TEST(Unicode, ReplacesMaximalSubparts) {
  EXPECT_EQ(replace_invalid_utf8("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"), replaced(8) + "A");  // table 3-8
  EXPECT_EQ(replace_invalid_utf8("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"), replaced(8) + "A");  // table 3-9
  EXPECT_EQ(replace_invalid_utf8("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"),                      // table 3-10
            replaced(5) + "A" + replaced(2) + "B");
  EXPECT_EQ(replace_invalid_utf8("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), replaced(4) + "A");  // table 3-11
}

TEST(Unicode, KeepsValidTextAndReplacesACutOffEnd) {
  const std::string valid = std::string("a\0b", 3) + "\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80";
  EXPECT_EQ(replace_invalid_utf8(valid), valid);
  EXPECT_EQ(replace_invalid_utf8(""), "");
  EXPECT_EQ(replace_invalid_utf8("a\xF0\x9F\x98"), "a" + replaced(1));
}

TEST(Unicode, LeavesAnIncompleteEndToTheCaller) {
  std::string out = "x";
  EXPECT_EQ(append_replacing_invalid(out, "a\xFF\xC3\xA9\xF0\x9F\x98"), 4u);
  EXPECT_EQ(out, "xa" + replaced(1) + "\xC3\xA9");
  EXPECT_EQ(append_replacing_invalid(out, ""), 0u);
}

TEST(Unicode, QuotesForMessages) {
  EXPECT_EQ(in_quotes("ab"), "\"ab\"");
  EXPECT_EQ(in_quotes("\xC3\xA9\n\xFF"), "\"\xC3\xA9\\x0a\\xff\"");
  const std::string cut = in_quotes(std::string(1000, 'x'));
  EXPECT_LT(cut.size(), 100u);
  EXPECT_EQ(cut.substr(cut.size() - 5), "x\"...");
}

}  // namespace
}  // namespace nb::text
