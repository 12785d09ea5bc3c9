// The softmax of one row of scores in place, as eager attention does it: a loop over vectors of f32.
//
// The loop is compiled for AVX-512 and AVX2 too and the best of them is taken, so that no instruction set is held
// against eager attention. For benchmarks only: the exponential is good to six digits.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace eager {

inline constexpr int kLanes = 16;

// 2^x for -126 < x <= 0.
[[gnu::always_inline]] inline float exp2_below(float x) {
  const auto whole = static_cast<std::int32_t>(x - 0.5f);
  const float rest = x - static_cast<float>(whole);  // [-0.5, 0.5]
  float sum = 1.3333558e-3f;
  sum = sum * rest + 9.6181291e-3f;
  sum = sum * rest + 5.5504109e-2f;
  sum = sum * rest + 2.4022651e-1f;
  sum = sum * rest + 6.9314718e-1f;
  sum = sum * rest + 1.0f;
  return sum * std::bit_cast<float>((whole + 127) << 23);
}

// `size` is a multiple of kLanes; of its columns the first `visible` count, and the others become 0.
[[gnu::always_inline]] inline void softmax_loop(float* row, int visible, int size, float scale) {
  const float to_base_2 = scale * 1.44269504f;
  const int end = (visible + kLanes - 1) / kLanes * kLanes;
  std::fill(row + visible, row + end, row[0]);  // changes no maximum
  float largest[kLanes], sums[kLanes] = {};
  std::copy_n(row, kLanes, largest);
  for (int i = 0; i < end; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) largest[l] = row[i + l] > largest[l] ? row[i + l] : largest[l];
  }
  const float top = *std::max_element(largest, largest + kLanes);
  for (int i = 0; i < end; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float x = (row[i + l] - top) * to_base_2;
      row[i + l] = exp2_below(x < -125.0f ? -125.0f : x);
    }
    if (i + kLanes > visible) std::fill(row + visible, row + end, 0.0f);
    for (int l = 0; l < kLanes; ++l) sums[l] += row[i + l];
  }
  float sum = 0;
  for (const float part : sums) sum += part;
  const float factor = 1.0f / sum;
  for (int i = 0; i < end; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) row[i + l] *= factor;
  }
  std::fill(row + end, row + size, 0.0f);
}

#if defined(__x86_64__)
[[gnu::target("avx512f,avx2,fma")]] inline void softmax_avx512(float* row, int visible, int size, float scale) {
  softmax_loop(row, visible, size, scale);
}
[[gnu::target("avx2,fma")]] inline void softmax_avx2(float* row, int visible, int size, float scale) {
  softmax_loop(row, visible, size, scale);
}
#endif

}  // namespace eager

inline void eager_softmax(float* row, int visible, int size, float scale) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return eager::softmax_avx512(row, visible, size, scale);
  if (__builtin_cpu_supports("avx2")) return eager::softmax_avx2(row, visible, size, scale);
#endif
  eager::softmax_loop(row, visible, size, scale);
}
