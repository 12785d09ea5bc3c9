#include "engine/prompt_scores.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "base/error.h"
#include "engine/fake_requests.h"

namespace nb::engine {
namespace {

TEST(PromptScores, KeepsRowsAndLogProbabilities) {
  Request request = make_request(3, 0);  // tokens 1, 2, 3
  request.prompt_logits = true;
  request.prompt_logprobs = 1;
  auto sequence = make_sequence(1, request);
  reserve_prompt_scores(*sequence, 5);
  ASSERT_EQ(sequence->prompt_logprobs.size(), 4u);
  ASSERT_EQ(sequence->prompt_logits.bytes(), 3u * 5u * sizeof(float));
  const std::vector<float> even(5, 0.25f);
  const std::vector<float> sure{0.0f, 0.0f, 0.0f, 40.0f, 0.0f};
  sampling::Sampler sampler;
  store_prompt_score(*sequence, 0, even, sampler);
  store_prompt_score(*sequence, 1, sure, sampler);
  store_prompt_score(*sequence, 2, even, sampler);  // the last row predicts no prompt token
  const auto& scores = sequence->prompt_logprobs;   // each token and the most likely one
  EXPECT_EQ(scores[0].token, 2);
  EXPECT_EQ(scores[0].rank, 3);
  EXPECT_NEAR(scores[0].logprob, std::log(0.2), 2e-6);
  EXPECT_EQ(scores[1].token, 0);
  EXPECT_EQ(scores[2].token, 3);
  EXPECT_NEAR(scores[2].logprob, 0.0, 2e-6);
  EXPECT_EQ(scores[3].token, 3);
  EXPECT_EQ(sequence->prompt_logits.as<float>()[5 + 3], 40.0f);
  EXPECT_EQ(sequence->prompt_logits.as<float>()[14], 0.25f);
}

TEST(PromptScores, WantsOnlyWhatWasAskedFor) {
  Request request = make_request(3, 2);
  EXPECT_FALSE(wants_prompt_score(*make_sequence(1, request), 0));
  request.prompt_logprobs = 0;
  EXPECT_TRUE(wants_prompt_score(*make_sequence(1, request), 1));
  EXPECT_FALSE(wants_prompt_score(*make_sequence(1, request), 2));
  request.prompt_logits = true;
  EXPECT_TRUE(wants_prompt_score(*make_sequence(1, request), 2));
  EXPECT_FALSE(wants_prompt_score(*make_sequence(1, request), 3));
}

TEST(PromptScores, AnObserverSeesLogitsFromItsFirstPositionOn) {
  Request request = make_request(3, 2);
  std::vector<std::pair<int, float>> seen;
  request.observer = {1, [&](int position, std::span<const float> logits) { seen.emplace_back(position, logits[0]); }};
  auto sequence = make_sequence(1, request);
  EXPECT_FALSE(wants_prompt_score(*sequence, 0));
  EXPECT_TRUE(wants_prompt_score(*sequence, 1));
  EXPECT_TRUE(wants_prompt_score(*sequence, 2));
  EXPECT_FALSE(wants_prompt_score(*sequence, 3));
  EXPECT_EQ(sequence->reusable_blocks(), 0);  // all of the prompt is computed
  reserve_prompt_scores(*sequence, 5);
  EXPECT_FALSE(sequence->prompt_logits);
  sampling::Sampler sampler;
  for (const int position : {0, 1, 2}) {
    const std::vector<float> logits(5, static_cast<float>(position));
    store_prompt_score(*sequence, position, logits, sampler);
  }
  EXPECT_EQ(seen, (std::vector<std::pair<int, float>>{{1, 1.0f}, {2, 2.0f}}));
}

TEST(PromptScores, MoreThanTheMachineHasIsAnErrorWithTheShape) {
  Request request = make_request(100'000, 0);
  request.prompt_logits = true;
  auto sequence = make_sequence(1, request, {}, 200'000);
  try {
    reserve_prompt_scores(*sequence, 2'000'000'000);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::out_of_memory);
    EXPECT_NE(std::string(error.what()).find("f32[100000, 2000000000]"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace nb::engine
