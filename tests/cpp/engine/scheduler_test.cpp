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

/// A value for the KV of the last of `tokens`, which depends on all of them, as KV does.
std::uint64_t kv_of(std::span<const TokenId> tokens) {
  std::uint64_t value = 1469598103934665603u;
  for (const TokenId token : tokens) value = (value ^ static_cast<std::uint64_t>(token)) * 1099511628211u;
  return value;
}

/// The token that answer `choice` of the random runs continues `tokens` with; 0 stops it.
TokenId next_token(std::span<const TokenId> tokens, int choice) {
  return static_cast<TokenId>((kv_of(tokens) >> 20) + 7 * static_cast<std::uint64_t>(choice)) % 16;
}

using AnswerKey = std::pair<RequestId, int>;

/// What must become of an answer in the random runs below.
struct Expected {
  std::vector<TokenId> tokens;  // prompt and output
  int num_prompt;
  bool cancelled = false;
  bool ended = false;
};

/// Random arrivals, lengths, stops, cancellations, namespaces and numbers of answers on one random configuration, over
/// a memory that holds for each slot the value of its KV. Many prompts begin alike.
class RandomRun {
 public:
  explicit RandomRun(unsigned seed)
      : random_(seed),
        limits_{.max_batch_tokens = pick(1, 40), .max_num_seqs = pick(1, 8), .max_waiting = pick(0, 1) * pick(1, 6)},
        scheduler_(limits_, pick(2, 40), pick(0, 3) > 0 ? std::optional<std::string>("test") : std::nullopt),
        memory_(static_cast<std::size_t>(scheduler_.pool().num_blocks()) * kBlockTokens, kGarbage) {}

  void run() {
    for (int step = 0; step < 150; ++step) {
      arrive();
      cancel_some();
      one_step();
    }
    for (int step = 0; scheduler_.has_work() && step < 20'000; ++step) one_step();
    EXPECT_FALSE(scheduler_.has_work());
    EXPECT_EQ(scheduler_.pool().num_available(), scheduler_.pool().num_blocks());
    for (const auto& [key, expected] : answers_) EXPECT_TRUE(expected.ended) << "request " << key.first;
    EXPECT_FALSE(answers_.empty());
  }

  const SchedulerCounters& counters() const { return scheduler_.counters(); }

 private:
  static constexpr std::uint64_t kGarbage = 0xDEAD;

  int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  /// Beginnings from a small set, so that prompts share blocks, and sometimes all of a prompt.
  std::vector<TokenId> prompt() {
    std::vector<TokenId> tokens;
    const int shared = pick(0, 6) * pick(0, 16);
    const int family = pick(1, 3);
    for (int i = 0; i < shared; ++i) tokens.push_back(family * 1000 + i);
    const int own = tokens.empty() ? pick(1, 100) : pick(0, 1) * pick(0, 40);
    for (int i = 0; i < own; ++i) tokens.push_back(pick(1, 5));
    if (tokens.empty()) tokens.push_back(1);
    return tokens;
  }

  void arrive() {
    if (pick(0, 2) == 0) return;
    Request request;
    request.prompt = prompt();
    request.max_tokens = pick(0, 40);
    request.n = pick(0, 3) > 0 ? 1 : pick(2, 4);
    request.cache_salt = pick(0, 4) > 0 ? "" : "other";
    if (request.max_tokens == 0 || pick(0, 9) == 0) request.prompt_logprobs = 0;
    std::vector<std::unique_ptr<Sequence>> sequences;
    std::vector<Expected> expected;
    for (int choice = 0; choice < request.n; ++choice) {
      Request one = request;
      if (choice > 0) one.prompt_logprobs.reset();
      if (choice > 0 && one.max_tokens == 0) one.max_tokens = 1;
      sequences.push_back(std::make_unique<Sequence>(next_id_, one, std::vector<TokenId>{0}, 150, choice));
      expected.push_back(finished(*sequences.back()));
    }
    const auto longest = [](const auto& a, const auto& b) { return a->max_len < b->max_len; };
    const int max_len = (*std::max_element(sequences.begin(), sequences.end(), longest))->max_len;
    const bool fits = kv::BlockTable::blocks_for(max_len) <= scheduler_.pool().num_blocks();
    try {
      scheduler_.submit(std::move(sequences));
      EXPECT_TRUE(fits);
      for (int choice = 0; choice < request.n; ++choice) {
        answers_[{next_id_, choice}] = expected[static_cast<std::size_t>(choice)];
      }
      ++next_id_;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), fits ? ErrorCode::overloaded : ErrorCode::invalid_argument);
    }
  }

  static Expected finished(const Sequence& sequence) {
    Expected expected{.tokens = sequence.tokens, .num_prompt = sequence.num_prompt};
    while (static_cast<int>(expected.tokens.size()) < sequence.max_len) {
      const TokenId token = next_token(expected.tokens, sequence.choice);
      if (token == 0) break;
      expected.tokens.push_back(token);
    }
    return expected;
  }

  void cancel_some() {
    if (next_id_ == 1 || pick(0, 9) > 0) return;
    const RequestId id = static_cast<RequestId>(pick(1, static_cast<int>(next_id_) - 1));
    bool lives = false;
    for (auto& [key, expected] : answers_) {
      if (key.first != id || expected.ended) continue;
      lives = true;
      expected.cancelled = true;
    }
    EXPECT_EQ(scheduler_.cancel(id), lives);
  }

  PromptBudget random_budget() {
    if (pick(0, 3) > 0) return {};
    return {.work = pick(1, 8), .row_weight = 1, .key_weight = pick(0, 2)};
  }

  void one_step() {
    const StepPlan& plan = scheduler_.plan(random_budget());
    update_memory();
    check_plan(plan);
    compute(plan);
    std::vector<TokenId> sampled;
    for (const auto& entry : plan.entries)
      sampled.push_back(next_token(entry.sequence->tokens, entry.sequence->choice));
    scheduler_.commit(plan, sampled);
    scheduler_.check_invariants();
    update_memory();
    for (const auto& sequence : scheduler_.finished()) check_end(*sequence);
    scheduler_.forget_finished();
  }

  void update_memory() {
    const auto block = [&](BlockId id) { return memory_.begin() + static_cast<std::ptrdiff_t>(id) * kBlockTokens; };
    for (const auto& copy : scheduler_.copies()) std::copy_n(block(copy.from), kBlockTokens, block(copy.to));
    for (const BlockId id : scheduler_.freed_blocks()) std::fill_n(block(id), kBlockTokens, kGarbage);
    for (const BlockId id : scheduler_.fresh_blocks()) std::fill_n(block(id), kBlockTokens, 0);
    scheduler_.copies().clear();
    scheduler_.freed_blocks().clear();
    scheduler_.fresh_blocks().clear();
  }

  /// Writes the KV of every planned row, then looks at all that the rows attend to.
  void compute(const StepPlan& plan) {
    const auto slot = [](const Sequence& sequence, int position) {
      return static_cast<std::size_t>(sequence.table.slot_of(position));
    };
    for (const auto& entry : plan.entries) {
      const std::span<const TokenId> tokens = entry.sequence->tokens;
      for (int position = entry.first; position < entry.first + entry.count; ++position) {
        const std::size_t where = slot(*entry.sequence, position);
        const BlockId block = static_cast<BlockId>(where) / kBlockTokens;
        ASSERT_EQ(scheduler_.pool().ref_count(block), 1) << "a shared block is written";
        ASSERT_FALSE(scheduler_.pool().is_kept(block)) << "a cached block is written";
        memory_[where] = kv_of(tokens.first(static_cast<std::size_t>(position) + 1));
      }
    }
    for (const auto& entry : plan.entries) {
      const std::span<const TokenId> tokens = entry.sequence->tokens;
      for (int position = 0; position < entry.first + entry.count; ++position) {
        ASSERT_EQ(memory_[slot(*entry.sequence, position)], kv_of(tokens.first(static_cast<std::size_t>(position) + 1)))
            << "request " << entry.sequence->id << " position " << position;
      }
    }
  }

  void check_plan(const StepPlan& plan) {
    int total = 0;
    std::map<AnswerKey, int> seen;
    bool sliced = false;
    for (const auto& entry : plan.entries) {
      const Sequence& sequence = *entry.sequence;
      EXPECT_EQ(++seen[AnswerKey(sequence.id, sequence.choice)], 1);
      EXPECT_GE(entry.count, 1);
      EXPECT_EQ(entry.first, sequence.computed_len());
      EXPECT_LE(entry.first + entry.count, sequence.len());
      EXPECT_GE(sequence.table.length(), entry.first + entry.count);
      EXPECT_EQ(entry.samples, entry.first + entry.count == sequence.len() && sequence.generates());
      EXPECT_FALSE(sequence.ends_early());
      EXPECT_FALSE(sliced) << "a younger sequence computes while an older prompt was cut short";
      sliced = entry.first + entry.count < sequence.len();
      total += entry.count;
    }
    EXPECT_EQ(total, plan.num_tokens);
    EXPECT_LE(total, limits_.max_batch_tokens);
    // Something always moves: a step without rows only ends cancelled sequences.
    const bool live = std::any_of(answers_.begin(), answers_.end(),
                                  [](const auto& entry) { return !entry.second.ended && !entry.second.cancelled; });
    idle_steps_ = live && total == 0 ? idle_steps_ + 1 : 0;
    EXPECT_LE(idle_steps_, 1);
  }

  void check_end(const Sequence& sequence) {
    Expected& expected = answers_.at({sequence.id, sequence.choice});
    EXPECT_FALSE(expected.ended) << "request " << sequence.id << " ended twice";
    expected.ended = true;
    EXPECT_EQ(sequence.table.capacity(), 0);
    if (sequence.finish_reason == FinishReason::abort) {
      EXPECT_TRUE(expected.cancelled);
    } else {
      EXPECT_EQ(sequence.tokens, expected.tokens);
    }
  }

  std::mt19937 random_;
  SchedulerLimits limits_;
  Scheduler scheduler_;
  std::vector<std::uint64_t> memory_;
  std::map<AnswerKey, Expected> answers_;
  RequestId next_id_ = 1;
  int idle_steps_ = 0;
};

TEST(Scheduler, RandomRunsKeepTheInvariants) {
  const unsigned num_seeds = std::getenv("NANOBRAID_TEST_FULL") != nullptr ? 3000 : is_reduced() ? 60 : 300;
  SchedulerCounters total;
  for (unsigned seed = 0; seed < num_seeds && !::testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE(concat("seed ", seed));
    RandomRun run(seed);
    run.run();
    total.preemptions += run.counters().preemptions;
    total.prefix_hit_tokens += run.counters().prefix_hit_tokens;
    total.forked_tokens += run.counters().forked_tokens;
  }
  EXPECT_GT(total.preemptions, num_seeds);
  EXPECT_GT(total.prefix_hit_tokens, 100 * num_seeds);
  EXPECT_GT(total.forked_tokens, 20 * num_seeds);
}

}  // namespace
}  // namespace nb::engine
