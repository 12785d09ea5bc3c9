#include "sampling/softmax.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace nb::sampling {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kHuge = std::numeric_limits<float>::max();

std::vector<float> random_row(unsigned seed, std::size_t size, float mean, float spread) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, spread);
  std::vector<float> row(size);
  for (float& logit : row) logit = normal(random);
  return row;
}

double naive_log_sum_exp(const std::vector<float>& row) {
  long double total = 0.0L;
  for (const float logit : row) total += std::exp(static_cast<long double>(logit) - 50.0L);
  return static_cast<double>(50.0L + std::log(total));
}

TEST(Softmax, WeightsAgreeWithTheLibrary) {
  std::vector<float> row;
  for (float x = 0.0f; x > -87.0f; x -= 0.00317f) row.push_back(x);
  for (const float scale : {1.0f, 1.25f, 0.5f}) {
    std::vector<float> weights(row.size());
    exp_weights(row, 0.0f, scale, weights);
    for (std::size_t i = 0; i < row.size(); ++i) {
      const double x = static_cast<double>(row[i]) * static_cast<double>(scale);
      if (x < -86.6) break;
      const double error = std::abs(static_cast<double>(weights[i]) / std::exp(x) - 1.0);
      ASSERT_LT(error, 3e-7 - 3e-7 * x) << x;
    }
  }
}

TEST(Softmax, WeightsHandleSpecialValuesAndTails) {
  const std::vector<float> pattern{1.0f, kNan, -kInfinity, 0.5f, -2.0f, 1.0f, -87.5f, 0.25f, kNan, -kHuge};
  for (const std::size_t size : {1u, 9u, 63u, 64u, 65u, 200u}) {
    std::vector<float> logits(size);
    for (std::size_t i = 0; i < size; ++i) logits[i] = pattern[i % pattern.size()];
    std::vector<float> weights(size);
    exp_weights(logits, 1.0f, 1.0f, weights);
    for (std::size_t i = 0; i < size; ++i) {
      const float x = logits[i] - 1.0f;
      const float expected = x >= -86.6f ? std::exp(x) : 0.0f;
      EXPECT_NEAR(weights[i], expected, 1e-6f) << i;
      EXPECT_EQ(weights[i] > 0.0f, expected > 0.0f) << i;
      float alone = 0.0f;
      exp_weights(std::span(logits).subspan(i, 1), 1.0f, 1.0f, std::span(&alone, 1));
      EXPECT_EQ(alone, weights[i]) << "a weight depends on its place";
    }
  }
  std::vector<float> weights(3);
  exp_weights(std::vector<float>{kInfinity, kHuge, 0.0f}, kHuge, 1.0f, weights);
  EXPECT_EQ(weights, (std::vector<float>{1.0f, 1.0f, 0.0f}));
}

TEST(Softmax, SumsAreThoseOfTheWeights) {
  for (const std::size_t size : {1u, 64u, 65u, 1000u}) {
    const std::vector<float> row = random_row(3, size, 0.0f, 3.0f);
    std::vector<float> weights(size);
    std::vector<float> sums(num_blocks(size));
    exp_weights(row, 20.0f, 0.7f, weights);
    const double total = exp_sums(row, 20.0f, 0.7f, sums);
    double expected = 0.0;
    for (std::size_t b = 0; b < sums.size(); ++b) {
      double sum = 0.0;
      for (std::size_t i = b * 64; i < std::min(size, b * 64 + 64); ++i) sum += static_cast<double>(weights[i]);
      EXPECT_NEAR(static_cast<double>(sums[b]) / sum, 1.0, 1e-6);
      expected += sum;
    }
    EXPECT_NEAR(total / expected, 1.0, 1e-6);
  }
}

TEST(Softmax, MaximaIgnoreNan) {
  const auto max_of = [](const std::vector<float>& row) {
    std::vector<float> maxima(num_blocks(row.size()));
    return block_maxima(row, maxima);
  };
  EXPECT_EQ(max_of({kNan, 2.0f, kNan, 3.0f}), 3.0f);
  EXPECT_EQ(max_of({kNan, -kInfinity}), -kInfinity);
  EXPECT_EQ(max_of({}), -kInfinity);
  EXPECT_EQ(max_of({1.0f, kInfinity}), kHuge);
  for (const std::size_t size : {1u, 7u, 64u, 100u, 193u}) {
    for (std::size_t best = 0; best < size; ++best) {
      std::vector<float> logits(size, -1.0f);
      logits[best] = 5.0f;
      if (best > 0) logits[best - 1] = kNan;
      std::vector<float> maxima(num_blocks(size));
      ASSERT_EQ(block_maxima(logits, maxima), 5.0f);
      for (std::size_t b = 0; b < maxima.size(); ++b) {
        ASSERT_EQ(maxima[b], best / 64 == b ? 5.0f : -1.0f);
      }
    }
  }
}

TEST(Softmax, LogProbabilityAgreesWithANaiveOne) {
  for (const std::size_t size : {1u, 5u, 64u, 257u, 8192u, 8193u, 20000u}) {
    const std::vector<float> logits = random_row(7, size, 50.0f, 6.0f);
    const double expected = naive_log_sum_exp(logits);
    const double actual = log_sum_exp(logits);
    ASSERT_NEAR(actual, expected, 5e-6);
    for (std::size_t token = 0; token < size; token += 1 + size / 7) {
      EXPECT_EQ(log_probability(logits, static_cast<TokenId>(token), actual),
                static_cast<double>(logits[token]) - actual);
    }
  }
}

TEST(Softmax, LogProbabilityOfBrokenLogits) {
  const auto logprob = [](const std::vector<float>& row, TokenId token) {
    return log_probability(row, token, log_sum_exp(row));
  };
  const std::vector<float> logits{0.0f, kNan, -kInfinity};
  EXPECT_EQ(logprob(logits, 0), 0.0);
  EXPECT_EQ(logprob(logits, 1), -std::numeric_limits<double>::infinity());
  EXPECT_EQ(logprob(logits, 2), -std::numeric_limits<double>::infinity());
  EXPECT_TRUE(std::isnan(logprob({kNan, -kInfinity}, 0)));
  EXPECT_EQ(logprob({1.0f, kInfinity}, 1), 0.0);
}

}  // namespace
}  // namespace nb::sampling
