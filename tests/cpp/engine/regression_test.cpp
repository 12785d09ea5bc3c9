// What other engines got wrong at the borders of blocks, steps and lives of requests, one test for each.
//
// Elsewhere: a pool of exactly one sequence and a wholly cached prompt (engine_test.cpp), equal keys of different
// prefixes (kv/prefix_cache_test.cpp).
#include <gtest/gtest.h>

#include "engine/engine_fixture.h"
#include "engine/fake_requests.h"

namespace nb::engine {
namespace {

/// Plans and commits a step in which every entry that samples draws `token`; returns the rows of each entry.
std::vector<int> run_step(Scheduler& scheduler, TokenId token = 100) {
  const StepPlan& plan = scheduler.plan();
  std::vector<int> counts;
  for (const PlannedSequence& entry : plan.entries) counts.push_back(entry.count);
  scheduler.commit(plan, std::vector<TokenId>(plan.entries.size(), token));
  scheduler.check_invariants();
  scheduler.fresh_blocks().clear();
  scheduler.freed_blocks().clear();
  return counts;
}

TEST(Regression, ABlockIsNotFoundBeforeItIsComputed) {
  Scheduler scheduler({.max_batch_tokens = 24, .max_num_seqs = 2}, 20, "test");
  scheduler.submit(make_sequence(1, 64, 4));
  scheduler.plan();  // of a step that fails: nothing is committed
  EXPECT_EQ(scheduler.pool().num_cached(), 0);
  scheduler.cancel_running(ErrorCode::internal, "a step failed");
  run_step(scheduler);
  scheduler.forget_finished();
  scheduler.submit(make_sequence(2, 64, 4));
  EXPECT_EQ(run_step(scheduler), (std::vector<int>{24})) << "nothing of the first one was stored";
  EXPECT_EQ(scheduler.counters().prefix_hit_tokens, 0);
  scheduler.cancel(2);  // with a block and a half stored
  run_step(scheduler);
  EXPECT_EQ(scheduler.pool().num_cached(), 1) << "the half block must not be found";
  scheduler.submit(make_sequence(3, 64, 4));
  run_step(scheduler);
  EXPECT_EQ(scheduler.counters().prefix_hit_tokens, 16);
}

TEST(Regression, AFailedStepLeavesNothingToHit) {
  const auto model = model::make_tiny_model({.nan_token = 7});
  Engine engine(*model, {});
  Request bad = random_request(2, 40, 6, 7);
  bad.prompt.back() = 7;
  bad.sampling.temperature = 1.0;
  engine.submit(bad);
  EXPECT_THROW(engine.step(), Error);
  engine.step();
  EXPECT_EQ(engine.stats().blocks_cached, 0);
  Request good = bad;
  good.prompt.back() = 1;
  good.sampling.temperature = 0.0;
  Engine plain(*model, {.enable_prefix_caching = false});
  EXPECT_EQ(answer_one(engine, good).tokens, answer_one(plain, good).tokens);
  EXPECT_EQ(engine.stats().prefix_hit_tokens, 0);
}

// The preempted sequence finds what is left of its own blocks and computes the rest, output included.
TEST(Regression, PreemptionThenAHitThenAPrefill) {
  const auto model = model::make_tiny_model();
  Engine plain(*model, {.enable_prefix_caching = false});
  const std::int64_t block_bytes = plain.stats().kv_bytes / plain.stats().blocks_total;
  const std::vector<Request> requests = {random_request(1, 31, 60), random_request(2, 30, 40)};
  Engine engine(*model, {.max_num_seqs = 2, .kv_cache_bytes = 7 * block_bytes});
  const std::vector<Answer> answers = answer_all(engine, requests);
  EXPECT_GE(engine.stats().preemptions, 1);
  EXPECT_GE(engine.stats().prefix_hit_tokens, 16) << "of its own blocks";
  EXPECT_GT(engine.stats().prompt_tokens + 60 + 40, 31 + 30 + 100 - 2) << "and a prefill";
  for (std::size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(answers[i].tokens, answer_one(plain, requests[i]).tokens) << i;
  }
}

TEST(Regression, ASliceThatEndsAtTheBorderOfABlock) {
  Scheduler scheduler({.max_batch_tokens = 16, .max_num_seqs = 2}, 20, "test");
  scheduler.submit(make_sequence(1, 48, 3));
  for (int blocks = 1; blocks <= 3; ++blocks) {
    EXPECT_EQ(run_step(scheduler), (std::vector<int>{16}));
    EXPECT_EQ(scheduler.pool().num_owned(), 3) << "no block beyond the prompt yet";
  }
  EXPECT_EQ(run_step(scheduler), (std::vector<int>{1}));
  EXPECT_EQ(scheduler.pool().num_owned(), 4);
  run_step(scheduler);
  scheduler.forget_finished();
  EXPECT_EQ(scheduler.pool().num_cached(), 3) << "each block once";

  const auto model = model::make_tiny_model();
  Engine plain(*model, {.enable_prefix_caching = false});
  for (const int slice : {15, 16, 17, 32}) {
    for (const int length : {32, 48, 64, 256}) {
      Engine engine(*model, {.max_batch_tokens = slice});
      const Request request = random_request(3, length, 18);
      const auto expected = answer_one(plain, request).tokens;
      EXPECT_EQ(answer_one(engine, request).tokens, expected) << slice << ' ' << length;
      EXPECT_EQ(answer_one(engine, request).tokens, expected) << slice << ' ' << length << " again";
    }
  }
}

TEST(Regression, AnEndWithTheFirstToken) {
  const auto model = model::make_tiny_model();
  for (const int length : {1, 15, 16, 17, 32}) {
    Engine plain(*model, {});
    Request request = random_request(4, length, 5);
    const TokenId first = answer_one(plain, request).tokens.front();
    for (const bool stops : {true, false}) {
      Engine engine(*model, {.eos_ids = {stops ? first : (first + 1) % 320}});
      request.max_tokens = stops ? 5 : 1;
      for (int round = 0; round < 2; ++round) {
        const Answer answer = answer_one(engine, request);
        EXPECT_EQ(answer.finish_reason, stops ? FinishReason::stop : FinishReason::length);
        EXPECT_EQ(answer.tokens, stops ? std::vector<TokenId>{} : std::vector<TokenId>{first});
        EXPECT_EQ(answer.metrics.tokens_per_s, 0.0);
      }
      EXPECT_EQ(engine.stats().steps, 2);
      EXPECT_EQ(engine.stats().blocks_owned, 0);
    }
  }
}

TEST(Regression, AnAbortInTheFinalStep) {
  Scheduler scheduler({}, 10, "test");
  scheduler.submit(make_sequence(1, 16, 2));
  run_step(scheduler);
  const StepPlan& plan = scheduler.plan();  // of its last token
  EXPECT_TRUE(scheduler.cancel(1));
  scheduler.commit(plan, std::vector<TokenId>{5});
  scheduler.check_invariants();
  ASSERT_EQ(scheduler.finished().size(), 1u) << "it ends once";
  EXPECT_EQ(scheduler.finished()[0]->finish_reason, FinishReason::length) << "the end came first";
  EXPECT_EQ(scheduler.pool().num_owned(), 0);
  EXPECT_FALSE(scheduler.cancel(1));
  EXPECT_FALSE(scheduler.has_work());

  const auto model = model::make_tiny_model();
  Engine engine(*model, {});
  const RequestId id = engine.submit(random_request(1, 16, 2));
  Answers answers;
  add(answers, engine.step());
  engine.cancel(id);  // the next step would have been its last
  drain(engine, answers);
  EXPECT_EQ(answers[id].finish_reason, FinishReason::abort);
  EXPECT_EQ(answers[id].tokens.size(), 1u);
  EXPECT_EQ(engine.stats().blocks_owned, 0);
  engine.cancel(id);
  EXPECT_FALSE(engine.has_work());
}

}  // namespace
}  // namespace nb::engine
