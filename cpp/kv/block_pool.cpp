#include "kv/block_pool.h"

#include <limits>

#include "base/error.h"

namespace nb::kv {

BlockPool::BlockPool(int num_blocks) {
  NB_CHECK(num_blocks >= 1, invalid_argument, "a block pool needs at least one block, got ", num_blocks);
  NB_CHECK(num_blocks <= std::numeric_limits<std::int32_t>::max() / kBlockTokens, invalid_argument,
           "a block pool holds at most ", std::numeric_limits<std::int32_t>::max() / kBlockTokens, " blocks, got ",
           num_blocks);
  ref_counts_.assign(static_cast<std::size_t>(num_blocks), 0);
  free_.reserve(ref_counts_.size());
  for (BlockId block = num_blocks - 1; block >= 0; --block) free_.push_back(block);
}

bool BlockPool::allocate(int count, std::vector<BlockId>& out) {
  NB_ASSERT(count >= 0);
  if (count > num_free()) return false;
  out.reserve(out.size() + static_cast<std::size_t>(count));  // the only line that may throw, before any change
  for (int i = 0; i < count; ++i) {
    const BlockId block = free_.back();
    free_.pop_back();
    ref_counts_[static_cast<std::size_t>(block)] = 1;
    out.push_back(block);
  }
  num_owned_ += count;
  return true;
}

void BlockPool::add_ref(BlockId block) {
  NB_CHECK(ref_count(block) > 0, internal, "KV block ", block, " gained an owner while it was free");
  ++ref_counts_[static_cast<std::size_t>(block)];
}

bool BlockPool::release(BlockId block) {
  NB_CHECK(ref_count(block) > 0, internal, "KV block ", block, " was released while it was free");
  if (--ref_counts_[static_cast<std::size_t>(block)] > 0) return false;
  free_.push_back(block);
  --num_owned_;
  return true;
}

int BlockPool::ref_count(BlockId block) const {
  NB_CHECK(block >= 0 && block < num_blocks(), internal, "KV block ", block, " is not one of the pool's ",
           num_blocks());
  return ref_counts_[static_cast<std::size_t>(block)];
}

void BlockPool::check_invariants() const {
  NB_ASSERT(num_free() + num_owned_ == num_blocks());
  std::vector<bool> listed(ref_counts_.size(), false);
  for (const BlockId block : free_) {
    NB_CHECK(ref_count(block) == 0, internal, "KV block ", block, " is free and has ", ref_count(block), " owners");
    NB_CHECK(!listed[static_cast<std::size_t>(block)], internal, "KV block ", block, " is twice in the free list");
    listed[static_cast<std::size_t>(block)] = true;
  }
  for (std::size_t i = 0; i < listed.size(); ++i) {
    NB_CHECK(listed[i] == (ref_counts_[i] == 0), internal, "KV block ", i, " has ", ref_counts_[i],
             " owners and is not in the free list");
  }
}

void BlockPool::check_invariants(std::span<const BlockId> owners) const {
  check_invariants();
  std::vector<std::int32_t> counted(ref_counts_.size(), 0);
  for (const BlockId block : owners) {
    static_cast<void>(ref_count(block));
    ++counted[static_cast<std::size_t>(block)];
  }
  for (std::size_t i = 0; i < counted.size(); ++i) {
    NB_CHECK(counted[i] == ref_counts_[i], internal, "KV block ", i, " has reference count ", ref_counts_[i], " but ",
             counted[i], " owners");
  }
}

}  // namespace nb::kv
