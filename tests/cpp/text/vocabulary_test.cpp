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

TEST(Vocabulary, SpaceMarksAreSpacesUnderSentencePieceSpelling) {
  const std::vector<std::string_view> tokens = {
      "\xE2\x96\x81"
      "a",
      "b",
      "c d",
      "<s>\xE2\x96\x81",
      "\xE2\x96\x81\xE2\x96\x81",
      "\xE2\x96\x81"
      "u",
      "\xC4\xA0",
      "<unk>"};
  const std::vector<TokenType> types = {TokenType::normal,  TokenType::normal,       TokenType::normal,
                                        TokenType::control, TokenType::user_defined, TokenType::unused,
                                        TokenType::normal,  TokenType::unknown};
  const Vocabulary vocabulary(tokens, types, Spelling::sentencepiece);
  const std::vector<std::string> bytes = {" a", "b", "c d", "<s>\xE2\x96\x81", "  ", "", "\xC4\xA0", "<unk>"};
  const std::vector<bool> spelled = {true, true, false, false, true, true, true, false};
  for (TokenId id = 0; id < vocabulary.size(); ++id) {
    const std::size_t i = static_cast<std::size_t>(id);
    EXPECT_EQ(vocabulary.bytes(id), bytes[i]) << id;
    EXPECT_EQ(vocabulary.text(id), tokens[i]) << id;
    EXPECT_EQ(vocabulary.find_text(tokens[i]), id);
    EXPECT_EQ(vocabulary.is_spelled(id), spelled[i]) << id;
    EXPECT_EQ(vocabulary.find_bytes(vocabulary.stored(id)), spelled[i] ? id : -1) << id;
  }
  EXPECT_EQ(vocabulary.stored(5), " u");
  EXPECT_EQ(vocabulary.find_text(" a"), -1);
  EXPECT_EQ(vocabulary.find_bytes("\xE2\x96\x81"
                                  "a"),
            -1);
}

TEST(Vocabulary, ByteTokensAreFoundByTheirByteOnly) {
  const std::vector<std::string_view> tokens = {"\n", "<0x0A>", "<0xFF>", "<0x0B>"};
  const std::vector<TokenType> types = {TokenType::normal, TokenType::byte, TokenType::byte, TokenType::normal};
  for (int round = 0; round < 50; ++round) {  // the table is seeded at random
    const Vocabulary vocabulary(tokens, types, Spelling::sentencepiece);
    ASSERT_EQ(vocabulary.bytes(1), "\n");
    ASSERT_EQ(vocabulary.bytes(2), "\xFF");
    ASSERT_EQ(vocabulary.bytes(3), "<0x0B>");
    ASSERT_EQ(vocabulary.find_byte_token(0x0A), 1);
    ASSERT_EQ(vocabulary.find_byte_token(0xFF), 2);
    ASSERT_EQ(vocabulary.find_byte_token(0x0B), -1);
    ASSERT_EQ(vocabulary.find_bytes("\n"), 0);
    ASSERT_EQ(vocabulary.find_bytes("\xFF"), -1);
    ASSERT_EQ(vocabulary.find_bytes("<0x0A>"), -1);
    ASSERT_EQ(vocabulary.find_text("<0x0A>"), 1);
    ASSERT_EQ(vocabulary.find_text("\n"), 0);
    ASSERT_EQ(vocabulary.find_text("<0x0B>"), 3);
    ASSERT_EQ(vocabulary.text(1), "<0x0A>");
    ASSERT_EQ(vocabulary.text(2), "<0xFF>");
    ASSERT_FALSE(vocabulary.is_spelled(1));
  }
  // In GPT-2's alphabet the type means nothing.
  const Vocabulary byte_level(tokens, {});
  EXPECT_EQ(byte_level.find_byte_token(0x0A), -1);
  EXPECT_EQ(byte_level.bytes(1), "<0x0A>");
}

TEST(Vocabulary, ByteTokensOfAnotherFormAreErrors) {
  for (const std::string_view text : {"\n", "<0x0a>", "<0x0A", "<0xGG>", "0x0A", "<0x00A>", "", "<0X0A>", "<0x0A> "}) {
    EXPECT_EQ(named_byte(text), std::nullopt) << text;
    const std::vector<std::string_view> tokens = {"a", text};
    const std::vector<TokenType> types = {TokenType::normal, TokenType::byte};
    try {
      const Vocabulary vocabulary(tokens, types, Spelling::sentencepiece);
      FAIL() << "accepted " << text;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::format);
      EXPECT_NE(std::string(error.what()).find("token 1 ("), std::string::npos) << error.what();
    }
  }
  EXPECT_EQ(named_byte("<0x00>"), 0);
  EXPECT_EQ(named_byte("<0xF9>"), 0xF9);
  EXPECT_EQ(named_byte("<0xAf>"), std::nullopt);
}

TEST(Vocabulary, SpaceMarksAndSpacesAreExchanged) {
  EXPECT_EQ(with_spaces("\xE2\x96\x81"
                        "a\xE2\x96\x81\xE2\x96\x81\xE2\x96"),
            " a  \xE2\x96");
  EXPECT_EQ(with_spaces(""), "");
  EXPECT_EQ(with_space_marks(" a  "),
            "\xE2\x96\x81"
            "a\xE2\x96\x81\xE2\x96\x81");
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
