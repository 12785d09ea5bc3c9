// The chunks: pieces of context whose KV was computed once, to stand behind other text in any number of sequences.
//
//   chunk:  [anchor a0..aA-1 | tokens t0..tn-1]   computed at positions 0 .. A+n-1, kept in blocks of the pool
//
// A chunk is found by its content: tokens, anchor and namespace, all compared. What uses one holds it; it goes when
// nobody does, it is not pinned and others need the room, the one that was used longest ago first. Its KV is exact for
// its own anchor and tokens and approximate behind anything else, which is the business of who places it
// (engine/composition.h). Not for prefixes (prefix_cache.h). Used by the thread that runs steps.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string_view>
#include <vector>

#include "base/ids.h"
#include "base/sha256.h"
#include "kv/block_pool.h"

namespace nb::kv {

using ChunkId = std::uint64_t;  ///< names a chunk of one store, never reused; 0 is none

/// What is known of a chunk.
struct Chunk {
  ChunkId id = 0;
  Digest root{};                  ///< its namespace
  Digest key{};                   ///< see ChunkStore::key
  std::vector<TokenId> tokens{};  ///< anchor, then its own
  int anchor_len = 0;
  std::vector<BlockId> blocks{};  ///< of all tokens, once it is ready
  bool is_ready = false;          ///< its KV is stored; until then somebody computes it
  bool is_removed = false;        ///< cannot be found, and goes with its last user
  bool is_pinned = false;
  int num_users = 0;
  std::int64_t num_hits = 0;   ///< times it was found
  std::uint64_t last_use = 0;  ///< larger is later

  int num_tokens() const { return static_cast<int>(tokens.size()) - anchor_len; }
  /// Blocks it takes, also before it has them.
  int num_blocks() const { return (static_cast<int>(tokens.size()) + kBlockTokens - 1) / kBlockTokens; }
};

/// What a chunk is found by, as somebody who wants it keeps it: its key is computed once, however often it is looked
/// for. The token lists must outlive it.
struct ChunkContent {
  Digest root;
  Digest key;
  std::span<const TokenId> anchor;
  std::span<const TokenId> tokens;

  /// Blocks of the chunk.
  int num_blocks() const { return (static_cast<int>(anchor.size() + tokens.size()) + kBlockTokens - 1) / kBlockTokens; }
};

struct ChunkCounters {
  std::int64_t hits = 0;       ///< chunks that were wanted and there, or being computed
  std::int64_t misses = 0;     ///< chunks that had to be computed
  std::int64_t evictions = 0;  ///< chunks that went because others needed the room
};

class ChunkStore {
 public:
  /// `pool` must outlive the store.
  explicit ChunkStore(BlockPool& pool) : pool_(pool), num_holders_(static_cast<std::size_t>(pool.num_blocks()), 0) {}

  /// The beginning of the namespace called `salt`; the empty one is everybody's.
  static Digest root(std::string_view salt);

  /// Names content in a namespace: SHA-256 over the root and both token lists with their lengths.
  static Digest key(const Digest& root, std::span<const TokenId> anchor, std::span<const TokenId> tokens);

  /// With the key computed.
  static ChunkContent content(const Digest& root, std::span<const TokenId> anchor, std::span<const TokenId> tokens) {
    return {root, key(root, anchor, tokens), anchor, tokens};
  }

  /// The chunk with this content, or 0. Changes nothing.
  ChunkId find(const ChunkContent& wanted) const;

  /// One more user.
  void hold(ChunkId id) { ++at(id).num_users; }

  /// Counts that somebody wanted the chunk, who holds it now: a hit if it `was_there`, else a miss.
  void count(ChunkId id, bool was_there);

  /// A chunk with this content, which must not exist, and its first user. It has no blocks until complete().
  ChunkId create(const ChunkContent& wanted);

  /// Hands over the blocks that hold the chunk's KV, with the reference of each. They are released again at once if the
  /// chunk was removed and nobody uses it.
  void complete(ChunkId id, std::vector<BlockId> blocks, std::vector<BlockId>& freed);

  /// One user fewer. Blocks that become free are appended to `freed`, here and below.
  void release(ChunkId id, std::vector<BlockId>& freed);

  /// Makes the chunk one that cannot be found any more; it goes when nobody uses it. False if there is none.
  bool remove(ChunkId id, std::vector<BlockId>& freed);

  /// Pinned chunks are not evicted. False if there is none.
  bool pin(ChunkId id, bool pinned);

  /// Evicts the chunk that was used longest ago, if there is one that may go.
  bool evict_one(std::vector<BlockId>& freed);

  /// Throws internal for an unknown id.
  const Chunk& get(ChunkId id) const;
  /// In the order of their ids.
  const std::map<ChunkId, Chunk>& chunks() const { return chunks_; }
  /// Blocks that the chunks take: a block of several chunks, which begin alike, counts once; what is being computed
  /// counts with all of its blocks.
  int num_blocks() const { return num_blocks_; }
  const ChunkCounters& counters() const { return counters_; }

 private:
  Chunk& at(ChunkId id);
  int& num_holders(BlockId block) { return num_holders_[static_cast<std::size_t>(block)]; }
  void drop_if_unused(ChunkId id, std::vector<BlockId>& freed);

  BlockPool& pool_;
  std::map<ChunkId, Chunk> chunks_;
  std::multimap<Digest, ChunkId> by_key_;  // those that can be found
  ChunkId next_id_ = 1;
  std::uint64_t clock_ = 0;
  std::vector<int> num_holders_;  // of each block of the pool: chunks that have it
  int num_blocks_ = 0;
  ChunkCounters counters_;
};

}  // namespace nb::kv
