// Who owns which KV block: ids and reference counts, all or nothing.
//
// Every block is free, cached (reserved for the prefix cache, which is not here yet) or owned. The pool hands out ids
// only: whoever allocates clears the memory (KvStorage::zero) before the first step that uses it, and poisons what
// was freed. Used by the thread that runs steps.
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
  int num_owned() const { return num_owned_; }

  /// Appends `count` free blocks to `out`, each with one reference; false and no change if there are fewer.
  /// Order: the block freed last goes out first (its memory is warm and resident); fresh blocks in ascending order.
  bool allocate(int count, std::vector<BlockId>& out);

  /// One more owner of an owned block. Throws internal if the block is not owned.
  void add_ref(BlockId block);

  /// One owner fewer; true if that made the block free. Throws internal if the block is not owned (double release).
  bool release(BlockId block);

  /// Owners of a block; 0 means free. Throws internal for an id outside the pool.
  int ref_count(BlockId block) const;

  /// Throws internal unless the free list and the counts agree: every block is in exactly one state.
  void check_invariants() const;

  /// As above, and every count equals the number of times its block appears in `owners`: the block lists of all
  /// sequences, one after the other.
  void check_invariants(std::span<const BlockId> owners) const;

 private:
  std::vector<BlockId> free_;  // a stack: the back goes out first
  std::vector<std::int32_t> ref_counts_;
  int num_owned_ = 0;
};

}  // namespace nb::kv
