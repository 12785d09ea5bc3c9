// Times the drawing of one token over a vocabulary of 151,936 against one decode step of a 0.5B-shaped model.
//
//   sampling_bench [BACKEND] [THREADS] [ROUNDS] [READ_GB_PER_S]
//
// The weights are those of a seeded model (hidden 896, intermediate 4864, 24 layers, 14 heads, 2 KV heads of 64) in W4,
// every layer in memory of its own. A step cannot be faster than reading them once, so the share is the median draw
// over that time: their bytes at the machine's read rate, which is the fastest round measured here or the rate given,
// whichever is higher (bench_cpu_peers.py measures one; the plain loop here does not reach the limit of every
// machine). The matrix products themselves are timed too, for comparison; other programs on the machine slow them most.
// Drawing uses one thread, as it does for a batch of one. Reads, products and draws alternate; JSON to stdout has
// medians, the fastest rounds and every round, in milliseconds.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "ops/backends.h"
#include "ops/ops.h"
#include "quant/format.h"
#include "sampling/row_kernels.h"
#include "sampling/sampler.h"

namespace {

using nb::DType;
using nb::Tensor;
using nb::TokenId;

constexpr int kVocab = 151936, kHidden = 896, kInner = 4864, kLayers = 24, kQkv = 896 + 2 * 128;
constexpr std::size_t kHistory = 4000, kPrompt = 3000;

double milliseconds_of(const std::function<void()>& function) {
  const auto begin = std::chrono::steady_clock::now();
  function();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

std::vector<float> normal_values(std::size_t count, float spread, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// Logits that fall with the logarithm of the rank, tokens in random order: a few likely ones and a long tail.
std::vector<float> zipf_row() {
  std::vector<float> row(kVocab);
  for (std::size_t i = 0; i < row.size(); ++i) row[i] = 18.0f - 1.6f * std::log(static_cast<float>(i + 1));
  std::shuffle(row.begin(), row.end(), std::mt19937(2));
  return row;
}

// The matrix products of one decode step.
class Step {
 public:
  Step(const std::string& backend, int num_threads)
      : backend_(nb::ops::find_backend(backend)),
        pool_(num_threads),
        workspace_(nb::CachingPool::create()),
        arena_(nb::HostArena::create()),
        ctx_{backend_.kernels, &pool_, &workspace_},
        out_(static_cast<std::size_t>(kVocab)),
        x_(normal_values(kInner, 1.0f, 1)) {
    for (int layer = 0; layer < kLayers; ++layer) {
      for (const auto& [rows, cols] :
           {std::pair{kQkv, kHidden}, {kHidden, kHidden}, {2 * kInner, kHidden}, {kHidden, kInner}}) {
        add(rows, cols);
      }
    }
    add(kVocab, kHidden);
  }

  void run() {
    for (const nb::ops::LinearWeight& weight : weights_) {
      const nb::Workspace::Scope scope(workspace_);
      const auto act = nb::ops::prepare(Tensor(x_.data(), DType::f32, {1, weight.cols()}), weight.act_type, ctx_);
      nb::ops::linear(Tensor(out_.data(), DType::f32, {1, weight.rows()}), act, weight.segments[0], Tensor(), false,
                      ctx_);
    }
  }

  // Reads every byte of the weights once; the result keeps the compiler from leaving it out.
  std::uint64_t read() {
    std::vector<std::uint64_t> sums(static_cast<std::size_t>(pool_.num_threads()));
    pool_.run([&](const nb::Part& part) {
      std::uint64_t sum = 0;
      for (const auto& weight : weights_) {
        const auto* words = weight.memory.as<std::uint64_t>();
        const std::size_t count = static_cast<std::size_t>(weight.bytes) / sizeof(std::uint64_t);
        const auto index = static_cast<std::size_t>(part.index), parts = static_cast<std::size_t>(part.count);
        const std::size_t end = count * (index + 1) / parts;
        // Four places at a time, so that more than one page is on its way.
        const std::size_t begin = count * index / parts, quarter = (end - begin) / 4;
        const auto* from = words + begin;
        for (std::size_t i = 0; i < quarter; ++i) {
          sum += from[i] + from[i + quarter] + from[i + 2 * quarter] + from[i + 3 * quarter];
        }
      }
      sums[static_cast<std::size_t>(part.index)] = sum;
    });
    std::uint64_t total = 0;
    for (const std::uint64_t sum : sums) total += sum;
    return total;
  }

  double bytes() const {
    double total = 0.0;
    for (const auto& weight : weights_) total += static_cast<double>(weight.bytes);
    return total;
  }
  const char* backend() const { return backend_.kernels->name; }
  int num_threads() const { return pool_.num_threads(); }

 private:
  void add(int rows, int cols) {
    constexpr auto kFormat = nb::quant::Format::w4;
    const auto row_bytes = static_cast<std::size_t>(nb::quant::row_bytes(kFormat, cols));
    std::vector<std::uint8_t> row(row_bytes);
    nb::quant::pack_row(kFormat, x_.data(), cols, row.data());
    const auto fill = [&](std::int32_t, std::int32_t count, std::byte* out) {
      for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i)
        std::memcpy(out + i * row_bytes, row.data(), row_bytes);
    };
    const nb::ops::MatrixSource source{"bench", kFormat, rows, cols, fill, {}};
    weights_.push_back(nb::ops::pack_linear(std::span(&source, 1), nb::ops::Grouping::stacked, "auto",
                                            backend_.kernels->layout, *arena_, pool_));
  }

  const nb::ops::Backend& backend_;
  nb::ThreadPool pool_;
  nb::Workspace workspace_;
  std::shared_ptr<nb::HostArena> arena_;
  nb::ops::ExecContext ctx_;
  std::vector<float> out_;
  std::vector<float> x_;
  std::vector<nb::ops::LinearWeight> weights_;
};

struct Case {
  const char* name;
  nb::sampling::SamplingParams params;
  bool scores = false;
  std::vector<double> rounds{};
};

std::vector<Case> make_cases() {
  nb::sampling::SamplingParams base;
  base.temperature = 0.8;
  std::vector<Case> cases;
  const auto add = [&](const char* name, const std::function<void(nb::sampling::SamplingParams&)>& set) {
    cases.push_back({name, base});
    set(cases.back().params);
  };
  add("temperature 0.8", [](auto&) {});
  add("temperature 0.8, top_k 50", [](auto& p) { p.top_k = 50; });
  add("temperature 0.8, top_p 0.9", [](auto& p) { p.top_p = 0.9; });
  add("temperature 0.8, top_p 0.95", [](auto& p) { p.top_p = 0.95; });
  add("temperature 0.8, top_k 40, top_p 0.95", [](auto& p) {
    p.top_k = 40;
    p.top_p = 0.95;
  });
  add("temperature 0.8, min_p 0.05", [](auto& p) { p.min_p = 0.05; });
  const auto all = [](auto& p) {
    p.top_k = 50;
    p.top_p = 0.9;
    p.min_p = 0.05;
    p.repetition_penalty = 1.1;
  };
  add("temperature 0.8, top_k 50, top_p 0.9, min_p 0.05, repetition_penalty 1.1, history 4000", all);
  add("the same, presence and frequency penalty", [&](auto& p) {
    all(p);
    p.presence_penalty = 0.5;
    p.frequency_penalty = 0.2;
  });
  add("temperature 0.8, logprobs 20", [](auto& p) { p.logprobs = 20; });
  cases.back().scores = true;
  add("greedy with a masked token", [](auto& p) {
    p.temperature = 0.0;
    p.bad_words_token_ids = {{7}};
  });
  add("greedy, logprobs 20", [](auto& p) {
    p.temperature = 0.0;
    p.logprobs = 20;
  });
  cases.back().scores = true;
  return cases;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void print_times(const char* indent, const std::vector<double>& rounds) {
  std::printf("%s\"median_ms\": %.4f, \"fastest_ms\": %.4f, \"rounds_ms\": [", indent, median(rounds),
              *std::min_element(rounds.begin(), rounds.end()));
  for (std::size_t i = 0; i < rounds.size(); ++i) std::printf("%s%.4f", i == 0 ? "" : ", ", rounds[i]);
  std::printf("]");
}

void run(const std::string& backend, int num_threads, int num_rounds, double given_gb_per_s) {
  Step step(backend, num_threads);
  std::mt19937 random(7);
  std::vector<TokenId> history(kHistory);
  for (TokenId& token : history) {  // the square favours low ids, so that tokens repeat
    const double place = std::uniform_real_distribution<double>(0.0, 1.0)(random);
    token = static_cast<TokenId>(place * place * 4000.0);
  }
  struct Shape {
    const char* name;
    std::vector<float> row;
    std::vector<Case> cases = make_cases();
  };
  std::vector<Shape> shapes;
  shapes.push_back({"zipf 1.6", zipf_row()});
  shapes.push_back({"normal 2.5", normal_values(kVocab, 2.5f, 3)});
  nb::sampling::Sampler sampler;
  std::vector<nb::sampling::TokenLogprob> scores(21);
  std::vector<double> reads, products;
  std::uint64_t checksum = 0;
  for (int round = -1; round < num_rounds; ++round) {  // the first round warms up
    const double read_ms = milliseconds_of([&] { checksum ^= step.read(); });
    const double product_ms = milliseconds_of([&] { step.run(); });
    if (round >= 0) reads.push_back(read_ms);
    if (round >= 0) products.push_back(product_ms);
    for (Shape& shape : shapes) {
      for (Case& test : shape.cases) {
        constexpr int kDraws = 10;
        const double ms = milliseconds_of([&] {
          for (int i = 0; i < kDraws; ++i) {
            const auto seed = static_cast<std::uint64_t>(round * kDraws + i);
            const TokenId token = sampler.sample({shape.row, test.params, seed, history, kPrompt});
            if (test.scores) sampler.score(shape.row, token, scores);
            checksum += static_cast<std::uint64_t>(token);
          }
        });
        if (round >= 0) test.rounds.push_back(ms / kDraws);
      }
    }
  }
  std::printf("{\n  \"backend\": \"%s\", \"threads\": %d, \"weight_format\": \"w4\", \"vocab_size\": %d,\n",
              step.backend(), step.num_threads(), kVocab);
  std::printf("  \"row_kernels\": \"%s\",\n", nb::sampling::row_kernels().back().name);
  const double measured_gb_per_s = step.bytes() / *std::min_element(reads.begin(), reads.end()) / 1e6;
  const double step_ms = step.bytes() / std::max(measured_gb_per_s, given_gb_per_s) / 1e6;
  std::printf(
      "  \"weight_mb\": %.1f, \"measured_read_gb_per_s\": %.1f, \"given_read_gb_per_s\": %.1f, \"step_ms\": %.3f,\n",
      step.bytes() / 1e6, measured_gb_per_s, given_gb_per_s, step_ms);
  std::printf("  \"checksum\": \"%016llx\",\n  \"read\": {\n", static_cast<unsigned long long>(checksum));
  print_times("    ", reads);
  std::printf("},\n  \"products\": {\n");
  print_times("    ", products);
  std::printf("},\n  \"draws\": [");
  bool first = true;
  for (const Shape& shape : shapes) {
    for (const Case& test : shape.cases) {
      std::printf("%s\n    {\"logits\": \"%s\", \"params\": \"%s\", \"share_of_step_percent\": %.2f,\n",
                  first ? "" : ",", shape.name, test.name, 100.0 * median(test.rounds) / step_ms);
      print_times("      ", test.rounds);
      std::printf("}");
      first = false;
    }
  }
  std::printf("\n  ]\n}\n");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const int num_rounds = argc > 3 ? std::max(1, std::atoi(argv[3])) : 15;
    run(argc > 1 ? argv[1] : "", argc > 2 ? std::atoi(argv[2]) : nb::ThreadPool::default_num_threads(), num_rounds,
        argc > 4 ? std::atof(argv[4]) : 0.0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "sampling_bench: error: %s\n", error.what());
    return 2;
  }
  return 0;
}
