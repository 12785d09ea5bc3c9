#include "kv/block_table.h"

#include <algorithm>

#include "base/error.h"

namespace nb::kv {

bool BlockTable::reserve(BlockPool& pool, int num_tokens) {
  const int missing = blocks_for(num_tokens) - static_cast<int>(blocks_.size());
  return missing <= 0 || pool.allocate(missing, blocks_);
}

std::span<const BlockId> BlockTable::grow_to(int num_tokens) {
  NB_CHECK(num_tokens <= capacity(), internal, "a block table reserved for ", capacity(), " tokens was grown to ",
           num_tokens);
  const std::size_t used_before = blocks().size();
  length_ = std::max(length_, num_tokens);
  return blocks().subspan(used_before);
}

int BlockTable::slot_of(int position) const {
  NB_CHECK(position >= 0 && position < length_, internal, "position ", position, " of a block table of length ",
           length_);
  return blocks_[static_cast<std::size_t>(position / kBlockTokens)] * kBlockTokens + position % kBlockTokens;
}

void BlockTable::release(BlockPool& pool, std::vector<BlockId>& freed) {
  while (!blocks_.empty()) {
    const BlockId block = blocks_.back();
    blocks_.pop_back();
    if (pool.release(block)) freed.push_back(block);
  }
  length_ = 0;
}

}  // namespace nb::kv
