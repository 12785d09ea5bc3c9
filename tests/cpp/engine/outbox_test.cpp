#include "engine/outbox.h"

#include <gtest/gtest.h>

#include <limits>
#include <thread>

namespace nb::engine {

using namespace std::chrono_literals;

namespace {

StepOutput output_of(RequestId id, int choice, std::vector<TokenId> tokens, FinishReason reason = FinishReason::none) {
  StepOutput output;
  output.request_id = id;
  output.choice = choice;
  for (const TokenId token : tokens) output.logprobs.push_back({.token = token});
  output.token_ids = std::move(tokens);
  output.finish_reason = reason;
  return output;
}

}  // namespace

TEST(Outbox, JoinsWhatALaterStepDid) {
  StepOutput output = output_of(5, 1, {1, 2});
  StepOutput later = output_of(5, 1, {3}, FinishReason::length);
  later.num_cached_tokens = 7;
  later.error = "e";
  append(output, std::move(later));
  EXPECT_EQ(output.token_ids, (std::vector<TokenId>{1, 2, 3}));
  ASSERT_EQ(output.logprobs.size(), 3u);
  EXPECT_EQ(output.logprobs[0].token, 1);
  EXPECT_EQ(output.logprobs[2].token, 3);
  EXPECT_EQ(output.finish_reason, FinishReason::length);
  EXPECT_EQ(output.num_cached_tokens, 7);
  EXPECT_EQ(output.error, "e");
}

TEST(Outbox, AnEmptyOneIsWaitedForAndNotLonger) {
  Outbox outbox;
  EXPECT_TRUE(outbox.poll().empty());
  const Clock::time_point begin = Clock::now();
  EXPECT_TRUE(outbox.wait(20ms).empty());
  EXPECT_GE(Clock::now() - begin, 20ms);
  EXPECT_TRUE(outbox.wait(Outbox::Seconds(-1.0)).empty());
  EXPECT_TRUE(outbox.wait_for_ends(Outbox::Seconds(0.0)));
}

TEST(Outbox, ClosingWakesAReaderThatWaitsForEver) {
  Outbox outbox;
  std::thread reader(
      [&] { EXPECT_TRUE(outbox.wait(Outbox::Seconds(std::numeric_limits<double>::infinity())).empty()); });
  std::this_thread::sleep_for(10ms);
  EXPECT_FALSE(outbox.closed());
  outbox.close();
  reader.join();
  EXPECT_TRUE(outbox.closed());
  EXPECT_TRUE(outbox.wait(1h).empty());
}

}  // namespace nb::engine
