// What reading shared prefixes once gains: attention alone, and decode steps of an engine over a model file.
//
//   cascade_bench [MODEL] [BACKEND] [THREADS] [ROUNDS]
//   cascade_bench --decode SEQUENCES SHARED MODEL [BACKEND] [THREADS] [ROUNDS]
//
// The second form measures decode steps of one case and prints every round as a line of JSON, in microseconds.
//
// Both sides alternate in one run; every line has medians over the rounds and the median of the rounds' ratios. The
// operator has SmolLM2-135M's shape (9 heads on 3 KV heads of 64). Without MODEL only the operator is measured.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/ids.h"
#include "engine/engine.h"
#include "io/model_source.h"
#include "kv/kv_storage.h"
#include "model/loader.h"
#include "ops/backends.h"
#include "ops/ops.h"
#include "random_values.h"

namespace {

using nb::DType;
using nb::Tensor;

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Seconds of one side and the other, round by round.
struct Rounds {
  std::vector<double> off, on;
  double ratio() const {
    std::vector<double> ratios;
    for (std::size_t i = 0; i < off.size(); ++i) ratios.push_back(off[i] / on[i]);
    return median(ratios);
  }
};

// One decode row each for `sequences` with `shared` keys in common and `own` of their own. `layers` copies of the KV
// stand for the layers of a model: together they do not fit into a cache.
void bench_operator(const nb::ops::Backend& backend, int num_threads, int rounds, int sequences, int shared, int own) {
  constexpr int kHeads = 9, kKvHeads = 3, kDim = 64, kLayers = 12;
  nb::ThreadPool pool(num_threads);
  nb::Workspace workspace(nb::CachingPool::create());
  nb::ops::ExecContext ctx{backend.kernels, &pool, &workspace};
  const int shared_blocks = shared / nb::kBlockTokens, own_blocks = own / nb::kBlockTokens, keys = shared + own;
  const int num_blocks = shared_blocks + sequences * own_blocks;
  nb::kv::KvStorage storage({nb::quant::KvFormat::bf16, kLayers, kKvHeads, kDim}, num_blocks);
  const std::vector<float> rotations = random_values(static_cast<std::size_t>(keys) * kDim);
  const nb::ops::RopeTable rope{rotations.data(), kDim, keys};
  const int slots_in_all = num_blocks * nb::kBlockTokens;
  std::vector<float> values = random_values(static_cast<std::size_t>(slots_in_all) * kKvHeads * kDim);
  std::vector<std::int32_t> slots(static_cast<std::size_t>(slots_in_all));
  std::iota(slots.begin(), slots.end(), 0);
  const Tensor kv(values.data(), DType::f32, {slots_in_all, kKvHeads * kDim});
  for (int i = 0; i < kLayers; ++i) nb::ops::kv_write(storage.layer(i), kv, kv, slots, ctx);

  std::vector<std::int32_t> positions, blocks;
  std::vector<nb::ops::AttentionSegment> segments;
  std::vector<nb::ops::AttentionRun> runs;
  for (int s = 0; s < sequences; ++s) {
    segments.push_back({s, 1, s, 1, s > 0 ? shared : 0});
    runs.push_back({static_cast<std::int32_t>(blocks.size()), keys, 0});
    for (int b = 0; b < shared_blocks; ++b) blocks.push_back(b);
    for (int b = 0; b < own_blocks; ++b) blocks.push_back(shared_blocks + s * own_blocks + b);
    positions.push_back(keys - 1);
  }
  std::vector<nb::ops::AttentionSegment> apart = segments;
  for (auto& segment : apart) segment.shared_keys = 0;
  std::vector<float> q = random_values(static_cast<std::size_t>(sequences) * kHeads * kDim), out(q.size());
  const auto run = [&](const std::vector<nb::ops::AttentionSegment>& plan) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kLayers; ++i) {
      nb::ops::attention(Tensor(out.data(), DType::f32, {sequences, kHeads * kDim}),
                         Tensor(q.data(), DType::f32, {sequences, kHeads * kDim}), kHeads, 0.125f, 0, rope,
                         storage.layer(i), {positions, plan, runs, blocks}, ctx);
    }
    workspace.reset();
    return seconds_since(begin) / kLayers;
  };
  run(apart), run(segments);
  Rounds result;
  for (int i = 0; i < rounds; ++i) {
    result.off.push_back(run(apart));
    result.on.push_back(run(segments));
  }
  std::printf("%9d %8d %6d %14.1f %14.1f %8.2f\n", sequences, shared, own, median(result.off) * 1e6,
              median(result.on) * 1e6, result.ratio());
  std::fflush(stdout);
}

// Two engines over one model, alternating step by step through the same decodes behind one system prompt or, with
// `chunks`, behind as many chunks, each a little further back in one sequence than in the one before. Returns the
// tokens that a step of the second need not read.
std::int64_t run_engines(const nb::model::Model& model, int sequences, int shared, int chunks, int steps,
                         Rounds& result) {
  const auto make = [&](bool cascade) {
    nb::engine::EngineOptions options;
    options.max_model_len = shared + 512 + chunks * (sequences + 1);
    options.max_num_seqs = sequences;
    options.cascade = cascade;
    auto engine = std::make_unique<nb::engine::Engine>(model, options);
    std::mt19937 random(7);
    std::uniform_int_distribution<nb::TokenId> token(100, model.config().vocab_size - 1);
    std::vector<nb::TokenId> system(static_cast<std::size_t>(shared));
    for (auto& id : system) id = token(random);
    for (int s = 0; s < sequences; ++s) {
      nb::engine::Request request;
      if (chunks == 0) request.prompt = system;
      for (int c = 0; c < chunks; ++c) {
        for (int i = 0; i < s + 1; ++i) request.prompt.push_back(token(random));
        const int count = shared / chunks;
        request.chunks.push_back({.begin = static_cast<int>(request.prompt.size()), .count = count});
        request.prompt.insert(request.prompt.end(), system.begin() + c * count, system.begin() + (c + 1) * count);
      }
      if (chunks > 0) request.reuse.mode = nb::engine::ReuseMode::isolated;
      for (int i = 0; i < 20; ++i) request.prompt.push_back(token(random));
      request.sampling.temperature = 0.0;
      request.max_tokens = steps + 200;
      request.ignore_eos = true;
      engine->submit(std::move(request));
    }
    return engine;
  };
  const auto off = make(false), on = make(true);
  for (const auto& engine : {off.get(), on.get()}) {  // until all of them decode
    while (engine->step().size() < static_cast<std::size_t>(sequences)) continue;
    for (int i = 0; i < 3; ++i) engine->step();
  }
  const auto saved = on->stats().cascade_saved_tokens;
  for (int i = 0; i < steps; ++i) {
    auto begin = std::chrono::steady_clock::now();
    off->step();
    result.off.push_back(seconds_since(begin));
    begin = std::chrono::steady_clock::now();
    on->step();
    result.on.push_back(seconds_since(begin));
  }
  return (on->stats().cascade_saved_tokens - saved) / steps;
}

void bench_engine(const nb::model::Model& model, int sequences, int shared, int chunks, int steps) {
  Rounds result;
  const std::int64_t saved = run_engines(model, sequences, shared, chunks, steps, result);
  std::printf("%9d %8d %6d %14.1f %14.1f %8.2f %14lld\n", sequences, shared, chunks, sequences / median(result.off),
              sequences / median(result.on), result.ratio(), static_cast<long long>(saved));
  std::fflush(stdout);
}

void print_samples(const char* name, const std::vector<double>& seconds) {
  std::printf(", \"%s\": [", name);
  for (std::size_t i = 0; i < seconds.size(); ++i) std::printf("%s%.3f", i > 0 ? ", " : "", seconds[i] * 1e6);
  std::printf("]");
}

std::string text_of(int argc, char** argv, int i) { return i < argc ? argv[i] : ""; }

int number_of(int argc, char** argv, int i, int usual) { return i < argc ? std::atoi(argv[i]) : usual; }

int print_decode(int argc, char** argv) {
  const int sequences = number_of(argc, argv, 2, 0), shared = number_of(argc, argv, 3, 0);
  const int steps = number_of(argc, argv, 7, 31);
  if (sequences < 1 || shared < 1 || steps < 1 || argc < 5) {
    throw std::invalid_argument("--decode wants numbers of sequences and of shared tokens, and a model");
  }
  const auto file = nb::io::open_model(argv[4]);
  const int threads = number_of(argc, argv, 6, nb::ThreadPool::default_num_threads());
  const auto model = nb::model::load_model(*file, {.backend = text_of(argc, argv, 5), .num_threads = threads});
  Rounds result;
  const std::int64_t saved = run_engines(*model, sequences, shared, 0, steps, result);
  std::printf("{\"row\": \"cascade\", \"case\": \"%d sequences, %d common tokens\", \"backend\": \"%s\"", sequences,
              shared, model->kernels().name);
  std::printf(", \"saved_tokens\": %lld", static_cast<long long>(saved));
  print_samples("off", result.off);
  print_samples("on", result.on);
  std::printf("}\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (text_of(argc, argv, 1) == "--decode") return print_decode(argc, argv);
    const std::string path = text_of(argc, argv, 1), name = text_of(argc, argv, 2);
    const int threads = number_of(argc, argv, 3, nb::ThreadPool::default_num_threads());
    const int rounds = number_of(argc, argv, 4, 31);
    const nb::ops::Backend& backend = nb::ops::find_backend(name);
    std::printf("backend %s, %d threads, bf16 keys and values\n\n", backend.kernels->name, threads);
    std::printf("attention of one decode row a sequence, one layer\n");
    std::printf("sequences   shared    own        off, us         on, us    ratio\n");
    for (const int shared : {64, 256, 1024, 4096}) {
      for (const int sequences : {2, 4, 8, 16}) bench_operator(backend, threads, rounds, sequences, shared, 64);
    }
    for (const int own : {512, 1024, 2048, 4096}) bench_operator(backend, threads, rounds, 16, 512, own);
    if (path.empty()) return 0;
    const auto file = nb::io::open_model(path);
    const auto model = nb::model::load_model(*file, {.backend = name, .num_threads = threads});
    std::printf("\ndecode of %s\n", path.substr(path.rfind('/') + 1).c_str());
    std::printf("sequences   shared chunks     off, tok/s      on, tok/s    ratio    saved a step\n");
    for (const int shared : {200, 2000}) {
      for (const int sequences : {1, 2, 4, 8, 16}) bench_engine(*model, sequences, shared, 0, 3 * rounds);
    }
    for (const int chunks : {1, 16}) {
      for (const int sequences : {2, 4, 8, 16}) bench_engine(*model, sequences, 2048, chunks, 3 * rounds);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cascade_bench: error: %s\n", error.what());
    return 2;
  }
  return 0;
}
