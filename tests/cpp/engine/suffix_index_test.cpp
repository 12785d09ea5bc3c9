#include "engine/suffix_index.h"

#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <random>

namespace nb::engine {
namespace {

using Tokens = std::vector<TokenId>;

Tokens guess(const SuffixIndex& index, int most) {
  Tokens out;
  index.guess(most, out);
  return out;
}

/// The longest ending that occurs before, the slow way.
int longest_match(const Tokens& text) {
  int longest = 0;
  for (std::size_t end = 1; end < text.size(); ++end) {
    int common = 0;
    while (common < static_cast<int>(end) && text[end - 1 - static_cast<std::size_t>(common)] ==
                                                 text[text.size() - 1 - static_cast<std::size_t>(common)]) {
      ++common;
    }
    longest = std::max(longest, common);
  }
  return longest;
}

/// How often each token followed the last `length` tokens.
std::map<TokenId, int> followers(const Tokens& text, int length) {
  std::map<TokenId, int> counts;
  const auto part = std::span(text).last(static_cast<std::size_t>(length));
  for (std::size_t end = part.size(); end < text.size(); ++end) {
    if (std::equal(part.begin(), part.end(), text.begin() + static_cast<std::ptrdiff_t>(end - part.size()))) {
      ++counts[text[end]];
    }
  }
  return counts;
}

TEST(SuffixIndex, FindsTheLongestMatchAndWhatFollowedItMostOften) {
  std::mt19937 random(1);
  for (int run = 0; run < 60; ++run) {
    const TokenId vocab = run % 3 + 2;
    Tokens text;
    SuffixIndex index;
    for (int i = 0; i < 120; ++i) {
      text.push_back(std::uniform_int_distribution<TokenId>(0, vocab - 1)(random));
      index.push(text.back());
      const int length = longest_match(text);
      ASSERT_EQ(index.match_length(), length) << "run " << run << " token " << i;
      const Tokens guessed = guess(index, 1);
      if (length == 0) {
        ASSERT_TRUE(guessed.empty());
        continue;
      }
      const auto counts = followers(text, length);
      int most = 0;
      for (const auto& [token, count] : counts) most = std::max(most, count);
      ASSERT_EQ(guessed.size(), 1u);
      ASSERT_EQ(counts.at(guessed[0]), most) << "run " << run << " token " << i;
    }
    ASSERT_EQ(index.size(), text.size());
  }
}

TEST(SuffixIndex, FollowsTheTextAndGoesOnRepeating) {
  SuffixIndex index;
  for (const TokenId token : {1, 2, 3, 4, 5, 6, 9, 1, 2, 3}) index.push(token);
  EXPECT_EQ(index.match_length(), 3);
  EXPECT_EQ(guess(index, 3), (Tokens{4, 5, 6}));
  SuffixIndex circle;
  for (const TokenId token : {7, 1, 2, 1, 2}) circle.push(token);
  EXPECT_EQ(guess(circle, 5), (Tokens{1, 2, 1, 2, 1}));
}

TEST(SuffixIndex, GuessesNothingThatFollowedSeldom) {
  SuffixIndex index;
  for (TokenId token = 10; token < 20; ++token) {
    index.push(1);
    index.push(token);
  }
  index.push(1);
  EXPECT_EQ(index.match_length(), 1);
  EXPECT_TRUE(guess(index, 1).empty()) << "ten tokens followed, each once";
}

// Texts that are the worst for an index by parts: each token would cost as much as there are tokens before it.
TEST(SuffixIndex, TakesTheSameTimeForEveryText) {
  for (const TokenId period : {1, 2, 1000}) {
    SuffixIndex index;
    const auto begun = std::chrono::steady_clock::now();
    for (TokenId i = 0; i < 200'000; ++i) index.push(i % period);
    EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count(), 20.0);
    EXPECT_EQ(index.match_length(), 200'000 - period);
  }
}

}  // namespace
}  // namespace nb::engine
