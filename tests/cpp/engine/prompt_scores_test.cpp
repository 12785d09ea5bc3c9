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
  request.prompt_logprobs = true;
  auto sequence = make_sequence(1, request);
  reserve_prompt_scores(*sequence, 5);
  ASSERT_EQ(sequence->prompt_logprobs.size(), 2u);
  ASSERT_EQ(sequence->prompt_logits.bytes(), 3u * 5u * sizeof(float));
  const std::vector<float> even(5, 0.25f);
  const std::vector<float> sure{0.0f, 0.0f, 0.0f, 40.0f, 0.0f};
  store_prompt_score(*sequence, 0, even);
  store_prompt_score(*sequence, 1, sure);
  store_prompt_score(*sequence, 2, even);  // the last row predicts no prompt token
  EXPECT_FLOAT_EQ(sequence->prompt_logprobs[0], std::log(0.2f));
  EXPECT_NEAR(sequence->prompt_logprobs[1], 0.0f, 1e-6f);
  EXPECT_EQ(sequence->prompt_logits.as<float>()[5 + 3], 40.0f);
  EXPECT_EQ(sequence->prompt_logits.as<float>()[14], 0.25f);
}

TEST(PromptScores, WantsOnlyWhatWasAskedFor) {
  Request request = make_request(3, 2);
  EXPECT_FALSE(wants_prompt_score(*make_sequence(1, request), 0));
  request.prompt_logprobs = true;
  EXPECT_TRUE(wants_prompt_score(*make_sequence(1, request), 1));
  EXPECT_FALSE(wants_prompt_score(*make_sequence(1, request), 2));
  request.prompt_logits = true;
  EXPECT_TRUE(wants_prompt_score(*make_sequence(1, request), 2));
  EXPECT_FALSE(wants_prompt_score(*make_sequence(1, request), 3));
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
