#include "tensor/workspace.h"

#include <algorithm>
#include <cstring>

#include "base/align.h"
#include "tensor/device_memory.h"

namespace nb {

std::byte* Workspace::allocate(std::size_t bytes) {
  const std::size_t size = round_up(std::max<std::size_t>(bytes, 1), kBufferAlignment);
  const std::size_t begin = used_;
  const bool overflows = begin + size > arena_.bytes();
  if (overflows) {
    overflow_.push_back(pool_->allocate(size));  // may throw: nothing has changed yet
    ++num_growths_;
    has_overflowed_ = true;
  }
  used_ = begin + size;
  high_water_ = std::max(high_water_, used_);
  return overflows ? overflow_.back().data() : arena_.data() + begin;
}

const void* Workspace::mirror(const void* host, std::size_t bytes) {
  if (pool_->memory() == nullptr) return host;
  const Mirror* found = find(host, bytes);
  if (found == nullptr) found = add(host, bytes, host, bytes);
  return found->data;
}

const Workspace::Mirror* Workspace::find(const void* host, std::size_t bytes) const {
  const auto same = [&](const Mirror& mirror) { return mirror.host == host && mirror.bytes == bytes; };
  const auto found = std::find_if(mirrors_.begin(), mirrors_.end(), same);
  return found == mirrors_.end() ? nullptr : &*found;
}

const Workspace::Mirror* Workspace::add(const void* host, std::size_t key_bytes, const void* data, std::size_t bytes) {
  Buffer copy = pool_->allocate(bytes);
  if (bytes == 0) {
    // nothing to copy, and perhaps nowhere to copy from
  } else if (pool_->memory() != nullptr) {
    pool_->memory()->copy_in(copy.data(), data, bytes);
  } else {
    std::memcpy(copy.data(), data, bytes);
  }
  const void* const where = copy.data();
  mirrors_.push_back({host, key_bytes, where, std::move(copy)});
  return &mirrors_.back();
}

void Workspace::reset() {
  used_ = 0;
  mirrors_.clear();
  if (!has_overflowed_) return;
  has_overflowed_ = false;
  overflow_.clear();
  arena_ = Buffer();
  pool_->trim();  // pieces of sizes that no step will ask for again
  arena_ = pool_->allocate(high_water_);
}

}  // namespace nb
