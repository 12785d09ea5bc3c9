// Sums and maxima over a block, in an order that depends on the size of the block only.
#pragma once

#include "cuda/device.cuh"

namespace nb::cuda {

/// The sum over a block of kThreads threads, for all of them. `scratch` holds a value for every warp.
template <int kThreads>
NB_DEVICE float block_sum(float value, SharedPtr<float> scratch) {
  value = warp_sum(value);
  if (lane_id() == 0) scratch[threadIdx.x / 32] = value;
  sync_block();
  float sum = 0.0f;
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += scratch[warp];
  sync_block();
  return sum;
}

/// 1 / sqrt(mean(x^2) + eps) of a row, computed by a block together.
template <int kThreads>
NB_DEVICE float rms_scale(const float* x, int cols, float eps, SharedPtr<float> scratch) {
  float squares = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < cols; i += kThreads) squares = fmaf(x[i], x[i], squares);
  return 1.0f / sqrtf(block_sum<kThreads>(squares, scratch) / static_cast<float>(cols) + eps);
}

/// The same of M rows at once, with the bits of rms_scale(). `scratch` holds M values for every warp; a barrier must
/// come before it is written again.
template <int kThreads, int M>
NB_DEVICE void rms_scales(float (&scales)[M], const float* const (&rows)[M], int cols, float eps,
                          SharedPtr<float> scratch) {
  NB_UNROLL
  for (int m = 0; m < M; ++m) scales[m] = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < cols; i += kThreads) {
    NB_UNROLL
    for (int m = 0; m < M; ++m) scales[m] = fmaf(rows[m][i], rows[m][i], scales[m]);
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  NB_UNROLL
  for (int m = 0; m < M; ++m) {
    scales[m] = warp_sum(scales[m]);
    if (lane_id() == 0) scratch[warp * M + m] = scales[m];
  }
  sync_block();
  NB_UNROLL
  for (int m = 0; m < M; ++m) {
    float sum = 0.0f;
    for (int w = 0; w < kThreads / 32; ++w) sum += scratch[w * M + m];
    scales[m] = 1.0f / sqrtf(sum / static_cast<float>(cols) + eps);
  }
}

}  // namespace nb::cuda
