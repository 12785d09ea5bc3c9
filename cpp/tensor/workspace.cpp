#include "tensor/workspace.h"

#include <algorithm>

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
  }
  used_ = begin + size;
  high_water_ = std::max(high_water_, used_);
  return overflows ? overflow_.back().data() : arena_.data() + begin;
}

const void* Workspace::mirror(const void* host, std::size_t bytes) {
  const DeviceMemory* const memory = pool_->memory();
  if (memory == nullptr) return host;
  for (const Mirror& mirror : mirrors_) {
    if (mirror.host == host && mirror.bytes == bytes) return mirror.copy.data();
  }
  Buffer copy = pool_->allocate(bytes);
  memory->copy_in(copy.data(), host, bytes);
  mirrors_.push_back({host, bytes, std::move(copy)});
  return mirrors_.back().copy.data();
}

void Workspace::reset() {
  used_ = 0;
  mirrors_.clear();
  if (overflow_.empty()) return;
  overflow_.clear();
  arena_ = Buffer();
  arena_ = pool_->allocate(high_water_);
}

}  // namespace nb
