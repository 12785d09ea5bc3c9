#include "text/byte_bpe.h"

#include <gtest/gtest.h>

#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "tiny_vocabulary.h"

namespace nb::text {
namespace {

using Ids = std::vector<TokenId>;

/// The definition, on strings: the neighbours of the first listed merge are joined, the leftmost first, until no
/// merge is left. Bytes that no token spells are left out before.
Ids merge_naively(const Vocabulary& vocabulary, const std::vector<std::pair<std::string, std::string>>& merges,
                  std::string_view piece) {
  std::vector<std::string> parts;
  for (const char c : piece) {
    if (vocabulary.find_bytes(std::string_view(&c, 1)) >= 0) parts.emplace_back(1, c);
  }
  while (true) {
    std::size_t best_rank = merges.size();
    std::size_t best = 0;
    for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
      for (std::size_t rank = 0; rank < best_rank; ++rank) {
        if (merges[rank].first != parts[i] || merges[rank].second != parts[i + 1]) continue;
        best_rank = rank;
        best = i;
      }
    }
    if (best_rank == merges.size()) break;
    parts[best] += parts[best + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
  Ids ids;
  for (const std::string& part : parts) ids.push_back(vocabulary.find_bytes(part));
  return ids;
}

/// A vocabulary of random merges of the bytes of a few letters, and the merges as bytes.
struct RandomBpe {
  RandomBpe(std::mt19937& random, std::string_view pre, std::string_view letters) : tiny(std::string(pre)) {
    std::vector<std::string> texts;
    for (const char c : letters) texts.emplace_back(1, c);
    for (std::size_t count = random() % 80; count > 0; --count) {
      const std::string left = texts[random() % texts.size()];
      const std::string right = texts[random() % texts.size()];
      if (left.size() + right.size() > 24) continue;
      tiny.merge(left, right);
      merges.emplace_back(left, right);
      texts.push_back(left + right);
    }
    // Half of the tables in any order: a merge may then come before those that make its parts.
    if (random() % 2 == 0) {
      for (std::size_t i = merges.size(); i > 1; --i) {
        const std::size_t other = random() % i;
        std::swap(merges[i - 1], merges[other]);
        std::swap(tiny.spec.merges[i - 1], tiny.spec.merges[other]);
      }
    }
    for (int i = 0; i < 5; ++i) {  // tokens that no merge makes
      const std::string text = texts[random() % texts.size()] + texts[random() % texts.size()];
      vocabulary_has(text);
    }
  }

  void vocabulary_has(const std::string& bytes) {
    const std::string text = spelled(bytes);
    for (const std::string_view token : tiny.spec.tokens) {
      if (token == text) return;
    }
    tiny.add(text, TokenType::normal);
  }

  TinyVocabulary tiny;
  std::vector<std::pair<std::string, std::string>> merges;
};

constexpr std::string_view kLetters = "ab 1.\n\xC3\xA9\xE4\xFF";

TEST(ByteBpe, AgreesWithTheDefinitionOnEachPiece) {
  std::mt19937 random(9);
  int num_merged = 0;
  for (const PreTokenizer& row : pre_tokenizers()) {
    for (int round = 0; round < 40; ++round) {
      RandomBpe made(random, row.name, kLetters);
      if (random() % 3 == 0) made.tiny.spec.tokens['b'] = "[none]";  // then no token spells it
      Vocabulary vocabulary(made.tiny.spec.tokens, made.tiny.spec.types);
      // Merges of the letter need its token.
      if (vocabulary.find_bytes("b") < 0) {
        std::vector<std::string_view> kept;
        std::vector<std::pair<std::string, std::string>> kept_pairs;
        for (std::size_t i = 0; i < made.merges.size(); ++i) {
          if (made.merges[i].first == "b" || made.merges[i].second == "b") continue;
          kept.push_back(made.tiny.spec.merges[i]);
          kept_pairs.push_back(made.merges[i]);
        }
        made.tiny.spec.merges = kept;
        made.merges = kept_pairs;
      }
      const ByteBpe bpe(vocabulary, row, made.tiny.spec.merges, {});
      for (int i = 0; i < 20; ++i) {
        std::string text;
        for (std::size_t length = random() % 80; length > 0; --length) text += kLetters[random() % kLetters.size()];
        Ids expected;
        for (const std::string_view piece : split_pieces(row, text)) {
          const TokenId whole = row.whole_pieces_first ? vocabulary.find_bytes(piece) : -1;
          const Ids ids = whole >= 0 ? Ids{whole} : merge_naively(vocabulary, made.merges, piece);
          expected.insert(expected.end(), ids.begin(), ids.end());
        }
        Ids ids;
        bpe.append(text, ids);
        ASSERT_EQ(ids, expected) << row.name << " round " << round << " text " << spelled(text);
        num_merged += ids.size() + 4 < text.size();
      }
    }
  }
  EXPECT_GT(num_merged, 1000);
}

/// A vocabulary and its ByteBpe; the vocabulary keeps its address.
struct Built {
  explicit Built(const TinyVocabulary& tiny, std::vector<TokenId> protect = {})
      : vocabulary(tiny.spec.tokens, tiny.spec.types),
        bpe(vocabulary, find_pre_tokenizer(tiny.spec.pre), tiny.spec.merges, protect) {}

  Ids encode(std::string_view text) const {
    Ids ids;
    bpe.append(text, ids);
    return ids;
  }

  Vocabulary vocabulary;
  ByteBpe bpe;
};

TEST(ByteBpe, LongPiecesAndWhatIsThereAlready) {
  TinyVocabulary tiny;
  const TokenId aa = tiny.merge("a", "a");
  const Built built(tiny);
  Ids ids = {'a', 'a'};
  built.bpe.append(std::string(101, 'a'), ids);
  Ids expected(50, aa);
  expected.insert(expected.begin(), {'a', 'a'});
  expected.push_back('a');
  EXPECT_EQ(ids, expected);
}

TEST(ByteBpe, TokensOfNoTextAreNeverMade) {
  for (const TokenType type : {TokenType::control, TokenType::unknown, TokenType::unused}) {
    TinyVocabulary tiny;
    const TokenId ab = tiny.merge("a", "b");
    tiny.spec.types[static_cast<std::size_t>(ab)] = type;
    const TokenId abc = tiny.merge("ab", "c");
    EXPECT_EQ(Built(tiny).encode("abc"), byte_ids("abc")) << static_cast<int>(type);
    EXPECT_GT(abc, ab);
  }
}

// The text of a user-defined token is no spelling: only where both are the same can merges make it.
TEST(ByteBpe, UserDefinedTokensAreMadeIfTheirTextIsWhatIsMerged) {
  TinyVocabulary tiny;
  const TokenId ab = tiny.merge("a", "b");
  const TokenId space_a = tiny.merge(" ", "a");
  for (const TokenId id : {ab, space_a}) tiny.spec.types[static_cast<std::size_t>(id)] = TokenType::user_defined;
  const Built built(tiny);
  EXPECT_EQ(built.encode("ab"), Ids{ab});
  EXPECT_EQ(built.encode(" a"), byte_ids(" a"));
}

TEST(ByteBpe, ProtectedTokensBecomeControlUnlessTextMakesThem) {
  TinyVocabulary tiny("llama-bpe");
  const TokenId ab = tiny.merge("a", "b");
  const TokenId end = tiny.add("end", TokenType::normal);
  const TokenId unknown = tiny.add("<unk>", TokenType::unknown);
  const Built built(tiny, {ab, end, '\n', unknown});
  EXPECT_EQ(built.vocabulary.type(ab), TokenType::normal);
  EXPECT_EQ(built.vocabulary.type('\n'), TokenType::normal);
  EXPECT_EQ(built.vocabulary.type(end), TokenType::control);
  EXPECT_EQ(built.vocabulary.type(unknown), TokenType::unknown);
  EXPECT_EQ(built.encode("end"), byte_ids("end"));
  EXPECT_EQ(Built(tiny).encode("end"), Ids{end});
}

TEST(ByteBpe, KnowsWhichBytesTheVocabularyLacks) {
  TinyVocabulary tiny;
  tiny.spec.tokens['x'] = "[none]";
  const Built built(tiny);
  for (int byte = 0; byte < 256; ++byte) EXPECT_EQ(built.bpe.has_byte(static_cast<std::uint8_t>(byte)), byte != 'x');
  EXPECT_EQ(built.encode("axb"), byte_ids("ab"));
  EXPECT_EQ(built.encode("x"), Ids{});
}

TEST(ByteBpe, MergesOfUnknownTokensAreNamed) {
  const std::pair<const char*, const char*> cases[] = {{"a zz", "\"azz\" is not a token"},
                                                       {"zz a", "\"zza\" is not a token"},
                                                       {"a b", "\"ab\" is not a token"},
                                                       {"x yz", "\"yz\" is not a token"},
                                                       {"xy z", "\"xy\" is not a token"},
                                                       {"ab", "left right"},
                                                       {"a ", "left right"},
                                                       {" a", "left right"},
                                                       {"", "left right"}};
  for (const auto& [merge, part] : cases) {
    TinyVocabulary tiny;
    tiny.add("xyz", TokenType::normal);
    tiny.spec.merges = {merge};
    try {
      const Built built(tiny);
      FAIL() << "accepted " << merge;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::format);
      const std::string what = error.what();
      EXPECT_NE(what.find("merge 0 (\"" + std::string(merge) + "\")"), std::string::npos) << what;
      EXPECT_NE(what.find(part), std::string::npos) << what;
    }
  }
}

}  // namespace
}  // namespace nb::text
