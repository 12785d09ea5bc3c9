// The oracle of the sampling tests: every stage as its definition reads, in double, with full sorts.
//
// Shares no code with the sampler.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <span>
#include <vector>

#include "sampling/stages.h"

namespace nb::sampling::naive {

inline double value_of(float logit) {
  if (std::isnan(logit)) return -std::numeric_limits<double>::infinity();
  return std::min(static_cast<double>(logit), static_cast<double>(std::numeric_limits<float>::max()));
}

/// Indices by descending value, ties by ascending index.
inline std::vector<std::size_t> order_of(const std::vector<double>& x) {
  std::vector<std::size_t> order(x.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return x[a] > x[b]; });
  return order;
}

/// The logits after everything that edits them; masked tokens are -infinity.
inline std::vector<double> edited(std::span<const float> row, const StageInput& in) {
  const double minus_infinity = -std::numeric_limits<double>::infinity();
  const SamplingParams& params = in.params;
  std::vector<double> x;
  for (const float logit : row) x.push_back(value_of(logit));
  const auto at = [&](TokenId token) -> double& { return x[static_cast<std::size_t>(token)]; };
  for (const LogitBias& entry : params.logit_bias) at(entry.token) += entry.bias;
  for (TokenId token = 0; token < static_cast<TokenId>(x.size()); ++token) {
    std::vector<TokenId> text(in.tokens.begin(), in.tokens.end());
    text.push_back(token);
    for (const auto& word : params.bad_words_token_ids) {
      if (text.size() >= word.size() && std::equal(word.rbegin(), word.rend(), text.rbegin()))
        at(token) = minus_infinity;
    }
    if (params.allowed_token_ids) {
      const auto& allowed = *params.allowed_token_ids;
      if (std::find(allowed.begin(), allowed.end(), token) == allowed.end()) at(token) = minus_infinity;
    }
    if (!in.allowed_bits.empty()) {
      const std::size_t word = static_cast<std::size_t>(token) / 32;
      if (word >= in.allowed_bits.size() || (in.allowed_bits[word] & (1u << (token % 32))) == 0) {
        at(token) = minus_infinity;
      }
    }
  }
  if (in.tokens.size() - in.num_prompt < static_cast<std::size_t>(params.min_tokens)) {
    for (const TokenId token : in.stop_ids) at(token) = minus_infinity;
  }
  for (const TokenId token : std::set<TokenId>(in.tokens.begin(), in.tokens.end())) {
    at(token) = at(token) > 0 ? at(token) / params.repetition_penalty : at(token) * params.repetition_penalty;
  }
  std::map<TokenId, int> counts;
  for (std::size_t i = in.num_prompt; i < in.tokens.size(); ++i) ++counts[in.tokens[i]];
  for (const auto& [token, count] : counts) at(token) -= count * params.frequency_penalty + params.presence_penalty;
  return x;
}

/// The exact distribution over [0, V) from which a token is drawn; a one at the argmax for temperature 0.
inline std::vector<double> distribution(std::span<const float> row, const StageInput& in) {
  const SamplingParams& params = in.params;
  const std::vector<double> x = edited(row, in);
  const auto order = order_of(x);
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
