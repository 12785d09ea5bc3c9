// The sampler on the device against the one on the CPU: the same token for the same logits, parameters and seed.
#include "sampling/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>

#include "cuda_emulation/device_fixture.h"
#include "sampling/sample_rows.h"

namespace nb::cuda {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// A request at some point of its life.
struct Request {
  std::vector<float> logits;
  sampling::SamplingParams params;
  std::uint64_t seed = 0;
  std::vector<TokenId> tokens{};
  std::size_t num_prompt = 0;
  std::vector<TokenId> stop_ids{};
  std::vector<std::uint32_t> allowed_bits{};
};

/// Device memory for the lists of requests.
class Lists {
 public:
  explicit Lists(const DeviceMemory& memory) : memory_(memory) {}

  template <class T>
  T* put(const std::vector<T>& values) {
    if (values.empty()) return nullptr;
    buffers_.push_back(copy_to(memory_, values.data(), values.size() * sizeof(T)));
    return buffers_.back().as<T>();
  }

  template <class T>
  T* room(std::size_t count) {
    buffers_.push_back(copy_to(memory_, std::vector<T>(count).data(), count * sizeof(T)));
    return buffers_.back().as<T>();
  }

 private:
  const DeviceMemory& memory_;
  std::vector<Buffer> buffers_;
};

sampling::SampleInput input_of(const Request& request) {
  return {request.logits,     request.params,   request.seed,        request.tokens,
          request.num_prompt, request.stop_ids, request.allowed_bits};
}

std::vector<std::int32_t> draw_on_device(const std::vector<Request>& requests) {
  DeviceBench bench;
  Lists lists(bench.memory);
  const std::size_t vocab = requests.front().logits.size(), stride = vocab + 3;
  std::vector<float> logits(requests.size() * stride, kNan);
  sampling::SampleRows rows;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    std::copy(requests[i].logits.begin(), requests[i].logits.end(),
              logits.begin() + static_cast<std::ptrdiff_t>(i * stride));
    rows.add(input_of(requests[i]));
  }
  float* const memory = lists.put(logits);
  auto* const params = lists.room<ops::SampleRow>(rows.bytes() / sizeof(ops::SampleRow) + 1);
  bench.memory.copy_in(params, rows.packed_for(params).data(), rows.bytes());
  Tensor view(memory, DType::f32, {static_cast<std::int64_t>(requests.size()), static_cast<std::int64_t>(vocab)});
  view.row_stride = static_cast<std::int64_t>(stride);
  std::vector<std::int32_t> drawn(requests.size());
  ops::sample(drawn, view, params, bench.ctx);
  std::vector<float> after(logits.size());
  bench.memory.copy_out(after.data(), memory, after.size() * sizeof(float));
  EXPECT_EQ(std::memcmp(after.data(), logits.data(), after.size() * sizeof(float)), 0) << "logits have been changed";
  return drawn;
}

TokenId draw_on_cpu(const Request& request) {
  sampling::Sampler sampler;
  return sampler.sample(input_of(request));
}

// How the logits of a case look.
enum class Shape { peaked, flat, ties, extremes };

std::vector<float> random_logits(std::mt19937& random, int vocab, Shape shape) {
  std::normal_distribution<float> normal(0.0F, shape == Shape::flat ? 0.5F : 3.0F);
  std::vector<float> logits(static_cast<std::size_t>(vocab));
  for (float& logit : logits) {
    logit = normal(random);
    if (shape == Shape::ties) logit = std::round(logit);
  }
  if (shape == Shape::extremes && vocab > 4) {
    const float values[] = {kNan, -kInf, kInf, std::numeric_limits<float>::max(), -0.0F, 0.0F};
    for (int i = 0; i < vocab / 4; ++i) logits[random() % logits.size()] = values[random() % 6];
    logits[random() % logits.size()] = 1.0F;
  }
  return logits;
}

using Edit = void (*)(Request&, std::mt19937&);

struct Setting {
  const char* name;
  Edit edit;
};

TokenId any_token(const Request& request, std::mt19937& random) {
  return static_cast<TokenId>(random() % request.logits.size());
}

void use_temperature(Request& r, std::mt19937& random) {
  const double values[] = {0.3, 0.8, 1.0, 2.5};
  r.params.temperature = values[random() % 4];
}
void use_top_k(Request& r, std::mt19937& random) {
  const int values[] = {1, 2, 7, 40, 255, 256, 257, 700, 4999, 6000};
  r.params.top_k = values[random() % 10];
}
void use_top_p(Request& r, std::mt19937& random) {
  const double values[] = {1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 0.9999999};
  r.params.top_p = values[random() % 7];
}
void use_min_p(Request& r, std::mt19937& random) {
  const double values[] = {1e-30, 0.001, 0.05, 0.5, 1.0};
  r.params.min_p = values[random() % 5];
}
void use_bias(Request& r, std::mt19937& random) {
  for (int i = 0; i < 9; ++i) {
    r.params.logit_bias.push_back({any_token(r, random), static_cast<double>(random() % 200) / 10.0 - 10.0});
  }
  r.params.logit_bias.push_back({r.params.logit_bias.front().token, 0.1});
}
void use_masks(Request& r, std::mt19937& random) {
  const TokenId last = r.tokens.back(), other = any_token(r, random);
  if (r.logits.size() < 2) return;
  r.params.bad_words_token_ids = {{other}, {last, any_token(r, random)}, {r.tokens.front(), last, last}};
  r.stop_ids = {any_token(r, random)};
  r.params.min_tokens = static_cast<int>(random() % 40);
}
void use_allowed(Request& r, std::mt19937& random) {
  std::vector<TokenId> allowed;
  for (std::size_t i = 0; i < r.logits.size() / 2 + 1; ++i) allowed.push_back(any_token(r, random));
  r.params.allowed_token_ids = allowed;
}
void use_bits(Request& r, std::mt19937& random) {
  r.allowed_bits.resize((r.logits.size() + 31) / 32);
  for (std::uint32_t& word : r.allowed_bits) word = static_cast<std::uint32_t>(random()) | 1u;
  if (r.allowed_bits.size() > 2) r.allowed_bits.resize(r.allowed_bits.size() - 1);  // words that are missing
}
void use_repetition(Request& r, std::mt19937& random) { r.params.repetition_penalty = random() % 2 == 0 ? 1.3 : 0.7; }
void use_output_penalties(Request& r, std::mt19937& random) {
  r.params.presence_penalty = static_cast<double>(random() % 5) / 2.0 - 1.0;
  r.params.frequency_penalty = static_cast<double>(random() % 7) / 5.0 - 0.4;
}

constexpr Setting kSettings[] = {
    {"plain", [](Request&, std::mt19937&) {}},
    {"greedy", [](Request& r, std::mt19937&) { r.params.temperature = 0.0; }},
    {"temperature", use_temperature},
    {"top_k", use_top_k},
    {"top_p", use_top_p},
    {"min_p", use_min_p},
    {"bias", use_bias},
    {"masks", use_masks},
    {"allowed ids", use_allowed},
    {"allowed bits", use_bits},
    {"repetition", use_repetition},
    {"output penalties", use_output_penalties},
    {"temperature, min_p, top_k, top_p",
     [](Request& r, std::mt19937& random) {
       for (const Edit edit : {use_temperature, use_min_p, use_top_k, use_top_p}) edit(r, random);
     }},
    {"temperature, top_k, top_p",
     [](Request& r, std::mt19937& random) {
       for (const Edit edit : {use_temperature, use_top_k, use_top_p}) edit(r, random);
     }},
    {"everything",
     [](Request& r, std::mt19937& random) {
       for (const Edit edit : {use_temperature, use_min_p, use_top_k, use_top_p, use_bias, use_masks, use_bits,
                               use_repetition, use_output_penalties}) {
         edit(r, random);
       }
     }},
    {"all that edit, greedy",
     [](Request& r, std::mt19937& random) {
       for (const Edit edit : {use_bias, use_masks, use_allowed, use_repetition, use_output_penalties}) {
         edit(r, random);
       }
       r.params.temperature = 0.0;
     }},
};

Request random_request(std::mt19937& random, int vocab, Shape shape, const Setting& setting) {
  Request request{random_logits(random, vocab, shape), {}};
  request.seed = static_cast<std::uint64_t>(random()) << 32 | random();
  request.params.choice_index = static_cast<std::uint32_t>(random() % 3);
  const std::size_t length = 1 + random() % 60;
  for (std::size_t i = 0; i < length; ++i) request.tokens.push_back(any_token(request, random) / 2);
  request.num_prompt = random() % length;
  setting.edit(request, random);
  return request;
}

// Draws rows of every shape and compares them; adds to the numbers of draws and of those that agree.
void compare(int vocab, const Setting& setting, int rows_per_shape, int& draws, int& agree) {
  std::mt19937 random(static_cast<unsigned>(vocab) + static_cast<unsigned>(&setting - kSettings));
  std::vector<Request> requests;
  std::vector<std::int32_t> expected;
  for (const Shape shape : {Shape::peaked, Shape::flat, Shape::ties, Shape::extremes}) {
    for (int i = 0; i < rows_per_shape; ++i) {
      requests.push_back(random_request(random, vocab, shape, setting));
      try {
        expected.push_back(draw_on_cpu(requests.back()));
      } catch (const Error&) {
        expected.push_back(-1);  // masks leave nothing
      }
    }
  }
  const std::vector<std::int32_t> drawn = draw_on_device(requests);
  for (std::size_t i = 0; i < drawn.size(); ++i) {
    EXPECT_EQ(drawn[i], expected[i]) << setting.name << ", V " << vocab << ", row " << i;
    ++draws;
    agree += drawn[i] == expected[i] ? 1 : 0;
  }
}

TEST(DeviceSampling, DrawsTheTokensOfTheCpu) {
  int draws = 0, agree = 0;
  for (const Setting& setting : kSettings) {
    compare(1, setting, 2, draws, agree);
    compare(37, setting, is_reduced() ? 4 : 8, draws, agree);
    compare(1000, setting, is_reduced() ? 2 : 6, draws, agree);
    compare(5003, setting, is_reduced() ? 1 : 4, draws, agree);
  }
  std::printf("%d of %d draws agree\n", agree, draws);
}

TEST(DeviceSampling, DrawsThemFromLargeVocabularies) {
  int draws = 0, agree = 0;
  for (const std::size_t setting : {0, 1, 3, 4, 12, 14}) compare(9001, kSettings[setting], 1, draws, agree);
  std::printf("%d of %d draws agree\n", agree, draws);
}

TEST(DeviceSampling, AnyOrderOfThreads) {
  in_both_orders([] {
    int draws = 0, agree = 0;
    for (const Setting& setting : kSettings) compare(300, setting, 1, draws, agree);
  });
}

// Equal logits, both zeros among them: fronts end among ties, and sums of weights are exact.
TEST(DeviceSampling, FrontsEndAmongTies) {
  std::vector<Request> requests;
  std::vector<std::int32_t> expected;
  const auto add = [&](int vocab, float logit, int top_k, double top_p, double temperature) {
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
      Request request{std::vector<float>(static_cast<std::size_t>(vocab), logit), {}};
      for (std::size_t i = 0; i < request.logits.size(); i += 2) request.logits[i] = -logit;
      if (logit != 0.0F) std::fill(request.logits.begin(), request.logits.end(), logit);
      request.params.top_k = top_k;
      request.params.top_p = top_p;
      request.params.temperature = temperature;
      request.seed = seed;
      request.tokens = {1};
      expected.push_back(draw_on_cpu(request));
      EXPECT_LT(expected.back(), top_k > 0 ? top_k : top_p * vocab);
      requests.push_back(std::move(request));
    }
  };
  for (const float logit : {0.0F, 2.5F}) {
    add(1024, logit, -1, 1.0, 0.0);
    for (const int top_k : {1, 3, 300}) add(1024, logit, top_k, 1.0, 1.0);
    for (const double top_p : {1.0 / 1024, 2.0 / 1024, 0.125, 0.5}) add(1024, logit, -1, top_p, 0.7);
  }
  EXPECT_EQ(draw_on_device(requests), expected);
}

TEST(DeviceSampling, RowsWithoutAnyTokenSayMinusOne) {
  Request none{std::vector<float>(40, -kInf), {}};
  none.tokens = {1};
  none.logits[3] = kNan;
  Request masked{std::vector<float>(40, 1.0F), {}};
  masked.tokens = {1};
  masked.params.temperature = 0.0;
  masked.allowed_bits = {0};
  Request one = masked;
  one.allowed_bits = {1u << 9};
  EXPECT_EQ(draw_on_device({none, masked, one}), (std::vector<std::int32_t>{-1, -1, 9}));
}

}  // namespace
}  // namespace nb::cuda
