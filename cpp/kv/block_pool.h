// Who owns which KV block: ids and reference counts, all or nothing.
//
// Every block is free, owned, or cached: without an owner, but kept because its content may be wanted again
// (prefix_cache.h says which). Cached blocks are given away when free ones run out, the one that lost its last owner
// first. The pool hands out ids only: whoever allocates clears the memory (KvStorage::zero) before the first step that
// uses it, and poisons what was freed. Used by the thread that runs steps.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"

namespace nb::kv {

class BlockPool {
 public:
  /// All blocks start free. Throws invalid_argument unless 1 <= num_blocks and every slot fits 32 bits.
  explicit BlockPool(int num_blocks);

  int num_blocks() const { return static_cast<int>(ref_counts_.size()); }
  int num_free() const { return static_cast<int>(free_.size()); }
  int num_cached() const { return num_cached_; }
  int num_owned() const { return num_blocks() - num_free() - num_cached_; }
  /// Blocks that allocate() can give: free and cached ones.
  int num_available() const { return num_free() + num_cached_; }

  /// Appends `count` blocks to `out`, each with one reference; false and no change if there are fewer.
  /// Order: the block freed last goes out first (its memory is warm and resident), fresh blocks in ascending order,
  /// then cached blocks, the one that has been cached longest first; those are added to evicted().
  bool allocate(int count, std::vector<BlockId>& out);

  /// One more owner of an owned or cached block. Throws internal if the block is free.
  void add_ref(BlockId block);

  /// One owner fewer; true if that made the block free, which it becomes unless it is kept. Throws internal if the
  /// block has no owner (double release).
  bool release(BlockId block);

  /// The block becomes cached when its last owner releases it. Throws internal if it has no owner.
  void keep(BlockId block);

  /// Cached blocks that allocate() gave away since clear_evicted(); they are kept no longer.
  std::span<const BlockId> evicted() const { return evicted_; }
  void clear_evicted() { evicted_.clear(); }

  /// Owners of a block; 0 means free or cached. Throws internal for an id outside the pool.
  int ref_count(BlockId block) const;
  bool is_kept(BlockId block) const;

  /// Throws internal unless lists and counts agree: every block is in exactly one state.
  void check_invariants() const;

  /// As above, and every count equals the number of times its block appears in `owners`: the block lists of all
  /// sequences, one after the other.
  void check_invariants(std::span<const BlockId> owners) const;

 private:
  struct Links {
    BlockId older;
    BlockId newer;
  };

  void append_cached(BlockId block);
  void remove_cached(BlockId block);
  Links& links(BlockId block) { return links_[static_cast<std::size_t>(block)]; }

  std::vector<BlockId> free_;  // a stack: the back goes out first
  std::vector<std::int32_t> ref_counts_;
  std::vector<std::uint8_t> kept_;
  std::vector<Links> links_;  // of cached blocks, a list from the oldest to the newest
  BlockId oldest_ = kNoBlock;
  BlockId newest_ = kNoBlock;
  int num_cached_ = 0;
  std::vector<BlockId> evicted_;
};

}  // namespace nb::kv
