// The prefix cache: which blocks hold the KV of which tokens behind which other tokens, so that they are computed once.
//
// Exact: a block is found by its own tokens behind the very same blocks, under one fingerprint and in one namespace.
//
//   chain:  root(namespace) <- block [t0..t15] <- block [t16..t31] <- ...     key = hash(key of parent, tokens)
//
// Keys only find candidates; parent and tokens are compared, so equal keys of different prefixes do no harm. Only full
// blocks whose KV is stored may be published. A sequence that holds a block holds its parents too, and gives blocks
// back last first, so a parent is never evicted before what depends on it. Not for who owns a block (block_pool.h) nor
// for chunks behind other text. Used by the thread that runs steps.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/ids.h"
#include "base/sha256.h"
#include "kv/block_pool.h"

namespace nb::kv {

/// A namespace's beginning: prefixes of different namespaces never match each other.
using PrefixRoot = Digest;

/// Where one sequence stands: its namespace, and the keys of its leading blocks as far as they were needed. Tokens are
/// only ever appended, so a key is computed once, however often the sequence looks for its blocks.
struct PrefixKeys {
  PrefixRoot root{};
  std::vector<Digest> keys{};
};

class PrefixCache {
 public:
  using KeyFunction = Digest (*)(const Digest& parent, std::span<const TokenId> tokens);

  /// SHA-256 of the parent's key and the tokens as little-endian 32-bit integers.
  static Digest chain_key(const Digest& parent, std::span<const TokenId> tokens);

  /// `pool` must outlive the cache. `fingerprint` names everything but the tokens that the content of a block depends
  /// on. `key` is for tests of colliding keys.
  PrefixCache(BlockPool& pool, std::string_view fingerprint, KeyFunction key = chain_key);

  /// The root of the namespace called `salt`; the empty one is everybody's.
  PrefixRoot root(std::string_view salt) const;

  /// Appends to `chain`, a sequence's blocks from the root on, the published blocks that continue it with `tokens`, the
  /// sequence's tokens from the beginning, as long as it has fewer than `max_blocks`; takes a reference of each. Blocks
  /// that are in `chain` already must be published. Returns how many were appended.
  int extend(PrefixKeys& keys, std::span<const TokenId> tokens, int max_blocks, std::vector<BlockId>& chain);

  /// How many published blocks `tokens` begin with, at most `max_blocks`. Takes and changes nothing.
  int match(PrefixKeys& keys, std::span<const TokenId> tokens, int max_blocks);

  /// Makes the last block of `chain` findable: the KV of its tokens, the last 16 of `tokens`, is stored, and those
  /// before it are published. Returns the block that stands for them from now on: this one, or one with equal content
  /// that was published before, of which the caller must take a reference instead.
  /// Allocates nothing if `keys` has room for the block.
  BlockId publish(PrefixKeys& keys, std::span<const TokenId> tokens, std::span<const BlockId> chain);

  /// Makes `keys` those of the first `num_blocks` blocks of `tokens` at least.
  void extend_keys(PrefixKeys& keys, std::span<const TokenId> tokens, std::size_t num_blocks) const {
    if (num_blocks > 0) static_cast<void>(key_of(keys, tokens, num_blocks - 1));
  }

  /// Whether the block can be found.
  bool is_published(BlockId block) const;
  int num_published() const { return num_published_; }

  /// Throws internal unless the table agrees with itself and with the pool. O(blocks).
  void check_invariants();

 private:
  struct Entry {
    Digest key;
    Digest parent_key;
    BlockId parent = kNoBlock;  // kNoBlock: the root
    BlockId next = kNoBlock;    // in its bucket
    int num_children = 0;
    bool published = false;
  };

  void forget_evicted();
  void forget(BlockId block);
  const Digest& key_of(PrefixKeys& keys, std::span<const TokenId> tokens, std::size_t index) const;
  std::size_t bucket_of(const Digest& key) const;
  BlockId find(const Digest& key, const Digest& parent_key, BlockId parent, std::span<const TokenId> tokens) const;
  std::span<const TokenId> tokens_of(BlockId block) const;
  Entry& entry(BlockId block) { return entries_[static_cast<std::size_t>(block)]; }
  const Entry& entry(BlockId block) const { return entries_[static_cast<std::size_t>(block)]; }

  BlockPool& pool_;
  KeyFunction key_;
  Digest fingerprint_;
  std::vector<Entry> entries_;    // by block, up to the largest that was published
  std::vector<TokenId> tokens_;   // kBlockTokens for each of them
  std::vector<BlockId> buckets_;  // heads of lists
  int num_published_ = 0;
};

}  // namespace nb::kv
