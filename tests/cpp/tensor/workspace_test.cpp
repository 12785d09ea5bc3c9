#include "tensor/workspace.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tensor/device.h"
#include "tensor/tensor.h"

namespace nb {
namespace {

TEST(Workspace, GrowsOnceThenNeverAgain) {
  Workspace workspace(CachingPool::create());
  const auto step = [&] {
    workspace.allocate(1000);
    {
      const Workspace::Scope scope(workspace);
      workspace.allocate(50000);
    }
    workspace.allocate_array<float>(300);
    workspace.reset();
  };
  step();
  const std::size_t growths = workspace.num_growths(), high = workspace.high_water_bytes();
  EXPECT_GE(high, 51000u);
  for (int i = 0; i < 10; ++i) step();
  EXPECT_EQ(workspace.num_growths(), growths);
  EXPECT_EQ(workspace.high_water_bytes(), high);
}

// A step of many layers, the first of its size: what one layer needs is enough for all, and no piece stays behind.
TEST(Workspace, AFirstStepHoldsNoMoreThanItsLargestScope) {
  const auto pool = CachingPool::create();
  Workspace workspace(pool);
  constexpr std::size_t kPieceBytes = 1 << 20;
  const auto held = [&] { return pool->stats().in_use_bytes + pool->stats().cached_bytes; };
  const auto step = [&](int num_pieces) {
    workspace.allocate(1000);
    for (int layer = 0; layer < 20; ++layer) {
      const Workspace::Scope scope(workspace);
      for (int i = 0; i < num_pieces; ++i) workspace.allocate(kPieceBytes)[0] = std::byte{1};
    }
  };
  step(3);
  EXPECT_LE(held(), 4 * kPieceBytes);
  EXPECT_LE(pool->stats().system_allocs, 4u);
  workspace.reset();
  EXPECT_EQ(pool->stats().cached_bytes, 0u);
  EXPECT_LE(held(), CachingPool::size_class(3 * kPieceBytes + 1024));
  step(5);  // grows again: neither the old arena nor the pieces are kept
  workspace.reset();
  EXPECT_LE(held(), CachingPool::size_class(5 * kPieceBytes + 1024));
}

TEST(Workspace, PiecesAreAlignedAndDisjointWithinAScope) {
  Workspace workspace(CachingPool::create());
  for (int round = 0; round < 2; ++round) {
    std::byte* first = workspace.allocate(1);
    std::byte* second = workspace.allocate(65);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(second) % 64, 0u);
    EXPECT_TRUE(second >= first + 64 || first >= second + 128);
    workspace.reset();
  }
  std::byte* outer = nullptr;
  {
    const Workspace::Scope scope(workspace);
    outer = workspace.allocate(64);
  }
  EXPECT_EQ(workspace.allocate(64), outer);
}

TEST(Workspace, AFailedAllocationLeavesItUsable) {
  Workspace workspace(CachingPool::create());
  workspace.allocate(100);
  EXPECT_THROW(workspace.allocate(std::size_t{1} << 50), Error);
  EXPECT_LT(workspace.high_water_bytes(), 1000u);
  workspace.reset();
  EXPECT_NE(workspace.allocate(100), nullptr);
}

TEST(Tensor, DescribesAndChecksShapes) {
  float values[6] = {};
  const Tensor tensor(values, DType::f32, {2, 3});
  EXPECT_EQ(to_string(tensor), "f32[2, 3]");
  EXPECT_EQ(tensor.dim(-1), 3);
  EXPECT_NO_THROW(check_tensor(tensor, "x", DType::f32, {-1, 3}));
  try {
    check_tensor(tensor, "gate", DType::f32, {2, 4});
    FAIL() << "a wrong shape passed";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "gate: expected f32[2, 4], got f32[2, 3]");
  }
  EXPECT_THROW(check_tensor(Tensor(), "gate", DType::f32, {2}), Error);
  EXPECT_THROW(check_tensor(tensor, "gate", DType::bf16, {2, 3}), Error);
}

TEST(Device, IsNamed) {
  EXPECT_EQ(to_string(Device{}), "cpu");
  EXPECT_EQ(to_string(Device{DeviceKind::cuda, 1}), "cuda:1");
}

}  // namespace
}  // namespace nb
