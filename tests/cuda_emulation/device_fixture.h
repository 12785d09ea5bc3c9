// Shared by tests of device kernels: tensors in device memory, a context for operators, and the reference beside it.
//
// For tests only. Everything goes through DeviceMemory, so that the same tests run on a GPU:
// NANOBRAID_TEST_DEVICE=cuda:0 takes the library of kernels that the core finds, and no emulator.
#pragma once

#include "base/effort.h"
#include "base/env.h"
#include "cuda_emulation/device.h"
#include "cuda_emulation/emulator.h"
#include "ops/ops_fixture.h"
#include "tensor/device_memory.h"

namespace nb::cuda {

/// The emulator, or the backend that NANOBRAID_TEST_DEVICE names.
inline const ops::Backend& tested_backend() {
  const auto name = environment("NANOBRAID_TEST_DEVICE");
  return name ? ops::find_backend(*name) : emulation::backend();
}

/// Operators of the device under test.
struct DeviceBench {
  DeviceBench()
      : backend(tested_backend()),
        memory(*backend.kernels->memory),
        pool(1),
        workspace(CachingPool::create(&memory)),
        ctx{backend.kernels, &pool, &workspace} {}

  /// A group of matrices packed for the device.
  ops::LinearWeight pack(std::vector<ops::MatrixSource> group, const std::string& act,
                         ops::Grouping grouping = ops::Grouping::stacked) {
    const auto arena = HostArena::create(1);
    ops::LinearWeight weight = ops::pack_linear(group, grouping, act, backend.kernels->layout, *arena, pool);
    ops::move_to(memory, weight);
    return weight;
  }

  const ops::Backend& backend;
  const DeviceMemory& memory;
  ThreadPool pool;
  Workspace workspace;
  ops::ExecContext ctx;
};

/// A matrix on the device.
class DeviceMatrix {
 public:
  DeviceMatrix(const DeviceBench& bench, const ops::Matrix& values)
      : memory_(bench.memory),
        rows_(values.num_rows),
        cols_(values.num_cols),
        buffer_(copy_to(bench.memory, values.values.data(), values.values.size() * sizeof(float))) {}

  Tensor view() const { return Tensor(buffer_.data(), DType::f32, {rows_, cols_}); }
  Tensor vector() const { return Tensor(buffer_.data(), DType::f32, {rows_ * cols_}); }

  ops::Matrix host() const {
    ops::Matrix values(rows_, cols_);
    memory_.copy_out(values.values.data(), buffer_.data(), values.values.size() * sizeof(float));
    check(memory_);
    return values;
  }

 private:
  const DeviceMemory& memory_;
  std::int64_t rows_, cols_;
  Buffer buffer_;
};

/// Runs a test body with the threads of a block in either order. A kernel that needs one of them is wrong. Where tests
/// are reduced, the calls take an order each, in turn.
template <class Body>
void in_both_orders(const Body& body) {
  static std::size_t calls = 0;
  const std::size_t turn = calls++ % 2;
  const std::vector<emulation::Order> orders = {emulation::Order::forward, emulation::Order::reversed};
  for (const auto order : is_reduced() ? std::vector{orders[turn]} : orders) {
    emulation::set_order(order);
    body();
  }
  emulation::set_order(emulation::Order::forward);
}

}  // namespace nb::cuda
