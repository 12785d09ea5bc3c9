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

TEST(Softmax, ExponentialAgreesWithTheLibrary) {
  double worst = 0.0;
  for (double x = 0.0; x >= -700.0; x -= 0.00713) {
    worst = std::max(worst, std::abs(exp_nonpositive(x) / std::exp(x) - 1.0));
  }
  EXPECT_LT(worst, 4e-16);
  EXPECT_EQ(exp_nonpositive(0.0), 1.0);
  EXPECT_EQ(exp_nonpositive(-700.5), 0.0);
  EXPECT_EQ(exp_nonpositive(-std::numeric_limits<double>::infinity()), 0.0);
}

TEST(Softmax, WeightsHandleSpecialValuesAndTails) {
  const std::vector<float> logits{1.0f, kNan, -kInfinity, 0.5f, kInfinity, -2.0f, 1.0f, 0.0f, 0.25f, kNan, 0.75f};
  std::vector<double> weights(logits.size());
  exp_weights(logits, 1.0f, weights);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double expected = std::isnan(logits[i]) ? 0.0
                            : logits[i] > 1.0f    ? 1.0
                                                  : std::exp(static_cast<double>(logits[i]) - 1.0);
    EXPECT_NEAR(weights[i], expected, 1e-15) << i;
  }
}

TEST(Softmax, MaximumIgnoresNan) {
  EXPECT_EQ(max_value(std::vector<float>{kNan, 2.0f, kNan, 3.0f}), 3.0f);
  EXPECT_EQ(max_value(std::vector<float>{kNan, -kInfinity}), -kInfinity);
  EXPECT_EQ(max_value({}), -kInfinity);
  for (std::size_t size = 1; size < 40; ++size) {
    for (std::size_t best = 0; best < size; ++best) {
      std::vector<float> logits(size, -1.0f);
      logits[best] = 5.0f;
      ASSERT_EQ(max_value(logits), 5.0f);
    }
  }
}

TEST(Softmax, LogProbabilityAgreesWithANaiveOne) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0.0f, 6.0f);
  for (const std::size_t size : {1u, 5u, 256u, 257u, 3000u}) {
    std::vector<float> logits(size);
    for (float& logit : logits) logit = normal(random) + 50.0f;
    long double total = 0.0L;
    for (const float logit : logits) total += std::exp(static_cast<long double>(logit));
    for (std::size_t token = 0; token < size; token += 1 + size / 7) {
      const double expected = static_cast<double>(static_cast<long double>(logits[token]) - std::log(total));
      EXPECT_NEAR(log_probability(logits, static_cast<TokenId>(token)), expected, 1e-12);
    }
  }
}

TEST(Softmax, LogProbabilityOfBrokenLogits) {
  const std::vector<float> logits{0.0f, kNan, -kInfinity};
  EXPECT_EQ(log_probability(logits, 0), 0.0);
  EXPECT_EQ(log_probability(logits, 1), -std::numeric_limits<double>::infinity());
  EXPECT_EQ(log_probability(logits, 2), -std::numeric_limits<double>::infinity());
  EXPECT_TRUE(std::isnan(log_probability(std::vector<float>{kNan, -kInfinity}, 0)));
  EXPECT_EQ(log_probability(std::vector<float>{1.0f, kInfinity}, 1), 0.0);
}

}  // namespace
}  // namespace nb::sampling
