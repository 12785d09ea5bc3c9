// Times the barrier of the thread pool and the operators of a backend, one line each, beside the machine's limits.
//
//   op_bench [BACKEND] [THREADS] [--only TEXT]
//   op_bench --ceilings [THREADS]
//
// BACKEND may be a device, or "all" for every one of the CPU but the reference. TEXT keeps the lines whose operator and
// format, as they are printed with one space between them, contain it: q4_k, "head", "linear q8_0". A line is the
// median of 15 samples, fewer for what takes long. On the CPU the limits are measured before and, to compare, after
// (ceilings.h); a line names the share of the one that binds it: few rows and decode attention read memory, many rows
// multiply. Weights are packed from random values, and where few rows read them there are copies enough to miss every
// cache.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/ids.h"
#include "bench_machine.h"
#include "ceilings.h"
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

// Which lines are wanted.
struct Filter {
  std::string text;
  int num_kept = 0;

  bool keeps(const std::string& op, const std::string& format) {
    const bool kept = (op + " " + format).find(text) != std::string::npos;
    num_kept += kept ? 1 : 0;
    return kept;
  }
  bool keeps(const char* op, Format format) { return keeps(op, std::string(nb::quant::to_string(format))); }
};

// Of the machine that runs the operators: zero on a device.
struct Bench : Machine {
  using Machine::Machine;
  ceilings::Ceilings limits;
};

// Seconds per call: the median of up to 15 samples, each long enough to be measured.
template <class Function>
double seconds_of(const Bench& machine, const Function& function) {
  const auto run = [&](int count) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < count; ++i) function();
    machine.finish();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  int count = 1;
  while (run(count) < 2e-3 && count < (1 << 20)) count *= 2;
  std::vector<double> samples;
  double spent = 0;
  while (samples.size() < 15 && (samples.size() < 3 || spent < 2)) {
    const double seconds = run(count);
    samples.push_back(seconds / count);
    spent += seconds;
  }
  const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2);
  std::nth_element(samples.begin(), middle, samples.end());
  return *middle;
}

// "  63 % of int8", or nothing where the limit is not known.
std::string share(double reached, double limit, const char* name) {
  if (limit <= 0) return "";
  char text[64];
  std::snprintf(text, sizeof(text), "  %3.0f %% of %s", 100 * reached / limit, name);
  return text;
}

// The share of what binds a product with weights: their bytes, or the multiplications of their type.
std::string share_of_product(const Bench& machine, nb::ops::ActType type, int rows, double gb_s, double gop_s) {
  const ceilings::Ceilings& limits = machine.limits;
  if (rows <= 8) return share(gb_s, limits.read_2m_all, "read");
  if (type == nb::ops::ActType::int8) return share(gop_s, limits.int8_dot, "int8");
  if (type == nb::ops::ActType::bf16 && limits.bf16_dot > 0) return share(gop_s, limits.bf16_dot, "bf16");
  return share(gop_s, limits.fp32_fma, "fp32");
}

void bench_threads(Bench& machine) {
  constexpr int kBarriers = 1000;
  const double barrier = seconds_of(machine, [&] {
    machine.pool.run([](const nb::Part& part) {
      for (int i = 0; i < kBarriers; ++i) part.barrier();
    });
  });
  const double phase = seconds_of(machine, [&] { machine.pool.run([](const nb::Part&) {}); });
  std::printf("barrier %8.0f ns   empty phase %8.0f ns\n", barrier / kBarriers * 1e9, phase * 1e9);
}

constexpr int kWidth = 1536, kInner = 8192;

void print_product(const Bench& machine, const char* name, Format format, int num_rows, int cols, int num_outputs,
                   const nb::ops::LinearWeight& weight, double seconds) {
  const double gb_s = static_cast<double>(weight.bytes) / seconds / 1e9;
  const double gop_s = 2.0 * num_outputs * cols * num_rows / seconds / 1e9;
  std::printf("%-13s %-10s %4d rows x %4d x %6d %10.1f us %8.1f GB/s %9.1f GOP/s%s\n", name,
              nb::quant::to_string(format), num_rows, cols, num_outputs, seconds * 1e6, gb_s, gop_s,
              share_of_product(machine, weight.act_type, num_rows, gb_s, gop_s).c_str());
  std::fflush(stdout);
}

void bench_linear(Bench& machine, Format format, int num_rows) {
  Copies copies(machine, format, {kInner}, kWidth, nb::ops::Grouping::stacked, num_rows <= 8);
  const nb::Buffer x = machine.place(random_values(static_cast<std::size_t>(num_rows) * kWidth));
  const nb::Buffer out = machine.place(std::vector<float>(static_cast<std::size_t>(num_rows) * kInner));
  const nb::ops::Activation act =
      nb::ops::prepare(Tensor(x.data(), DType::f32, {num_rows, kWidth}), copies.weights[0].act_type, machine.ctx);
  const double seconds = seconds_of(machine, [&] {
    nb::ops::linear(Tensor(out.data(), DType::f32, {num_rows, kInner}), act, copies.next().segments[0], Tensor(), false,
                    machine.ctx);
  });
  print_product(machine, "linear", format, num_rows, kWidth, kInner, copies.weights[0], seconds);
  machine.workspace.reset();
}

// norm + gate/up + SiLU, and down + residual: the two fused operators that hold most of a layer's weights.
void bench_ffn(Bench& machine, Format format, int num_rows, Filter& filter) {
  const auto count = static_cast<std::size_t>(num_rows);
  const nb::Buffer x = machine.place(random_values(count * kWidth));
  const nb::Buffer scale = machine.place(std::vector<float>(kWidth, 1.0f));
  const nb::ops::Norm norm{Tensor(scale.data(), DType::f32, {kWidth}), 1e-6f};
  const Tensor rows(x.data(), DType::f32, {num_rows, kWidth});
  if (filter.keeps("norm_gate_up", format)) {
    Copies copies(machine, format, {kInner, kInner}, kWidth, nb::ops::Grouping::interleaved32, num_rows <= 8);
    const double seconds = seconds_of(machine, [&] {
      nb::ops::norm_gate_up(rows, norm, copies.next(), copies.weights[0].act_type, machine.ctx);
      machine.workspace.reset();
    });
    print_product(machine, "norm_gate_up", format, num_rows, kWidth, 2 * kInner, copies.weights[0], seconds);
  }
  if (!filter.keeps("down_residual", format)) return;
  Copies copies(machine, format, {kWidth}, kInner, nb::ops::Grouping::stacked, num_rows <= 8);
  const nb::Buffer inner = machine.place(random_values(count * kInner));
  const nb::ops::Activation act =
      nb::ops::prepare(Tensor(inner.data(), DType::f32, {num_rows, kInner}), copies.weights[0].act_type, machine.ctx);
  const double seconds = seconds_of(machine, [&] { nb::ops::linear_residual(rows, act, copies.next(), machine.ctx); });
  print_product(machine, "down_residual", format, num_rows, kInner, kWidth, copies.weights[0], seconds);
  machine.workspace.reset();
}

// Norm + queries, keys and values + rotation and writing of keys, of one layer.
void bench_qkv(Bench& machine, Format format, int width, int kv_width, int head_dim, int num_rows) {
  const auto count = static_cast<std::size_t>(num_rows);
  const nb::Buffer x = machine.place(random_values(count * static_cast<std::size_t>(width)));
  const nb::Buffer scale = machine.place(std::vector<float>(static_cast<std::size_t>(width), 1.0f));
  const nb::Buffer q = machine.place(std::vector<float>(count * static_cast<std::size_t>(width)));
  const nb::Buffer rotations = machine.place(random_values(count * static_cast<std::size_t>(head_dim)));
  const nb::ops::RopeTable rope{rotations.as<const float>(), head_dim, num_rows};
  const int num_blocks = (num_rows + nb::kBlockTokens - 1) / nb::kBlockTokens;
  nb::kv::KvStorage storage({nb::quant::KvFormat::bf16, 1, kv_width / head_dim, head_dim}, num_blocks, machine.memory);
  std::vector<std::int32_t> positions(count);
  std::iota(positions.begin(), positions.end(), 0);
  Copies copies(machine, format, {width, kv_width, kv_width}, width, nb::ops::Grouping::stacked, num_rows <= 8);
  const nb::ops::Norm norm{Tensor(scale.data(), DType::f32, {width}), 1e-6f};
  const double seconds = seconds_of(machine, [&] {
    nb::ops::norm_qkv(Tensor(q.data(), DType::f32, {num_rows, width}), storage.layer(0),
                      Tensor(x.data(), DType::f32, {num_rows, width}), norm, copies.next(), {}, positions, positions,
                      rope, machine.ctx);
    machine.workspace.reset();
  });
  print_product(machine, "norm_qkv", format, num_rows, width, width + 2 * kv_width, copies.weights[0], seconds);
}

// The last norm, the product with every word's weights, and the argmax; with the logits in memory too or without them.
void bench_head(Bench& machine, Format format, int width, int vocab, Filter& filter) {
  const bool greedy = filter.keeps("head_greedy", format), full = filter.keeps("head_logits", format);
  if (!greedy && !full) return;
  Copies copies(machine, format, {vocab}, width, nb::ops::Grouping::stacked, true);
  const nb::Buffer scale = machine.place(std::vector<float>(static_cast<std::size_t>(width), 1.0f));
  const nb::ops::Norm norm{Tensor(scale.data(), DType::f32, {width}), 1e-6f};
  for (const int num_rows : {1, 8}) {
    const auto count = static_cast<std::size_t>(num_rows);
    const nb::Buffer x = machine.place(random_values(count * static_cast<std::size_t>(width)));
    const nb::Buffer out = machine.place(std::vector<float>(full ? count * static_cast<std::size_t>(vocab) : 1));
    std::vector<std::int32_t> row_ids(count), best(count);
    std::iota(row_ids.begin(), row_ids.end(), 0);
    for (const bool logits : {false, true}) {
      if (!(logits ? full : greedy)) continue;
      const Tensor target = logits ? Tensor(out.data(), DType::f32, {num_rows, vocab}) : Tensor();
      const double seconds = seconds_of(machine, [&] {
        nb::ops::head(target, best, Tensor(x.data(), DType::f32, {num_rows, width}), row_ids, norm, copies.next(),
                      machine.ctx);
        machine.workspace.reset();
      });
      print_product(machine, logits ? "head_logits" : "head_greedy", format, num_rows, width, vocab, copies.weights[0],
                    seconds);
    }
  }
}

void bench_attention(Bench& machine, nb::quant::KvFormat format, int context, int rows) {
  constexpr int kHeads = 9, kKvHeads = 3, kDim = 64;
  const int num_blocks = context / nb::kBlockTokens;
  // Decode goes through as many layers as miss every cache; many rows find theirs in one.
  const std::int64_t layer_bytes = nb::kv::KvShape{format, 1, kKvHeads, kDim}.block_bytes() * num_blocks;
  const int num_layers = rows == 1 ? static_cast<int>(kBeyondCaches / layer_bytes + 1) : 1;
  nb::kv::KvStorage storage({format, num_layers, kKvHeads, kDim}, num_blocks, machine.memory);
  const nb::Buffer rotations = machine.place(random_values(static_cast<std::size_t>(context) * kDim));
  const nb::ops::RopeTable rope{rotations.as<const float>(), kDim, context};
  const nb::Buffer keys = machine.place(random_values(static_cast<std::size_t>(context) * kKvHeads * kDim));
  std::vector<std::int32_t> slots(static_cast<std::size_t>(context)), blocks(static_cast<std::size_t>(num_blocks));
  std::iota(slots.begin(), slots.end(), 0);
  std::iota(blocks.begin(), blocks.end(), 0);
  const Tensor kv(keys.data(), DType::f32, {context, kKvHeads * kDim});
  for (int layer = 0; layer < num_layers; ++layer) {
    nb::ops::kv_write(storage.layer(layer), kv, kv, slots, machine.ctx);
  }
  const std::size_t size = static_cast<std::size_t>(rows) * kHeads * kDim;
  const nb::Buffer q = machine.place(random_values(size)), out = machine.place(std::vector<float>(size));
  std::vector<std::int32_t> positions(static_cast<std::size_t>(rows));
  std::iota(positions.begin(), positions.end(), context - rows);
  const std::vector<nb::ops::AttentionSegment> segments = {{0, rows, 0, 1}};
  const std::vector<nb::ops::AttentionRun> runs = {{0, context, 0}};
  int layer = 0;
  const double seconds = seconds_of(machine, [&] {
    layer = (layer + 1) % num_layers;
    nb::ops::attention(Tensor(out.data(), DType::f32, {rows, kHeads * kDim}),
                       Tensor(q.data(), DType::f32, {rows, kHeads * kDim}), kHeads, 0.125f, 0, rope,
                       storage.layer(layer), {positions, segments, runs, blocks}, machine.ctx);
    machine.workspace.reset();
  });
  // Pairs of a query and a key at or before it.
  const double pairs = static_cast<double>(rows) * context - 0.5 * rows * (rows - 1.0);
  const double gb_s = static_cast<double>(layer_bytes) / seconds / 1e9;
  const double gop_s = 4.0 * kHeads * kDim * pairs / seconds / 1e9;
  const ceilings::Ceilings& limits = machine.limits;
  const bool bf16 = format == nb::quant::KvFormat::bf16 && limits.bf16_dot > 0;
  // Every product with a code is two, one for each digit.
  const bool codes = format == nb::quant::KvFormat::int8 || format == nb::quant::KvFormat::mixed;
  const std::string part = rows == 1 ? share(gb_s, limits.read_2m_all, "read")
                           : codes   ? share(2 * gop_s, limits.int8_dot, "int8")
                           : bf16    ? share(gop_s, limits.bf16_dot, "bf16")
                                     : share(gop_s, limits.fp32_fma, "fp32");
  std::printf("attention     %-7s KV %4d rows, %5d keys     %10.1f us %8.1f GB/s %9.1f GOP/s%s\n",
              nb::quant::to_string(format), rows, context, seconds * 1e6, gb_s, gop_s, part.c_str());
}

// One line a limit, for people and programs.
void print_ceilings(const ceilings::Ceilings& limits) {
  const std::pair<const char*, double> lines[] = {
      {"read_4k_one_gb_s", limits.read_4k_one}, {"read_2m_one_gb_s", limits.read_2m_one},
      {"read_4k_all_gb_s", limits.read_4k_all}, {"read_2m_all_gb_s", limits.read_2m_all},
      {"int8_dot_gop_s", limits.int8_dot},      {"bf16_dot_gop_s", limits.bf16_dot},
      {"fp32_fma_gop_s", limits.fp32_fma},
  };
  for (const auto& [name, value] : lines) {
    if (value > 0) std::printf("ceiling %-18s %9.1f\n", name, value);
  }
  std::fflush(stdout);
}

void bench(const std::string& backend, int num_threads, ceilings::Ceilings limits, Filter& filter) {
  Bench machine(backend, num_threads);
  std::printf("backend %s, %d threads\n", machine.backend.kernels->name, machine.pool.num_threads());
  if (machine.memory == nullptr) {
    machine.limits = limits;
    if (filter.keeps("barrier", "")) bench_threads(machine);
  }
  for (int id = 0; id < nb::quant::kNumFormats; ++id) {
    const auto format = static_cast<Format>(id);
    // On a device quantized weights become bf16.
    if (machine.memory != nullptr && !nb::quant::format_info(format).is_plain()) continue;
    if (filter.keeps("linear", format)) {
      for (int rows : {1, 8, 512}) bench_linear(machine, format, rows);
    }
    for (int rows : {1, 512}) bench_ffn(machine, format, rows, filter);
  }
  // Shapes of models of 0.1, 0.5 and 1.5 billion parameters, whose rows fill the blocks of these formats.
  const bool on_device = machine.memory != nullptr;
  const Format usual = on_device ? Format::bf16 : Format::q8_0;
  for (const auto& [format, width, kv_width, head_dim] :
       {std::tuple{usual, 576, 192, 64}, {on_device ? Format::bf16 : Format::q4_k, 1536, 256, 128}}) {
    if (!filter.keeps("norm_qkv", format)) continue;
    for (int rows : {1, 8, 512}) bench_qkv(machine, format, width, kv_width, head_dim, rows);
  }
  bench_head(machine, usual, 576, 49152, filter);
  bench_head(machine, usual, 896, 151936, filter);
  bench_head(machine, on_device ? Format::bf16 : Format::q6_k, 1536, 151936, filter);
  for (auto format : {nb::quant::KvFormat::bf16, nb::quant::KvFormat::f16, nb::quant::KvFormat::f32,
                      nb::quant::KvFormat::int8, nb::quant::KvFormat::mixed}) {
    if ((machine.backend.kernels->kv_formats & nb::ops::kv_bit(format)) == 0) continue;
    if (!filter.keeps("attention", nb::quant::to_string(format))) continue;
    bench_attention(machine, format, 2048, 1);
    bench_attention(machine, format, 4096, 1);
    bench_attention(machine, format, 2048, 256);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Filter filter;
    std::vector<std::string> words(argv + 1, argv + argc);
    const auto only = std::find(words.begin(), words.end(), "--only");
    if (only != words.end()) {
      if (only + 1 == words.end()) throw std::invalid_argument("--only wants a part of an operator and format");
      filter.text = only[1];
      words.erase(only, only + 2);
    }
    const std::string name = words.empty() ? "" : words[0];
    const int threads = words.size() > 1 ? std::atoi(words[1].c_str()) : nb::ThreadPool::default_num_threads();
    nb::ThreadPool pool(threads);
    const bool all = name == "all";
    const bool on_device = name != "--ceilings" && !all && nb::ops::find_backend(name).kernels->memory != nullptr;
    ceilings::Ceilings limits;
    if (!on_device) print_ceilings(limits = ceilings::measure(pool));
    if (name == "--ceilings") return 0;
    for (const std::string& backend : all ? nb::ops::available_backends() : std::vector<std::string>{name}) {
      if (all && (backend == "reference" || nb::ops::find_backend(backend).kernels->memory != nullptr)) continue;
      bench(backend, threads, limits, filter);
    }
    if (filter.num_kept == 0) throw std::invalid_argument("no operator and format contains '" + filter.text + "'");
    if (!on_device) {
      std::printf("again, after the operators\n");
      print_ceilings(ceilings::measure(pool));
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "op_bench: error: %s\n", error.what());
    return 2;
  }
  return 0;
}
