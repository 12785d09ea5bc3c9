#include "engine/save_queue.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace nb::engine {
namespace {

TEST(SaveQueue, CutsChainsIntoRecords) {
  kv::BlockPool pool(40);
  kv::PrefixCache cache(pool, "test");
  std::vector<BlockId> blocks, freed;
  ASSERT_TRUE(pool.allocate(37, blocks));
  kv::PrefixKeys keys{.root = cache.root("")};
  std::vector<TokenId> tokens(37 * 16 + 3);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<TokenId>(i % 11);
  cache.extend_keys(keys, tokens, 37);
  SaveQueue queue(pool);
  queue.add_prefix(keys, tokens, blocks);
  for (const BlockId block : blocks) pool.release(block);
  EXPECT_EQ(pool.num_owned(), 37);
  Digest parent = keys.root;
  for (const std::size_t begin : {0u, 16u, 32u}) {
    const std::size_t end = std::min<std::size_t>(begin + 16, 37);
    const SaveRecord record = queue.front();
    EXPECT_EQ(record.kind, kv::RecordKind::prefix);
    EXPECT_EQ(record.parent, parent);
    EXPECT_EQ(record.key, keys.keys[end - 1]);
    EXPECT_EQ(record.position, static_cast<int>(begin * 16));
    EXPECT_EQ(record.tokens.data()[0], tokens[begin * 16]);
    EXPECT_EQ(record.tokens.size(), (end - begin) * 16);
    EXPECT_TRUE(std::equal(record.blocks.begin(), record.blocks.end(), blocks.begin() + static_cast<int>(begin),
                           blocks.begin() + static_cast<int>(end)));
    EXPECT_EQ(pool.num_owned(), 37) << "the whole chain is held";
    parent = record.key;
    queue.pop(freed);
  }
  EXPECT_TRUE(queue.empty());
  EXPECT_EQ(pool.num_owned(), 0);
  EXPECT_EQ(freed.size(), 37u);
  EXPECT_EQ(freed.front(), blocks.back()) << "last block first";
}

TEST(SaveQueue, GivesUpWhatCameLast) {
  kv::BlockPool pool(8);
  std::vector<BlockId> blocks, freed;
  ASSERT_TRUE(pool.allocate(4, blocks));
  SaveQueue queue(pool);
  kv::Chunk chunk;
  chunk.root = kv::ChunkStore::root("");
  for (int i = 0; i < 2; ++i) {
    chunk.tokens.assign(20, i);
    chunk.blocks = {blocks[static_cast<std::size_t>(2 * i)], blocks[static_cast<std::size_t>(2 * i + 1)]};
    queue.add_chunk(chunk);
  }
  for (const BlockId block : blocks) pool.release(block);
  EXPECT_TRUE(queue.drop_one(freed));
  EXPECT_EQ(queue.num_dropped(), 1);
  EXPECT_EQ(freed, (std::vector<BlockId>{blocks[3], blocks[2]}));
  EXPECT_EQ(queue.front().tokens.front(), 0);
  EXPECT_EQ(queue.front().kind, kv::RecordKind::chunk);
  std::vector<BlockId> owners;
  queue.append_owners(owners);
  EXPECT_EQ(owners, (std::vector<BlockId>{blocks[0], blocks[1]}));
  queue.drop_chunk(queue.front().key, freed);
  EXPECT_TRUE(queue.empty());
  EXPECT_FALSE(queue.drop_one(freed));
  EXPECT_EQ(pool.num_owned(), 0);
}

}  // namespace
}  // namespace nb::engine
