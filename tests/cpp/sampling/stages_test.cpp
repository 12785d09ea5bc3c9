#include "sampling/stages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "base/error.h"
#include "sampling/naive_sampler.h"
#include "sampling/softmax.h"

namespace nb::sampling {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Applies the active stages and returns the distribution that is left, over the whole vocabulary.
std::vector<double> staged(std::span<const float> row, const SamplingParams& params, std::span<const TokenId> tokens) {
  Candidates candidates;
  candidates.reset(row);
  for (const Stage& stage : stages()) {
    if (stage.active(params)) stage.apply(candidates, {params, tokens});
  }
  std::vector<double> p(row.size(), 0.0);
  candidates.weights.resize(candidates.size());
  exp_weights(candidates.logits, candidates.max_logit(), candidates.weights);
  const double total = sum(candidates.weights);
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    p[static_cast<std::size_t>(candidates.ids[i])] = candidates.weights[i] / total;
  }
  return p;
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
            (std::vector<std::string>{"logit_bias", "repetition_penalty", "temperature", "min_p", "top_k", "top_p"}));
  for (const Stage& stage : stages()) EXPECT_FALSE(stage.active({})) << stage.name;  // defaults change nothing
}

TEST(Stages, EachAloneEqualsItsDefinition) {
  const SamplingParams cases[] = {
      with([](SamplingParams& p) {
        p.logit_bias = {{3, 5.0}, {7, -100.0}, {3, 1.0}};
      }),
      with([](SamplingParams& p) { p.repetition_penalty = 1.7; }),
      with([](SamplingParams& p) { p.repetition_penalty = 0.6; }),
      with([](SamplingParams& p) { p.temperature = 0.25; }),
      with([](SamplingParams& p) { p.temperature = 3.0; }),
      with([](SamplingParams& p) { p.min_p = 0.05; }),
      with([](SamplingParams& p) { p.min_p = 1.0; }),
      with([](SamplingParams& p) { p.top_k = 1; }),
      with([](SamplingParams& p) { p.top_k = 17; }),
      with([](SamplingParams& p) { p.top_k = 1000000; }),
      with([](SamplingParams& p) { p.top_p = 0.3; }),
      with([](SamplingParams& p) { p.top_p = 0.97; }),
      with([](SamplingParams& p) { p.top_p = 1e-12; }),
  };
  std::mt19937 random(1);
  for (const std::size_t size : {10u, 100u, 5000u}) {
    const std::vector<float> row = random_row(random, size, 2.0f);
    const std::vector<TokenId> tokens{1, 4, 1, 9, 4, 1};
    for (std::size_t i = 0; i < std::size(cases); ++i) {
      SCOPED_TRACE(concat("case ", i, ", ", size, " tokens"));
      expect_close(staged(row, cases[i], tokens), naive::distribution(row, cases[i], tokens));
    }
  }
}

TEST(Stages, TogetherEqualTheDefinition) {
  std::mt19937 random(2);
  for (int trial = 0; trial < 300; ++trial) {
    SCOPED_TRACE(concat("trial ", trial));
    const std::size_t size = 2 + random() % 3000;
    const std::vector<float> row = random_row(random, size, 0.2f + static_cast<float>(random() % 5));
    SamplingParams params;
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    if (random() % 2) params.temperature = 0.2 + 2.0 * uniform(random);
    if (random() % 2) params.repetition_penalty = 0.7 + uniform(random);
    if (random() % 2) params.top_k = static_cast<int>(1 + random() % 400);
    if (random() % 2) params.top_p = 0.01 + 0.98 * uniform(random);
    if (random() % 2) params.min_p = 0.2 * uniform(random) * uniform(random);
    for (unsigned i = random() % 4; i > 0; --i) {
      params.logit_bias.push_back({static_cast<TokenId>(random() % size), 20.0 * uniform(random) - 10.0});
    }
    std::vector<TokenId> tokens(random() % 50);
    for (TokenId& token : tokens) token = static_cast<TokenId>(random() % size);
    const auto actual = staged(row, params, tokens);
    const auto expected = naive::distribution(row, params, tokens);
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

TEST(Stages, TopKOverManyTokensKeepsTheLargest) {
  std::mt19937 random(3);
  std::vector<float> row(150000);
  std::normal_distribution<float> normal;
  for (float& logit : row) logit = normal(random);
  std::sort(row.begin(), row.end());  // ascending: the worst case of a running threshold
  for (const int k : {1, 40, 20000}) {
    SamplingParams params;
    params.top_k = k;
    Candidates candidates;
    candidates.reset(row);
    stages()[4].apply(candidates, {params, {}});
    ASSERT_EQ(candidates.size(), static_cast<std::size_t>(k));
    EXPECT_EQ(candidates.ids.front(), static_cast<TokenId>(row.size()) - k);
  }
}

TEST(Stages, PenaltyCountsATokenOnceAndLeavesNoTrace) {
  const std::vector<float> row{2.0f, -2.0f, 2.0f, 0.0f};
  const std::vector<TokenId> tokens{0, 1, 0, 0, 1, 3};
  SamplingParams params;
  params.repetition_penalty = 2.0;
  Candidates candidates;
  for (int pass = 0; pass < 2; ++pass) {
    candidates.reset(row);
    stages()[1].apply(candidates, {params, tokens});
    EXPECT_EQ(candidates.logits, (std::vector<float>{1.0f, -4.0f, 2.0f, 0.0f}));
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

TEST(Candidates, LeaveOutWhatCannotBeDrawn) {
  Candidates candidates;
  candidates.reset(std::vector<float>{kNan, 1.0f, -kInfinity, kInfinity, -3.0f});
  EXPECT_EQ(candidates.ids, (std::vector<TokenId>{1, 3, 4}));
  EXPECT_EQ(candidates.find(3), 1);
  EXPECT_EQ(candidates.find(0), -1);
  EXPECT_EQ(candidates.find(4), 2);
  EXPECT_EQ(candidates.find(5), -1);
  try {
    candidates.reset(std::vector<float>{kNan, -kInfinity});
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::internal);
  }
}

TEST(Draw, InvertsTheCumulativeDistributionInOrderOfId) {
  Candidates candidates;
  candidates.reset(std::vector<float>{std::log(1.0f), -kInfinity, std::log(2.0f), std::log(1.0f)});
  EXPECT_EQ(draw(candidates, 0.0), 0);
  EXPECT_EQ(draw(candidates, 0.2499), 0);
  EXPECT_EQ(draw(candidates, 0.2501), 2);
  EXPECT_EQ(draw(candidates, 0.7499), 2);
  EXPECT_EQ(draw(candidates, 0.7501), 3);
  EXPECT_EQ(draw(candidates, std::nextafter(1.0, 0.0)), 3);
}

TEST(Draw, NeverTakesATokenWithoutWeight) {
  Candidates candidates;
  candidates.reset(std::vector<float>{-5000.0f, 0.0f, -5000.0f});
  EXPECT_EQ(draw(candidates, 0.0), 1);
  EXPECT_EQ(draw(candidates, std::nextafter(1.0, 0.0)), 1);
}

TEST(PickGreedy, TiesGoToTheLowerId) {
  Candidates candidates;
  candidates.reset(std::vector<float>{-1.0f, 3.0f, kNan, 3.0f});
  EXPECT_EQ(pick_greedy(candidates), 1);
}

}  // namespace
}  // namespace nb::sampling
