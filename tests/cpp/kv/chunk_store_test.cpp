#include "kv/chunk_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

#include "base/code_of.h"
#include "base/error.h"

namespace nb::kv {
namespace {

using Tokens = std::vector<TokenId>;

Tokens numbers(int count, TokenId first = 0) {
  Tokens tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(first + i);
  return tokens;
}

class ChunkStoreTest : public testing::Test {
 protected:
  /// As if the chunk had been computed, with one user left.
  ChunkId store(const Tokens& tokens, const Tokens& anchor = {}, std::string_view salt = "") {
    const ChunkId id = chunks_.create(ChunkStore::content(ChunkStore::root(salt), anchor, tokens));
    std::vector<BlockId> blocks;
    EXPECT_TRUE(pool_.allocate(chunks_.get(id).num_blocks(), blocks));
    chunks_.complete(id, blocks, freed_);
    return id;
  }

  ChunkId find(const Tokens& tokens, const Tokens& anchor = {}, std::string_view salt = "") {
    return chunks_.find(ChunkStore::content(ChunkStore::root(salt), anchor, tokens));
  }

  /// As one more user who wants it; 0 if it is not there.
  ChunkId acquire(const Tokens& tokens) {
    const ChunkId id = find(tokens);
    if (id == 0) return 0;
    chunks_.hold(id);
    chunks_.count(id, true);
    return id;
  }

  BlockPool pool_{20};
  ChunkStore chunks_{pool_};
  std::vector<BlockId> freed_;
};

TEST_F(ChunkStoreTest, AChunkIsFoundByTokensAnchorAndNamespace) {
  const ChunkId id = store(numbers(40), {7});
  EXPECT_EQ(chunks_.get(id).num_blocks(), 3);
  EXPECT_EQ(chunks_.get(id).num_tokens(), 40);
  EXPECT_EQ(find(numbers(40), {7}), id);
  EXPECT_EQ(find(numbers(40)), 0u);
  EXPECT_EQ(find(numbers(40), {8}), 0u);
  EXPECT_EQ(find(numbers(39), {7}), 0u);
  EXPECT_EQ(find(numbers(41), {7}), 0u);
  EXPECT_EQ(find(numbers(40), {7}, "other"), 0u);
  // The border between anchor and tokens is part of the identity.
  Tokens longer = numbers(40);
  longer.insert(longer.begin(), 7);
  EXPECT_EQ(find(longer), 0u);
  EXPECT_NE(store(longer), id);
}

TEST_F(ChunkStoreTest, UsersAreCountedAndBlocksStayUntilTheLastOneOfARemovedChunk) {
  const ChunkId id = store(numbers(20));
  EXPECT_EQ(acquire(numbers(20)), id);
  EXPECT_EQ(chunks_.get(id).num_users, 2);
  EXPECT_TRUE(chunks_.remove(id, freed_));
  EXPECT_FALSE(chunks_.remove(id, freed_));
  EXPECT_EQ(find(numbers(20)), 0u);
  EXPECT_FALSE(chunks_.pin(id, true));
  chunks_.release(id, freed_);
  EXPECT_EQ(pool_.num_owned(), 2);
  chunks_.release(id, freed_);
  EXPECT_EQ(pool_.num_owned(), 0);
  EXPECT_EQ(freed_.size(), 2u);
  EXPECT_EQ(chunks_.num_blocks(), 0);
  EXPECT_EQ(code_of([&] { chunks_.get(id); }), ErrorCode::internal);
}

TEST_F(ChunkStoreTest, TheOneUsedLongestAgoGoesUnlessPinnedOrInUse) {
  const ChunkId used = store(numbers(16));
  const ChunkId pinned = store(numbers(16, 100)), old = store(numbers(16, 200)), young = store(numbers(16, 300));
  for (const ChunkId id : {pinned, old, young}) chunks_.release(id, freed_);
  chunks_.pin(pinned, true);
  acquire(numbers(16, 200));  // now it is the youngest
  chunks_.release(old, freed_);
  EXPECT_TRUE(chunks_.evict_one(freed_));
  EXPECT_EQ(find(numbers(16, 300)), 0u);
  EXPECT_TRUE(chunks_.evict_one(freed_));
  EXPECT_EQ(find(numbers(16, 200)), 0u);
  EXPECT_FALSE(chunks_.evict_one(freed_));
  chunks_.pin(pinned, false);
  EXPECT_TRUE(chunks_.evict_one(freed_));
  chunks_.release(used, freed_);
  EXPECT_TRUE(chunks_.evict_one(freed_));
  EXPECT_EQ(pool_.num_owned(), 0);
  EXPECT_EQ(chunks_.counters().evictions, 4);
}

TEST_F(ChunkStoreTest, AChunkThatIsBeingComputedIsFoundAndNotEvicted) {
  const ChunkId id = chunks_.create(ChunkStore::content(ChunkStore::root(""), {}, numbers(33)));
  EXPECT_EQ(chunks_.num_blocks(), 3);
  EXPECT_EQ(find(numbers(33)), id);
  EXPECT_FALSE(chunks_.get(id).is_ready);
  chunks_.release(id, freed_);
  EXPECT_FALSE(chunks_.evict_one(freed_));
}

TEST_F(ChunkStoreTest, RandomUseKeepsTheCounts) {
  std::mt19937 random(3);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  std::map<ChunkId, int> users;
  for (int step = 0; step < 100'000; ++step) {
    const Tokens tokens = numbers(pick(1, 40), 1000 * pick(0, 5));
    const ChunkId found = find(tokens);
    if (pick(0, 1) == 0 && found != 0) {
      ASSERT_EQ(acquire(tokens), found);
      ++users[found];
    } else if (found == 0 && pool_.num_available() >= 3) {
      ++users[store(tokens)];
    } else if (pick(0, 2) == 0) {
      chunks_.evict_one(freed_);
    } else if (found != 0 && pick(0, 4) == 0) {
      chunks_.remove(found, freed_);
    }
    for (auto& [id, count] : users) {
      for (; count > 0 && pick(0, 1) == 0; --count) chunks_.release(id, freed_);
    }
    std::erase_if(users, [](const auto& entry) { return entry.second == 0; });
    std::vector<BlockId> owners;
    int blocks = 0;
    for (const auto& [id, chunk] : chunks_.chunks()) {
      ASSERT_EQ(chunk.num_users, users.contains(id) ? users[id] : 0);
      owners.insert(owners.end(), chunk.blocks.begin(), chunk.blocks.end());
      blocks += chunk.num_blocks();
    }
    ASSERT_EQ(blocks, chunks_.num_blocks());
    if (step % 50 == 0) pool_.check_invariants(owners);
  }
}

}  // namespace
}  // namespace nb::kv
