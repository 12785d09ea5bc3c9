#include "engine/suffix_proposer.h"

#include <gtest/gtest.h>

#include "engine/fake_requests.h"

namespace nb::engine {
namespace {

using Tokens = std::vector<TokenId>;

TEST(SuffixProposer, GuessesMoreTheLongerTheMatch) {
  Request request;
  request.max_tokens = 100;
  for (TokenId token = 0; token < 50; ++token) request.prompt.push_back(token);
  request.prompt.push_back(20);
  const auto sequence = make_sequence(1, request);
  SuffixProposer proposer(1);
  std::unique_ptr<DraftState> memory;
  Tokens drafts;
  EXPECT_EQ(proposer.propose(*sequence, memory, 8, drafts), 1);
  EXPECT_EQ(drafts, (Tokens{21, 22}));
  drafts.clear();
  sequence->tokens.insert(sequence->tokens.end(), {21, 22});
  EXPECT_EQ(proposer.propose(*sequence, memory, 8, drafts), 3);
  EXPECT_EQ(drafts, (Tokens{23, 24, 25, 26, 27, 28}));
  drafts.clear();
  EXPECT_EQ(proposer.propose(*sequence, memory, 2, drafts), 3);
  EXPECT_EQ(drafts, (Tokens{23, 24}));
  drafts.clear();
  sequence->tokens.push_back(1000);
  EXPECT_EQ(proposer.propose(*sequence, memory, 8, drafts), 0);
  EXPECT_TRUE(drafts.empty());
}

TEST(SuffixProposer, GuessesNothingFromShortMatchesIfAsked) {
  Request request;
  request.prompt = {1, 2, 3, 4, 1, 2};
  SuffixProposer proposer(3);
  std::unique_ptr<DraftState> memory;
  Tokens drafts;
  EXPECT_EQ(proposer.propose(*make_sequence(1, request), memory, 8, drafts), 0);
  EXPECT_TRUE(drafts.empty());
}

TEST(SuffixProposer, IndexesALongPromptOverSeveralSteps) {
  Request request;
  request.prompt.assign(SuffixProposer::kMostIndexed * 2 + 10, 3);
  const auto sequence = make_sequence(1, request, {}, SuffixProposer::kMostIndexed * 3);
  SuffixProposer proposer(1);
  std::unique_ptr<DraftState> memory;
  Tokens drafts;
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(proposer.propose(*sequence, memory, 4, drafts), 0);
    EXPECT_TRUE(drafts.empty());
  }
  EXPECT_EQ(proposer.propose(*sequence, memory, 4, drafts), SuffixProposer::kMostIndexed * 2 + 9);
  EXPECT_EQ(drafts, (Tokens{3, 3, 3, 3}));
}

}  // namespace
}  // namespace nb::engine
