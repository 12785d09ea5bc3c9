// Times the barrier of the thread pool and the operators of a backend, one line each.
//
//   op_bench [BACKEND] [THREADS]
//
// BACKEND may be a device. Every line is the median of 15 samples. Weights are packed from random values. For a
// weight-bound product (few rows) look at GB/s against the machine's read rate, for a compute-bound one at GOP/s (two
// operations per multiply-add).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "base/ids.h"
#include "kv/kv_storage.h"
#include "ops/backends.h"
#include "ops/ops.h"
#include "quant/format.h"
#include "quant/kv_format.h"
#include "random_values.h"
#include "tensor/device_memory.h"

namespace {

using nb::DType;
using nb::Tensor;
using nb::quant::Format;

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

// Seconds per call: the median of 15 samples, each long enough to be measured.
template <class Function>
double seconds_of(const Machine& machine, const Function& function) {
  const auto run = [&](int count) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < count; ++i) function();
    machine.finish();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  int count = 1;
  while (run(count) < 2e-3 && count < (1 << 20)) count *= 2;
  std::vector<double> samples(15);
  for (double& sample : samples) sample = run(count) / count;
  std::nth_element(samples.begin(), samples.begin() + 7, samples.end());
  return samples[7];
}

void bench_threads(Machine& machine) {
  constexpr int kBarriers = 1000;
  const double barrier = seconds_of(machine, [&] {
    machine.pool.run([](const nb::Part& part) {
      for (int i = 0; i < kBarriers; ++i) part.barrier();
    });
  });
  const double phase = seconds_of(machine, [&] { machine.pool.run([](const nb::Part&) {}); });
  std::printf("barrier %8.0f ns   empty phase %8.0f ns\n", barrier / kBarriers * 1e9, phase * 1e9);
}

void bench_linear(Machine& machine, Format format, int num_rows) {
  constexpr int kOut = 8192, kIn = 1536;
  const std::vector<float> values = random_values(kIn);
  const std::int64_t row_bytes = nb::quant::row_bytes(format, kIn);
  std::vector<std::uint8_t> row(static_cast<std::size_t>(row_bytes));
  nb::quant::pack_row(format, values.data(), kIn, row.data());
  const nb::ops::MatrixSource source{"bench",
                                     format,
                                     kOut,
                                     kIn,
                                     [&](std::int32_t, std::int32_t count, std::byte* out) {
                                       for (int i = 0; i < count; ++i) {
                                         std::memcpy(out + i * row_bytes, row.data(), row.size());
                                       }
                                     },
                                     {}};
  nb::ops::LinearWeight weight = nb::ops::pack_linear(std::span(&source, 1), nb::ops::Grouping::stacked, "auto",
                                                      machine.backend.kernels->layout, *machine.arena, machine.pool);
  if (machine.memory != nullptr) nb::ops::move_to(*machine.memory, weight);
  const nb::Buffer x = machine.place(random_values(static_cast<std::size_t>(num_rows) * kIn));
  const nb::Buffer out = machine.place(std::vector<float>(static_cast<std::size_t>(num_rows) * kOut));
  const nb::ops::Activation act =
      nb::ops::prepare(Tensor(x.data(), DType::f32, {num_rows, kIn}), weight.act_type, machine.ctx);
  const double seconds = seconds_of(machine, [&] {
    nb::ops::linear(Tensor(out.data(), DType::f32, {num_rows, kOut}), act, weight.segments[0], Tensor(), false,
                    machine.ctx);
  });
  const double operations = 2.0 * kOut * kIn * num_rows;
  std::printf("linear %-10s %4d rows x %d x %d %10.1f us %8.1f GB/s %9.1f GOP/s\n", nb::quant::to_string(format),
              num_rows, kIn, kOut, seconds * 1e6, static_cast<double>(weight.bytes) / seconds / 1e9,
              operations / seconds / 1e9);
}

void bench_attention(Machine& machine, nb::quant::KvFormat format, int context, int rows) {
  constexpr int kHeads = 9, kKvHeads = 3, kDim = 64;
  const int num_blocks = context / nb::kBlockTokens;
  nb::kv::KvStorage storage({format, 1, kKvHeads, kDim}, num_blocks, machine.memory);
  const nb::Buffer rotations = machine.place(random_values(static_cast<std::size_t>(context) * kDim));
  const nb::ops::RopeTable rope{rotations.as<const float>(), kDim, context};
  const nb::Buffer keys = machine.place(random_values(static_cast<std::size_t>(context) * kKvHeads * kDim));
  std::vector<std::int32_t> slots(static_cast<std::size_t>(context)), blocks(static_cast<std::size_t>(num_blocks));
  std::iota(slots.begin(), slots.end(), 0);
  std::iota(blocks.begin(), blocks.end(), 0);
  const Tensor kv(keys.data(), DType::f32, {context, kKvHeads * kDim});
  nb::ops::kv_write(storage.layer(0), kv, kv, slots, machine.ctx);
  const std::size_t size = static_cast<std::size_t>(rows) * kHeads * kDim;
  const nb::Buffer q = machine.place(random_values(size)), out = machine.place(std::vector<float>(size));
  std::vector<std::int32_t> positions(static_cast<std::size_t>(rows));
  std::iota(positions.begin(), positions.end(), context - rows);
  const std::vector<nb::ops::AttentionSegment> segments = {{0, rows, 0, 1}};
  const std::vector<nb::ops::AttentionRun> runs = {{0, context, 0}};
  const double seconds = seconds_of(machine, [&] {
    nb::ops::attention(Tensor(out.data(), DType::f32, {rows, kHeads * kDim}),
                       Tensor(q.data(), DType::f32, {rows, kHeads * kDim}), kHeads, 0.125f, 0, rope, storage.layer(0),
                       {positions, segments, runs, blocks}, machine.ctx);
    machine.workspace.reset();
  });
  const double operations = 4.0 * kHeads * kDim * rows * (context - rows / 2.0);
  std::printf("attention %-4s KV %4d rows, %5d keys      %10.1f us %8.1f GB/s %9.1f GOP/s\n",
              nb::quant::to_string(format), rows, context, seconds * 1e6,
              static_cast<double>(storage.bytes()) / seconds / 1e9, operations / seconds / 1e9);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Machine machine(argc > 1 ? argv[1] : "", argc > 2 ? std::atoi(argv[2]) : nb::ThreadPool::default_num_threads());
    std::printf("backend %s, %d threads\n", machine.backend.kernels->name, machine.pool.num_threads());
    if (machine.memory == nullptr) bench_threads(machine);
    for (int id = 0; id < nb::quant::kNumFormats; ++id) {
      const auto format = static_cast<Format>(id);
      // On a device quantized weights become bf16.
      if (machine.memory != nullptr && nb::quant::format_info(format).is_quantized()) continue;
      for (int rows : {1, 8, 512}) bench_linear(machine, format, rows);
    }
    for (auto format : {nb::quant::KvFormat::bf16, nb::quant::KvFormat::f32}) {
      for (int rows : {1, 256}) bench_attention(machine, format, 2048, rows);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "op_bench: error: %s\n", error.what());
    return 2;
  }
  return 0;
}
