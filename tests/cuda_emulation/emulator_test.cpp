#include "cuda_emulation/emulator.h"

#include <gtest/gtest.h>

#include <numeric>
#include <stdexcept>
#include <vector>

#include "cuda/device.cuh"

namespace nb::emulation {

namespace {

// The message of the error that a kernel ends with, in both orders of threads; empty if it ends well in both.
template <class Kernel>
std::string error_of(const Launch& launch, const Kernel& kernel) {
  std::string message;
  for (const Order order : {Order::forward, Order::reversed}) {
    set_order(order);
    try {
      run("kernel", launch, kernel);
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
  }
  set_order(Order::forward);
  return message;
}

bool mentions(const std::string& message, const std::string& words) { return message.find(words) != std::string::npos; }

}  // namespace

TEST(Emulator, EveryThreadOfEveryBlockRunsOnce) {
  std::vector<int> counts(2 * 3 * 4 * 5);
  const auto kernel = [&] {
    const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
    const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
    ++counts[block * 20 + thread];
  };
  EXPECT_EQ(error_of({.grid = {2, 3}, .block = {4, 5}}, kernel), "");
  EXPECT_EQ(counts, std::vector<int>(120, 2));  // once in each order
  EXPECT_TRUE(has_run("kernel"));
  EXPECT_FALSE(has_run("another"));
}

TEST(Emulator, SharedMemoryAndBarriers) {
  std::vector<float> out(256);
  const auto reverse = [&] {
    NB_SHARED(float, tile, 256);
    tile[threadIdx.x] = static_cast<float>(threadIdx.x);
    cuda::sync_block();
    out[threadIdx.x] = tile[255 - threadIdx.x];
  };
  EXPECT_EQ(error_of({.grid = {3}, .block = {256}}, reverse), "");
  for (int i = 0; i < 256; ++i) EXPECT_EQ(out[static_cast<std::size_t>(i)], 255 - i);
}

TEST(Emulator, AMissingBarrierIsARace) {
  float out = 0;
  const auto write_then_read = [&] {
    NB_SHARED(float, tile, 64);
    tile[threadIdx.x] = 1.0F;
    out += tile[63 - threadIdx.x];
  };
  const std::string message = error_of({.grid = {1}, .block = {64}}, write_then_read);
  EXPECT_TRUE(mentions(message, "without a barrier") || mentions(message, "nobody wrote")) << message;
  EXPECT_TRUE(mentions(message, "emulator_test.cpp:")) << message;
  const auto read_then_write = [&] {
    NB_SHARED(float, tile, 64);
    tile[threadIdx.x] = 1.0F;
    cuda::sync_block();
    out += tile[63 - threadIdx.x];
    tile[threadIdx.x] = 2.0F;  // others may not have read yet
  };
  EXPECT_TRUE(mentions(error_of({.grid = {1}, .block = {64}}, read_then_write), "without a barrier between"));
  const auto two_writers = [&] {
    NB_SHARED(float, tile, 1);
    tile[0] = 1.0F;
  };
  EXPECT_TRUE(mentions(error_of({.grid = {1}, .block = {2}}, two_writers), "writes shared memory that"));
}

TEST(Emulator, AWarpBarrierOrdersItsOwnWarpOnly) {
  float out = 0;
  const auto within = [&] {
    NB_SHARED(float, tile, 64);
    tile[threadIdx.x] = 1.0F;
    cuda::sync_warp();
    out += tile[threadIdx.x ^ 1u];
    cuda::sync_warp();
    tile[threadIdx.x] = 2.0F;
  };
  EXPECT_EQ(error_of({.grid = {1}, .block = {64}}, within), "");
  const auto across = [&] {
    NB_SHARED(float, tile, 64);
    tile[threadIdx.x] = 1.0F;
    cuda::sync_warp();
    out += tile[threadIdx.x ^ 32u];
  };
  EXPECT_NE(error_of({.grid = {1}, .block = {64}}, across), "");
}

TEST(Emulator, ReadsOfWhatNobodyWroteAndPastTheEnd) {
  float out = 0;
  const auto unwritten = [&] {
    NB_SHARED(float, tile, 4);
    if (threadIdx.x == 0) tile[0] = 1.0F;
    cuda::sync_block();
    out += tile[1];
  };
  EXPECT_TRUE(mentions(error_of({.grid = {1}, .block = {32}}, unwritten), "nobody wrote"));
  const auto past = [&] {
    const auto tile = cuda::dynamic_shared<float>();
    tile[32 + threadIdx.x] = 1.0F;
  };
  EXPECT_TRUE(mentions(error_of({.grid = {1}, .block = {1}, .dynamic_shared_bytes = 128}, past), "past the end"));
}

TEST(Emulator, DivergentBarriersAreReported) {
  const auto half = [] {
    if (threadIdx.x < 16) cuda::sync_block();
  };
  EXPECT_TRUE(mentions(error_of({.grid = {1}, .block = {32}}, half), "16 threads at the barrier"));
  const auto two_places = [] {
    if (threadIdx.x < 16) {
      cuda::sync_block();
    } else {
      cuda::sync_block();
    }
  };
  EXPECT_TRUE(mentions(error_of({.grid = {1}, .block = {32}}, two_places), "wait for others that never come"));
}

TEST(Emulator, ShufflesBallotsAndSums) {
  std::vector<float> sums(64);
  std::vector<int> neighbours(64);
  std::vector<unsigned> votes(64);
  const auto kernel = [&] {
    const unsigned i = threadIdx.x;
    sums[i] = cuda::warp_sum(static_cast<float>(i));
    neighbours[i] = cuda::shuffle(static_cast<int>(i), cuda::lane_id() + 1);
    votes[i] = cuda::ballot(i % 3 == 0);
  };
  EXPECT_EQ(error_of({.grid = {1}, .block = {64}}, kernel), "");
  for (unsigned i = 0; i < 64; ++i) {
    EXPECT_EQ(sums[i], i < 32 ? 496.0F : 496.0F + 32 * 32);
    EXPECT_EQ(neighbours[i], static_cast<int>(i / 32 * 32 + (i + 1) % 32));
  }
  for (unsigned lane = 0; lane < 32; ++lane) EXPECT_EQ(votes[0] >> lane & 1u, lane % 3 == 0 ? 1u : 0u);
}

TEST(Emulator, ShufflesWithAWrongMaskAreReported) {
  int out = 0;
  const auto some_missing = [&] {
    if (threadIdx.x < 31) out += cuda::shuffle_xor(1, 1);
  };
  EXPECT_TRUE(mentions(error_of({.grid = {1}, .block = {32}}, some_missing), "shuffle_xor with mask 0xffffffff"));
  const auto outside = [&] {
    if (threadIdx.x < 16) out += cuda::shuffle_xor(1, 16, 0xffffu);
  };
  EXPECT_TRUE(mentions(error_of({.grid = {1}, .block = {32}}, outside), "outside the mask"));
  const auto not_named = [&] { out += cuda::shuffle_xor(1, 1, 0xffffu); };
  EXPECT_TRUE(mentions(error_of({.grid = {1}, .block = {32}}, not_named), "does not name the calling lane"));
  const auto not_there = [&] { out += cuda::shuffle_xor(1, 1); };
  EXPECT_TRUE(mentions(error_of({.grid = {1}, .block = {16}}, not_there), "lanes that do not exist"));
  const auto groups = [&] {
    const unsigned mask = threadIdx.x < 16 ? 0xffffu : 0xffff0000u;
    out += cuda::shuffle_xor(1, 1, mask);
  };
  EXPECT_EQ(error_of({.grid = {1}, .block = {32}}, groups), "");
}

TEST(Emulator, DifferentCollectivesDoNotMeet) {
  unsigned out = 0;
  const auto kernel = [&] {
    if (threadIdx.x < 16) {
      out += cuda::ballot(true);
    } else {
      out += cuda::shuffle(1u, 0);
    }
  };
  EXPECT_TRUE(mentions(error_of({.grid = {1}, .block = {32}}, kernel), "is at"));
}

TEST(Emulator, AsynchronousCopiesArriveWhenWaitedFor) {
  std::vector<float> in(64);
  std::iota(in.begin(), in.end(), 0.0F);
  std::vector<float> out(64);
  const auto copy = [&](bool waits) {
    const auto tile = cuda::dynamic_shared<float>();
    const unsigned i = threadIdx.x * 4;
    copy_async(cuda::raw(tile) + i, in.data() + i, 16, 0, Where::current());
    copy_async_commit();
    copy_async_wait(waits ? 0 : 1);
    cuda::sync_block();
    for (unsigned j = i; j < i + 4; ++j) out[j] = tile[63 - j];
    if (!waits) copy_async_wait(0);
  };
  const Launch launch{.grid = {1}, .block = {16}, .dynamic_shared_bytes = 256};
  EXPECT_EQ(error_of(launch, [&] { copy(true); }), "");
  for (int i = 0; i < 64; ++i) EXPECT_EQ(out[static_cast<std::size_t>(i)], 63 - i);
  EXPECT_TRUE(mentions(error_of(launch, [&] { copy(false); }), "nobody wrote"));
}

}  // namespace nb::emulation
