#include <gtest/gtest.h>

#include <map>

#include "base/code_of.h"
#include "engine/engine_fixture.h"
#include "engine/fake_requests.h"

namespace nb::engine {
namespace {

/// A prompt of 5 plain tokens, a chunk of `count` tokens that differ with `which`, and 5 more.
Request with_chunk(int which, int count = 40, int max_tokens = 3) {
  Request request = make_request(10 + count, max_tokens);
  for (int i = 0; i < count; ++i) request.prompt[static_cast<std::size_t>(5 + i)] = 100 * which + i;
  request.chunks = {{.begin = 5, .count = count}};
  request.reuse.mode = ReuseMode::isolated;
  return request;
}

/// Wants nothing but the chunk.
Request only_chunk(int which, int count = 40, bool pin = false) {
  Request request = with_chunk(which, count, 0);
  request.only_chunks = true;
  request.pin_chunks = pin;
  request.reuse = {};
  return request;
}

class SchedulerChunks : public testing::Test {
 protected:
  /// One step; returns the rows of every entry by request and choice.
  std::map<std::pair<RequestId, int>, int> step(Scheduler& scheduler) {
    const StepPlan& plan = scheduler.plan();
    std::map<std::pair<RequestId, int>, int> rows;
    for (const auto& entry : plan.entries) rows[{entry.sequence->id, entry.sequence->choice}] = entry.count;
    scheduler.commit(plan, std::vector<TokenId>(plan.entries.size(), 9));
    for (const auto& sequence : scheduler.finished()) {
      if (!sequence->is_internal()) ended_[sequence->id] = sequence->finish_reason;
      if (!sequence->error.empty()) errors_[sequence->id] = sequence->error;
    }
    scheduler.forget_finished();
    scheduler.freed_blocks().clear();
    scheduler.fresh_blocks().clear();
    scheduler.copies().clear();
    scheduler.check_invariants();
    return rows;
  }

  void finish(Scheduler& scheduler) {
    for (int i = 0; scheduler.has_work(); ++i) {
      ASSERT_LT(i, 1000);
      step(scheduler);
    }
  }

  std::map<RequestId, FinishReason> ended_;
  std::map<RequestId, std::string> errors_;
};

using Rows = std::map<std::pair<RequestId, int>, int>;

TEST_F(SchedulerChunks, AMissingChunkIsComputedOnceRightBeforeItsFirstUser) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 8}, 50);
  scheduler.submit(make_sequence(1, with_chunk(1)));
  scheduler.submit(make_sequence(2, with_chunk(1)));
  EXPECT_EQ(step(scheduler), (Rows{{{1, -1}, 40}}));
  EXPECT_EQ(step(scheduler), (Rows{{{1, 0}, 10}, {{2, 0}, 10}}));  // its own tokens only
  finish(scheduler);
  EXPECT_EQ(scheduler.chunks().counters().misses, 1);
  EXPECT_EQ(scheduler.chunks().counters().hits, 1);
  EXPECT_EQ(scheduler.pool().num_owned(), 3);  // the chunk stays
  scheduler.submit(make_sequence(3, with_chunk(1)));
  EXPECT_EQ(step(scheduler), (Rows{{{3, 0}, 10}}));
  finish(scheduler);
}

TEST_F(SchedulerChunks, ATicketEndsWhenItsChunksAreThere) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 1}, 50);
  scheduler.submit(make_sequence(1, only_chunk(1, 40, true)));
  scheduler.submit(make_sequence(2, 10, 5));
  step(scheduler);
  EXPECT_EQ(ended_, (std::map<RequestId, FinishReason>{{1, FinishReason::length}}));
  scheduler.submit(make_sequence(3, only_chunk(1)));  // it is there
  finish(scheduler);
  EXPECT_EQ(ended_.at(3), FinishReason::length);
  const auto& chunk = scheduler.chunks().chunks().begin()->second;
  EXPECT_TRUE(chunk.is_pinned && chunk.is_ready);
  EXPECT_EQ(chunk.num_users, 0);
}

TEST_F(SchedulerChunks, WhoFindsNoRoomWaitsAndOldChunksGo) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 8}, 8);
  for (RequestId id = 1; id <= 4; ++id) scheduler.submit(make_sequence(id, with_chunk(static_cast<int>(id))));
  finish(scheduler);  // 3 blocks of a chunk and 1 of a request: two at a time
  for (RequestId id = 1; id <= 4; ++id) EXPECT_EQ(ended_.at(id), FinishReason::length) << id;
  EXPECT_GE(scheduler.chunks().counters().evictions, 2);
}

// Whoever waits for room is looked at in every step: its chunks are hashed and counted once all the same.
TEST_F(SchedulerChunks, WaitingNeitherHashesNorCountsAgain) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 8}, 9);
  scheduler.submit(make_sequence(1, only_chunk(1, 40, true)));  // 3 blocks
  finish(scheduler);
  scheduler.submit(make_sequence(2, 10, 70));  // 5 blocks in the end, so that 3 remain
  step(scheduler);
  Request both = with_chunk(1);
  both.prompt.insert(both.prompt.end(), 30, 7);  // and 3 for the request, which leave no room for the second chunk
  both.chunks.push_back({.begin = 50, .count = 30});
  scheduler.submit(make_sequence(3, both));
  step(scheduler);
  const auto keys = scheduler.counters().chunk_keys;
  EXPECT_EQ(keys, 1 + 2);
  for (int i = 0; i < 50; ++i) {
    ASSERT_EQ(step(scheduler), (Rows{{{2, 0}, 1}}));
    ASSERT_EQ(scheduler.counters().chunk_keys, keys);
    ASSERT_EQ(scheduler.chunks().counters().hits, 0);
    ASSERT_EQ(scheduler.chunks().counters().misses, 1);
    ASSERT_EQ(scheduler.chunks().chunks().begin()->second.num_hits, 0);
  }
  finish(scheduler);
  EXPECT_EQ(ended_.at(3), FinishReason::length);
  EXPECT_EQ(scheduler.counters().chunk_keys, keys);
  EXPECT_EQ(scheduler.chunks().counters().hits, 1);
  EXPECT_EQ(scheduler.chunks().counters().misses, 2);
  EXPECT_EQ(scheduler.chunks().chunks().begin()->second.num_hits, 1);
}

TEST_F(SchedulerChunks, TheSameChunkTwiceIsComputedOnce) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 8}, 7);  // room for one of the chunk and the request
  Request twice = with_chunk(1, 20);
  const Request once = twice;
  twice.prompt.insert(twice.prompt.end(), once.prompt.begin(), once.prompt.end());
  twice.chunks.push_back({.begin = 35, .count = 20});
  scheduler.submit(make_sequence(1, twice));
  finish(scheduler);
  EXPECT_EQ(ended_.at(1), FinishReason::length);
  EXPECT_EQ(scheduler.chunks().chunks().size(), 1u);
  EXPECT_EQ(scheduler.chunks().counters().misses, 1);
  EXPECT_EQ(scheduler.chunks().counters().hits, 1);
}

TEST_F(SchedulerChunks, PinnedChunksAreNotEvictedAndAnErrorNamesThem) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 8}, 8);
  scheduler.submit(make_sequence(1, only_chunk(1, 40, true)));
  scheduler.submit(make_sequence(2, only_chunk(2, 40, true)));
  scheduler.submit(make_sequence(3, with_chunk(3)));
  finish(scheduler);
  EXPECT_EQ(ended_.at(3), FinishReason::error);
  EXPECT_NE(errors_.at(3).find("no room for 1 blocks of the request and 3 of its chunks beside 6"), std::string::npos)
      << errors_.at(3);
  scheduler.remove_chunk(scheduler.chunks().chunks().begin()->first);
  scheduler.submit(make_sequence(4, with_chunk(3)));
  finish(scheduler);
  EXPECT_EQ(ended_.at(4), FinishReason::length);
}

TEST_F(SchedulerChunks, WhatCanNeverFitIsRefusedWithTheNumbers) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 8}, 3);
  EXPECT_EQ(code_of([&] { scheduler.submit(make_sequence(1, with_chunk(1))); }), ErrorCode::invalid_argument);
  EXPECT_FALSE(scheduler.has_work());
}

TEST_F(SchedulerChunks, AChunkThatCannotBeComputedEndsThoseWhoWait) {
  Scheduler scheduler({.max_batch_tokens = 16, .max_num_seqs = 8}, 50);
  scheduler.submit(make_sequence(1, with_chunk(1)));
  scheduler.submit(make_sequence(2, 4, 2));
  step(scheduler);
  scheduler.cancel_running(ErrorCode::internal, "it broke");
  finish(scheduler);
  EXPECT_EQ(ended_.at(1), FinishReason::abort);
  EXPECT_NE(errors_.at(1).find("it broke"), std::string::npos);
  EXPECT_TRUE(scheduler.chunks().chunks().empty());
  EXPECT_EQ(scheduler.pool().num_owned(), 0);
}

TEST_F(SchedulerChunks, CancellingAUserLetsTheChunkBeComputed) {
  Scheduler scheduler({.max_batch_tokens = 16, .max_num_seqs = 8}, 50);
  scheduler.submit(make_sequence(1, with_chunk(1)));
  step(scheduler);
  EXPECT_TRUE(scheduler.cancel(1));
  finish(scheduler);
  EXPECT_EQ(ended_.at(1), FinishReason::abort);
  EXPECT_TRUE(scheduler.chunks().chunks().begin()->second.is_ready);
}

TEST_F(SchedulerChunks, ARemovedChunkServesItsUsersToTheEnd) {
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 8}, 50);
  scheduler.submit(make_sequence(1, with_chunk(1, 40, 6)));
  step(scheduler);
  step(scheduler);
  EXPECT_TRUE(scheduler.remove_chunk(scheduler.chunks().chunks().begin()->first));
  step(scheduler);
  EXPECT_EQ(scheduler.pool().num_owned(), 4);
  finish(scheduler);
  EXPECT_EQ(scheduler.pool().num_owned(), 0);
}

// Exact and approximate KV never mix: what stands behind a chunk is published nowhere.
TEST_F(SchedulerChunks, OnlyTheLeadOfAComposedPromptIsPublished) {
  Scheduler scheduler({.max_batch_tokens = 256, .max_num_seqs = 8}, 50, "test");
  Request request = make_request(120, 20);
  request.chunks = {{.begin = 35, .count = 40}};
  request.reuse.mode = ReuseMode::isolated;
  scheduler.submit(make_sequence(1, request));
  finish(scheduler);
  Request exact = make_request(120, 1);
  scheduler.submit(make_sequence(2, exact));
  EXPECT_EQ(step(scheduler), (Rows{{{2, 0}, 120 - 32}}));
}

// A chunk is computed as an exact prompt, so a prompt that begins with it finds its full blocks.
TEST_F(SchedulerChunks, APromptThatBeginsWithAChunkFindsItsBlocks) {
  Scheduler scheduler({.max_batch_tokens = 256, .max_num_seqs = 8}, 50, "test");
  Request ticket = make_request(60, 0);
  ticket.chunks = {{.begin = 0, .count = 40}};
  ticket.only_chunks = true;
  scheduler.submit(make_sequence(1, ticket));
  finish(scheduler);
  Request request = make_request(60, 1);
  request.chunks = ticket.chunks;
  request.reuse.mode = ReuseMode::isolated;
  scheduler.submit(make_sequence(2, request));
  EXPECT_EQ(step(scheduler), (Rows{{{2, 0}, 60 - 32}}));
}

TEST_F(SchedulerChunks, NamespacesDoNotShareChunks) {
  Scheduler scheduler({.max_batch_tokens = 256, .max_num_seqs = 8}, 50, "test");
  scheduler.submit(make_sequence(1, with_chunk(1)));
  finish(scheduler);
  Request other = with_chunk(1);
  other.cache_salt = "other";
  scheduler.submit(make_sequence(2, other));
  EXPECT_EQ(step(scheduler), (Rows{{{2, -1}, 40}}));
  finish(scheduler);
  EXPECT_EQ(scheduler.chunks().counters().misses, 2);
}

// Preempted with its chunk in hand, it computes its own tokens again and nothing else.
TEST_F(SchedulerChunks, PreemptionKeepsTheChunk) {
  Scheduler scheduler({.max_batch_tokens = 256, .max_num_seqs = 8}, 9);
  scheduler.submit(make_sequence(1, 60, 20));
  scheduler.submit(make_sequence(2, with_chunk(1, 40, 20)));
  finish(scheduler);
  EXPECT_GT(scheduler.counters().preemptions, 0);
  EXPECT_EQ(scheduler.chunks().counters().misses, 1);
  EXPECT_EQ(ended_.at(1), FinishReason::length);
  EXPECT_EQ(ended_.at(2), FinishReason::length);
}

}  // namespace
}  // namespace nb::engine
