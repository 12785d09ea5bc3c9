// What the scheduler does with what an archive gives or fails to give: integers only.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <vector>

#include "engine/fake_requests.h"
#include "engine/scheduler.h"

namespace nb::engine {
namespace {

/// Says that it filled as many blocks as it is told to, at once or when it is told to.
class FakeArchive : public BlockArchive {
 public:
  LoadId begin_prefix(const kv::PrefixKeys& keys, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                      int first) noexcept override {
    ++num_asked;
    EXPECT_GE(keys.keys.size(), blocks.size());
    EXPECT_EQ(tokens.size(), blocks.size() * kBlockTokens);
    EXPECT_LT(first, static_cast<int>(blocks.size()));
    asked_from = first;
    return begin(blocks, first, std::min(num_blocks, static_cast<int>(blocks.size()) - first));
  }
  LoadId begin_chunk(const Digest&, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                     int first) noexcept override {
    EXPECT_EQ(blocks.size(), (tokens.size() + kBlockTokens - 1) / kBlockTokens);
    return has_chunks ? begin(blocks, first, static_cast<int>(blocks.size()) - first) : 0;
  }
  std::optional<int> take(LoadId load) noexcept override {
    if (!may_end()) return std::nullopt;
    const int filled = loads.at(load).num_filled;
    loads.erase(load);
    return filled;
  }
  void stop(LoadId load) noexcept override {
    EXPECT_EQ(loads.erase(load), 1u);
    ++num_stopped;
  }

  struct Load {
    std::vector<BlockId> blocks;  // that are being written to
    int num_filled;
  };

  int num_blocks = 0;
  bool has_chunks = false;
  std::function<void()> settle = [] {};
  std::function<bool()> may_end = [] { return true; };
  int num_asked = 0;
  int asked_from = -1;
  int num_stopped = 0;
  std::map<LoadId, Load> loads;

 private:
  LoadId begin(std::span<const BlockId> blocks, int first, int filled) {
    settle();
    loads[++last_] = {.blocks = {blocks.begin() + first, blocks.end()}, .num_filled = filled};
    return last_;
  }

  LoadId last_ = 0;
};

/// Rows of each step until nothing is left to do.
std::vector<int> rows_of_steps(Scheduler& scheduler) {
  std::vector<int> rows;
  while (scheduler.has_work() && rows.size() < 1000) {
    const StepPlan& plan = scheduler.plan();
    rows.push_back(plan.num_tokens);
    scheduler.commit(plan, std::vector<TokenId>(plan.entries.size(), 100));
    scheduler.check_invariants();
    scheduler.fresh_blocks().clear();
    scheduler.freed_blocks().clear();
    scheduler.forget_finished();
  }
  return rows;
}

TEST(SchedulerArchive, RestoredBlocksAreNotComputedNorCleared) {
  FakeArchive archive;
  archive.num_blocks = 2;
  Scheduler scheduler({.max_batch_tokens = 64}, 10, "test");
  scheduler.set_archive(archive);
  scheduler.submit(make_sequence(1, 50, 2));
  const StepPlan& plan = scheduler.plan();
  ASSERT_EQ(plan.entries.size(), 1u);
  EXPECT_EQ(plan.entries[0].first, 32);
  EXPECT_EQ(plan.num_tokens, 18);
  EXPECT_EQ(scheduler.fresh_blocks().size(), 2u) << "of four";
  EXPECT_EQ(scheduler.counters().restored_tokens, 32);
  EXPECT_EQ(plan.entries[0].sequence->num_cached_tokens, 32);
  EXPECT_EQ(plan.entries[0].sequence->num_published, 2) << "others may share them at once";
  scheduler.check_invariants();
}

TEST(SchedulerArchive, IsAskedForWhatThePrefixCacheDoesNotHave) {
  FakeArchive archive;
  Scheduler scheduler({.max_batch_tokens = 64}, 20, "test");
  scheduler.set_archive(archive);
  scheduler.submit(make_sequence(1, 40, 1));
  EXPECT_EQ(rows_of_steps(scheduler), std::vector<int>{40});
  EXPECT_EQ(archive.asked_from, 0);
  scheduler.submit(make_sequence(2, 60, 1));
  archive.num_blocks = 9;
  EXPECT_EQ(rows_of_steps(scheduler), std::vector<int>{12}) << "the last token is computed, in a block of its own";
  EXPECT_EQ(archive.asked_from, 2);
  scheduler.submit(make_sequence(3, 60, 1));
  archive.num_asked = 0;
  EXPECT_EQ(rows_of_steps(scheduler), std::vector<int>{12});
  EXPECT_EQ(archive.num_asked, 0) << "all is in memory";
}

TEST(SchedulerArchive, AChunkThatIsThereTakesNoRows) {
  for (const bool has_chunks : {false, true}) {
    FakeArchive archive;
    archive.has_chunks = has_chunks;
    Scheduler scheduler({.max_batch_tokens = 64}, 10, "test");
    scheduler.set_archive(archive);
    Request request;
    request.prompt.assign(40, 7);
    request.chunks = {{.begin = 0, .count = 40, .anchor = {}}};
    request.only_chunks = true;
    request.max_tokens = 0;
    scheduler.submit(std::make_unique<Sequence>(RequestId{1}, request, std::span<const TokenId>(), 100));
    EXPECT_EQ(rows_of_steps(scheduler), (std::vector<int>{has_chunks ? 0 : 40}));
    EXPECT_EQ(scheduler.counters().restored_chunks, has_chunks ? 1 : 0);
    ASSERT_EQ(scheduler.chunks().chunks().size(), 1u);
    EXPECT_TRUE(scheduler.chunks().chunks().begin()->second.is_ready);
    EXPECT_EQ(scheduler.pool().num_owned(), 3);
    scheduler.drop_saves();
    EXPECT_EQ(scheduler.pool().num_owned(), 3) << "the chunk has them";
    EXPECT_TRUE(scheduler.remove_chunk(scheduler.chunks().chunks().begin()->first));
    scheduler.check_invariants();
    EXPECT_EQ(scheduler.pool().num_owned(), 0);
  }
}

TEST(SchedulerArchive, OthersRunWhileALoadIsUnderWay) {
  FakeArchive archive;
  bool ends = false;
  archive.may_end = [&] { return ends; };
  archive.num_blocks = 3;
  Scheduler scheduler({.max_batch_tokens = 64}, 40, "test");
  scheduler.set_archive(archive);
  const auto step = [&] {
    const StepPlan& plan = scheduler.plan();
    std::vector<RequestId> ids;
    for (const PlannedSequence& entry : plan.entries) ids.push_back(entry.sequence->id);
    scheduler.commit(plan, std::vector<TokenId>(plan.entries.size(), 100));
    scheduler.check_invariants();
    return ids;
  };
  using Ids = std::vector<RequestId>;
  scheduler.submit(make_sequence(1, 10, 30));
  EXPECT_EQ(step(), Ids{1}) << "too short for a block";
  scheduler.submit(make_sequence(2, 60, 30));
  auto younger = make_sequence(3, 10, 30);
  std::fill(younger->tokens.begin(), younger->tokens.end(), 9);
  scheduler.submit(std::move(younger));
  scheduler.submit(make_sequence(4, 60, 30));  // needs what is being loaded
  EXPECT_EQ(step(), (Ids{1, 3}));
  EXPECT_EQ(step(), (Ids{1, 3}));
  EXPECT_TRUE(scheduler.is_loading());
  EXPECT_EQ(scheduler.num_running(), 4);
  EXPECT_EQ(archive.num_asked, 1) << "nobody loads what another one does";
  ends = true;
  EXPECT_EQ(step(), (Ids{1, 3, 2, 4}));
  EXPECT_FALSE(scheduler.is_loading());
  EXPECT_EQ(scheduler.counters().restored_tokens, 48);
  EXPECT_EQ(scheduler.counters().prefix_hit_tokens, 48);
}

TEST(SchedulerArchive, AChunkThatFailsToLoadIsComputed) {
  FakeArchive archive;
  archive.has_chunks = true;
  bool ends = false;
  archive.may_end = [&] { return ends; };
  Scheduler scheduler({.max_batch_tokens = 64}, 10, "test");
  scheduler.set_archive(archive);
  Request request;
  request.prompt.assign(40, 7);
  request.chunks = {{.begin = 0, .count = 40, .anchor = {}}};
  request.only_chunks = true;
  request.max_tokens = 0;
  scheduler.submit(std::make_unique<Sequence>(RequestId{1}, request, std::span<const TokenId>(), 100));
  EXPECT_EQ(scheduler.plan().num_tokens, 0);
  scheduler.check_invariants();
  ASSERT_EQ(archive.loads.size(), 1u);
  archive.loads.begin()->second.num_filled = 0;
  ends = true;
  EXPECT_EQ(rows_of_steps(scheduler), std::vector<int>{40});
  EXPECT_EQ(archive.num_asked, 1) << "for a prefix instead";
  EXPECT_EQ(scheduler.counters().restored_chunks, 0);
}

/// Whatever ends a sequence: no block is given back while something may write to it.
TEST(SchedulerArchive, BlocksOfALoadAreNobodyElses) {
  int preemptions = 0, stopped = 0;
  std::int64_t restored = 0;
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed);
    const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    FakeArchive archive;
    archive.may_end = [&] { return draw(0, 5) == 0; };
    Scheduler scheduler({.max_batch_tokens = 48, .max_num_seqs = 5}, 24, "test");
    scheduler.set_archive(archive);
    archive.settle = [&] {
      scheduler.fresh_blocks().clear();
      scheduler.freed_blocks().clear();
    };
    RequestId next = 1;
    for (int steps = 0; next <= 25 || scheduler.has_work(); ++steps) {
      ASSERT_LT(steps, 20'000);
      archive.num_blocks = draw(0, 9);
      if (next <= 25 && draw(0, 2) == 0) {
        auto sequence = make_sequence(next++, draw(1, 150), draw(1, 60));
        std::fill(sequence->tokens.begin() + draw(0, sequence->len() - 1), sequence->tokens.end(), draw(0, 300));
        if (draw(0, 9) == 0) sequence->times.deadline = Clock::now();
        scheduler.submit(std::move(sequence));
      }
      if (draw(0, 15) == 0) scheduler.cancel(static_cast<RequestId>(draw(1, static_cast<int>(next))));
      if (draw(0, 99) == 0) scheduler.cancel_running(ErrorCode::internal, "a step failed");
      scheduler.end_overdue(Clock::now());
      const StepPlan& plan = scheduler.plan();
      for (const PlannedSequence& entry : plan.entries) ASSERT_EQ(entry.sequence->load, 0u);
      scheduler.commit(plan, std::vector<TokenId>(plan.entries.size(), 100));
      scheduler.check_invariants();
      for (const auto& [id, load] : archive.loads) {
        for (const BlockId block : load.blocks) {
          ASSERT_EQ(std::ranges::count(scheduler.freed_blocks(), block), 0) << "seed " << seed;
          ASSERT_EQ(std::ranges::count(scheduler.fresh_blocks(), block), 0) << "seed " << seed;
        }
      }
      ASSERT_EQ(scheduler.is_loading(), !archive.loads.empty());
      archive.settle();
      scheduler.forget_finished();
      if (draw(0, 3) == 0 && !scheduler.saves().empty()) scheduler.pop_save();
    }
    EXPECT_TRUE(archive.loads.empty());
    scheduler.drop_saves();
    EXPECT_EQ(scheduler.pool().num_owned(), 0);
    preemptions += static_cast<int>(scheduler.counters().preemptions);
    stopped += archive.num_stopped;
    restored += scheduler.counters().restored_tokens;
  }
  EXPECT_GT(preemptions, 20);
  EXPECT_GT(stopped, 20);
  EXPECT_GT(restored, 2000);
}

TEST(SchedulerArchive, WhatWaitsToBeKeptYieldsToWhoNeedsTheRoom) {
  FakeArchive archive;
  Scheduler scheduler({.max_batch_tokens = 64}, 6, "test");
  scheduler.set_archive(archive);
  scheduler.submit(make_sequence(1, 60, 1));
  rows_of_steps(scheduler);
  EXPECT_FALSE(scheduler.saves().empty());
  EXPECT_EQ(scheduler.pool().num_owned(), 3) << "full blocks wait";
  auto other = make_sequence(2, 90, 5);
  std::fill(other->tokens.begin(), other->tokens.end(), 9);
  scheduler.submit(std::move(other));
  EXPECT_EQ(rows_of_steps(scheduler).size(), 6u);
  EXPECT_EQ(scheduler.counters().preemptions, 0);
  EXPECT_EQ(scheduler.saves().num_dropped(), 1);
}

TEST(SchedulerArchive, NothingIsKeptWithoutAnArchive) {
  Scheduler scheduler({.max_batch_tokens = 64}, 6, "test");
  scheduler.submit(make_sequence(1, 60, 1));
  rows_of_steps(scheduler);
  EXPECT_TRUE(scheduler.saves().empty());
  EXPECT_EQ(scheduler.pool().num_owned(), 0);
}

}  // namespace
}  // namespace nb::engine
