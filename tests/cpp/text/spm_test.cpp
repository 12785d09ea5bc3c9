#include "text/spm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "text/unicode.h"
#include "tiny_vocabulary.h"

namespace nb::text {
namespace {

using Ids = std::vector<TokenId>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class Pieces : public TinyPieces {
 public:
  Vocabulary vocabulary() const { return Vocabulary(spec.tokens, spec.types, Spelling::sentencepiece); }

  /// The ids of `text`, with spaces.
  Ids encode(std::string_view text) const {
    const Vocabulary built = vocabulary();
    Ids ids;
    SentencePieceBpe(built, spec.scores).append(text, ids);
    return ids;
  }
};

/// The definition, on strings: of all neighbours whose joined text is a piece the best scored, the leftmost of equals,
/// is joined until there is none; unused pieces then fall apart into what they were joined from, and what is no piece
/// becomes the tokens of its bytes.
class NaiveSpm {
 public:
  explicit NaiveSpm(const Pieces& pieces) : pieces_(pieces) {}

  Ids encode(std::string_view text) const {
    std::vector<Node> nodes;
    while (!text.empty()) {
      const DecodedChar next = decode_utf8(text.data(), text.data() + text.size());
      const std::size_t length = next.status == Utf8Status::valid ? next.length : 1;
      nodes.push_back({std::string(text.substr(0, length)), next.status == Utf8Status::valid, {}});
      text.remove_prefix(length);
    }
    while (true) {
      std::size_t best = nodes.size();
      float best_score = 0;
      for (std::size_t i = 0; i + 1 < nodes.size(); ++i) {
        const TokenId id = nodes[i].is_text && nodes[i + 1].is_text ? find(nodes[i].text + nodes[i + 1].text) : -1;
        if (id < 0 || (best < nodes.size() && !(score(id) > best_score))) continue;
        best = i;
        best_score = score(id);
      }
      if (best == nodes.size()) break;
      Node joined{nodes[best].text + nodes[best + 1].text, true, {nodes[best], nodes[best + 1]}};
      nodes[best] = joined;
      nodes.erase(nodes.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    }
    Ids ids;
    for (const Node& node : nodes) append(node, ids);
    return ids;
  }

 private:
  struct Node {
    std::string text;
    bool is_text;
    std::vector<Node> parts;
  };

  float score(TokenId id) const { return pieces_.spec.scores[static_cast<std::size_t>(id)]; }

  TokenId find(const std::string& text) const {
    for (std::size_t i = 0; i < pieces_.spec.tokens.size(); ++i) {
      const TokenType type = pieces_.spec.types[i];
      if (type != TokenType::normal && type != TokenType::unused) continue;
      if (pieces_.spec.tokens[i].find(' ') == std::string_view::npos && with_spaces(pieces_.spec.tokens[i]) == text) {
        return static_cast<TokenId>(i);
      }
    }
    return -1;
  }

  void append(const Node& node, Ids& ids) const {
    const TokenId id = node.is_text ? find(node.text) : -1;
    if (id >= 0 && pieces_.spec.types[static_cast<std::size_t>(id)] == TokenType::normal) {
      ids.push_back(id);
    } else if (!node.parts.empty()) {
      for (const Node& part : node.parts) append(part, ids);
    } else {
      for (const char c : node.text) ids.push_back(static_cast<std::uint8_t>(c));
    }
  }

  const Pieces& pieces_;
};

const std::vector<std::string>& letters() {
  static const std::vector<std::string> kLetters = {"a", "b", " ", "c", "\xC3\xA9", "\xE4\xB8\xAD", "\xF0\x9F\x98\x80"};
  return kLetters;
}

/// Texts of few letters, so that most pairs of them are pieces.
std::string random_text(std::mt19937& random, std::size_t num_letters, std::size_t length, bool valid_only) {
  std::string text;
  for (std::size_t i = 0; i < length; ++i) {
    if (!valid_only && random() % 12 == 0) {
      text.push_back("\xFF\xC3\xE4\x80\xB8"[random() % 5]);
    } else {
      text += letters()[random() % num_letters];
    }
  }
  return text;
}

/// Random pieces; most are joined from two others, so that they can arise. Few scores: many ties.
Pieces random_pieces(std::mt19937& random, std::size_t num_letters, bool words_apart) {
  static constexpr TokenType kTypes[] = {TokenType::normal,       TokenType::normal,  TokenType::normal,
                                         TokenType::normal,       TokenType::unused,  TokenType::unused,
                                         TokenType::user_defined, TokenType::control, TokenType::unknown};
  Pieces pieces;
  std::vector<std::string> texts;
  for (std::size_t i = 0; i < num_letters; ++i) texts.push_back(letters()[i]);
  const std::size_t num_scores = 1 + random() % 30;
  const std::size_t num_types = random() % 2 == 0 ? 1 : std::size(kTypes);
  const std::size_t count = random() % 60;
  for (std::size_t i = 0; i < num_letters; ++i) {
    if (random() % 4 != 0) pieces.add(with_space_marks(letters()[i]), 0.0f, kTypes[random() % num_types]);
  }
  for (std::size_t i = 0; i < count; ++i) {
    const std::string text = texts[random() % texts.size()] + texts[random() % texts.size()];
    if (text.size() > 40 || (words_apart && text.find(' ', text.find_first_not_of(' ')) < text.size())) continue;
    const float score = random() % 20 == 0 ? -kInfinity : -static_cast<float>(random() % num_scores);
    const bool is_new = pieces.add(with_space_marks(text), score, kTypes[random() % num_types]) >= 0;
    if (is_new) texts.push_back(text);
  }
  return pieces;
}

TEST(Spm, AgreesWithTheDefinitionOnRandomVocabularies) {
  std::mt19937 random(3);
  int num_merged = 0;
  for (int round = 0; round < 600; ++round) {
    const std::size_t num_letters = 1 + random() % letters().size();
    const Pieces pieces = random_pieces(random, num_letters, round % 2 == 0);
    const Vocabulary vocabulary = pieces.vocabulary();
    const SentencePieceBpe spm(vocabulary, pieces.spec.scores);
    const NaiveSpm naive(pieces);
    for (const std::size_t length : {0u, 1u, 2u, 3u, 5u, 9u, 14u, 30u, 70u}) {
      const std::string text = random_text(random, num_letters, length, random() % 2 == 0);
      Ids ids;
      spm.append(text, ids);
      ASSERT_EQ(ids, naive.encode(text)) << "round " << round << " text " << in_quotes(text);
      num_merged += ids.size() + 4 < text.size();
      std::string bytes;
      for (const TokenId id : ids) bytes += vocabulary.bytes(id);
      ASSERT_EQ(bytes, text);
    }
  }
  EXPECT_GT(num_merged, 1000);
}

// The text of every piece, which is looked up as a whole, and of pieces among others.
TEST(Spm, PiecesAreEncodedAsTheirTextIs) {
  std::mt19937 random(4);
  for (int round = 0; round < 60; ++round) {
    const Pieces pieces = random_pieces(random, 4, round % 2 == 0);
    const Vocabulary vocabulary = pieces.vocabulary();
    const SentencePieceBpe spm(vocabulary, pieces.spec.scores);
    const NaiveSpm naive(pieces);
    for (const std::string_view token : pieces.spec.tokens) {
      for (const char* behind : {"", "a", " "}) {
        const std::string text = with_spaces(token) + behind;
        Ids ids;
        spm.append(text, ids);
        ASSERT_EQ(ids, naive.encode(text)) << in_quotes(text);
      }
    }
  }
}

TEST(Spm, TheBestScoreGoesFirstThenTheLeftmost) {
  Pieces pieces;
  const TokenId a = pieces.add("a", 0);
  const TokenId c = pieces.add("c", 0);
  pieces.add("b", 0);
  const TokenId ab = pieces.add("ab", -2);
  const TokenId bc = pieces.add("bc", -1);
  const TokenId aa = pieces.add("aa", -3);
  EXPECT_EQ(pieces.encode("abc"), (Ids{a, bc}));
  EXPECT_EQ(pieces.encode("aaa"), (Ids{aa, a}));
  EXPECT_EQ(pieces.encode("aab"), (Ids{a, ab}));
  pieces.spec.scores[static_cast<std::size_t>(ab)] = pieces.spec.scores[static_cast<std::size_t>(bc)];
  EXPECT_EQ(pieces.encode("abc"), (Ids{ab, c}));
  EXPECT_EQ(pieces.encode(""), Ids{});
}

TEST(Spm, UnusedPiecesAreStepsAndFallApart) {
  Pieces pieces;
  const TokenId a = pieces.add("a", 0);
  pieces.add("b", 0);
  const TokenId c = pieces.add("c", 0);
  const TokenId ab = pieces.add("ab", -1, TokenType::unused);
  const TokenId abc = pieces.add("abc", -2);
  const TokenId abcab = pieces.add("abcab", -3, TokenType::unused);
  EXPECT_EQ(pieces.encode("abc"), Ids{abc});
  EXPECT_EQ(pieces.encode("ab"), (Ids{a, a + 1}));
  EXPECT_EQ(pieces.encode("abcab"), (Ids{abc, a, a + 1}));
  EXPECT_EQ(pieces.encode("cab"), (Ids{c, a, a + 1}));
  pieces.spec.types[static_cast<std::size_t>(abcab)] = TokenType::normal;
  EXPECT_EQ(pieces.encode("abcab"), Ids{abcab});
  pieces.spec.types[static_cast<std::size_t>(c)] = TokenType::unused;  // a character that is unused becomes its byte
  EXPECT_EQ(pieces.encode("c"), Ids{'c'});
  pieces.spec.types[static_cast<std::size_t>(ab)] = TokenType::normal;
  EXPECT_EQ(pieces.encode("abc"), Ids{abc});
}

// Longer than what is merged without a heap.
TEST(Spm, LongUnusedPiecesFallApart) {
  Pieces pieces;
  std::string text = "a";
  pieces.add(text, 0);
  for (int i = 0; i < 10; ++i) {
    text += text;
    pieces.add(text, -static_cast<float>(i), text.size() > 256 ? TokenType::unused : TokenType::normal);
  }
  ASSERT_EQ(text.size(), SentencePieceBpe::kMaxPieceBytes);
  const TokenId part = 256 + 8;
  EXPECT_EQ(pieces.encode(text), Ids(4, part));
  EXPECT_EQ(pieces.encode(text + "a" + text.substr(0, 512)), (Ids{part, part, part, part, part, part, 256}));
}

TEST(Spm, WhatNoPieceSpellsBecomesByteTokens) {
  Pieces pieces;
  const TokenId ab = pieces.add("ab", 0);  // of two characters that are no pieces
  const TokenId accent = pieces.add("\xC3\xA9", 0);
  EXPECT_EQ(pieces.encode("ab"), Ids{ab});
  EXPECT_EQ(pieces.encode("ba"), (Ids{'b', 'a'}));
  EXPECT_EQ(pieces.encode("\xE4\xB8\xAD"), (Ids{0xE4, 0xB8, 0xAD}));
  EXPECT_EQ(pieces.encode("\xC3\xA9\xC3\xC3\xA9\xA9"), (Ids{accent, 0xC3, accent, 0xA9}));
  EXPECT_EQ(pieces.encode(std::string_view("\0\xFF", 2)), (Ids{0, 0xFF}));
}

TEST(Spm, ControlAndUserDefinedTokensAreNoPieces) {
  for (const TokenType type : {TokenType::control, TokenType::unknown, TokenType::user_defined}) {
    Pieces pieces;
    const TokenId a = pieces.add("a", 0);
    const TokenId aa = pieces.add("aa", 0);
    pieces.add("aaa", 5, type);
    EXPECT_EQ(pieces.encode("aaa"), (Ids{aa, a}));
  }
}

// Byte tokens have scores and texts too, which must not be found in text.
TEST(Spm, TheNamesOfByteTokensAreText) {
  Pieces pieces;
  EXPECT_EQ(pieces.encode("<0x0A>"), (Ids{'<', '0', 'x', '0', 'A', '>'}));
  EXPECT_EQ(pieces.encode("\n"), Ids{'\n'});
}

TEST(Spm, PiecesAcrossSpacesAreMerged) {
  Pieces pieces;
  const TokenId a = pieces.add("a", 0);
  const TokenId space_a = pieces.add(
      "\xE2\x96\x81"
      "a",
      -1);
  EXPECT_EQ(pieces.encode("a a a"), (Ids{a, space_a, space_a}));
  const TokenId across = pieces.add("a\xE2\x96\x81", 1);
  EXPECT_EQ(pieces.encode("a a a"), (Ids{across, across, a}));
}

TEST(Spm, AppendsBehindWhatIsThere) {
  Pieces pieces;
  const TokenId aa = pieces.add("aa", 0);
  const Vocabulary vocabulary = pieces.vocabulary();
  const SentencePieceBpe spm(vocabulary, pieces.spec.scores);
  Ids ids = {'a', 'a', -5};
  spm.append("aa", ids);
  spm.append(std::string(100, 'a'), ids);
  Ids expected(51, aa);
  expected.insert(expected.begin(), {'a', 'a', -5});
  EXPECT_EQ(ids, expected);
}

void expect_error(const Pieces& pieces, std::initializer_list<std::string> parts) {
  const Vocabulary vocabulary = pieces.vocabulary();
  try {
    const SentencePieceBpe spm(vocabulary, pieces.spec.scores);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::format);
    for (const std::string& part : parts) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what() << " lacks " << part;
    }
  }
}

TEST(Spm, BrokenScoresAreErrors) {
  Pieces pieces;
  pieces.add("ab", std::nanf(""));
  expect_error(pieces, {"token 256", "\"ab\"", "not a number"});
  pieces.spec.scores.pop_back();
  expect_error(pieces, {"257 tokens", "256 scores"});
  pieces.spec.scores.clear();
  expect_error(pieces, {"0 scores"});
}

TEST(Spm, InfiniteScoresAreScores) {
  Pieces pieces;
  const TokenId ab = pieces.add("ab", -kInfinity);
  const TokenId bc = pieces.add("bc", kInfinity);
  EXPECT_EQ(pieces.encode("abc"), (Ids{'a', bc}));
  EXPECT_EQ(pieces.encode("ab"), Ids{ab});
}

TEST(Spm, AMissingByteTokenIsAnError) {
  for (const std::size_t byte : {std::size_t{0x0A}, std::size_t{0xFF}}) {
    Pieces pieces;
    pieces.spec.types[byte] = TokenType::normal;
    expect_error(pieces, {byte == 0x0A ? "<0x0A>" : "<0xFF>", "byte fallback"});
  }
}

TEST(Spm, LongPiecesAreErrors) {
  Pieces pieces;
  pieces.add(std::string(SentencePieceBpe::kMaxPieceBytes, 'a'), 0);
  EXPECT_EQ(pieces.encode("aa"), (Ids{'a', 'a'}));
  pieces.add(std::string(SentencePieceBpe::kMaxPieceBytes + 1, 'a'), 0);
  expect_error(pieces, {"token 257", "\"aaaa", "1025 bytes"});
  pieces.spec.types.back() = TokenType::control;  // is no piece
  EXPECT_EQ(pieces.encode("a"), Ids{'a'});
}

TEST(Spm, PiecesThatAreNotUtf8AreErrors) {
  for (const char* text : {"\xFF", "a\xC3",
                           "\xC3"
                           "a",
                           "\x80"}) {
    for (const TokenType type : {TokenType::normal, TokenType::unused}) {
      Pieces pieces;
      pieces.add(text, 0, type);
      expect_error(pieces, {"token 256", "not UTF-8"});
    }
  }
}

TEST(Spm, EmptyPiecesAreNeverFound) {
  Pieces pieces;
  pieces.add("", 5);
  EXPECT_EQ(pieces.encode("a b"), (Ids{'a', ' ', 'b'}));
  pieces.spec.types.back() = TokenType::unused;
  EXPECT_EQ(pieces.encode("a b"), (Ids{'a', ' ', 'b'}));
}

}  // namespace
}  // namespace nb::text
