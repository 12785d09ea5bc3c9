// What the scheduler does with what an archive gives or fails to give: integers only.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "engine/fake_requests.h"
#include "engine/scheduler.h"

namespace nb::engine {
namespace {

/// Says that it filled as many blocks as it is told to.
class FakeArchive : public BlockArchive {
 public:
  int load_prefix(const kv::PrefixKeys& keys, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                  int first) noexcept override {
    ++num_asked;
    EXPECT_GE(keys.keys.size(), blocks.size());
    EXPECT_EQ(tokens.size(), blocks.size() * kBlockTokens);
    EXPECT_LT(first, static_cast<int>(blocks.size()));
    asked_from = first;
    return std::min(num_blocks, static_cast<int>(blocks.size()) - first);
  }
  bool load_chunk(const Digest&, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                  int) noexcept override {
    EXPECT_EQ(blocks.size(), (tokens.size() + kBlockTokens - 1) / kBlockTokens);
    return has_chunks;
  }

  int num_blocks = 0;
  bool has_chunks = false;
  int num_asked = 0;
  int asked_from = -1;
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
