#include "kv/block_table.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace nb::kv {
namespace {

TEST(BlockTable, CountsBlocks) {
  EXPECT_EQ(BlockTable::blocks_for(0), 0);
  EXPECT_EQ(BlockTable::blocks_for(1), 1);
  EXPECT_EQ(BlockTable::blocks_for(16), 1);
  EXPECT_EQ(BlockTable::blocks_for(17), 2);
}

TEST(BlockTable, ReservesAllOrNothing) {
  BlockPool pool(3);
  BlockTable table;
  EXPECT_FALSE(table.reserve(pool, 49));
  EXPECT_EQ(pool.num_free(), 3);
  EXPECT_EQ(table.capacity(), 0);
  EXPECT_TRUE(table.reserve(pool, 17));
  EXPECT_EQ(table.capacity(), 32);
  EXPECT_EQ(table.length(), 0);
  EXPECT_TRUE(table.reserve(pool, 20));  // already there
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_TRUE(table.reserve(pool, 48));
  EXPECT_EQ(pool.num_free(), 0);
}

TEST(BlockTable, GrowingReportsEachBlockOnceWhenItComesIntoUse) {
  BlockPool pool(8);
  BlockTable table;
  ASSERT_TRUE(table.reserve(pool, 64));
  EXPECT_TRUE(table.blocks().empty());
  EXPECT_EQ(table.grow_to(1).size(), 1u);
  EXPECT_EQ(table.grow_to(16).size(), 0u);
  const auto fresh = table.grow_to(49);
  ASSERT_EQ(fresh.size(), 3u);
  EXPECT_EQ(fresh[0], table.reserved()[1]);
  EXPECT_EQ(table.grow_to(5).size(), 0u);  // never shrinks
  EXPECT_EQ(table.length(), 49);
  EXPECT_EQ(table.blocks().size(), 4u);
  EXPECT_THROW(table.grow_to(65), Error);
}

TEST(BlockTable, SlotsFollowTheBlocks) {
  BlockPool pool(8);
  std::vector<BlockId> others;
  ASSERT_TRUE(pool.allocate(3, others));
  pool.release(1);  // so that the table gets blocks 1, 3
  BlockTable table;
  ASSERT_TRUE(table.reserve(pool, 32));
  table.grow_to(20);
  EXPECT_EQ(table.slot_of(0), 1 * 16);
  EXPECT_EQ(table.slot_of(15), 1 * 16 + 15);
  EXPECT_EQ(table.slot_of(16), 3 * 16);
  EXPECT_EQ(table.slot_of(19), 3 * 16 + 3);
  EXPECT_THROW(table.slot_of(20), Error);
  EXPECT_THROW(table.slot_of(-1), Error);
}

TEST(BlockTable, ReleaseReportsOnlyBlocksThatBecameFree) {
  BlockPool pool(4);
  BlockTable table;
  ASSERT_TRUE(table.reserve(pool, 48));
  table.grow_to(48);
  pool.add_ref(1);  // somebody else reads block 1 too
  std::vector<BlockId> freed;
  table.release(pool, freed);
  EXPECT_EQ(freed, (std::vector<BlockId>{2, 0}));
  EXPECT_EQ(table.length(), 0);
  EXPECT_EQ(table.capacity(), 0);
  EXPECT_EQ(pool.num_owned(), 1);
  std::vector<BlockId> next;
  ASSERT_TRUE(pool.allocate(1, next));
  EXPECT_EQ(next[0], 0);  // the sequence's first block goes out first
}

TEST(BlockTable, AdoptsCachedBlocksAndSwapsItsOwnForThem) {
  BlockPool pool(10);
  PrefixCache cache(pool, "f");
  PrefixKeys keys{.root = cache.root("")};
  const std::vector<TokenId> tokens(40, 3);
  std::vector<BlockId> freed;
  BlockTable first;
  BlockTable second;
  ASSERT_TRUE(first.reserve(pool, 40));
  ASSERT_TRUE(second.reserve(pool, 40));  // computes the same at the same time
  first.grow_to(40);
  second.grow_to(40);
  for (const int index : {0, 1}) first.publish(cache, pool, keys, tokens, index, freed);
  const std::vector<BlockId> own(second.reserved().begin(), second.reserved().end());
  for (const int index : {0, 1}) second.publish(cache, pool, keys, tokens, index, freed);
  EXPECT_EQ(freed, (std::vector<BlockId>{own[0], own[1]}));
  EXPECT_EQ(second.reserved()[0], first.reserved()[0]);
  EXPECT_EQ(second.reserved()[1], first.reserved()[1]);
  EXPECT_EQ(second.reserved()[2], own[2]);
  BlockTable third;
  EXPECT_EQ(third.adopt(cache, keys, tokens, 2), 2);
  EXPECT_EQ(third.length(), 32);
  EXPECT_EQ(third.slot_of(20), first.slot_of(20));
  ASSERT_TRUE(third.reserve(pool, 40));
  EXPECT_EQ(third.grow_to(40).size(), 1u);  // adopted blocks are not fresh
  std::vector<BlockId> owners;
  for (const BlockTable* table : {&first, &second, &third}) {
    owners.insert(owners.end(), table->reserved().begin(), table->reserved().end());
  }
  pool.check_invariants(owners);
}

TEST(BlockTable, AForkSharesFullBlocksAndCopiesTheRest) {
  BlockPool pool(4);
  BlockTable first;
  ASSERT_TRUE(first.reserve(pool, 40));
  first.grow_to(40);
  std::vector<BlockCopy> copies;
  BlockTable fork;
  ASSERT_TRUE(fork.fork(pool, first, 37, copies));
  ASSERT_EQ(copies.size(), 1u);
  EXPECT_EQ(copies[0].from, first.reserved()[2]);
  EXPECT_EQ(copies[0].to, fork.reserved()[2]);
  EXPECT_EQ(fork.length(), 37);
  EXPECT_EQ(fork.reserved()[0], first.reserved()[0]);
  EXPECT_EQ(pool.ref_count(first.reserved()[1]), 2);
  EXPECT_TRUE(fork.grow_to(38).empty());  // its own block is in use already
  BlockTable none;
  EXPECT_FALSE(none.fork(pool, first, 37, copies));  // the pool is empty
  EXPECT_EQ(none.capacity(), 0);
  EXPECT_EQ(copies.size(), 1u);
  BlockTable whole;
  ASSERT_TRUE(whole.fork(pool, first, 32, copies));  // nothing to copy
  EXPECT_EQ(copies.size(), 1u);
  EXPECT_EQ(whole.capacity(), 32);
  std::vector<BlockId> owners;
  for (const BlockTable* table : {&first, &fork, &whole}) {
    owners.insert(owners.end(), table->reserved().begin(), table->reserved().end());
  }
  pool.check_invariants(owners);
}

TEST(BlockTable, ADroppedBlockLeavesAHole) {
  BlockPool pool(4);
  BlockTable table;
  ASSERT_TRUE(table.reserve(pool, 64));
  table.grow_to(40);
  const std::vector<BlockId> blocks(table.reserved().begin(), table.reserved().end());
  std::vector<BlockId> freed;
  table.drop(pool, 1, freed);
  table.drop(pool, 1, freed);  // once is enough
  EXPECT_EQ(freed, std::vector<BlockId>{blocks[1]});
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_EQ(table.num_holes(), 1);
  EXPECT_EQ(table.num_owned(), 3);
  EXPECT_EQ(table.blocks()[1], kNoBlock);
  EXPECT_EQ(table.slot_of(39), blocks[2] * 16 + 7);
  EXPECT_THROW(table.slot_of(20), Error);  // there is no such place any more
  EXPECT_TRUE(table.reserve(pool, 80));    // of five blocks four are owned
  freed.clear();
  table.release(pool, freed);
  EXPECT_EQ(freed.size(), 4u);
  EXPECT_EQ(pool.num_free(), 4);
  EXPECT_EQ(table.num_holes(), 0);
}

TEST(BlockTable, ADroppedBlockStaysWithOthersWhoShareIt) {
  BlockPool pool(3);
  BlockTable table, fork;
  std::vector<BlockCopy> copies;
  std::vector<BlockId> freed;
  ASSERT_TRUE(table.reserve(pool, 32));
  table.grow_to(32);
  ASSERT_TRUE(fork.fork(pool, table, 32, copies));
  table.drop(pool, 0, freed);
  EXPECT_TRUE(freed.empty());
  EXPECT_EQ(pool.ref_count(fork.blocks()[0]), 1);
}

}  // namespace
}  // namespace nb::kv
