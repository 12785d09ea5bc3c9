#include "kv/block_table.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace nb::kv {

bool BlockTable::reserve(BlockPool& pool, int num_tokens) {
  const int missing = blocks_for(num_tokens) - static_cast<int>(blocks_.size());
  return missing <= 0 || pool.allocate(missing, blocks_);
}

int BlockTable::adopt(PrefixCache& cache, PrefixKeys& keys, std::span<const TokenId> tokens, int max_blocks) {
  NB_ASSERT(length_ == capacity());
  const int adopted = cache.extend(keys, tokens, max_blocks, blocks_);
  length_ = capacity();
  return adopted;
}

void BlockTable::publish(PrefixCache& cache, BlockPool& pool, PrefixKeys& keys, std::span<const TokenId> tokens,
                         int index, std::vector<BlockId>& freed) {
  const std::size_t count = static_cast<std::size_t>(index) + 1;
  NB_ASSERT(index >= 0 && static_cast<int>(count) * kBlockTokens <= length_);
  BlockId& own = blocks_[count - 1];
  const BlockId found = cache.publish(keys, tokens.first(count * kBlockTokens), std::span(blocks_).first(count));
  if (found == own) return;
  pool.add_ref(found);
  if (pool.release(own)) freed.push_back(own);
  own = found;
}

bool BlockTable::fork(BlockPool& pool, const BlockTable& other, int num_tokens, std::vector<BlockCopy>& copies) {
  NB_ASSERT(blocks_.empty() && num_tokens >= 0 && num_tokens <= other.length_);
  const std::size_t shared = static_cast<std::size_t>(num_tokens / kBlockTokens);
  NB_ASSERT(other.num_holes_ == 0);
  const bool has_rest = num_tokens % kBlockTokens != 0;
  blocks_.reserve(shared + 1);
  copies.reserve(copies.size() + 1);
  if (has_rest && !pool.allocate(1, blocks_)) return false;
  for (std::size_t i = 0; i < shared; ++i) pool.add_ref(other.blocks_[i]);
  if (has_rest) copies.push_back({.from = other.blocks_[shared], .to = blocks_[0]});
  blocks_.insert(blocks_.begin(), other.blocks_.begin(), other.blocks_.begin() + static_cast<std::ptrdiff_t>(shared));
  length_ = num_tokens;
  return true;
}

std::span<const BlockId> BlockTable::grow_to(int num_tokens) {
  NB_CHECK(num_tokens <= capacity(), internal, "a block table reserved for ", capacity(), " tokens was grown to ",
           num_tokens);
  const std::size_t used_before = blocks().size();
  length_ = std::max(length_, num_tokens);
  return blocks().subspan(used_before);
}

void BlockTable::truncate(int num_tokens) {
  NB_ASSERT(num_tokens >= 0 && num_tokens <= length_);
  length_ = num_tokens;
}

int BlockTable::slot_of(int position) const {
  NB_CHECK(position >= 0 && position < length_, internal, "position ", position, " of a block table of length ",
           length_);
  const BlockId block = blocks_[static_cast<std::size_t>(position / kBlockTokens)];
  NB_CHECK(block != kNoBlock, internal, "position ", position, " of a block table is in a block that was given back");
  return block * kBlockTokens + position % kBlockTokens;
}

void BlockTable::drop(BlockPool& pool, int index, std::vector<BlockId>& freed) {
  NB_ASSERT(index >= 0 && (index + 1) * kBlockTokens <= length_);
  BlockId& block = blocks_[static_cast<std::size_t>(index)];
  if (block == kNoBlock) return;
  if (pool.release(block)) freed.push_back(block);
  block = kNoBlock;
  ++num_holes_;
}

std::vector<BlockId> BlockTable::detach() {
  NB_ASSERT(num_holes_ == 0);
  length_ = 0;
  return std::exchange(blocks_, {});
}

void BlockTable::release(BlockPool& pool, std::vector<BlockId>& freed) {
  while (!blocks_.empty()) {
    const BlockId block = blocks_.back();
    blocks_.pop_back();
    if (block != kNoBlock && pool.release(block)) freed.push_back(block);
  }
  length_ = 0;
  num_holes_ = 0;
}

}  // namespace nb::kv
