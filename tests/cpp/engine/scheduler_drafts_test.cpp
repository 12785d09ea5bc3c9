// Drafts in the scheduler: who gets how many, and that those which are wrong leave nothing behind.
#include <gtest/gtest.h>

#include <functional>

#include "engine/fake_requests.h"
#include "engine/scheduler.h"
#include "sampling/accept.h"

namespace nb::engine {
namespace {

using sampling::kNotDrawn;
using Tokens = std::vector<TokenId>;

/// Gives everybody the drafts 50, 51, ..., as many as there may be.
class Counting final : public DraftSource {
 public:
  explicit Counting(int most) : most_(most) {}
  void propose(std::span<const DraftCandidate> candidates, DraftRoom room) override {
    last_room = room;
    for (const DraftCandidate& candidate : candidates) {
      const int count = std::min({most_, candidate.most, room.free_rows});
      for (int i = 0; i < count; ++i) candidate.sequence->drafts.push_back(50 + i);
      room.free_rows -= count;
    }
  }
  DraftRoom last_room{};

 private:
  int most_;
};

/// The next plan, with the memory's lists emptied.
const StepPlan& plan(Scheduler& scheduler) {
  scheduler.fresh_blocks().clear();
  scheduler.freed_blocks().clear();
  return scheduler.plan();
}

/// A sequence whose prompt is computed and whose first token is drawn.
Sequence& begin(Scheduler& scheduler, std::unique_ptr<Sequence> sequence) {
  Sequence& result = *sequence;
  scheduler.submit(std::move(sequence));
  const StepPlan& first = plan(scheduler);
  scheduler.commit(first, Tokens(static_cast<std::size_t>(first.num_draws), 40));
  return result;
}

TEST(SchedulerDrafts, RightOnesAreTokensOfTheSameStep) {
  Counting source(3);
  Scheduler scheduler({.max_batch_tokens = 32}, 10);
  scheduler.set_draft_source(source);
  Sequence& sequence = begin(scheduler, make_sequence(1, 5, 20));
  const StepPlan& step = plan(scheduler);
  ASSERT_EQ(step.entries.size(), 1u);
  EXPECT_EQ(step.entries[0].count, 4);
  EXPECT_EQ(step.entries[0].num_drafts, 3);
  EXPECT_EQ(step.num_tokens, 4);
  EXPECT_EQ(step.num_draws, 4);
  EXPECT_EQ(source.last_room.planned_rows, 1);
  EXPECT_EQ(source.last_room.free_rows, 31);
  scheduler.commit(step, Tokens{50, 51, 7, kNotDrawn});
  scheduler.check_invariants();
  EXPECT_EQ(sequence.tokens, (Tokens{1, 2, 3, 4, 5, 40, 50, 51, 7}));
  EXPECT_EQ(sequence.computed_len(), 8);
  EXPECT_EQ(sequence.table.length(), 8);
  EXPECT_EQ(sequence.num_drafted, 3);
  EXPECT_EQ(sequence.num_accepted, 2);
  const StepPlan& all = plan(scheduler);
  EXPECT_EQ(all.entries[0].first, 8);
  scheduler.commit(all, Tokens{50, 51, 52, 8});
  EXPECT_EQ(sequence.computed_len(), 12);
  EXPECT_EQ(sequence.tokens.back(), 8);
}

TEST(SchedulerDrafts, ABlockOfWrongOnesIsClearedWhenItIsUsedAgain) {
  Counting source(12);
  Scheduler scheduler({.max_batch_tokens = 32}, 10, "test");
  scheduler.set_draft_source(source);
  Sequence& sequence = begin(scheduler, make_sequence(1, 8, 40));
  const StepPlan& step = plan(scheduler);
  EXPECT_EQ(scheduler.fresh_blocks().size(), 1u);
  Tokens drawn(13, kNotDrawn);
  drawn[0] = 9;
  scheduler.commit(step, drawn);
  scheduler.check_invariants();
  EXPECT_EQ(sequence.num_published, 0) << "the first block was full of drafts";
  EXPECT_EQ(sequence.computed_len(), 9);
  EXPECT_EQ(sequence.table.length(), 9);
  EXPECT_EQ(sequence.table.num_owned(), 2) << "it stays reserved";
  const BlockId second = sequence.table.reserved()[1];
  EXPECT_TRUE(scheduler.freed_blocks().empty());
  plan(scheduler);
  EXPECT_EQ(scheduler.fresh_blocks(), (std::vector<BlockId>{second}));
}

TEST(SchedulerDrafts, NeverPassTheEndOfAnAnswer) {
  Counting source(100);
  Scheduler scheduler({.max_batch_tokens = 200}, 20);
  scheduler.set_draft_source(source);
  Sequence& sequence = begin(scheduler, make_sequence(1, 5, 8));
  const StepPlan& step = plan(scheduler);
  EXPECT_EQ(step.entries[0].num_drafts, 6) << "with a token behind them that is all that is wanted";
  scheduler.commit(step, Tokens{50, 51, 52, 53, 54, 55, 9});
  EXPECT_EQ(sequence.finish_reason, FinishReason::length);
  EXPECT_EQ(sequence.num_generated(), 8);
  EXPECT_FALSE(scheduler.has_work());
  scheduler.check_invariants();
}

TEST(SchedulerDrafts, TakeWhatDecodesAndPromptsLeave) {
  Counting source(100);
  Scheduler scheduler({.max_batch_tokens = 16}, 40);
  scheduler.set_draft_source(source);
  begin(scheduler, make_sequence(1, 5, 50));
  begin(scheduler, make_sequence(2, 5, 50));
  scheduler.submit(make_sequence(3, 10, 50));
  const StepPlan& step = plan(scheduler);
  ASSERT_EQ(step.entries.size(), 3u);
  EXPECT_EQ(step.entries[2].count, 10);
  EXPECT_EQ(step.entries[2].num_drafts, 0) << "a prompt has none";
  EXPECT_EQ(step.entries[0].num_drafts + step.entries[1].num_drafts, 4);
  EXPECT_EQ(step.num_tokens, 16);
  EXPECT_EQ(step.entries[1].first_draw, step.entries[0].num_draws());
}

TEST(SchedulerDrafts, TakeNoBlockThatOthersMayNeed) {
  Counting source(100);
  Scheduler scheduler({.max_batch_tokens = 200, .max_num_seqs = 4}, 6);
  scheduler.set_draft_source(source);
  begin(scheduler, make_sequence(1, 13, 60));
  begin(scheduler, make_sequence(2, 30, 60));  // the other has one more token by then
  const StepPlan& step = plan(scheduler);
  ASSERT_EQ(step.entries.size(), 2u);
  EXPECT_EQ(scheduler.counters().preemptions, 0);
  EXPECT_GE(scheduler.pool().num_available(), 1);
  EXPECT_EQ(step.entries[0].num_drafts, 1) << "up to the end of its block";
  EXPECT_EQ(step.entries[1].num_drafts, 1);
}

TEST(SchedulerDrafts, AnAnswerMayEndAmongThem) {
  Counting source(4);
  Scheduler scheduler({.max_batch_tokens = 32}, 10);
  scheduler.set_draft_source(source);
  Sequence& sequence = begin(scheduler, make_sequence(1, make_request(5, 20), {51}));
  scheduler.commit(plan(scheduler), Tokens{50, 51, kNotDrawn, kNotDrawn, kNotDrawn});
  EXPECT_EQ(sequence.finish_reason, FinishReason::stop);
  EXPECT_EQ(sequence.tokens, (Tokens{1, 2, 3, 4, 5, 40, 50})) << "without the token that ends it";
  EXPECT_FALSE(scheduler.has_work());
}

TEST(SchedulerDrafts, AMonitorSeesEachTokenOnceAndEndsTheAnswer) {
  struct Monitor final : TokenMonitor {
    explicit Monitor(Tokens& seen) : tokens(seen) {}
    bool ends_with(TokenId token) noexcept override {
      tokens.push_back(token);
      return token == 51;
    }
    Tokens& tokens;
  };
  Counting source(4);
  Scheduler scheduler({.max_batch_tokens = 32}, 10);
  scheduler.set_draft_source(source);
  Tokens seen;
  Request request = make_request(5, 20);
  request.make_monitor = [&] { return std::make_unique<Monitor>(seen); };
  Sequence& sequence = begin(scheduler, make_sequence(1, request));
  const StepPlan& step = plan(scheduler);
  sequence.error = "of a token behind the end";
  scheduler.commit(step, Tokens{50, 51, 52, kNotDrawn, kNotDrawn});
  EXPECT_EQ(seen, (Tokens{40, 50, 51}));
  EXPECT_EQ(sequence.tokens, (Tokens{1, 2, 3, 4, 5, 40, 50, 51}));
  EXPECT_EQ(sequence.finish_reason, FinishReason::stop);
  EXPECT_EQ(sequence.error, "") << "nobody wants that token";
}

TEST(SchedulerDrafts, AnErrorBehindRightOnesKeepsThem) {
  Counting source(4);
  Scheduler scheduler({.max_batch_tokens = 32}, 10);
  scheduler.set_draft_source(source);
  Sequence& sequence = begin(scheduler, make_sequence(1, 5, 20));
  const StepPlan& step = plan(scheduler);
  sequence.error = "no token is left";
  scheduler.commit(step, Tokens{50, kNotDrawn, kNotDrawn, kNotDrawn, kNotDrawn});
  EXPECT_EQ(sequence.finish_reason, FinishReason::error);
  EXPECT_EQ(sequence.error, "no token is left");
  EXPECT_EQ(sequence.tokens.back(), 50);
}

TEST(SchedulerDrafts, FillNoGroupOfKeysThatWouldBeSealed) {
  Counting source(100);
  Scheduler scheduler({.max_batch_tokens = 200, .seals_keys = true}, 20);
  scheduler.set_draft_source(source);
  Sequence& sequence = begin(scheduler, make_sequence(1, 12, 60));
  const int expected[] = {2, 1, 0, 15};  // the next token goes to index 12, 13, 14, 15 of its block
  for (const int drafts : expected) {
    const StepPlan& step = plan(scheduler);
    EXPECT_EQ(step.entries[0].num_drafts, drafts) << sequence.computed_len();
    Tokens drawn(static_cast<std::size_t>(step.num_draws), kNotDrawn);
    drawn[0] = 9;
    scheduler.commit(step, drawn);
    scheduler.check_invariants();
  }
}

TEST(SchedulerDrafts, GoOnlyToWhoWantsThem) {
  Counting source(4);
  Scheduler scheduler({.max_batch_tokens = 64}, 20);
  scheduler.set_draft_source(source);
  Request without = make_request(5, 20);
  without.speculative = false;
  Request keeps_nothing = make_request(5, 20);
  keeps_nothing.keeps_kv = false;
  begin(scheduler, make_sequence(1, without));
  begin(scheduler, make_sequence(2, keeps_nothing));
  begin(scheduler, make_sequence(3, 5, 20));
  for (const PlannedSequence& entry : plan(scheduler).entries) {
    EXPECT_EQ(entry.num_drafts, entry.sequence->id == 3 ? 4 : 0);
  }
}

}  // namespace
}  // namespace nb::engine
