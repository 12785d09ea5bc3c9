#include "sampling/softmax.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "base/error.h"

namespace nb::sampling {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr std::size_t kLanes = 8;

/// exp by range reduction: x = n ln 2 + r, |r| <= ln 2 / 2, then the Taylor polynomial of degree 13 in r. No branch,
/// so that compilers turn a loop of these into vector code; the operations per value are the same either way.
inline double exp_inline(double x) {
  constexpr double kLog2E = 0x1.71547652b82fep+0;
  constexpr double kLn2High = 0x1.62e42fee00000p-1;  // 32 bits, so that n * kLn2High is exact
  constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  constexpr double kRound = 0x1.8p52;  // adding it leaves round(x / ln 2) in the low bits
  const double bounded = x < -700.0 ? -700.0 : x;
  const double shifted = bounded * kLog2E + kRound;
  const double n = shifted - kRound;
  const double r = (bounded - n * kLn2High) - n * kLn2Low;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const std::uint64_t exponent = (std::bit_cast<std::uint64_t>(shifted) << 52) + (std::uint64_t{1023} << 52);
  const double value = p * std::bit_cast<double>(exponent);
  const std::uint64_t keep = x < -700.0 ? 0 : ~std::uint64_t{0};
  return std::bit_cast<double>(std::bit_cast<std::uint64_t>(value) & keep);
}

inline double weight(double logit, double max) {
  const double x = logit - max;
  const double bounded = x < 0.0 ? x : 0.0;               // +infinity counts as the maximum
  return exp_inline(logit == logit ? bounded : -1000.0);  // NaN weighs nothing
}

}  // namespace

double exp_nonpositive(double x) { return exp_inline(x); }

void exp_weights(std::span<const float> logits, float max, std::span<double> weights) {
  NB_ASSERT(weights.size() == logits.size());
  const double shift = static_cast<double>(max);
  std::size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      weights[i + lane] = weight(static_cast<double>(logits[i + lane]), shift);
    }
  }
  for (; i < logits.size(); ++i) weights[i] = weight(static_cast<double>(logits[i]), shift);
}

float max_value(std::span<const float> logits) {
  std::array<float, kLanes> best;  // lanes, so that comparisons need not wait for each other
  best.fill(kMinusInfinity);
  std::size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      best[lane] = logits[i + lane] > best[lane] ? logits[i + lane] : best[lane];
    }
  }
  for (; i < logits.size(); ++i) best[0] = logits[i] > best[0] ? logits[i] : best[0];
  return *std::max_element(best.begin(), best.end());
}

double sum(std::span<const double> weights) {
  double total = 0.0;
  for (const double value : weights) total += value;
  return total;
}

double log_probability(std::span<const float> logits, TokenId token) {
  NB_ASSERT(token >= 0 && static_cast<std::size_t>(token) < logits.size());
  const float max = std::min(max_value(logits), std::numeric_limits<float>::max());
  if (max == kMinusInfinity) return std::numeric_limits<double>::quiet_NaN();
  std::array<double, 256> weights;
  double total = 0.0;
  for (std::size_t begin = 0; begin < logits.size(); begin += weights.size()) {
    const auto piece = logits.subspan(begin, std::min(weights.size(), logits.size() - begin));
    exp_weights(piece, max, std::span(weights).first(piece.size()));
    total += sum(std::span(weights).first(piece.size()));
  }
  const float logit = logits[static_cast<std::size_t>(token)];
  if (std::isnan(logit)) return -std::numeric_limits<double>::infinity();
  return static_cast<double>(std::min(logit, max)) - static_cast<double>(max) - std::log(total);
}

}  // namespace nb::sampling
