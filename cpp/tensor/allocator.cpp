#include "tensor/allocator.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <new>

#include "base/align.h"
#include "base/error.h"
#include "tensor/device_memory.h"

namespace nb {
namespace {

// Pieces from here on are mapped. malloc keeps what it is given back, in as many places as there are threads, and
// raises the size from which it maps to 32 MB.
constexpr std::size_t kMappedBytes = std::size_t{128} << 10;

// Zeroed pages, at an address that is a multiple of `alignment` (of 4 KB at least). Throws out_of_memory.
std::byte* map_pages(std::size_t bytes, std::size_t alignment) {
  // Map more than needed by the alignment and give back the unaligned ends.
  void* mapped = mmap(nullptr, bytes + alignment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  NB_CHECK(mapped != MAP_FAILED, out_of_memory, "cannot allocate ", bytes, " bytes of host memory");
  const auto address = reinterpret_cast<std::uintptr_t>(mapped);
  const std::size_t head = round_up(address, static_cast<std::uintptr_t>(alignment)) - address;
  std::byte* const base = static_cast<std::byte*>(mapped) + head;
  if (head > 0) munmap(mapped, head);
  munmap(base + bytes, alignment - head);
  return base;
}

}  // namespace

std::shared_ptr<HostArena> HostArena::create(std::size_t region_bytes) {
  return std::shared_ptr<HostArena>(new HostArena(round_up(std::max<std::size_t>(region_bytes, 1), kHugePageBytes)));
}

HostArena::~HostArena() {
  for (const Region& region : regions_) munmap(region.base, region.bytes);
}

Buffer HostArena::allocate(std::size_t bytes, std::size_t alignment) {
  NB_ASSERT(std::has_single_bit(alignment) && alignment <= kHugePageBytes);
  NB_CHECK(bytes < std::size_t{1} << 46, out_of_memory, "refusing to allocate ", bytes, " bytes of host memory");
  std::size_t offset = round_up(used_, alignment);
  if (regions_.empty() || offset + bytes > regions_.back().bytes) {
    const std::size_t wanted = std::max(region_bytes_, round_up(bytes, kHugePageBytes));
    std::byte* const base = map_pages(wanted, kHugePageBytes);
    if (madvise(base, wanted, MADV_HUGEPAGE) == 0) stats_.huge_page_bytes += wanted;
    regions_.push_back({base, wanted});
    ++stats_.system_allocs;
    offset = 0;
  }
  used_ = offset + bytes;
  stats_.in_use_bytes += bytes;
  stats_.peak_bytes = stats_.in_use_bytes;
  return Buffer(regions_.back().base + offset, bytes, shared_from_this());
}

void HostArena::trim() {
  if (regions_.empty()) return;
  constexpr std::size_t kPageBytes = 4096;
  const Region& last = regions_.back();
  const std::size_t used = round_up(used_, kPageBytes);
  const std::size_t end = std::min(round_up(used_, kHugePageBytes), last.bytes);
  // Advice: a system that refuses it keeps the pages, which is no error.
  if (used < end) static_cast<void>(madvise(last.base + used, end - used, MADV_DONTNEED));
}

std::shared_ptr<CachingPool> CachingPool::create(const DeviceMemory* memory) {
  return std::shared_ptr<CachingPool>(new CachingPool(memory));
}

CachingPool::~CachingPool() { trim(); }

std::size_t CachingPool::size_class(std::size_t bytes) {
  if (bytes <= kBufferAlignment) return kBufferAlignment;
  const std::size_t power = std::bit_ceil(bytes);
  const std::size_t three_quarters = power / 4 * 3;
  return bytes <= three_quarters ? three_quarters : power;
}

std::byte* CachingPool::ask_system(std::size_t size, bool& huge) {
  if (memory_ != nullptr) {
    void* data = memory_->allocate(size);
    if (data == nullptr) {
      trim();  // what is cached is of other sizes
      data = memory_->allocate(size);
    }
    if (data == nullptr) check(*memory_);  // a device that fails gives no memory either
    NB_CHECK(data != nullptr, out_of_memory, memory_->name, ": cannot allocate ", size, " bytes; ",
             memory_->free_bytes(), " are free, ", stats().in_use_bytes, " in use by this pool");
    return static_cast<std::byte*>(data);
  }
  if (size >= kMappedBytes) {
    constexpr std::size_t kPageBytes = 4096;
    std::byte* const pages =
        map_pages(round_up(size, kPageBytes), size >= kHugePageBytes ? kHugePageBytes : kPageBytes);
    huge = size >= kHugePageBytes && madvise(pages, size, MADV_HUGEPAGE) == 0;
    return pages;
  }
  auto* data = static_cast<std::byte*>(std::aligned_alloc(kBufferAlignment, size));
  NB_CHECK(data != nullptr, out_of_memory, "cannot allocate ", size, " bytes of host memory");
  return data;
}

Buffer CachingPool::allocate(std::size_t bytes) {
  NB_CHECK(bytes < std::size_t{1} << 46, out_of_memory, "refusing to allocate ", bytes, " bytes of memory");
  const std::size_t size = round_up(size_class(bytes), kBufferAlignment);
  std::byte* data = nullptr;
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = cached_.find(size); found != cached_.end()) {
      data = found->second;
      cached_.erase(found);
      stats_.cached_bytes -= size;
    }
  }
  const bool fresh = data == nullptr;
  bool huge = false;
  if (fresh) data = ask_system(size, huge);
  {
    const std::lock_guard lock(mutex_);
    if (fresh) ++stats_.system_allocs;
    if (huge) stats_.huge_page_bytes += size;
    stats_.in_use_bytes += size;
    stats_.peak_bytes = std::max(stats_.peak_bytes, stats_.in_use_bytes);
  }
  auto owner = std::shared_ptr<void>(data, [pool = shared_from_this(), size](void* pointer) {
    pool->give_back(static_cast<std::byte*>(pointer), size);
  });
  return Buffer(data, bytes, std::move(owner));
}

void CachingPool::give_back(std::byte* data, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  cached_.emplace(bytes, data);
  stats_.in_use_bytes -= bytes;
  stats_.cached_bytes += bytes;
}

void CachingPool::trim() {
  const std::lock_guard lock(mutex_);
  for (const auto& [bytes, data] : cached_) {
    if (memory_ != nullptr) {
      memory_->release(data);
    } else if (bytes >= kMappedBytes) {
      munmap(data, bytes);
    } else {
      std::free(data);
    }
  }
  cached_.clear();
  stats_.cached_bytes = 0;
}

AllocatorStats CachingPool::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace nb
