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

}  // namespace nb::cuda
