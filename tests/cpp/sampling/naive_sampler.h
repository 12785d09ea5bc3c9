// The oracle of the sampling tests: every stage as its definition reads, in double, with full sorts.
//
// Shares no code with the sampler.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <span>
#include <vector>

#include "sampling/params.h"

namespace nb::sampling::naive {

/// The exact distribution over [0, V) from which a token is drawn; a one at the argmax for temperature 0.
inline std::vector<double> distribution(std::span<const float> row, const SamplingParams& params,
                                        std::span<const TokenId> tokens) {
  const double minus_infinity = -std::numeric_limits<double>::infinity();
  std::vector<double> x(row.begin(), row.end());
  for (double& logit : x) logit = std::isnan(logit) ? minus_infinity : logit;
  for (const LogitBias& entry : params.logit_bias) x[static_cast<std::size_t>(entry.token)] += entry.bias;
  for (const TokenId token : std::set<TokenId>(tokens.begin(), tokens.end())) {
    double& logit = x[static_cast<std::size_t>(token)];
    logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
  }
  std::vector<std::size_t> order(x.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return x[a] > x[b]; });
  std::vector<double> p(x.size(), 0.0);
  if (params.temperature == 0.0) {
    p[order[0]] = 1.0;
    return p;
  }
  const double best = x[order[0]];
  for (std::size_t i = 0; i < x.size(); ++i) p[i] = std::exp((x[i] - best) / params.temperature);
  const auto normalize = [&] {
    double total = 0.0;
    for (const double value : p) total += value;
    for (double& value : p) value /= total;
  };
  normalize();
  const double floor = params.min_p * p[order[0]];
  for (double& value : p) value = value >= floor ? value : 0.0;
  if (params.top_k > 0) {
    for (std::size_t i = static_cast<std::size_t>(params.top_k); i < order.size(); ++i) p[order[i]] = 0.0;
  }
  normalize();
  double mass = 0.0;
  bool crossed = false;
  for (const std::size_t i : order) {
    if (crossed && params.top_p < 1.0) p[i] = 0.0;
    mass += p[i];
    crossed = crossed || mass >= params.top_p;
  }
  normalize();
  return p;
}

}  // namespace nb::sampling::naive
