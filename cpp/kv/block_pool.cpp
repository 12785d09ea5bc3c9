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
  kept_.assign(ref_counts_.size(), 0);
  links_.assign(ref_counts_.size(), {.older = kNoBlock, .newer = kNoBlock});
  evicted_.reserve(ref_counts_.size());
  free_.reserve(ref_counts_.size());
  for (BlockId block = num_blocks - 1; block >= 0; --block) free_.push_back(block);
}

bool BlockPool::allocate(int count, std::vector<BlockId>& out) {
  NB_ASSERT(count >= 0);
  if (count > num_available()) return false;
  // The only lines that may throw, before any change.
  out.reserve(out.size() + static_cast<std::size_t>(count));
  evicted_.reserve(evicted_.size() + static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) {
    BlockId block = kNoBlock;
    if (!free_.empty()) {
      block = free_.back();
      free_.pop_back();
    } else {
      block = oldest_;
      remove_cached(block);
      kept_[static_cast<std::size_t>(block)] = 0;
      evicted_.push_back(block);
    }
    ref_counts_[static_cast<std::size_t>(block)] = 1;
    out.push_back(block);
  }
  return true;
}

void BlockPool::add_ref(BlockId block) {
  if (ref_count(block) == 0) {
    NB_CHECK(is_kept(block), internal, "KV block ", block, " gained an owner while it was free");
    remove_cached(block);
  }
  ++ref_counts_[static_cast<std::size_t>(block)];
}

bool BlockPool::release(BlockId block) {
  NB_CHECK(ref_count(block) > 0, internal, "KV block ", block, " was released without an owner");
  if (--ref_counts_[static_cast<std::size_t>(block)] > 0) return false;
  if (is_kept(block)) {
    append_cached(block);
    return false;
  }
  free_.push_back(block);
  return true;
}

void BlockPool::keep(BlockId block) {
  NB_CHECK(ref_count(block) > 0, internal, "KV block ", block, " is to be kept without an owner");
  kept_[static_cast<std::size_t>(block)] = 1;
}

bool BlockPool::is_kept(BlockId block) const { return kept_[static_cast<std::size_t>(block)] != 0; }

void BlockPool::append_cached(BlockId block) {
  links(block) = {.older = newest_, .newer = kNoBlock};
  (newest_ == kNoBlock ? oldest_ : links(newest_).newer) = block;
  newest_ = block;
  ++num_cached_;
}

void BlockPool::remove_cached(BlockId block) {
  const Links found = links(block);
  (found.older == kNoBlock ? oldest_ : links(found.older).newer) = found.newer;
  (found.newer == kNoBlock ? newest_ : links(found.newer).older) = found.older;
  --num_cached_;
}

int BlockPool::ref_count(BlockId block) const {
  NB_CHECK(block >= 0 && block < num_blocks(), internal, "KV block ", block, " is not one of the pool's ",
           num_blocks());
  return ref_counts_[static_cast<std::size_t>(block)];
}

void BlockPool::check_invariants() const {
  std::vector<bool> listed(ref_counts_.size(), false);
  const auto list = [&](BlockId block, bool cached) {
    NB_CHECK(ref_count(block) == 0, internal, "KV block ", block, " is listed as free or cached and has ",
             ref_count(block), " owners");
    NB_CHECK(is_kept(block) == cached, internal, "KV block ", block, " is in the wrong list");
    NB_CHECK(!listed[static_cast<std::size_t>(block)], internal, "KV block ", block, " is listed twice");
    listed[static_cast<std::size_t>(block)] = true;
  };
  for (const BlockId block : free_) list(block, false);
  int cached = 0;
  BlockId last = kNoBlock;
  for (BlockId block = oldest_; block != kNoBlock; block = links_[static_cast<std::size_t>(block)].newer) {
    list(block, true);
    NB_ASSERT(links_[static_cast<std::size_t>(block)].older == last);
    last = block;
    ++cached;
  }
  NB_ASSERT(cached == num_cached_ && newest_ == last);
  for (std::size_t i = 0; i < listed.size(); ++i) {
    NB_CHECK(listed[i] == (ref_counts_[i] == 0), internal, "KV block ", i, " has ", ref_counts_[i],
             " owners and is in no list");
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
