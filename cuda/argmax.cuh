// The largest of many values and its number: ties go to the lower number, NaN never wins.
#pragma once

#include "cuda/device.cuh"

namespace nb::cuda {

struct Best {
  static constexpr int kNone = 0x7fffffff;  // as a row of NaN or minus infinity has

  float value = -INFINITY;
  int id = kNone;

  NB_DEVICE void take(float other, int other_id) {
    if (other > value || (other == value && other_id < id && id != kNone)) {
      value = other;
      id = other_id;
    }
  }

  /// Takes that of the lane whose number differs in the bits of `lane_mask`.
  NB_DEVICE void take_from_lane(int lane_mask) {
    const float other = shuffle_xor(value, lane_mask);
    take(other, shuffle_xor(id, lane_mask));
  }

  /// Takes those of all threads of a block; thread 0 has the result. Both arrays hold a value for every warp.
  template <int kThreads>
  NB_DEVICE void take_from_block(SharedPtr<float> values, SharedPtr<int> ids) {
    for (int step = 16; step > 0; step /= 2) take_from_lane(step);
    if (lane_id() == 0) {
      values[threadIdx.x / 32] = value;
      ids[threadIdx.x / 32] = id;
    }
    sync_block();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < kThreads / 32; ++warp) take(values[warp], ids[warp]);
  }

  NB_DEVICE int found() const { return id == kNone ? 0 : id; }
};

}  // namespace nb::cuda
