#include "sampling/row_kernels.h"

#include <cstdint>
#include <limits>
#include <vector>

namespace nb::sampling {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kMaxFinite = std::numeric_limits<float>::max();
constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLowestBits = -125.0f;  // 2 to this power is still a normal float
constexpr std::size_t kLanes = 8;

// What follows becomes part of functions for several instruction sets. Always inline, arrays and builtins instead of
// the library: no copy of any of it may remain that needs more than the processor has.
#define NB_INLINE __attribute__((always_inline)) inline

/// 2^x with x = (logit - max) * bits: x = n + f with |f| <= 1/2, then the Taylor polynomial of 2^f of degree 6 (it
/// leaves out less than 1.3e-7), and n goes into the exponent. No branch, so that compilers turn a loop of these into
/// vector code; the operations per value are the same either way.
NB_INLINE float weight(float logit, float max, float bits) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves round(x) in the low bits
  const float x = ((kMaxFinite < logit ? kMaxFinite : logit) - max) * bits;
  const float bounded = x > kLowestBits ? x : kLowestBits;  // a NaN fails the comparison
  const float shifted = bounded + kRound;
  const float f = bounded - (shifted - kRound);
  float p = 0x1.430912p-13f;  // (ln 2)^k / k! for k = 6 .. 0
  p = p * f + 0x1.5d87fep-10f;
  p = p * f + 0x1.3b2ab6p-7f;
  p = p * f + 0x1.c6b08ep-5f;
  p = p * f + 0x1.ebfbe0p-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  const std::uint32_t value = __builtin_bit_cast(std::uint32_t, p) + (__builtin_bit_cast(std::uint32_t, shifted) << 23);
  const std::uint32_t keep = x >= kLowestBits ? ~std::uint32_t{0} : 0;
  return __builtin_bit_cast(float, value& keep);
}

NB_INLINE void block_weights(const float* logits, float max, float scale, float* weights) {
  const float bits = scale * kLog2E;
  for (std::size_t i = 0; i < kBlockLogits; ++i) weights[i] = weight(logits[i], max, bits);
}

using Four = float __attribute__((vector_size(16)));

NB_INLINE Four four_at(const float* values) {
  Four four;
  __builtin_memcpy(&four, values, sizeof(four));
  return four;
}

NB_INLINE float block_sum(const float* logits, float max, float scale) {
  float weights[kBlockLogits];
  block_weights(logits, max, scale, weights);
  Four low = four_at(weights), high = four_at(weights + 4);
  for (std::size_t i = kLanes; i < kBlockLogits; i += kLanes) {
    low += four_at(weights + i);
    high += four_at(weights + i + 4);
  }
  low += high;
  return (low[0] + low[2]) + (low[1] + low[3]);
}

NB_INLINE Four larger(Four a, Four b) { return a > b ? a : b; }

NB_INLINE float block_max(const float* logits) {
  const Four lowest = Four{} + kMinusInfinity;
  Four best[4] = {lowest, lowest, lowest, lowest};  // four, so that comparisons need not wait for each other
  for (std::size_t i = 0; i < kBlockLogits; i += 16) {
    for (std::size_t k = 0; k < 4; ++k) best[k] = larger(four_at(logits + i + 4 * k), best[k]);
  }
  Four all = larger(larger(best[0], best[1]), larger(best[2], best[3]));
  all = larger(all, Four{all[2], all[3], all[0], all[1]});
  return all[0] > all[1] ? all[0] : all[1];
}

using FourInts = std::int32_t __attribute__((vector_size(16)));

NB_INLINE std::uint64_t block_reaching(const float* logits, float floor) {
  std::uint64_t mask = 0;
  for (std::size_t half = 0; half < 2; ++half) {
    FourInts bits{};
    FourInts bit = {1, 2, 4, 8};
    for (std::size_t i = 0; i < kBlockLogits / 2; i += 4, bit <<= 4) {
      bits |= (four_at(logits + half * kBlockLogits / 2 + i) >= floor) & bit;
    }
    const auto all = static_cast<std::uint32_t>((bits[0] | bits[1]) | (bits[2] | bits[3]));
    mask |= static_cast<std::uint64_t>(all) << (half * kBlockLogits / 2);
  }
  return mask;
}

#define NB_ROW_KERNELS(isa, target)                                                                                \
  target void maxima_##isa(const float* logits, std::size_t num_blocks, float* maxima) {                           \
    for (std::size_t b = 0; b < num_blocks; ++b) maxima[b] = block_max(logits + b * kBlockLogits);                 \
  }                                                                                                                \
  target void weights_##isa(const float* logits, std::size_t num_blocks, float max, float scale, float* weights) { \
    for (std::size_t b = 0; b < num_blocks; ++b) {                                                                 \
      block_weights(logits + b * kBlockLogits, max, scale, weights + b * kBlockLogits);                            \
    }                                                                                                              \
  }                                                                                                                \
  target void sums_##isa(const float* logits, std::size_t num_blocks, float max, float scale, float* sums) {       \
    for (std::size_t b = 0; b < num_blocks; ++b) sums[b] = block_sum(logits + b * kBlockLogits, max, scale);       \
  }                                                                                                                \
  target std::uint64_t reaching_##isa(const float* logits, float floor) { return block_reaching(logits, floor); }

NB_ROW_KERNELS(plain, )
#if defined(__x86_64__)
NB_ROW_KERNELS(avx2, __attribute__((target("avx2"))))
NB_ROW_KERNELS(avx512, __attribute__((target("avx512f,avx512dq,avx512vl"))))
#endif

}  // namespace

std::span<const RowKernels> row_kernels() {
  static const std::vector<RowKernels> list = [] {
    std::vector<RowKernels> usable = {{"plain", maxima_plain, weights_plain, sums_plain, reaching_plain}};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) usable.push_back({"avx2", maxima_avx2, weights_avx2, sums_avx2, reaching_avx2});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      usable.push_back({"avx512", maxima_avx512, weights_avx512, sums_avx512, reaching_avx512});
    }
#endif
    return usable;
  }();
  return list;
}

}  // namespace nb::sampling
