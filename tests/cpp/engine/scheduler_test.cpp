#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <optional>
#include <random>
#include <span>
#include <string>

#include "base/effort.h"
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
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 4}, 5);
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

TEST(Scheduler, KnowsWhoStreamsAndWhoWaitsForASlot) {
  const auto demand_of = [](const Scheduler& scheduler) {
    const Demand demand = scheduler.demand();
    return std::pair(demand.streaming, demand.waiting);
  };
  Scheduler scheduler({.max_batch_tokens = 8, .max_num_seqs = 5}, 50);
  EXPECT_EQ(demand_of(scheduler), std::pair(0, 0));
  for (RequestId id = 1; id <= 3; ++id) {
    scheduler.submit(make_sequence(id, 2, 50));
    EXPECT_EQ(demand_of(scheduler), std::pair(0, static_cast<int>(id)));
  }
  std::unique_ptr<Sequence> patient = make_sequence(4, 2, 50);
  patient->request.streams = false;  // nobody reads its tokens as they come
  scheduler.submit(std::move(patient));
  run_step(scheduler);
  EXPECT_EQ(demand_of(scheduler), std::pair(3, 0));
  for (RequestId id = 5; id <= 9; ++id) scheduler.submit(make_sequence(id, 10, 50));
  EXPECT_EQ(demand_of(scheduler), std::pair(3, 1)) << "the others gain nothing, since there is one slot";
  run_step(scheduler);
  EXPECT_EQ(demand_of(scheduler), std::pair(3, 1)) << "in the middle of its prompt";
  EXPECT_TRUE(scheduler.cancel(5));
  EXPECT_EQ(demand_of(scheduler), std::pair(3, 0));
  run_step(scheduler);
  EXPECT_TRUE(scheduler.cancel(1));
  EXPECT_EQ(demand_of(scheduler).first, 2);
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
  EXPECT_EQ(scheduler.pool().num_owned(), 2);
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

TEST(Scheduler, TheYoungestIsPreemptedAndGoesOnWithItsTokens) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 4}, 5);
  scheduler.submit(make_sequence(1, 31, 30));  // 2 blocks, 4 in the end
  scheduler.submit(make_sequence(2, 30, 20));  // 2 blocks, 4 in the end
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 31}, {2, 30}}));
  run_step(scheduler);
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 1}, {2, 1}}));  // the first takes the last free block
  EXPECT_EQ(run_step(scheduler), (Shares{{1, 1}}));          // the second would need another
  EXPECT_EQ(scheduler.counters().preemptions, 1);
  EXPECT_EQ(scheduler.num_waiting(), 1);
  EXPECT_EQ(scheduler.pool().num_owned(), 3);
  while (scheduler.num_waiting() > 0) run_step(scheduler);
  ASSERT_EQ(scheduler.finished().size(), 1u);
  EXPECT_EQ(scheduler.finished()[0]->id, 1u);
  scheduler.forget_finished();
  while (scheduler.has_work()) run_step(scheduler);
  EXPECT_EQ(scheduler.finished()[0]->num_generated(), 20);
}

TEST(Scheduler, PromptsGetFewRowsWhileOthersDecode) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 4}, 20);
  scheduler.submit(make_sequence(1, 4, 10));
  run_step(scheduler);
  scheduler.submit(make_sequence(2, 100, 1));
  const StepPlan& plan = scheduler.plan({.work = 8});
  EXPECT_EQ(shares(plan), (Shares{{1, 1}, {2, 8}}));
  scheduler.commit(plan, std::vector<TokenId>(2, 100));
  scheduler.cancel(1);
  run_step(scheduler);
  const StepPlan& alone = scheduler.plan({.work = 8});
  EXPECT_EQ(shares(alone), (Shares{{2, 28}})) << "nothing decodes, so that nobody is delayed";
}

TEST(Scheduler, NobodyIsDelayedWhoDoesNotReadTokensAsTheyCome) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 4}, 20);
  auto patient = make_sequence(1, 4, 10);
  patient->request.streams = false;
  scheduler.submit(std::move(patient));
  run_step(scheduler);
  scheduler.submit(make_sequence(2, 100, 1));
  EXPECT_EQ(shares(scheduler.plan({.work = 8})), (Shares{{1, 1}, {2, 63}}));
}

TEST(Scheduler, RowsOfPromptsWeighTheirKeys) {
  Scheduler scheduler({.max_batch_tokens = 512, .max_num_seqs = 4}, 200);
  scheduler.submit(make_sequence(1, 4, 400));
  run_step(scheduler);
  scheduler.submit(make_sequence(2, 1000, 1));
  scheduler.submit(make_sequence(3, 100, 1));
  int first = 0;
  while (first < 999) {
    const std::int64_t work = first < 900 ? 5000 : 12;
    const StepPlan& plan = scheduler.plan({.work = work, .row_weight = 10, .key_weight = 1});
    ASSERT_GE(plan.entries.size(), 2u);
    const PlannedSequence& slice = plan.entries[1];
    ASSERT_EQ(slice.sequence->id, 2u);
    ASSERT_EQ(slice.first, first);
    std::int64_t weight = 0;  // row by row, the slow way
    for (int row = 0; row < slice.count; ++row) weight += 10 + (first + row + 1);
    if (work == 12) {
      EXPECT_EQ(slice.count, 1) << "a prompt goes on, whatever its row weighs";
      EXPECT_EQ(plan.entries.size(), 2u);
    } else {
      EXPECT_LE(weight, work);
      EXPECT_GT(weight + 10 + first + slice.count + 1, work) << "one more row would have been too much";
    }
    first += slice.count;
    scheduler.commit(plan, std::vector<TokenId>(plan.entries.size(), 100));
    scheduler.forget_finished();
  }
  EXPECT_EQ(scheduler.plan({.work = 0}).entries.size(), 2u) << "the last row of a prompt is one of those that decode";
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

}  // namespace
}  // namespace nb::engine
