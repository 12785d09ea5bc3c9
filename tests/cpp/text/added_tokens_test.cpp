#include "text/added_tokens.h"

#include <gtest/gtest.h>

#include <chrono>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace nb::text {
namespace {

struct Fixture {
  explicit Fixture(std::vector<std::string> tokens) : texts(std::move(tokens)) {
    const std::vector<std::string_view> views(texts.begin(), texts.end());
    const std::vector<TokenType> types(texts.size(), TokenType::control);
    vocabulary.emplace(views, types);
    std::vector<TokenId> ids;
    for (TokenId id = 0; id < vocabulary->size(); ++id) ids.push_back(id);
    added.emplace(*vocabulary, ids);
  }

  std::vector<std::string> texts;
  std::optional<Vocabulary> vocabulary;
  std::optional<AddedTokens> added;
};

TEST(AddedTokens, LeftmostThenLongest) {
  const Fixture f({"<|a|>", "<|a|>b", "|a", "a|>bc"});
  const AddedTokens::Match match = f.added->find("x<|a|>bc", 0);
  EXPECT_EQ(match.begin, 1u);
  EXPECT_EQ(match.length, 6u);
  EXPECT_EQ(match.id, 1);
  EXPECT_EQ(f.added->find("x<|a|>bc", 2).id, 2);
  EXPECT_EQ(f.added->find("x<|a|>bc", 3).id, 3);
}

TEST(AddedTokens, NothingFoundIsTheEndOfTheText) {
  const Fixture f({"<|a|>"});
  for (const char* text : {"", "a", "<|a|", "<|b|>", "|a|>"}) {
    const AddedTokens::Match match = f.added->find(text, 0);
    EXPECT_EQ(match.begin, std::string(text).size());
    EXPECT_EQ(match.length, 0u);
    EXPECT_EQ(match.id, -1);
  }
  EXPECT_EQ(AddedTokens().find("abc", 1).begin, 3u);
}

TEST(AddedTokens, AgreesWithTryingEveryTokenEverywhere) {
  std::mt19937 random(12);
  for (int round = 0; round < 2000; ++round) {
    std::set<std::string> tokens;
    for (int i = 0; i < 6; ++i) {
      std::string token;
      for (std::size_t n = 1 + random() % 4; n > 0; --n) token += "ab\xFF"[random() % 3];
      tokens.insert(token);
    }
    const Fixture f({tokens.begin(), tokens.end()});
    std::string text;
    for (std::size_t n = random() % 12; n > 0; --n) text += "abc\xFF"[random() % 4];
    AddedTokens::Match expected{text.size(), 0, -1};
    for (std::size_t begin = 0; begin < text.size() && expected.length == 0; ++begin) {
      for (std::size_t id = 0; id < f.texts.size(); ++id) {
        const std::string& token = f.texts[id];
        if (text.compare(begin, token.size(), token) != 0 || token.size() <= expected.length) continue;
        expected = {begin, token.size(), static_cast<TokenId>(id)};
      }
    }
    const AddedTokens::Match match = f.added->find(text, 0);
    ASSERT_EQ(match.begin, expected.begin) << text;
    ASSERT_EQ(match.length, expected.length) << text;
    ASSERT_EQ(match.id, expected.id) << text;
  }
}

// Many tokens with one beginning, as Llama 3 reserves, against text full of that beginning.
TEST(AddedTokens, NearMissesAreCheap) {
  std::vector<std::string> tokens;
  for (int i = 0; i < 5000; ++i) tokens.push_back("<|reserved_special_token_" + std::to_string(i) + "|>");
  const Fixture f(tokens);
  std::string text;
  while (text.size() < 2'000'000) text += "<|reserved_special_token_";
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(f.added->find(text, 0).id, -1);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
  EXPECT_EQ(f.added->find(text + "4999|>", 0).id, 4999);
}

}  // namespace
}  // namespace nb::text
