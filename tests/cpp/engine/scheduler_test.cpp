#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <random>
#include <string>

#include "base/error.h"
#include "engine/fake_requests.h"

namespace nb::engine {
namespace {

using Shares = std::vector<std::pair<RequestId, int>>;

/// (id, number of rows) of each entry, in order.
Shares shares(const StepPlan& plan) {
  Shares result;
  for (const auto& entry : plan.entries) result.emplace_back(entry.sequence->id, entry.count);
  return result;
}

/// Plans and commits a step in which every entry that samples draws `token`.
Shares run_step(Scheduler& scheduler, TokenId token = 100) {
  const StepPlan& plan = scheduler.plan();
  const Shares result = shares(plan);
  scheduler.commit(plan, std::vector<TokenId>(plan.entries.size(), token));
  scheduler.check_invariants();
  scheduler.fresh_blocks().clear();
  scheduler.freed_blocks().clear();
  return result;
}

ErrorCode submit_error(Scheduler& scheduler, std::unique_ptr<Sequence> sequence, std::string* message = nullptr) {
  try {
    scheduler.submit(std::move(sequence));
  } catch (const Error& error) {
    if (message != nullptr) *message = error.what();
    return error.code();
  }
  ADD_FAILURE() << "nothing was thrown";
  return ErrorCode::io;
}

TEST(Scheduler, SlicesAPromptAndThenDecodes) {
  Scheduler scheduler({.max_batch_tokens = 10, .max_num_seqs = 4}, 10);
  scheduler.submit(make_sequence(1, 25, 3));
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 10}}));
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 10}}));
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 5}}));
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 1}}));
  EXPECT_TRUE(scheduler.finished().empty());
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 1}}));
  ASSERT_EQ(scheduler.finished().size(), 1u);
  EXPECT_EQ(scheduler.finished()[0]->finish_reason, FinishReason::length);
  EXPECT_EQ(scheduler.finished()[0]->num_generated(), 3);
  EXPECT_FALSE(scheduler.has_work());
  EXPECT_EQ(scheduler.pool().num_free(), 10);
}

TEST(Scheduler, DecodesComeBeforeSlicesOfTheOldestPrompt) {
  Scheduler scheduler({.max_batch_tokens = 8, .max_num_seqs = 4}, 100);
  scheduler.submit(make_sequence(1, 3, 50));
  scheduler.submit(make_sequence(2, 20, 50));
  scheduler.submit(make_sequence(3, 4, 50));
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 3}, {2, 5}}));  // two prompts share a step
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 1}, {2, 7}}));
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 1}, {2, 7}}));
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 1}, {2, 1}, {3, 4}}));
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 1}, {2, 1}, {3, 1}}));
}

TEST(Scheduler, NobodyOvertakesTheOldest) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 4}, 4);
  scheduler.submit(make_sequence(1, 20, 12));  // 2 blocks
  scheduler.submit(make_sequence(2, 40, 8));   // 3 blocks: must wait
  scheduler.submit(make_sequence(3, 4, 4));    // 1 block: would fit, but came later
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 20}}));
  EXPECT_EQ(scheduler.num_waiting(), 2);
  for (int i = 0; i < 11; ++i) run_step(scheduler);
  EXPECT_EQ(scheduler.finished().size(), 1u);
  EXPECT_EQ(run_step(scheduler), (Shares{{2, 40}, {3, 4}}));
}

TEST(Scheduler, RespectsTheNumberOfSequences) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 2}, 50);
  for (RequestId id = 1; id <= 3; ++id) scheduler.submit(make_sequence(id, 2, 2));
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 2}, {2, 2}}));
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 1}, {2, 1}}));
  EXPECT_EQ(run_step(scheduler), (Shares{{3, 2}}));
}

TEST(Scheduler, StopTokensEndASequenceAndAreNotPartOfIt) {
  Scheduler scheduler({}, 50);
  Request ignoring = make_request(2, 5);
  ignoring.ignore_eos = true;
  Request stopping = make_request(2, 5);
  stopping.ignore_eos = true;
  stopping.stop_token_ids = {7};
  scheduler.submit(make_sequence(1, make_request(2, 5), {7, 8}));
  scheduler.submit(make_sequence(2, ignoring, {7, 8}));
  scheduler.submit(make_sequence(3, stopping, {8}));
  run_step(scheduler, 7);  // the first token already stops
  ASSERT_EQ(scheduler.finished().size(), 2u);
  EXPECT_EQ(scheduler.finished()[0]->id, 1u);
  EXPECT_EQ(scheduler.finished()[1]->id, 3u);
  EXPECT_EQ(scheduler.finished()[0]->finish_reason, FinishReason::stop);
  EXPECT_EQ(scheduler.finished()[0]->num_generated(), 0);
  for (int i = 0; i < 4; ++i) run_step(scheduler, 8);
  ASSERT_EQ(scheduler.finished().size(), 3u);
  EXPECT_EQ(scheduler.finished()[2]->finish_reason, FinishReason::length);
  EXPECT_EQ(scheduler.finished()[2]->num_generated(), 5);
}

TEST(Scheduler, TheContextEndsASequence) {
  Scheduler scheduler({}, 50);
  scheduler.submit(make_sequence(1, make_request(7, 100), {}, 10));
  int steps = 0;
  while (scheduler.has_work() && steps < 20) {
    run_step(scheduler);
    ++steps;
  }
  EXPECT_EQ(steps, 3);
  EXPECT_EQ(scheduler.finished()[0]->len(), 10);
  EXPECT_EQ(scheduler.finished()[0]->finish_reason, FinishReason::length);
}

TEST(Scheduler, ARequestThatOnlyScoresEndsWithItsPrompt) {
  Scheduler scheduler({.max_batch_tokens = 4}, 50);
  scheduler.submit(make_sequence(1, 6, 0));
  EXPECT_FALSE(scheduler.plan().entries[0].samples);
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 4}}));
  EXPECT_TRUE(scheduler.finished().empty());
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 2}}));
  ASSERT_EQ(scheduler.finished().size(), 1u);
  EXPECT_EQ(scheduler.finished()[0]->finish_reason, FinishReason::length);
  EXPECT_EQ(scheduler.finished()[0]->len(), 6);
}

TEST(Scheduler, CancellationGivesBlocksBackWithinOneStep) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 2}, 50);
  for (RequestId id = 1; id <= 4; ++id) scheduler.submit(make_sequence(id, 20, 20));
  run_step(scheduler);
  EXPECT_TRUE(scheduler.cancel(1));
  EXPECT_TRUE(scheduler.cancel(3));  // still waiting
  EXPECT_FALSE(scheduler.cancel(99));
  EXPECT_EQ(run_step(scheduler), (Shares{{2, 1}}));
  ASSERT_EQ(scheduler.finished().size(), 2u);
  for (const auto& sequence : scheduler.finished()) EXPECT_EQ(sequence->finish_reason, FinishReason::abort);
  EXPECT_EQ(scheduler.pool().num_owned(), 3);
  EXPECT_EQ(run_step(scheduler), (Shares{{2, 1}, {4, 20}}));
}

TEST(Scheduler, RefusesWhatCanNeverFitWithTheNumbers) {
  Scheduler scheduler({}, 3);
  std::string message;
  EXPECT_EQ(submit_error(scheduler, make_sequence(1, 40, 9), &message), ErrorCode::invalid_argument);
  EXPECT_NE(message.find("needs 4 KV blocks"), std::string::npos) << message;
  EXPECT_NE(message.find("pool has 3"), std::string::npos) << message;
  EXPECT_FALSE(scheduler.has_work());
  scheduler.submit(make_sequence(1, 40, 8));
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 40}}));
}

TEST(Scheduler, RefusesMoreThanMayWait) {
  Scheduler scheduler({.max_num_seqs = 2, .max_waiting = 1}, 50);
  for (RequestId id = 1; id <= 3; ++id) scheduler.submit(make_sequence(id, 2, 2));
  EXPECT_EQ(submit_error(scheduler, make_sequence(4, 2, 2)), ErrorCode::overloaded);
  run_step(scheduler);
  EXPECT_EQ(submit_error(scheduler, make_sequence(4, 2, 2)), ErrorCode::overloaded);
  run_step(scheduler);
  scheduler.submit(make_sequence(4, 2, 2));
  EXPECT_EQ(scheduler.num_waiting(), 2);
}

TEST(Scheduler, ReportsFreshAndFreedBlocks) {
  Scheduler scheduler({}, 4);
  scheduler.submit(make_sequence(1, 16, 2));
  scheduler.commit(scheduler.plan(), std::vector<TokenId>{5});
  EXPECT_EQ(scheduler.fresh_blocks(), (std::vector<BlockId>{0}));
  scheduler.fresh_blocks().clear();
  const StepPlan& plan = scheduler.plan();
  EXPECT_EQ(scheduler.fresh_blocks(), (std::vector<BlockId>{1}));  // the second block, when it is first needed
  EXPECT_TRUE(scheduler.freed_blocks().empty());
  scheduler.commit(plan, std::vector<TokenId>{5});
  EXPECT_EQ(scheduler.freed_blocks(), (std::vector<BlockId>{1, 0}));
}

TEST(Scheduler, RefusesImpossibleLimits) {
  EXPECT_THROW(Scheduler({.max_batch_tokens = 0}, 1), Error);
  EXPECT_THROW(Scheduler({.max_num_seqs = 0}, 1), Error);
  EXPECT_THROW(Scheduler({.max_waiting = -1}, 1), Error);
}

/// What must have become of a request in the random runs below.
struct Expected {
  int num_prompt;
  int max_len;
  bool cancelled = false;
  bool ended = false;
};

/// Random arrivals, lengths, stops and cancellations on one random configuration.
class RandomRun {
 public:
  explicit RandomRun(unsigned seed)
      : random_(seed),
        limits_{.max_batch_tokens = pick(1, 40), .max_num_seqs = pick(1, 8), .max_waiting = pick(0, 1) * pick(1, 6)},
        scheduler_(limits_, pick(2, 40)) {}

  void run() {
    for (int step = 0; step < 150; ++step) {
      arrive();
      cancel_some();
      one_step();
    }
    for (int step = 0; scheduler_.has_work() && step < 20'000; ++step) one_step();
    EXPECT_FALSE(scheduler_.has_work());
    EXPECT_EQ(scheduler_.pool().num_free(), scheduler_.pool().num_blocks());
    for (const auto& [id, expected] : requests_) EXPECT_TRUE(expected.ended) << "request " << id;
    EXPECT_FALSE(requests_.empty());
  }

 private:
  int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  void arrive() {
    if (pick(0, 2) == 0) return;
    const int num_prompt = pick(1, 120);
    auto sequence = make_sequence(next_id_, make_request(num_prompt, pick(0, 40)), {0}, 150);
    const Expected expected{.num_prompt = num_prompt, .max_len = sequence->max_len};
    const bool fits = kv::BlockTable::blocks_for(sequence->max_len) <= scheduler_.pool().num_blocks();
    try {
      scheduler_.submit(std::move(sequence));
      EXPECT_TRUE(fits);
      requests_[next_id_++] = expected;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), fits ? ErrorCode::overloaded : ErrorCode::invalid_argument);
    }
  }

  void cancel_some() {
    if (requests_.empty() || pick(0, 9) > 0) return;
    const RequestId id = static_cast<RequestId>(pick(1, static_cast<int>(requests_.size())));
    EXPECT_EQ(scheduler_.cancel(id), !requests_[id].ended);
    requests_[id].cancelled = true;
  }

  void one_step() {
    const StepPlan& plan = scheduler_.plan();
    check_plan(plan);
    std::vector<TokenId> sampled;
    for (std::size_t i = 0; i < plan.entries.size(); ++i) sampled.push_back(pick(0, 15));  // 0 stops
    scheduler_.commit(plan, sampled);
    scheduler_.check_invariants();
    for (const auto& sequence : scheduler_.finished()) check_end(*sequence);
    scheduler_.forget_finished();
    scheduler_.fresh_blocks().clear();
    scheduler_.freed_blocks().clear();
  }

  void check_plan(const StepPlan& plan) {
    int total = 0;
    std::map<RequestId, int> seen;
    bool sliced = false;
    for (const auto& entry : plan.entries) {
      const Sequence& sequence = *entry.sequence;
      EXPECT_EQ(++seen[sequence.id], 1);
      EXPECT_GE(entry.count, 1);
      EXPECT_EQ(entry.first, sequence.computed_len());
      EXPECT_LE(entry.first + entry.count, sequence.len());
      EXPECT_GE(sequence.table.length(), entry.first + entry.count);
      EXPECT_EQ(entry.samples, entry.first + entry.count == sequence.len() && sequence.generates());
      EXPECT_FALSE(requests_[sequence.id].cancelled);
      EXPECT_FALSE(sliced) << "a younger sequence computes while an older prompt was cut short";
      sliced = entry.first + entry.count < sequence.len();
      total += entry.count;
    }
    EXPECT_EQ(total, plan.num_tokens);
    EXPECT_LE(total, limits_.max_batch_tokens);
    // Something always moves (a step with nothing but cancelled sequences ends those).
    bool live = false;
    for (const auto& [id, expected] : requests_) live = live || (!expected.ended && !expected.cancelled);
    if (live && total == 0) {
      EXPECT_GT(scheduler_.pool().num_owned(), 0);
    }
  }

  void check_end(const Sequence& sequence) {
    Expected& expected = requests_[sequence.id];
    EXPECT_FALSE(expected.ended) << "request " << sequence.id << " ended twice";
    expected.ended = true;
    EXPECT_EQ(sequence.table.capacity(), 0);
    EXPECT_EQ(sequence.finish_reason == FinishReason::abort, expected.cancelled);
    EXPECT_LE(sequence.len(), expected.max_len);
    if (sequence.finish_reason == FinishReason::length) {
      EXPECT_EQ(sequence.len(), expected.max_len);
    }
    for (int i = expected.num_prompt; i < sequence.len(); ++i)
      EXPECT_NE(sequence.tokens[static_cast<std::size_t>(i)], 0);
  }

  std::mt19937 random_;
  SchedulerLimits limits_;
  Scheduler scheduler_;
  std::map<RequestId, Expected> requests_;
  RequestId next_id_ = 1;
};

TEST(Scheduler, RandomRunsKeepTheInvariants) {
  const unsigned num_seeds = std::getenv("NANOBRAID_TEST_FULL") != nullptr ? 3000 : 300;
  for (unsigned seed = 0; seed < num_seeds && !::testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE(concat("seed ", seed));
    RandomRun(seed).run();
  }
}

}  // namespace
}  // namespace nb::engine
