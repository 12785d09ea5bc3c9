// What benchmarks of operators share: a backend with all that its operators need, and weights that miss every cache.
//
// The tensors lie where the kernels of the backend read them: in host memory or in that of a device. For benchmarks
// only.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "ops/backends.h"
#include "ops/ops.h"
#include "quant/format.h"
#include "random_values.h"
#include "tensor/device_memory.h"

inline constexpr std::int64_t kBeyondCaches = std::int64_t{192} << 20;

/// A backend, a team of threads and a workspace.
struct Machine {
  Machine(const std::string& name, int num_threads)
      : backend(nb::ops::find_backend(name)),
        memory(backend.kernels->memory),
        pool(num_threads),
        workspace(nb::CachingPool::create(memory)),
        arena(nb::HostArena::create()),
        ctx{backend.kernels, &pool, &workspace} {}

  /// Room for f32 values where the kernels of the backend can use them.
  nb::Buffer place(const std::vector<float>& values) const {
    if (memory != nullptr) return nb::copy_to(*memory, values.data(), values.size() * sizeof(float));
    const nb::Buffer buffer = arena->allocate(values.size() * sizeof(float));
    std::memcpy(buffer.data(), values.data(), values.size() * sizeof(float));
    return buffer;
  }

  /// Waits for all that has been started.
  void finish() const {
    if (memory == nullptr) return;
    float value;
    memory->copy_out(&value, sentinel.data(), sizeof(value));
    nb::check(*memory);
  }

  const nb::ops::Backend& backend;
  const nb::DeviceMemory* memory;  // null: the host
  nb::ThreadPool pool;
  nb::Workspace workspace;
  std::shared_ptr<nb::HostArena> arena;
  nb::ops::ExecContext ctx;
  nb::Buffer sentinel = place({0.0f});
};

/// A weight of random values again and again, in memory of its own.
struct Copies {
  Copies(Machine& machine, nb::quant::Format format, const std::vector<int>& matrix_rows, int cols,
         nb::ops::Grouping grouping, bool beyond_caches)
      : arena(nb::HostArena::create()) {
    const std::vector<float> values = random_values(static_cast<std::size_t>(cols));
    const std::int64_t row_bytes = nb::quant::row_bytes(format, cols);
    std::vector<std::uint8_t> row(static_cast<std::size_t>(row_bytes));
    nb::quant::pack_row(format, values.data(), cols, row.data());
    const auto read = [&](std::int32_t, std::int32_t count, std::byte* out) {
      for (int i = 0; i < count; ++i) std::memcpy(out + i * row_bytes, row.data(), row.size());
    };
    std::vector<nb::ops::MatrixSource> sources;
    for (const int rows : matrix_rows) sources.push_back({"bench", format, rows, cols, read, {}});
    std::int64_t bytes = 0;
    do {
      weights.push_back(
          nb::ops::pack_linear(sources, grouping, "auto", machine.backend.kernels->layout, *arena, machine.pool));
      if (machine.memory != nullptr) nb::ops::move_to(*machine.memory, weights.back());
      bytes += weights.back().bytes;
    } while (beyond_caches && bytes < kBeyondCaches);
  }

  const nb::ops::LinearWeight& next() { return weights[at++ % weights.size()]; }

  std::shared_ptr<nb::HostArena> arena;
  std::vector<nb::ops::LinearWeight> weights;
  std::size_t at = 0;
};
