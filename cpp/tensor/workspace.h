// The scratch arena of one step: bump allocation, released by scope, with a high-water mark.
//
// When a step needs more than there is, the extra pieces come from the pool, return to it with their scope, and the
// next `reset` grows the arena to the high-water mark, so after warm-up a step allocates nothing. Not for anything that
// outlives a step. One thread.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

#include "tensor/allocator.h"

namespace nb {

class Workspace {
 public:
  explicit Workspace(std::shared_ptr<CachingPool> pool) : pool_(std::move(pool)) {}

  /// Uninitialised memory aligned to 64 bytes, valid until the scope in which it was taken ends, or `reset`.
  std::byte* allocate(std::size_t bytes);

  /// Uninitialised array of `count` values.
  template <class T>
  T* allocate_array(std::size_t count) {
    return reinterpret_cast<T*>(allocate(count * sizeof(T)));
  }

  /// The same values where kernels can read them until `reset`: on the host, the array itself; on a device a copy, made
  /// when an array is first asked for after `reset`. The array must keep its values until then.
  template <class T>
  const T* on_device(std::span<const T> host) {
    return static_cast<const T*>(mirror(host.data(), host.size_bytes()));
  }

  /// What `make()` returns, a vector, for kernels to read until `reset`: made when asked for by this key, the address
  /// of something that lives as long, for the first time after `reset`.
  template <class Make>
  auto derived_on_device(const void* key, const Make& make) {
    const Mirror* found = find(key, kDerived);
    if (found == nullptr) {
      const auto values = make();
      found = add(key, kDerived, values.data(), values.size() * sizeof(values[0]));
    }
    return static_cast<const typename std::invoke_result_t<Make>::value_type*>(found->data);
  }

  /// Tells where on the device the same values lie already, and will until `reset`: what on_device() answers from now
  /// on.
  template <class T>
  void place(std::span<const T> host, const void* device) {
    mirrors_.push_back({host.data(), host.size_bytes(), device, Buffer()});
  }

  /// Likewise of what derived_on_device() would make for a key.
  void place_derived(const void* key, const void* device) { mirrors_.push_back({key, kDerived, device, Buffer()}); }

  /// Gives everything back and grows the arena if the last use overflowed it. Call between steps.
  void reset();

  /// Whether the next `reset` moves the arena, so that what is allocated afterwards lies elsewhere than so far.
  bool has_overflowed() const { return has_overflowed_; }

  std::size_t high_water_bytes() const { return high_water_; }
  /// Times the system or the pool was asked for memory; constant once warm.
  std::size_t num_growths() const { return num_growths_; }

  /// Releases what was allocated since its construction.
  class Scope {
   public:
    explicit Scope(Workspace& workspace)
        : workspace_(workspace), mark_(workspace.used_), num_overflow_(workspace.overflow_.size()) {}
    ~Scope() { workspace_.release_to(mark_, num_overflow_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Workspace& workspace_;
    std::size_t mark_, num_overflow_;
  };

 private:
  struct Mirror {
    const void* host;
    std::size_t bytes;
    const void* data;  // where kernels can read it
    Buffer copy;       // where `data` is, unless it was placed
  };
  static constexpr std::size_t kDerived = ~std::size_t{0};  // in the place of a size: made from something else
  void release_to(std::size_t mark, std::size_t num_overflow) {
    used_ = mark;
    // To the pool, where the next operator finds them: a first step of many layers must not hold a set for each.
    while (overflow_.size() > num_overflow) overflow_.pop_back();
  }
  const Mirror* find(const void* host, std::size_t bytes) const;
  const Mirror* add(const void* host, std::size_t key_bytes, const void* data, std::size_t bytes);
  const void* mirror(const void* host, std::size_t bytes);

  std::shared_ptr<CachingPool> pool_;
  std::vector<Mirror> mirrors_;
  Buffer arena_;
  std::vector<Buffer> overflow_;
  std::size_t used_ = 0;  // bytes of arena and overflow together
  std::size_t high_water_ = 0;
  std::size_t num_growths_ = 0;
  bool has_overflowed_ = false;  // since the last reset
};

}  // namespace nb
