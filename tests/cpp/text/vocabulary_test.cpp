#include "text/vocabulary.h"

#include <gtest/gtest.h>

#include <optional>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/error.h"
#include "text/unicode.h"

namespace nb::text {
namespace {

std::string spelling_of(int byte) {
  std::string out;
  append_byte_char(out, static_cast<std::uint8_t>(byte));
  return out;
}

std::string utf8(char32_t code_point) {
  std::string out;
  append_utf8(out, code_point);
  return out;
}

// Known values of GPT-2's alphabet at the ends of its ranges.
TEST(Vocabulary, SpellsBytesAsGpt2Does) {
  EXPECT_EQ(spelling_of(0x00), utf8(0x100));
  EXPECT_EQ(spelling_of('\n'), utf8(0x10A));
  EXPECT_EQ(spelling_of(' '), utf8(0x120));
  EXPECT_EQ(spelling_of('!'), "!");
  EXPECT_EQ(spelling_of('~'), "~");
  EXPECT_EQ(spelling_of(0x7F), utf8(0x121));
  EXPECT_EQ(spelling_of(0xA0), utf8(0x142));
  EXPECT_EQ(spelling_of(0xA1), utf8(0xA1));
  EXPECT_EQ(spelling_of(0xAC), utf8(0xAC));
  EXPECT_EQ(spelling_of(0xAD), utf8(0x143));
  EXPECT_EQ(spelling_of(0xAE), utf8(0xAE));
  EXPECT_EQ(spelling_of(0xFF), utf8(0xFF));
}

TEST(Vocabulary, SpellingAndReadingAreInverse) {
  std::set<std::string> seen;
  for (int byte = 0; byte < 256; ++byte) {
    EXPECT_TRUE(seen.insert(spelling_of(byte)).second);
    EXPECT_EQ(spelled_bytes(spelling_of(byte)), std::string(1, static_cast<char>(static_cast<std::uint8_t>(byte))));
  }
  EXPECT_EQ(spelled_bytes(""), "");
}

TEST(Vocabulary, ForeignCharactersSpellNothing) {
  for (const char* text : {" ", "a b", "\n", "\xC2\xA0", "\xC2\xAD", "\xC5\x84", "\xE2\x96\x81", "a\xFF", "\xC4"}) {
    EXPECT_EQ(spelled_bytes(text), std::nullopt) << text;
  }
}

TEST(Vocabulary, FindsRandomTokensByTextAndBytes) {
  std::mt19937 random(11);
  std::unordered_map<std::string, TokenId> ids;
  std::vector<std::string> texts;
  std::vector<TokenType> types;
  while (texts.size() < 5000) {
    std::string text;
    for (std::size_t n = 1 + random() % 20; n > 0; --n) text += "ab\xFFxyz|<"[random() % 8];
    if (!ids.emplace(text, static_cast<TokenId>(texts.size())).second) continue;
    texts.push_back(text);
    types.push_back(random() % 4 == 0 ? TokenType::control : TokenType::normal);
  }
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  const Vocabulary vocabulary(views, types);
  for (std::size_t i = 0; i < texts.size(); ++i) {
    const TokenId id = static_cast<TokenId>(i);
    ASSERT_EQ(vocabulary.find_text(texts[i]), id);
    ASSERT_EQ(vocabulary.text(id), texts[i]);
    const bool spells = types[i] == TokenType::normal && spelled_bytes(texts[i]).has_value();
    ASSERT_EQ(vocabulary.find_bytes(texts[i]), spells ? id : -1);
    ASSERT_EQ(vocabulary.find_text(texts[i] + "q"), -1);
  }
}

TEST(Vocabulary, RawAndSpelledTokensOfEqualBytesAreTwoTokens) {
  const std::vector<std::string_view> tokens = {"\xC4\xA0", " "};  // the first spells a space, the second is one
  const std::vector<TokenType> types = {TokenType::normal, TokenType::control};
  for (int round = 0; round < 100; ++round) {  // the table is seeded at random, so that some rounds have collisions
    const Vocabulary vocabulary(tokens, types);
    ASSERT_EQ(vocabulary.bytes(0), " ");
    ASSERT_EQ(vocabulary.bytes(1), " ");
    ASSERT_EQ(vocabulary.find_bytes(" "), 0);
    ASSERT_EQ(vocabulary.find_text(" "), 1);
    ASSERT_EQ(vocabulary.find_text("\xC4\xA0"), 0);
  }
}

TEST(Vocabulary, RepeatedTokensAreErrorsAcrossTypes) {
  const std::vector<std::string_view> tokens = {"ab", "c", "ab"};
  for (const TokenType type : {TokenType::normal, TokenType::control, TokenType::unused}) {
    const std::vector<TokenType> types = {TokenType::normal, TokenType::normal, type};
    EXPECT_THROW(Vocabulary(tokens, types), Error);
    const std::vector<TokenType> reversed = {type, TokenType::normal, TokenType::normal};
    EXPECT_THROW(Vocabulary(tokens, reversed), Error);
  }
}

}  // namespace
}  // namespace nb::text
