#include "cuda/reduce.cuh"

#include <gtest/gtest.h>

#include "cuda/launch.cuh"
#include "cuda_emulation/emulator.h"

namespace nb::cuda {
namespace {

constexpr int kThreads = 96;

// Two sums through the same scratch memory, one right after the other.
void two_sums(float* out) {
  NB_SHARED(float, scratch, kThreads / 32);
  const int thread = static_cast<int>(threadIdx.x);
  const float first = block_sum<kThreads>(static_cast<float>(thread), scratch);
  const float second = block_sum<kThreads>(1.0f, scratch);
  out[2 * thread] = first;
  out[2 * thread + 1] = second;
}

TEST(Reduce, EveryThreadHasTheSumsOfABlock) {
  for (const auto order : {emulation::Order::forward, emulation::Order::reversed}) {
    emulation::set_order(order);
    float out[2 * kThreads] = {};
    launch({.name = "two_sums", .grid_x = 1, .threads = kThreads}, two_sums, out);
    for (int i = 0; i < kThreads; ++i) {
      EXPECT_EQ(out[2 * i], static_cast<float>(kThreads * (kThreads - 1) / 2));
      EXPECT_EQ(out[2 * i + 1], static_cast<float>(kThreads));
    }
  }
  emulation::set_order(emulation::Order::forward);
}

}  // namespace
}  // namespace nb::cuda
