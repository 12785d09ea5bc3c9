#include "sampling/stages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>

#include "base/error.h"
#include "sampling/naive_sampler.h"

namespace nb::sampling {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Applies the active stages and returns the distribution that is left, over the whole vocabulary.
std::vector<double> staged(std::span<const float> row, const StageInput& input) {
  Candidates candidates;
  candidates.reset(row);
  bool editing = true;
  for (const Stage& stage : stages()) {
    if (editing && !stage.edits) candidates.settle();
    editing = stage.edits;
    if (stage.active(input)) stage.apply(candidates, input);
  }
  std::vector<double> p(row.size(), 0.0);
  const double max = static_cast<double>(candidates.max_logit());
  double total = 0.0;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    const double weight = std::exp((naive::value_of(candidates.logits()[i]) - max) / candidates.temperature());
    p[static_cast<std::size_t>(candidates.id_at(i))] = weight;
    total += weight;
  }
  for (double& value : p) value /= total;
  return p;
}

std::vector<double> staged(std::span<const float> row, const SamplingParams& params, std::span<const TokenId> tokens) {
  return staged(row, StageInput{params, tokens});
}

void apply(const char* name, Candidates& candidates, const StageInput& input) {
  for (const Stage& stage : stages()) {
    if (std::string(stage.name) == name) return stage.apply(candidates, input);
  }
  ADD_FAILURE() << "no stage " << name;
}

void expect_close(const std::vector<double>& actual, const std::vector<double>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_NEAR(actual[i], expected[i], 1e-5) << "token " << i;
    ASSERT_EQ(actual[i] > 0.0, expected[i] > 0.0) << "token " << i;
  }
}

std::vector<float> random_row(std::mt19937& random, std::size_t size, float spread) {
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> row(size);
  for (float& logit : row) logit = std::round(normal(random) * 8.0f) / 8.0f;  // so that ties happen
  return row;
}

SamplingParams with(void (*set)(SamplingParams&)) {
  SamplingParams params;
  set(params);
  return params;
}

TEST(Stages, TableHasTheDocumentedOrder) {
  std::vector<std::string> names;
  for (const Stage& stage : stages()) names.emplace_back(stage.name);
  EXPECT_EQ(names,
            (std::vector<std::string>{"logit_bias", "bad_words", "allowed_tokens", "min_tokens", "repetition_penalty",
                                      "presence_and_frequency_penalty", "temperature", "min_p", "top_k", "top_p"}));
  const SamplingParams defaults;
  const std::vector<TokenId> tokens{1, 2};
  for (const Stage& stage : stages()) {
    EXPECT_FALSE(stage.active({defaults, tokens, 1, tokens})) << stage.name;  // defaults change nothing
  }
  EXPECT_TRUE(std::is_partitioned(stages().begin(), stages().end(), [](const Stage& stage) { return stage.edits; }));
}

TEST(Stages, EachAloneEqualsItsDefinition) {
  const SamplingParams cases[] = {
      with([](SamplingParams& p) {
        p.logit_bias = {{3, 5.0}, {7, -100.0}, {3, 1.0}};
      }),
      with([](SamplingParams& p) { p.bad_words_token_ids = {{2}}; }),
      with([](SamplingParams& p) {
        p.bad_words_token_ids = {{4, 1, 3}, {1, 5}, {9, 1, 6}, {1, 4, 1, 9, 4, 1, 8}, {0, 1, 4, 1, 9, 4, 1, 7}};
      }),
      with([](SamplingParams& p) {
        p.allowed_token_ids = {9, 2, 2, 5};
      }),
      with([](SamplingParams& p) { p.min_tokens = 5; }),
      with([](SamplingParams& p) { p.min_tokens = 4; }),
      with([](SamplingParams& p) { p.repetition_penalty = 1.7; }),
      with([](SamplingParams& p) { p.repetition_penalty = 0.6; }),
      with([](SamplingParams& p) { p.presence_penalty = 1.3; }),
      with([](SamplingParams& p) { p.presence_penalty = -2.0; }),
      with([](SamplingParams& p) { p.frequency_penalty = 0.7; }),
      with([](SamplingParams& p) { p.frequency_penalty = -1.1; }),
      with([](SamplingParams& p) { p.temperature = 0.25; }),
      with([](SamplingParams& p) { p.temperature = 3.0; }),
      with([](SamplingParams& p) { p.min_p = 0.05; }),
      with([](SamplingParams& p) { p.min_p = 1.0; }),
      with([](SamplingParams& p) { p.top_k = 1; }),
      with([](SamplingParams& p) { p.top_k = 17; }),
      with([](SamplingParams& p) { p.top_k = 1000; }),
      with([](SamplingParams& p) { p.top_k = 1000000; }),
      with([](SamplingParams& p) { p.top_p = 0.3; }),
      with([](SamplingParams& p) { p.top_p = 0.97; }),
      with([](SamplingParams& p) { p.top_p = 1e-12; }),
      with([](SamplingParams& p) { p.top_p = 0.999; }),
  };
  std::mt19937 random(1);
  for (const std::size_t size : {10u, 100u, 5000u}) {
    const std::vector<float> row = random_row(random, size, 2.0f);
    const std::vector<TokenId> tokens{1, 4, 1, 9, 4, 1};
    const std::vector<TokenId> stop_ids{0, 7};
    for (std::size_t i = 0; i < std::size(cases); ++i) {
      SCOPED_TRACE(concat("case ", i, ", ", size, " tokens"));
      const StageInput input{cases[i], tokens, 2, stop_ids};
      expect_close(staged(row, input), naive::distribution(row, input));
    }
  }
}

TEST(Stages, MasksTakeOutExactlyTheirTokens) {
  const std::vector<float> row(40, 1.0f);
  const std::vector<TokenId> tokens{5, 6};
  const auto masked = [&](const SamplingParams& params, std::span<const TokenId> stop_ids = {},
                          std::span<const std::uint32_t> bits = {}) {
    const auto p = staged(row, {params, tokens, 1, stop_ids, bits});
    std::vector<TokenId> out;
    for (std::size_t i = 0; i < p.size(); ++i) {
      if (p[i] == 0.0) out.push_back(static_cast<TokenId>(i));
    }
    return out;
  };
  using Ids = std::vector<TokenId>;
  SamplingParams params;
  params.bad_words_token_ids = {{5, 6, 7}, {6, 8}, {5, 9}, {3}};
  EXPECT_EQ(masked(params), (Ids{3, 7, 8}));
  params = {};
  params.min_tokens = 2;  // one of the two tokens is generated
  EXPECT_EQ(masked(params, Ids{2, 39}), (Ids{2, 39}));
  params.min_tokens = 1;
  EXPECT_EQ(masked(params, Ids{2, 39}), Ids{});
  params = {};
  const std::vector<std::uint32_t> bits{~0u & ~(1u << 4), 0x7f};  // 39 has no bit
  EXPECT_EQ(masked(params, {}, bits), (Ids{4, 39}));
  EXPECT_EQ(masked(params, {}, std::span(bits).first(1)), (Ids{4, 32, 33, 34, 35, 36, 37, 38, 39}));
  params.allowed_token_ids = Ids{4, 38, 39, 1};
  Ids rest(40);
  std::iota(rest.begin(), rest.end(), 0);
  Ids all_but_one_and_38 = rest;
  std::erase_if(all_but_one_and_38, [](TokenId id) { return id == 1 || id == 38; });
  EXPECT_EQ(masked(params, {}, bits), all_but_one_and_38);
}

TEST(Stages, MasksThatLeaveNothingNameThemselves) {
  const std::vector<float> row(3, 1.0f);
  const std::vector<TokenId> tokens{0};
  const auto refusal = [&](const SamplingParams& params, std::span<const TokenId> stop_ids) {
    try {
      staged(row, {params, tokens, 1, stop_ids});
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      return std::string(error.what());
    }
    return std::string("nothing was thrown");
  };
  SamplingParams params;
  params.bad_words_token_ids = {{0, 0}, {1}, {2}};
  EXPECT_NE(refusal(params, {}).find("bad_words_token_ids leaves no token"), std::string::npos) << refusal(params, {});
  params = {};
  params.min_tokens = 1;
  params.allowed_token_ids = {1, 2};
  const std::string both = refusal(params, std::vector<TokenId>{1, 2});
  EXPECT_NE(both.find("allowed_token_ids and min_tokens together leave no token"), std::string::npos) << both;
}

TEST(Stages, TogetherEqualTheDefinition) {
  std::mt19937 random(2);
  for (int trial = 0; trial < 400; ++trial) {
    SCOPED_TRACE(concat("trial ", trial));
    const std::size_t size = 2 + random() % 3000;
    std::vector<float> row = random_row(random, size, 0.2f + static_cast<float>(random() % 5));
    if (random() % 3 == 0) {
      for (unsigned i = 0; i < 1 + size / 10; ++i) row[random() % size] = std::array{kNan, -kInfinity}[random() % 2];
      row[random() % size] = 0.5f;
    }
    SamplingParams params;
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    const auto token = [&] { return static_cast<TokenId>(random() % size); };
    if (random() % 2) params.temperature = 0.2 + 2.0 * uniform(random);
    if (random() % 2) params.repetition_penalty = 0.7 + uniform(random);
    if (random() % 2) params.presence_penalty = 4.0 * uniform(random) - 2.0;
    if (random() % 2) params.frequency_penalty = 4.0 * uniform(random) - 2.0;
    if (random() % 2) params.top_k = static_cast<int>(1 + random() % 400);
    if (random() % 2) params.top_p = 0.01 + 0.98 * uniform(random);
    if (random() % 2) params.min_p = 0.2 * uniform(random) * uniform(random);
    for (unsigned i = random() % 4; i > 0; --i) params.logit_bias.push_back({token(), 20.0 * uniform(random) - 10.0});
    std::vector<TokenId> tokens(random() % 50);
    for (TokenId& id : tokens) id = token();
    for (unsigned i = random() % 4; i > 0; --i) {
      const std::size_t length = random() % std::min<std::size_t>(3, tokens.size() + 1);
      std::vector<TokenId> word(tokens.end() - static_cast<std::ptrdiff_t>(length), tokens.end());
      word.push_back(token());
      params.bad_words_token_ids.push_back(word);
    }
    if (random() % 3 == 0) {
      params.allowed_token_ids.emplace();
      for (std::size_t i = 0; i < 1 + size / 2; ++i) params.allowed_token_ids->push_back(token());
    }
    params.min_tokens = static_cast<int>(random() % 60);
    const std::vector<TokenId> stop_ids{token(), token()};
    std::vector<std::uint32_t> bits(random() % 3 == 0 ? (size + 31) / 32 : 0);
    for (auto& word : bits) word = static_cast<std::uint32_t>(random() | random());
    const StageInput input{params, tokens, tokens.empty() ? 0 : random() % tokens.size(), stop_ids, bits};
    const auto x = naive::edited(row, input);
    if (*std::max_element(x.begin(), x.end()) == -static_cast<double>(kInfinity)) {
      EXPECT_THROW(staged(row, input), Error);
      continue;
    }
    const auto actual = staged(row, input);
    const auto expected = naive::distribution(row, input);
    for (std::size_t i = 0; i < size; ++i) ASSERT_NEAR(actual[i], expected[i], 1e-5) << "token " << i;
  }
}

TEST(Stages, TopPKeepsTheCrossingToken) {
  const std::vector<float> row{std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  const auto support = [&](double top_p) {
    SamplingParams params;
    params.top_p = top_p;
    const auto p = staged(row, params, {});
    return std::count_if(p.begin(), p.end(), [](double value) { return value > 0.0; });
  };
  EXPECT_EQ(support(0.1), 1);
  EXPECT_EQ(support(0.49), 1);
  EXPECT_EQ(support(0.51), 2);
  EXPECT_EQ(support(0.79), 2);
  EXPECT_EQ(support(0.81), 3);
}

TEST(Stages, TiesAtABorderGoToTheLowerId) {
  const std::vector<float> row(1000, 1.5f);
  SamplingParams params;
  params.top_k = 3;
  auto p = staged(row, params, {});
  EXPECT_GT(p[2], 0.3);
  EXPECT_EQ(p[3], 0.0);
  params.top_k = -1;
  params.top_p = 0.5;
  p = staged(row, params, {});
  EXPECT_GT(p[499], 0.0);
  EXPECT_EQ(p[500], 0.0);
}

TEST(Stages, PenaltiesCountAndLeaveNoTrace) {
  const std::vector<float> row{2.0f, -2.0f, 2.0f, 0.0f, -kInfinity};
  const std::vector<TokenId> tokens{0, 1, 0, 0, 1, 3, 4};
  SamplingParams params;
  params.repetition_penalty = 2.0;
  params.presence_penalty = 0.5;
  params.frequency_penalty = 0.25;
  Candidates candidates;
  for (int pass = 0; pass < 2; ++pass) {
    candidates.reset(row);
    apply("repetition_penalty", candidates, {params, tokens, 3});
    EXPECT_EQ(std::vector<float>(candidates.logits().begin(), candidates.logits().end()),
              (std::vector<float>{1.0f, -4.0f, 2.0f, 0.0f, -kInfinity}));
    candidates.reset(row);
    apply("presence_and_frequency_penalty", candidates, {params, tokens, 2});
    EXPECT_EQ(std::vector<float>(candidates.logits().begin(), candidates.logits().end()),
              (std::vector<float>{1.0f, -2.75f, 2.0f, -0.75f, -kInfinity}));
  }
}

TEST(Stages, ExtremeValuesNeverBecomeNan) {
  SamplingParams params;
  params.temperature = 1e-300;
  params.repetition_penalty = 1e-30;
  params.logit_bias = {{0, 100.0}};
  const float huge = std::numeric_limits<float>::max();
  for (const auto& row : {std::vector<float>{huge, -huge, 0.0f}, std::vector<float>{kInfinity, kNan, -kInfinity},
                          std::vector<float>{1e-30f, 2e-30f, 3e-30f}}) {
    const auto p = staged(row, params, std::vector<TokenId>{0, 1, 2});
    double total = 0.0;
    for (const double value : p) total += value;
    EXPECT_NEAR(total, 1.0, 1e-12);
  }
}

}  // namespace
}  // namespace nb::sampling
