// What this machine can do at most: reading memory, int8 and bf16 dot products, fp32 multiply-adds in registers.
//
// Measured with the instructions that the processor has, whatever the kernels use; each figure is the best of several
// runs, since other programs can only lower it. Zero where it lacks the instruction, and on other than x86-64 for
// everything but reading. For benchmarks only.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "base/threads.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ceilings {

/// Of all threads together, but for the ones named `_one`.
struct Ceilings {
  double read_4k_one = 0, read_2m_one = 0, read_4k_all = 0, read_2m_all = 0;  ///< GB/s
  double int8_dot = 0, bf16_dot = 0, fp32_fma = 0;                            ///< GOP/s, two a multiply-add
};

namespace detail {

inline constexpr std::size_t kReadBytes = std::size_t{128} << 20;  // of each thread
inline constexpr int kReadRuns = 15, kLoopRuns = 100;
inline constexpr std::int64_t kSteps =
    200'000;                        // of a loop in registers: about 1 ms, which other programs may leave alone
inline constexpr int kChains = 12;  // independent ones: more than the latency times the units

/// Anonymous memory that is resident, on pages of the size wanted if the system gives them.
class Pages {
 public:
  Pages(std::size_t bytes, bool huge) : bytes_(bytes) {
    // Aligned by hand: advice about huge pages counts for whole ones.
    constexpr std::size_t kHuge = std::size_t{2} << 20;
    base_ = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::runtime_error("no memory to measure the read bandwidth with");
    const auto address = (reinterpret_cast<std::uintptr_t>(base_) + kHuge - 1) / kHuge * kHuge;
    data_ = reinterpret_cast<std::uint8_t*>(address);
    madvise(data_, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    std::memset(data_, 1, bytes);
  }
  ~Pages() { munmap(base_, bytes_ + (std::size_t{2} << 20)); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  const std::uint8_t* data() const { return data_; }

 private:
  std::size_t bytes_;
  void* base_;
  std::uint8_t* data_;
};

inline std::uint64_t read_plain(const std::uint8_t* data, std::size_t bytes) {
  std::uint64_t sums[8] = {};
  for (std::size_t i = 0; i < bytes; i += 64) {
    std::uint64_t words[8];
    std::memcpy(words, data + i, 64);
    for (int k = 0; k < 8; ++k) sums[k] ^= words[k];
  }
  for (int k = 1; k < 8; ++k) sums[0] ^= sums[k];
  return sums[0];
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) inline std::uint64_t read_avx2(const std::uint8_t* data, std::size_t bytes) {
  __m256i sums[8] = {};
  for (std::size_t i = 0; i < bytes; i += 256) {
    for (std::size_t k = 0; k < 8; ++k) {
      const auto* const from = reinterpret_cast<const __m256i*>(data + i + 32 * k);
      sums[k] = _mm256_xor_si256(sums[k], _mm256_load_si256(from));
    }
  }
  for (int k = 1; k < 8; ++k) sums[0] = _mm256_xor_si256(sums[0], sums[k]);
  return static_cast<std::uint64_t>(_mm256_extract_epi64(sums[0], 0));
}

// Instructions in `kChains` independent chains. The chains are variables, not an array, or they live in memory; the
// empty asm makes every round of the loop count.
#define NB_CHAINS(step) \
  step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9) step(10) step(11)
#define NB_PEAK_LOOP(name, isa, type, zero, constraint, step)                                                          \
  __attribute__((target(isa))) inline void name(std::int64_t steps) {                                                  \
    type a = zero, b = zero;                                                                                           \
    type c0 = zero, c1 = zero, c2 = zero, c3 = zero, c4 = zero, c5 = zero, c6 = zero, c7 = zero, c8 = zero, c9 = zero, \
         c10 = zero, c11 = zero;                                                                                       \
    asm volatile("" : "+" constraint(a), "+" constraint(b));                                                           \
    for (std::int64_t i = 0; i < steps; ++i) {                                                                         \
      NB_CHAINS(step)                                                                                                  \
      asm volatile(""                                                                                                  \
                   : "+" constraint(c0), "+" constraint(c1), "+" constraint(c2), "+" constraint(c3),                   \
                     "+" constraint(c4), "+" constraint(c5), "+" constraint(c6), "+" constraint(c7),                   \
                     "+" constraint(c8), "+" constraint(c9), "+" constraint(c10), "+" constraint(c11));                \
    }                                                                                                                  \
  }
#define NB_STEP(n) c##n = _mm256_fmadd_ps(a, b, c##n);
NB_PEAK_LOOP(fma_avx2, "avx2,fma", __m256, _mm256_setzero_ps(), "x", NB_STEP)
#undef NB_STEP
#define NB_STEP(n) c##n = _mm512_fmadd_ps(a, b, c##n);
NB_PEAK_LOOP(fma_avx512, "avx512f", __m512, _mm512_setzero_ps(), "v", NB_STEP)
#undef NB_STEP
#define NB_STEP(n) c##n = _mm512_dpbusd_epi32(c##n, a, b);
NB_PEAK_LOOP(int8_avx512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), "v", NB_STEP)
#undef NB_STEP
#define NB_STEP(n) c##n = _mm256_dpbusd_avx_epi32(c##n, a, b);
NB_PEAK_LOOP(int8_vnni, "avx2,avxvnni", __m256i, _mm256_setzero_si256(), "x", NB_STEP)
#undef NB_STEP
// Without VNNI a product of 32 pairs takes three instructions; `a` is made new each time, or the first is done once.
#define NB_STEP(n)            \
  asm volatile("" : "+x"(a)); \
  c##n = _mm256_add_epi32(c##n, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), b));
NB_PEAK_LOOP(int8_avx2, "avx2", __m256i, _mm256_setzero_si256(), "x", NB_STEP)
#undef NB_STEP
#define NB_STEP(n) c##n = _mm512_dpbf16_ps(c##n, (__m512bh)a, (__m512bh)b);
NB_PEAK_LOOP(bf16_avx512, "avx512f,avx512bf16", __m512, _mm512_setzero_ps(), "v", NB_STEP)
#undef NB_STEP
#undef NB_CHAINS
#undef NB_PEAK_LOOP
#endif

/// Seconds of the fastest of some runs of `function(index)` on the members of a pool that are asked for.
template <class Function>
double fastest(nb::ThreadPool& pool, int num_threads, int runs, const Function& function) {
  double best = 1e30;
  for (int run = 0; run < runs; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    pool.run([&](const nb::Part& part) {
      if (part.index < num_threads) function(part.index);
    });
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

inline double read_gb_s(nb::ThreadPool& pool, int num_threads, const Pages& pages) {
  auto* read = read_plain;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) read = read_avx2;
#endif
  const double seconds = fastest(pool, num_threads, kReadRuns, [&](int index) {
    volatile std::uint64_t sink = read(pages.data() + static_cast<std::size_t>(index) * kReadBytes, kReadBytes);
    (void)sink;
  });
  return static_cast<double>(kReadBytes) * num_threads / seconds / 1e9;
}

inline double giga_ops(nb::ThreadPool& pool, void (*loop)(std::int64_t), int ops_per_instruction) {
  const int threads = pool.num_threads();
  const double seconds = fastest(pool, threads, kLoopRuns, [&](int) { loop(kSteps); });
  return static_cast<double>(kSteps) * kChains * ops_per_instruction * threads / seconds / 1e9;
}

}  // namespace detail

/// Measures for about a second with the threads of `pool`. Throws std::runtime_error without the memory.
inline Ceilings measure(nb::ThreadPool& pool) {
  using namespace detail;
  Ceilings result;
  const int threads = pool.num_threads();
  const std::size_t bytes = kReadBytes * static_cast<std::size_t>(threads);
  {
    const Pages pages(bytes, false);
    result.read_4k_one = read_gb_s(pool, 1, pages);
    result.read_4k_all = read_gb_s(pool, threads, pages);
  }
  {
    const Pages pages(bytes, true);
    result.read_2m_one = read_gb_s(pool, 1, pages);
    result.read_2m_all = read_gb_s(pool, threads, pages);
  }
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f");
  if (avx512) {
    result.fp32_fma = giga_ops(pool, fma_avx512, 32);
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    result.fp32_fma = giga_ops(pool, fma_avx2, 16);
  }
  if (avx512 && __builtin_cpu_supports("avx512vnni")) {
    result.int8_dot = giga_ops(pool, int8_avx512, 128);
  } else if (__builtin_cpu_supports("avxvnni")) {
    result.int8_dot = giga_ops(pool, int8_vnni, 64);
  } else if (__builtin_cpu_supports("avx2")) {
    result.int8_dot = giga_ops(pool, int8_avx2, 64);
  }
  if (avx512 && __builtin_cpu_supports("avx512bf16")) result.bf16_dot = giga_ops(pool, bf16_avx512, 64);
#endif
  return result;
}

}  // namespace ceilings
