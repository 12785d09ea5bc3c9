#include "tensor/workspace.h"

#include <algorithm>

#include "base/align.h"

namespace nb {

std::byte* Workspace::allocate(std::size_t bytes) {
  const std::size_t size = round_up(std::max<std::size_t>(bytes, 1), kBufferAlignment);
  const std::size_t begin = used_;
  const bool overflows = begin + size > arena_.bytes();
  if (overflows) {
    overflow_.push_back(pool_->allocate(size));  // may throw: nothing has changed yet
    ++num_growths_;
  }
  used_ = begin + size;
  high_water_ = std::max(high_water_, used_);
  return overflows ? overflow_.back().data() : arena_.data() + begin;
}

void Workspace::reset() {
  used_ = 0;
  if (overflow_.empty()) return;
  overflow_.clear();
  arena_ = Buffer();
  arena_ = pool_->allocate(high_water_);
}

}  // namespace nb
