#include "kv/prefix_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <utility>

#include "base/code_of.h"
#include "base/error.h"

namespace nb::kv {
namespace {

using Tokens = std::vector<TokenId>;
using Blocks = std::vector<BlockId>;

Tokens numbers(int count, TokenId first = 0) {
  Tokens tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(first + i);
  return tokens;
}

/// Allocates and publishes the blocks of `tokens`, as if they had been computed, and returns them.
Blocks store(BlockPool& pool, PrefixCache& cache, const PrefixRoot& root, const Tokens& tokens) {
  Blocks chain;
  PrefixKeys keys{.root = root};
  cache.extend(keys, tokens, static_cast<int>(tokens.size()), chain);
  while ((chain.size() + 1) * kBlockTokens <= tokens.size()) {
    if (!pool.allocate(1, chain)) ADD_FAILURE() << "no block";
    const std::size_t size = chain.size() * kBlockTokens;
    EXPECT_EQ(cache.publish(keys, std::span(tokens).first(size), chain), chain.back());
  }
  return chain;
}

void give_back(BlockPool& pool, const Blocks& chain) {
  for (auto block = chain.rbegin(); block != chain.rend(); ++block) pool.release(*block);
}

Blocks find(PrefixCache& cache, const PrefixRoot& root, const Tokens& tokens, int most = 1000) {
  Blocks chain;
  PrefixKeys keys{.root = root};
  const int matched = cache.match(keys, tokens, most);
  cache.extend(keys, tokens, most, chain);
  EXPECT_EQ(static_cast<int>(chain.size()), matched);
  return chain;
}

TEST(PrefixCache, FindsFullBlocksBehindTheSameTokens) {
  BlockPool pool(10);
  PrefixCache cache(pool, "f");
  const PrefixRoot root = cache.root("");
  const Tokens tokens = numbers(50);
  const Blocks stored = store(pool, cache, root, tokens);
  ASSERT_EQ(stored.size(), 3u);
  EXPECT_EQ(find(cache, root, tokens), stored);
  EXPECT_EQ(pool.ref_count(stored[2]), 2);
  EXPECT_EQ(find(cache, root, tokens, 2), Blocks(stored.begin(), stored.begin() + 2));
  EXPECT_EQ(find(cache, root, numbers(47)).size(), 2u);  // the third block is not full
  Tokens other = tokens;
  other[20] = -7;
  EXPECT_EQ(find(cache, root, other), Blocks(stored.begin(), stored.begin() + 1));
  other = tokens;
  other[3] = -7;
  EXPECT_TRUE(find(cache, root, other).empty());
  EXPECT_TRUE(find(cache, root, Tokens(tokens.begin() + 16, tokens.end())).empty());  // elsewhere in a text
  cache.check_invariants();
}

TEST(PrefixCache, NamespacesAndFingerprintsShareNothing) {
  BlockPool pool(10);
  PrefixCache cache(pool, "f");
  PrefixCache other_model(pool, "g");
  const Tokens tokens = numbers(32);
  store(pool, cache, cache.root("a"), tokens);
  EXPECT_TRUE(find(cache, cache.root(""), tokens).empty());
  EXPECT_TRUE(find(cache, cache.root("b"), tokens).empty());
  EXPECT_EQ(find(cache, cache.root("a"), tokens).size(), 2u);
  EXPECT_NE(cache.root("a"), other_model.root("a"));
  // Fields cannot run into each other.
  EXPECT_NE(PrefixCache(pool, "ab").root("c"), PrefixCache(pool, "a").root("bc"));
}

TEST(PrefixCache, EqualKeysOfDifferentPrefixesDoNoHarm) {
  BlockPool pool(20);
  const auto same = [](const Digest&, std::span<const TokenId>) { return Digest{}; };
  PrefixCache cache(pool, "f", same);
  const PrefixRoot root = cache.root("");
  const Blocks first = store(pool, cache, root, numbers(48));
  const Blocks second = store(pool, cache, root, numbers(48, 100));
  Tokens mixed = numbers(16);  // the second block of the second chain, behind the first block of the first
  for (int i = 16; i < 32; ++i) mixed.push_back(100 + i);
  EXPECT_EQ(find(cache, root, numbers(48)), first);
  EXPECT_EQ(find(cache, root, numbers(48, 100)), second);
  EXPECT_EQ(find(cache, root, mixed), Blocks{first[0]});
  EXPECT_TRUE(find(cache, cache.root("b"), numbers(48)).empty());
  cache.check_invariants();
}

// A request that waits at the head of the queue looks for its blocks in every step.
TEST(PrefixCache, ASequenceComputesTheKeyOfEachBlockOnce) {
  static int num_hashes = 0;
  const auto counting = [](const Digest& parent, std::span<const TokenId> tokens) {
    ++num_hashes;
    return PrefixCache::chain_key(parent, tokens);
  };
  BlockPool pool(40);
  PrefixCache cache(pool, "f", counting);
  const PrefixRoot root = cache.root("");
  const Tokens tokens = numbers(20 * kBlockTokens);
  const Blocks stored = store(pool, cache, root, Tokens(tokens.begin(), tokens.begin() + 12 * kBlockTokens));
  num_hashes = 0;
  PrefixKeys keys{.root = root};
  for (int step = 0; step < 10; ++step) {
    Blocks chain;
    EXPECT_EQ(cache.extend(keys, tokens, 20, chain), 12);
    EXPECT_EQ(chain, stored);
    give_back(pool, chain);
  }
  EXPECT_EQ(num_hashes, 13) << "twelve that are found and one that is not";
  Blocks chain;
  cache.extend(keys, tokens, 20, chain);
  for (std::size_t i = 12; i < 20; ++i) {
    ASSERT_TRUE(pool.allocate(1, chain));
    cache.publish(keys, std::span(tokens).first((i + 1) * kBlockTokens), chain);
  }
  EXPECT_EQ(num_hashes, 20) << "publishing uses the same keys";
  EXPECT_EQ(find(cache, root, tokens), chain) << "and they are those that another sequence finds";
}

TEST(PrefixCache, EqualContentIsPublishedOnce) {
  BlockPool pool(10);
  PrefixCache cache(pool, "f");
  const PrefixRoot root = cache.root("");
  const Tokens tokens = numbers(16);
  const Blocks first = store(pool, cache, root, tokens);
  Blocks second;
  ASSERT_TRUE(pool.allocate(1, second));
  PrefixKeys keys{.root = root};
  EXPECT_EQ(cache.publish(keys, tokens, second), first[0]);
  EXPECT_FALSE(cache.is_published(second[0]));
  EXPECT_EQ(cache.num_published(), 1);
}

TEST(PrefixCache, TheTailIsEvictedBeforeWhatItDependsOn) {
  BlockPool pool(4);
  PrefixCache cache(pool, "f");
  const PrefixRoot root = cache.root("");
  const Tokens tokens = numbers(48);
  const Blocks stored = store(pool, cache, root, tokens);
  give_back(pool, stored);
  EXPECT_EQ(pool.num_cached(), 3);
  Blocks taken;
  ASSERT_TRUE(pool.allocate(2, taken));  // a free block and the tail
  EXPECT_EQ(taken[1], stored[2]);
  EXPECT_EQ(find(cache, root, tokens), Blocks(stored.begin(), stored.begin() + 2));
  cache.check_invariants();
  EXPECT_EQ(cache.num_published(), 2);
}

TEST(PrefixCache, MisuseIsAnInternalError) {
  BlockPool pool(4);
  PrefixCache cache(pool, "f");
  PrefixKeys keys{.root = cache.root("")};
  Blocks chain;
  ASSERT_TRUE(pool.allocate(2, chain));
  const Tokens tokens = numbers(32);
  EXPECT_EQ(code_of([&] { cache.publish(keys, tokens, chain); }), ErrorCode::internal);  // parent unpublished
  EXPECT_EQ(code_of([&] { cache.publish(keys, numbers(31), chain); }), ErrorCode::internal);
  EXPECT_EQ(code_of([&] { cache.extend(keys, numbers(48), 3, chain); }), ErrorCode::internal);
}

// Random chains over few tokens, against a map from whole prefixes to blocks.
TEST(PrefixCache, RandomOperationsAgreeWithAMap) {
  const int num_ops = std::getenv("NANOBRAID_TEST_FULL") != nullptr ? 1'000'000 : 60'000;
  std::mt19937 random(7);
  BlockPool pool(23);
  PrefixCache cache(pool, "f");
  const std::string salts[] = {"", "a"};
  std::map<std::pair<std::string, Tokens>, BlockId> stored;
  struct Owner {
    std::string salt;
    Tokens tokens;
    Blocks chain;
  };
  std::vector<Owner> owners;
  std::int64_t hits = 0;
  const auto forget = [&] {
    for (const BlockId block : pool.evicted()) {
      std::erase_if(stored, [&](const auto& entry) { return entry.second == block; });
    }
  };
  for (int op = 0; op < num_ops; ++op) {
    if (random() % 2 == 0 || owners.empty()) {
      Owner owner{.salt = salts[random() % 4 == 0 ? 1 : 0], .tokens = {}, .chain = {}};
      const std::size_t length = 1 + random() % 5;
      for (std::size_t i = 0; i < length; ++i)
        owner.tokens.insert(owner.tokens.end(), 16, static_cast<int>(random() % 2));
      PrefixKeys keys{.root = cache.root(owner.salt)};
      forget();
      const int matched = cache.match(keys, owner.tokens, 100);
      cache.extend(keys, owner.tokens, 100, owner.chain);
      ASSERT_EQ(matched, static_cast<int>(owner.chain.size()));
      Tokens prefix;
      for (std::size_t i = 0; i < length; ++i) {
        prefix.insert(prefix.end(), 16, owner.tokens[i * 16]);
        const auto found = stored.find({owner.salt, prefix});
        if (i < owner.chain.size()) {
          ASSERT_TRUE(found != stored.end() && found->second == owner.chain[i]);
          ++hits;
          continue;
        }
        ASSERT_TRUE(i > owner.chain.size() || found == stored.end());
        if (i > owner.chain.size() || !pool.allocate(1, owner.chain)) break;
        forget();
        ASSERT_EQ(cache.publish(keys, prefix, owner.chain), owner.chain.back());
        stored[{owner.salt, prefix}] = owner.chain.back();
      }
      owners.push_back(std::move(owner));
    } else {
      const std::size_t index = random() % owners.size();
      give_back(pool, owners[index].chain);
      owners.erase(owners.begin() + static_cast<std::ptrdiff_t>(index));
    }
    if (op % 32 == 0) {
      forget();
      cache.check_invariants();
    }
  }
  EXPECT_GT(hits, num_ops / 10);
}

}  // namespace
}  // namespace nb::kv
