// What kernels are written with: threads, collectives and shared memory, on a GPU and under the emulator of the tests.
//
// A kernel that is written with these runs unchanged on the CPU (tests/cuda_emulation), where every access to shared
// memory is checked. Rules: shared memory only through NB_SHARED and dynamic_shared(), lanes talk only through the
// functions here, instructions without a C++ spelling only through ptx.cuh, launches only through launch.cuh.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define NB_DEVICE __device__ __forceinline__
#define NB_PRAGMA(text) _Pragma(#text)
#define NB_UNROLL_BY(times) NB_PRAGMA(unroll times)
#define NB_UNROLL _Pragma("unroll")  // before a loop whose indices must be known, so that its arrays stay in registers

#else  // the emulator

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda_emulation/emulator.h"

#define NB_DEVICE inline
#define NB_UNROLL
#define NB_UNROLL_BY(times)
#define __global__
#define __launch_bounds__(...)
#define threadIdx (::nb::emulation::place().thread)
#define blockIdx (::nb::emulation::place().block)
#define blockDim (::nb::emulation::place().block_dim)
#define gridDim (::nb::emulation::place().grid_dim)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

#endif

namespace nb::cuda {

inline constexpr unsigned kFullWarp = 0xffffffffu;

// ---- shared memory ----

#if defined(__CUDACC__)

template <class T>
using SharedPtr = T*;

/// An array in the block's shared memory, not initialised: NB_SHARED(float, tile, 128); tile[i] = ...
#define NB_SHARED(Type, name, count)                   \
  __shared__ __align__(16) Type name##_storage[count]; \
  ::nb::cuda::SharedPtr<Type> name = name##_storage

/// The dynamic shared memory of the launch, aligned to 16 bytes.
template <class T>
NB_DEVICE SharedPtr<T> dynamic_shared() {
  extern __shared__ __align__(16) unsigned char nb_dynamic_shared[];
  return reinterpret_cast<T*>(nb_dynamic_shared);
}

/// The same memory as another type.
template <class To, class From>
NB_DEVICE To* shared_cast(From* pointer) {
  return reinterpret_cast<To*>(pointer);
}

template <class T>
NB_DEVICE T* raw(T* pointer) {
  return pointer;
}

#else

/// A place in shared memory: tells the emulator of every read and write.
template <class T>
class SharedRef {
 public:
  SharedRef(T* address, emulation::Where where) : address_(address), where_(where) {}
  operator T() const {  // as T& would
    emulation::on_read(address_, sizeof(T), where_);
    return *address_;
  }
  const SharedRef& operator=(const T& value) const {
    emulation::on_write(address_, sizeof(T), where_);
    *address_ = value;
    return *this;
  }
  const SharedRef& operator=(const SharedRef& other) const { return *this = static_cast<T>(other); }
  const SharedRef& operator+=(const T& value) const { return *this = static_cast<T>(*this) + value; }
  SharedRef(const SharedRef&) = default;

 private:
  T* address_;
  emulation::Where where_;
};

template <class T>
class SharedPtr {
 public:
  /// An index that knows where in the source it stands.
  struct Index {
    template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer> > >
    Index(Integer i, emulation::Where w = emulation::Where::current())
        : value(static_cast<std::ptrdiff_t>(i)), where(w) {}
    std::ptrdiff_t value;
    emulation::Where where;
  };

  explicit SharedPtr(T* address) : address_(address) {}
  SharedRef<T> operator[](Index index) const { return {address_ + index.value, index.where}; }
  SharedPtr operator+(std::ptrdiff_t offset) const { return SharedPtr(address_ + offset); }
  T* address() const { return address_; }

 private:
  T* address_;
};

#define NB_SHARED(Type, name, count) \
  static char name##_site;           \
  ::nb::cuda::SharedPtr<Type> name(  \
      reinterpret_cast<Type*>(::nb::emulation::shared_memory(&name##_site, sizeof(Type) * (count), 16)))

template <class T>
SharedPtr<T> dynamic_shared() {
  return SharedPtr<T>(reinterpret_cast<T*>(emulation::dynamic_shared_memory()));
}

template <class To, class From>
SharedPtr<To> shared_cast(SharedPtr<From> pointer) {
  return SharedPtr<To>(reinterpret_cast<To*>(pointer.address()));
}

template <class T>
T* raw(SharedPtr<T> pointer) {
  return pointer.address();
}

#endif

// ---- threads that wait for each other ----

#if defined(__CUDACC__)

NB_DEVICE void sync_block() { __syncthreads(); }
NB_DEVICE void sync_warp(unsigned mask = kFullWarp) { __syncwarp(mask); }

/// The value of the lane whose number differs in the bits of `lane_mask`.
template <class T>
NB_DEVICE T shuffle_xor(T value, int lane_mask, unsigned mask = kFullWarp) {
  return __shfl_xor_sync(mask, value, lane_mask);
}

/// The value of a lane.
template <class T>
NB_DEVICE T shuffle(T value, int lane, unsigned mask = kFullWarp) {
  return __shfl_sync(mask, value, lane);
}

/// A bit for every lane: whether its `predicate` holds.
NB_DEVICE unsigned ballot(bool predicate, unsigned mask = kFullWarp) { return __ballot_sync(mask, predicate); }

#else

inline void sync_block(emulation::Where where = emulation::Where::current()) { emulation::sync_threads(where); }
inline void sync_warp(unsigned mask = kFullWarp, emulation::Where where = emulation::Where::current()) {
  emulation::sync_warp(mask, where);
}

template <class T>
T shuffle_from(T value, int source, const char* name, unsigned mask, const emulation::Where& where) {
  struct Input {
    T value;
    int source;
  };
  static_assert(sizeof(Input) <= emulation::kLaneBytes);
  const Input input{value, source};
  T result;
  const auto compute = [&](emulation::WarpData& data) {
    for (int lane = 0; lane < 32; ++lane) {
      if ((data.mask >> lane & 1u) == 0) continue;
      Input mine;
      std::memcpy(&mine, data.in[lane], sizeof(mine));
      if ((data.mask >> mine.source & 1u) == 0) emulation::fail("a shuffle from a lane outside the mask", where);
      Input theirs;
      std::memcpy(&theirs, data.in[mine.source], sizeof(theirs));
      std::memcpy(data.out[lane], &theirs.value, sizeof(T));
    }
  };
  emulation::collective(mask, name, &input, sizeof(input), &result, sizeof(result), compute, where);
  return result;
}

template <class T>
T shuffle_xor(T value, int lane_mask, unsigned mask = kFullWarp, emulation::Where where = emulation::Where::current()) {
  return shuffle_from(value, (emulation::place().lane ^ lane_mask) & 31, "shuffle_xor", mask, where);
}

template <class T>
T shuffle(T value, int lane, unsigned mask = kFullWarp, emulation::Where where = emulation::Where::current()) {
  return shuffle_from(value, lane & 31, "shuffle", mask, where);
}

inline unsigned ballot(bool predicate, unsigned mask = kFullWarp,
                       emulation::Where where = emulation::Where::current()) {
  const unsigned char input = predicate ? 1 : 0;
  unsigned result = 0;
  const auto compute = [](emulation::WarpData& data) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if ((data.mask >> lane & 1u) != 0 && data.in[lane][0] != std::byte{0}) bits |= 1u << lane;
    }
    for (int lane = 0; lane < 32; ++lane) std::memcpy(data.out[lane], &bits, sizeof(bits));
  };
  emulation::collective(mask, "ballot", &input, 1, &result, sizeof(result), compute, where);
  return result;
}

#endif

/// The number of the calling thread within its warp.
NB_DEVICE int lane_id() { return static_cast<int>(threadIdx.x & 31u); }

/// The sum over the lanes of a warp, for all of them; the order of additions is fixed.
NB_DEVICE float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += shuffle_xor(value, step);
  return value;
}

NB_DEVICE float warp_max(float value) {
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, shuffle_xor(value, step));
  return value;
}

}  // namespace nb::cuda
