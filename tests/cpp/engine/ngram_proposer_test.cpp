#include "engine/ngram_proposer.h"

#include <gtest/gtest.h>

#include "engine/fake_requests.h"

namespace nb::engine {
namespace {

using Tokens = std::vector<TokenId>;

TEST(FindNgram, TakesTheLongestMatchAndOfTheseTheLatest) {
  const Tokens text{1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3};
  const auto found = find_ngram(text, 1, 5);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->next, 3u);
  EXPECT_EQ(found->length, 3);
  const auto shorter = find_ngram(text, 1, 2);
  ASSERT_TRUE(shorter);
  EXPECT_EQ(shorter->next, 7u) << "both are as long as may be, and this one is later";
  EXPECT_EQ(shorter->length, 2);
}

TEST(FindNgram, FindsNothingShorterThanAsked) {
  const Tokens text{1, 2, 3, 4, 2};
  EXPECT_TRUE(find_ngram(text, 1, 4));
  EXPECT_FALSE(find_ngram(text, 2, 4));
  EXPECT_FALSE(find_ngram(Tokens{}, 1, 4));
  EXPECT_FALSE(find_ngram(Tokens{5}, 1, 4));
  EXPECT_FALSE(find_ngram(Tokens{5, 6, 7}, 1, 4));
}

TEST(FindNgram, AgreesWithATrialOfEveryPlace) {
  for (int number = 0; number < 3 * 3 * 3 * 3 * 3 * 3 * 3; ++number) {
    Tokens text;
    for (int rest = number, i = 0; i < 7; ++i, rest /= 3) text.push_back(rest % 3);
    std::size_t next = 0;
    int length = 0;
    for (std::size_t end = 1; end < text.size(); ++end) {
      int common = 0;
      while (common < 4 && common < static_cast<int>(end) &&
             text[end - 1 - static_cast<std::size_t>(common)] == text[6 - static_cast<std::size_t>(common)]) {
        ++common;
      }
      if (common < length || common < 2) continue;
      length = common;
      next = end;
    }
    const auto found = find_ngram(text, 2, 4);
    ASSERT_EQ(found.has_value(), length > 0);
    if (!found) continue;
    ASSERT_EQ(found->length, length);
    ASSERT_EQ(found->next, next);
  }
}

TEST(NgramProposer, GoesOnAsTheTextDidAndRepeatsWhatRepeats) {
  NgramProposer proposer(1, 4);
  Request request;
  request.prompt = {1, 2, 3, 4, 5, 6, 1, 2, 3};
  std::unique_ptr<DraftState> memory;
  Tokens drafts;
  EXPECT_EQ(proposer.propose(*make_sequence(1, request), memory, 2, drafts), 3);
  EXPECT_EQ(drafts, (Tokens{4, 5}));
  drafts.clear();
  request.prompt = {9, 1, 2, 1, 2};
  EXPECT_EQ(proposer.propose(*make_sequence(1, request), memory, 5, drafts), 2);
  EXPECT_EQ(drafts, (Tokens{1, 2, 1, 2, 1}));
  drafts.clear();
  request.prompt = {1, 2, 3};
  EXPECT_EQ(proposer.propose(*make_sequence(1, request), memory, 5, drafts), 0);
  EXPECT_TRUE(drafts.empty());
}

}  // namespace
}  // namespace nb::engine
