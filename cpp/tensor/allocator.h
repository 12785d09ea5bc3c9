// Memory: an arena on 2 MB pages of the host for what lives long, a caching pool, of the host or of a device, for what
// comes and goes.
//
// Both hand out a Buffer, which keeps its owner alive. Not for tiny objects (use the standard containers). An arena
// is filled by one thread; a pool may be used by any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace nb {

struct DeviceMemory;  // device_memory.h

inline constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;
inline constexpr std::size_t kBufferAlignment = 64;

/// Owns a piece of memory, or nothing. Movable and copyable (copies share ownership); the piece returns to where it
/// came from with the last copy.
class Buffer {
 public:
  Buffer() = default;
  Buffer(std::byte* data, std::size_t bytes, std::shared_ptr<void> owner)
      : data_(data), bytes_(bytes), owner_(std::move(owner)) {}

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  explicit operator bool() const { return data_ != nullptr; }

  /// The memory seen as an array of T.
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  std::shared_ptr<void> owner_;
};

/// What an allocator has handed out and holds.
struct AllocatorStats {
  std::size_t in_use_bytes = 0;     ///< handed out and not returned
  std::size_t cached_bytes = 0;     ///< returned and kept for reuse
  std::size_t peak_bytes = 0;       ///< highest in_use_bytes
  std::size_t system_allocs = 0;    ///< requests that went to the operating system
  std::size_t huge_page_bytes = 0;  ///< bytes for which the kernel accepted the 2 MB page advice
};

/// Bump allocator over anonymous 2 MB-aligned regions advised to use huge pages. Memory is zero when handed out and
/// is returned to the system when the arena and every Buffer from it are gone.
class HostArena : public std::enable_shared_from_this<HostArena> {
 public:
  /// Regions are at least `region_bytes` long (rounded up to 2 MB). What is not used of one is not resident.
  static std::shared_ptr<HostArena> create(std::size_t region_bytes = 64 * kHugePageBytes);
  ~HostArena();
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;

  /// Zeroed memory aligned to `alignment` (a power of two, at most 2 MB). Throws out_of_memory naming the size.
  Buffer allocate(std::size_t bytes, std::size_t alignment = kBufferAlignment);

  /// Gives the part of the last huge page that is not used back to the system. For when everything is allocated.
  void trim();

  AllocatorStats stats() const { return stats_; }

 private:
  explicit HostArena(std::size_t region_bytes) : region_bytes_(region_bytes) {}

  struct Region {
    std::byte* base;
    std::size_t bytes;
  };

  std::size_t region_bytes_;
  std::vector<Region> regions_;
  std::size_t used_ = 0;  // of the last region
  AllocatorStats stats_;
};

/// Keeps returned pieces and hands them out again to requests of the same size class (powers of two and 1.5 times
/// them), so that a steady workload stops asking the system for memory. Contents are not cleared.
class CachingPool : public std::enable_shared_from_this<CachingPool> {
 public:
  /// `memory`: the device whose memory it hands out, which must outlive it; null for host memory.
  static std::shared_ptr<CachingPool> create(const DeviceMemory* memory = nullptr);
  ~CachingPool();
  CachingPool(const CachingPool&) = delete;
  CachingPool& operator=(const CachingPool&) = delete;

  /// At least `bytes` bytes aligned to 64. Throws out_of_memory naming the size.
  Buffer allocate(std::size_t bytes);

  /// Gives every cached piece back to the system.
  void trim();

  AllocatorStats stats() const;
  const DeviceMemory* memory() const { return memory_; }

  /// The size class a request of `bytes` falls into.
  static std::size_t size_class(std::size_t bytes);

 private:
  explicit CachingPool(const DeviceMemory* memory) : memory_(memory) {}
  std::byte* ask_system(std::size_t size, bool& huge);
  void give_back(std::byte* data, std::size_t bytes);

  const DeviceMemory* memory_;
  mutable std::mutex mutex_;
  std::multimap<std::size_t, std::byte*> cached_;
  AllocatorStats stats_;
};

}  // namespace nb
