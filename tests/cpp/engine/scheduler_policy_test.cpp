// What the scheduler gives back and takes for requests with a policy, step by step.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "base/error.h"
#include "engine/fake_requests.h"
#include "engine/scheduler.h"

namespace nb::engine {
namespace {

/// Steps until nothing is left to do; returns the most blocks that were owned between two of them.
int most_owned(Scheduler& scheduler) {
  int most = 0;
  for (int step = 0; scheduler.has_work() && step < 10'000; ++step) {
    const StepPlan& plan = scheduler.plan();
    scheduler.commit(plan, std::vector<TokenId>(plan.entries.size(), 7));
    scheduler.check_invariants();
    most = std::max(most, scheduler.pool().num_owned());
  }
  EXPECT_FALSE(scheduler.has_work());
  EXPECT_EQ(scheduler.pool().num_owned(), 0);
  return most;
}

Request with_policy(int num_prompt, int max_tokens, const ops::KeyPolicy& policy) {
  Request request = make_request(num_prompt, max_tokens);
  request.key_policy = policy;
  return request;
}

TEST(SchedulerPolicy, AWindowHoldsAsMuchHoweverLongTheTextIs) {
  const ops::KeyPolicy window = {.rule = ops::KeyRule::window, .prefix = 4, .window = 48};
  for (const int num_prompt : {200, 900}) {
    Scheduler scheduler({.max_batch_tokens = 32}, 100);
    scheduler.submit(make_sequence(1, with_policy(num_prompt, 90, window)));
    EXPECT_EQ(most_owned(scheduler), 5) << num_prompt;  // the block of the sinks, and four that the window reaches
  }
}

TEST(SchedulerPolicy, APoolOfAFewBlocksIsEnough) {
  const ops::KeyPolicy window = {.rule = ops::KeyRule::window, .window = 16};
  Scheduler scheduler({.max_batch_tokens = 16}, 4);
  scheduler.submit(make_sequence(1, with_policy(900, 90, window)));
  EXPECT_LE(most_owned(scheduler), 4);
  try {
    scheduler.submit(make_sequence(2, 900, 90));
    ADD_FAILURE() << "a request without a policy has room";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("needs 62 KV blocks"), std::string::npos) << error.what();
  }
}

TEST(SchedulerPolicy, OthersRunBesideOneThatTakesBlocksSliceBySlice) {
  const ops::KeyPolicy window = {.rule = ops::KeyRule::window, .window = 20};
  Scheduler scheduler({.max_batch_tokens = 24, .max_num_seqs = 4}, 9);
  scheduler.submit(make_sequence(1, with_policy(300, 20, window)));
  scheduler.submit(make_sequence(2, 60, 60));
  scheduler.submit(make_sequence(3, with_policy(200, 60, window)));
  scheduler.submit(make_sequence(4, 100, 20));
  most_owned(scheduler);
  EXPECT_EQ(scheduler.finished().size(), 4u);
  EXPECT_GT(scheduler.counters().preemptions, 0);
}

TEST(SchedulerPolicy, WhoKeepsNothingIsAPromptAfterEveryToken) {
  Scheduler scheduler({.max_batch_tokens = 64}, 20, "test");
  Request request = make_request(40, 3);
  request.keeps_kv = false;
  scheduler.submit(make_sequence(1, request));
  std::vector<int> rows;
  while (scheduler.has_work()) {
    const StepPlan& plan = scheduler.plan();
    rows.push_back(plan.num_tokens);
    scheduler.commit(plan, std::vector<TokenId>(plan.entries.size(), 7));
    EXPECT_EQ(scheduler.pool().num_owned(), 0);
    EXPECT_EQ(scheduler.pool().num_cached(), 0);
  }
  EXPECT_EQ(rows, (std::vector<int>{40, 41, 42}));
}

TEST(SchedulerPolicy, OnlyWhatSeesEverythingIsPublished) {
  Scheduler scheduler({.max_batch_tokens = 64}, 40, "test");
  const ops::KeyPolicy window = {.rule = ops::KeyRule::window, .window = 64};
  scheduler.submit(make_sequence(1, with_policy(200, 5, window)));
  most_owned(scheduler);
  EXPECT_EQ(scheduler.pool().num_cached(), 4);  // of 64 tokens
  scheduler.submit(make_sequence(2, 200, 5));
  scheduler.plan();
  EXPECT_EQ(scheduler.counters().prefix_hit_tokens, 64);
}

}  // namespace
}  // namespace nb::engine
