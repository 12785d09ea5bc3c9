// The blocks of one sequence, in position order: position p lives in block p / 16 at index p % 16.
//
//   reserved:  [b0][b1][b2][b3]     owned
//   in use:    [b0][b1]             positions [0, length) may be read
//
// Blocks may be shared with other sequences: then they are full and nobody writes them. Blocks that nobody will read
// any more may be given back one by one and leave holes (kNoBlock). Not for who else owns a block (block_pool.h). Used
// by the thread that runs steps.
#pragma once

#include <span>
#include <vector>

#include "base/ids.h"
#include "kv/block_pool.h"
#include "kv/prefix_cache.h"

namespace nb::kv {

/// A block whose content goes to another one, before either is used again.
struct BlockCopy {
  BlockId from;
  BlockId to;
};

class BlockTable {
 public:
  /// Blocks that hold `num_tokens` tokens.
  static int blocks_for(int num_tokens) { return (num_tokens + kBlockTokens - 1) / kBlockTokens; }

  /// Grows the reservation to `num_tokens` positions, all or nothing; false and no change if the pool has too few.
  bool reserve(BlockPool& pool, int num_tokens);

  /// Shares the cached blocks that continue this table with `tokens`, up to `max_blocks` in all; returns how many came.
  /// Everything reserved must be in use and full.
  int adopt(PrefixCache& cache, PrefixKeys& keys, std::span<const TokenId> tokens, int max_blocks);

  /// Publishes block `index`, whose KV is stored, and those before it are published. If equal content was published
  /// before, the table shares that block from now on; the own one is appended to `freed` if that made it free.
  void publish(PrefixCache& cache, BlockPool& pool, PrefixKeys& keys, std::span<const TokenId> tokens, int index,
               std::vector<BlockId>& freed);

  /// An empty table becomes a copy of the first `num_tokens` positions of `other`: shares the full blocks, and gets a
  /// block of its own for the rest, which is appended to `copies`. False and no change if the pool has no block.
  bool fork(BlockPool& pool, const BlockTable& other, int num_tokens, std::vector<BlockCopy>& copies);

  /// Makes positions [0, num_tokens) usable and returns the blocks that thereby came into use: clear their memory
  /// before the step. Throws internal beyond the reservation.
  std::span<const BlockId> grow_to(int num_tokens);

  /// Positions from `num_tokens` on are not in use any more; their blocks stay reserved, and come into use again with
  /// grow_to().
  void truncate(int num_tokens);

  /// block * 16 + index in block. Throws internal unless 0 <= position < length(), and in a hole.
  int slot_of(int position) const;

  /// Gives block `index`, which is in use and full, back, if that has not been done: a hole is left. Appends it to
  /// `freed` if it became free.
  void drop(BlockPool& pool, int index, std::vector<BlockId>& freed);

  /// Gives every block back; appends those that became free to `freed`, last position first, so that the pool hands
  /// the sequence's first blocks out next.
  void release(BlockPool& pool, std::vector<BlockId>& freed);

  /// Hands every block to the caller, with its reference; the table is empty afterwards.
  std::vector<BlockId> detach();

  /// Blocks owned: those reserved, without holes.
  int num_owned() const { return static_cast<int>(blocks_.size()) - num_holes_; }
  int num_holes() const { return num_holes_; }

  /// Usable positions.
  int length() const { return length_; }
  /// Positions covered by the reservation, a multiple of 16.
  int capacity() const { return static_cast<int>(blocks_.size()) * kBlockTokens; }
  /// Blocks of positions [0, length()), and holes.
  std::span<const BlockId> blocks() const {
    return std::span(blocks_).first(static_cast<std::size_t>(blocks_for(length_)));
  }
  /// Every block the sequence owns, and holes.
  std::span<const BlockId> reserved() const { return blocks_; }

 private:
  std::vector<BlockId> blocks_;
  int length_ = 0;
  int num_holes_ = 0;
};

}  // namespace nb::kv
