#include "kv/block_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <random>

#include "base/code_of.h"
#include "base/error.h"

namespace nb::kv {
namespace {

TEST(BlockPool, HandsOutAscendingIdsThenTheLastFreedFirst) {
  BlockPool pool(4);
  std::vector<BlockId> blocks;
  ASSERT_TRUE(pool.allocate(3, blocks));
  EXPECT_EQ(blocks, (std::vector<BlockId>{0, 1, 2}));
  EXPECT_TRUE(pool.release(0));
  EXPECT_TRUE(pool.release(2));
  std::vector<BlockId> again;
  ASSERT_TRUE(pool.allocate(3, again));
  EXPECT_EQ(again, (std::vector<BlockId>{2, 0, 3}));
}

TEST(BlockPool, AllocatesAllOrNothingAndAppends) {
  BlockPool pool(3);
  std::vector<BlockId> blocks{7};
  EXPECT_FALSE(pool.allocate(4, blocks));
  EXPECT_EQ(blocks, (std::vector<BlockId>{7}));
  EXPECT_EQ(pool.num_free(), 3);
  EXPECT_TRUE(pool.allocate(0, blocks));
  EXPECT_TRUE(pool.allocate(3, blocks));
  EXPECT_EQ(blocks.size(), 4u);
  EXPECT_EQ(pool.num_free(), 0);
  EXPECT_EQ(pool.num_owned(), 3);
  EXPECT_FALSE(pool.allocate(1, blocks));
}

TEST(BlockPool, ABlockIsFreeOnlyWhenItsLastOwnerLeaves) {
  BlockPool pool(2);
  std::vector<BlockId> blocks;
  ASSERT_TRUE(pool.allocate(1, blocks));
  pool.add_ref(blocks[0]);
  EXPECT_EQ(pool.ref_count(blocks[0]), 2);
  EXPECT_FALSE(pool.release(blocks[0]));
  EXPECT_EQ(pool.num_owned(), 1);
  EXPECT_TRUE(pool.release(blocks[0]));
  EXPECT_EQ(pool.num_owned(), 0);
  EXPECT_EQ(pool.ref_count(blocks[0]), 0);
}

TEST(BlockPool, MisuseIsAnInternalError) {
  BlockPool pool(2);
  std::vector<BlockId> blocks;
  ASSERT_TRUE(pool.allocate(1, blocks));
  pool.release(blocks[0]);
  EXPECT_EQ(code_of([&] { pool.release(blocks[0]); }), ErrorCode::internal);
  EXPECT_EQ(code_of([&] { pool.add_ref(blocks[0]); }), ErrorCode::internal);
  EXPECT_EQ(code_of([&] { pool.ref_count(2); }), ErrorCode::internal);
  EXPECT_EQ(code_of([&] { pool.ref_count(kNoBlock); }), ErrorCode::internal);
  pool.check_invariants();
}

TEST(BlockPool, RefusesImpossibleSizes) {
  EXPECT_EQ(code_of([] { BlockPool pool(0); }), ErrorCode::invalid_argument);
  EXPECT_EQ(code_of([] { BlockPool pool(-5); }), ErrorCode::invalid_argument);
  EXPECT_EQ(code_of([] { BlockPool pool(std::numeric_limits<std::int32_t>::max() / kBlockTokens + 1); }),
            ErrorCode::invalid_argument);
}

TEST(BlockPool, InvariantsCompareCountsWithOwners) {
  BlockPool pool(3);
  std::vector<BlockId> blocks;
  ASSERT_TRUE(pool.allocate(2, blocks));
  pool.check_invariants(blocks);
  pool.add_ref(blocks[1]);
  EXPECT_EQ(code_of([&] { pool.check_invariants(blocks); }), ErrorCode::internal);  // an owner too few
  blocks.push_back(blocks[1]);
  pool.check_invariants(blocks);
  blocks.push_back(2);
  EXPECT_EQ(code_of([&] { pool.check_invariants(blocks); }), ErrorCode::internal);  // a free block has an owner
  blocks.back() = 3;
  EXPECT_EQ(code_of([&] { pool.check_invariants(blocks); }), ErrorCode::internal);  // no such block
}

TEST(BlockPool, KeptBlocksAreCachedAndGivenAwayOldestFirst) {
  BlockPool pool(3);
  std::vector<BlockId> blocks;
  ASSERT_TRUE(pool.allocate(3, blocks));
  pool.keep(0);
  pool.keep(2);
  EXPECT_FALSE(pool.release(2));
  EXPECT_FALSE(pool.release(0));
  EXPECT_TRUE(pool.release(1));
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_EQ(pool.num_cached(), 2);
  EXPECT_EQ(pool.num_owned(), 0);
  pool.add_ref(2);  // wanted again
  EXPECT_EQ(pool.num_cached(), 1);
  pool.release(2);  // now the newest
  std::vector<BlockId> again;
  EXPECT_FALSE(pool.allocate(4, again));
  ASSERT_TRUE(pool.allocate(2, again));
  EXPECT_EQ(again, (std::vector<BlockId>{1, 0}));
  EXPECT_EQ(std::vector<BlockId>(pool.evicted().begin(), pool.evicted().end()), (std::vector<BlockId>{0}));
  EXPECT_FALSE(pool.is_kept(0));
  EXPECT_TRUE(pool.release(0));  // no longer kept: free
  pool.release(1);
  pool.check_invariants({});
  EXPECT_EQ(code_of([&] { pool.keep(0); }), ErrorCode::internal);
}

// Random operations against a model that keeps one list of owners per block, and cached blocks in order.
TEST(BlockPool, RandomOperationsKeepTheInvariants) {
  const int num_ops = std::getenv("NANOBRAID_TEST_FULL") != nullptr ? 5'000'000 : 1'000'000;
  constexpr int kNumBlocks = 37;
  std::mt19937 random(20240917);
  BlockPool pool(kNumBlocks);
  std::vector<BlockId> owners;  // one entry per reference
  std::vector<int> counts(kNumBlocks, 0);
  std::vector<bool> kept(kNumBlocks, false);
  std::vector<BlockId> cached;  // oldest first
  const auto take_owner = [&] {
    const std::size_t index = random() % owners.size();
    std::swap(owners[index], owners.back());
    return owners.back();
  };
  const auto add_owner = [&](BlockId block) {
    owners.push_back(block);
    ++counts[static_cast<std::size_t>(block)];
  };
  int refused = 0;
  int evicted = 0;
  for (int op = 0; op < num_ops; ++op) {
    const auto kind = random() % 7;
    if (kind <= 1) {
      const int count = static_cast<int>(random() % 9);
      const int free_before = pool.num_free();
      std::vector<BlockId> blocks;
      const bool taken = pool.allocate(count, blocks);
      ASSERT_EQ(taken, count <= free_before + static_cast<int>(cached.size()));
      ASSERT_EQ(blocks.size(), taken ? static_cast<std::size_t>(count) : 0u);
      for (std::size_t i = static_cast<std::size_t>(free_before); taken && i < blocks.size(); ++i) {
        ASSERT_EQ(blocks[i], cached.front());
        ASSERT_EQ(pool.evicted()[i - static_cast<std::size_t>(free_before)], cached.front());
        kept[static_cast<std::size_t>(cached.front())] = false;
        cached.erase(cached.begin());
        ++evicted;
      }
      pool.clear_evicted();
      refused += taken ? 0 : 1;
      for (const BlockId block : blocks) {
        ASSERT_EQ(counts[static_cast<std::size_t>(block)], 0);
        ASSERT_FALSE(pool.is_kept(block));
        add_owner(block);
      }
    } else if (kind == 2 && !owners.empty() && owners.size() < 100) {
      const BlockId block = take_owner();
      pool.add_ref(block);
      add_owner(block);
    } else if (kind == 3 && !cached.empty()) {
      const std::size_t index = random() % cached.size();
      pool.add_ref(cached[index]);
      add_owner(cached[index]);
      cached.erase(cached.begin() + static_cast<std::ptrdiff_t>(index));
    } else if (kind == 4 && !owners.empty()) {
      const BlockId block = take_owner();
      pool.keep(block);
      kept[static_cast<std::size_t>(block)] = true;
    } else if (!owners.empty()) {
      const BlockId block = take_owner();
      owners.pop_back();
      const bool is_last = --counts[static_cast<std::size_t>(block)] == 0;
      ASSERT_EQ(pool.release(block), is_last && !kept[static_cast<std::size_t>(block)]);
      if (is_last && kept[static_cast<std::size_t>(block)]) cached.push_back(block);
    }
    ASSERT_EQ(pool.num_cached(), static_cast<int>(cached.size()));
    if (op % 64 == 0) pool.check_invariants(owners);
  }
  EXPECT_GT(refused, 100);  // the pool really was full at times
  EXPECT_GT(evicted, 1000);
  for (const BlockId block : owners) pool.release(block);
  pool.check_invariants({});
  EXPECT_EQ(pool.num_available(), kNumBlocks);
}

}  // namespace
}  // namespace nb::kv
