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

// Random operations against a model that keeps one list of owners per block.
TEST(BlockPool, RandomOperationsKeepTheInvariants) {
  const int num_ops = std::getenv("NANOBRAID_TEST_FULL") != nullptr ? 2'000'000 : 200'000;
  constexpr int kNumBlocks = 37;
  std::mt19937 random(20240917);
  BlockPool pool(kNumBlocks);
  std::vector<BlockId> owners;  // one entry per reference
  const auto take_owner = [&] {
    const std::size_t index = random() % owners.size();
    std::swap(owners[index], owners.back());
    return owners.back();
  };
  int refused = 0;
  for (int op = 0; op < num_ops; ++op) {
    const auto kind = random() % 5;
    if (kind <= 1) {
      const int count = static_cast<int>(random() % 9);
      const int free_before = pool.num_free();
      std::vector<BlockId> blocks;
      const bool taken = pool.allocate(count, blocks);
      ASSERT_EQ(taken, count <= free_before);
      ASSERT_EQ(blocks.size(), taken ? static_cast<std::size_t>(count) : 0u);
      for (const BlockId block : blocks) ASSERT_EQ(std::count(owners.begin(), owners.end(), block), 0);
      refused += taken ? 0 : 1;
      owners.insert(owners.end(), blocks.begin(), blocks.end());
    } else if (kind == 2 && !owners.empty() && owners.size() < 100) {
      const BlockId block = take_owner();
      pool.add_ref(block);
      owners.push_back(block);
    } else if (!owners.empty()) {
      const BlockId block = take_owner();
      owners.pop_back();
      ASSERT_EQ(pool.release(block), std::count(owners.begin(), owners.end(), block) == 0);
    }
    if (op % 16 == 0) pool.check_invariants(owners);
  }
  EXPECT_GT(refused, 100);  // the pool really was full at times
  for (const BlockId block : owners) pool.release(block);
  pool.check_invariants({});
  EXPECT_EQ(pool.num_free(), kNumBlocks);
}

}  // namespace
}  // namespace nb::kv
