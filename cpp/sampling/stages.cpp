#include "sampling/stages.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "sampling/softmax.h"

namespace nb::sampling {

namespace {

constexpr float kMaxFinite = std::numeric_limits<float>::max();
constexpr TokenId kAnyId = std::numeric_limits<TokenId>::max();

bool more_likely(const Candidates::Candidate& a, const Candidates::Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

/// Rounds to float and keeps a finite value finite.
float finite(double value) {
  return static_cast<float>(std::clamp(value, -static_cast<double>(kMaxFinite), static_cast<double>(kMaxFinite)));
}

// ---- stages ----

void apply_logit_bias(Candidates& candidates, const StageInput& input) {
  for (const LogitBias& entry : input.params.logit_bias) {
    const std::ptrdiff_t index = candidates.find(entry.token);
    if (index < 0) continue;
    float& logit = candidates.logits[static_cast<std::size_t>(index)];
    logit = finite(static_cast<double>(logit) + entry.bias);
  }
}

/// Keskar et al., "CTRL", 2019, section 4.1, with the sign rule of the usual implementations: a positive logit is
/// divided, a negative one multiplied, once per distinct token.
void apply_repetition_penalty(Candidates& candidates, const StageInput& input) {
  const double penalty = input.params.repetition_penalty;
  candidates.distinct.clear();
  for (const TokenId token : input.tokens) {
    NB_ASSERT(token >= 0);
    if (static_cast<std::size_t>(token) >= candidates.seen.size()) {
      candidates.seen.resize(static_cast<std::size_t>(token) + 1, 0);
    }
    std::uint8_t& seen = candidates.seen[static_cast<std::size_t>(token)];
    if (seen == 0) candidates.distinct.push_back(token);
    seen = 1;
  }
  for (const TokenId token : candidates.distinct) {
    candidates.seen[static_cast<std::size_t>(token)] = 0;
    const std::ptrdiff_t index = candidates.find(token);
    if (index < 0) continue;
    float& logit = candidates.logits[static_cast<std::size_t>(index)];
    logit = finite(logit > 0.0f ? static_cast<double>(logit) / penalty : static_cast<double>(logit) * penalty);
  }
}

/// The largest logit becomes 0 first, so that a tiny temperature cannot overflow.
void apply_temperature(Candidates& candidates, const StageInput& input) {
  const double max = static_cast<double>(candidates.max_logit());
  for (float& logit : candidates.logits) {
    logit = finite((static_cast<double>(logit) - max) / input.params.temperature);
  }
}

void apply_min_p(Candidates& candidates, const StageInput& input) {
  candidates.keep_from(static_cast<double>(candidates.max_logit()) + std::log(input.params.min_p), kAnyId);
}

void apply_top_k(Candidates& candidates, const StageInput& input) {
  const std::size_t k = static_cast<std::size_t>(input.params.top_k);
  if (k >= candidates.size()) return;
  candidates.rank(k);
  const auto last = candidates.ranked.back();
  candidates.keep_from(static_cast<double>(last.logit), last.id);
}

/// Finds the crossing token without sorting them all: masses are summed in bins of 1/64 nat below the maximum, and
/// only the bin in which the sum crosses top_p is sorted. The last bin takes everything below 32 nats.
void apply_top_p(Candidates& candidates, const StageInput& input) {
  constexpr std::size_t kBins = 2048;
  const float max = candidates.max_logit();
  const auto bin_of = [max](float logit) {
    const double nats = static_cast<double>(max) - static_cast<double>(logit);
    return static_cast<std::size_t>(std::min(nats * 64.0, static_cast<double>(kBins - 1)));
  };
  candidates.weights.resize(candidates.size());
  exp_weights(candidates.logits, max, candidates.weights);
  candidates.bins.assign(kBins, 0.0);
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    candidates.bins[bin_of(candidates.logits[i])] += candidates.weights[i];
  }
  const double wanted = input.params.top_p * sum(candidates.bins);
  double mass = 0.0;
  std::size_t bin = 0;
  while (bin + 1 < kBins && mass + candidates.bins[bin] < wanted) mass += candidates.bins[bin++];
  candidates.ranked.clear();
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    if (bin_of(candidates.logits[i]) == bin) candidates.ranked.push_back({candidates.ids[i], candidates.logits[i]});
  }
  std::sort(candidates.ranked.begin(), candidates.ranked.end(), more_likely);
  for (const auto& candidate : candidates.ranked) {
    mass += exp_nonpositive(static_cast<double>(candidate.logit) - static_cast<double>(max));
    // The end of the bin crosses even if summing in another order has rounded the mass below it.
    if (mass >= wanted || &candidate == &candidates.ranked.back()) {
      return candidates.keep_from(static_cast<double>(candidate.logit), candidate.id);
    }
  }
}

constexpr std::array kStages = {
    Stage{"logit_bias", true, [](const SamplingParams& p) { return !p.logit_bias.empty(); }, apply_logit_bias},
    Stage{"repetition_penalty", true, [](const SamplingParams& p) { return p.repetition_penalty != 1.0; },
          apply_repetition_penalty},
    Stage{"temperature", false, [](const SamplingParams& p) { return p.temperature != 1.0; }, apply_temperature},
    Stage{"min_p", false, [](const SamplingParams& p) { return p.min_p > 0.0; }, apply_min_p},
    Stage{"top_k", false, [](const SamplingParams& p) { return p.top_k > 0; }, apply_top_k},
    Stage{"top_p", false, [](const SamplingParams& p) { return p.top_p < 1.0; }, apply_top_p},
};

}  // namespace

void Candidates::reset(std::span<const float> row) {
  ids.resize(row.size());
  logits.resize(row.size());
  std::size_t kept = 0;
  for (std::size_t i = 0; i < row.size(); ++i) {
    ids[kept] = static_cast<TokenId>(i);
    logits[kept] = std::min(row[i], kMaxFinite);
    kept += row[i] > -std::numeric_limits<float>::infinity() ? 1 : 0;  // a NaN fails the comparison
  }
  NB_CHECK(kept > 0, internal, "no token can be drawn: all ", row.size(), " logits are -infinity or NaN");
  ids.resize(kept);
  logits.resize(kept);
}

float Candidates::max_logit() const { return max_value(logits); }

std::ptrdiff_t Candidates::find(TokenId token) const {
  // With nothing left out, a token stands at its own index.
  const std::size_t guess = static_cast<std::size_t>(token);
  if (guess < ids.size() && ids[guess] == token) return token;
  const auto found = std::lower_bound(ids.begin(), ids.end(), token);
  return found != ids.end() && *found == token ? found - ids.begin() : -1;
}

void Candidates::keep_from(double floor, TokenId last_id) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const double logit = static_cast<double>(logits[i]);
    const bool keep = logit > floor || (logit == floor && ids[i] <= last_id);
    ids[kept] = ids[i];
    logits[kept] = logits[i];
    kept += keep ? 1 : 0;
  }
  ids.resize(kept);
  logits.resize(kept);
}

void Candidates::rank(std::size_t count) {
  // One pass with a buffer of at least twice the count. Whenever it is full it is cut back to the best `count`; what
  // is not above the worst of them cannot be among the best any more (ids ascend, so ties have already lost).
  const std::size_t room = std::max<std::size_t>(2 * count, 256);
  const auto cut = [&] {
    std::nth_element(ranked.begin(), ranked.begin() + static_cast<std::ptrdiff_t>(count) - 1, ranked.end(),
                     more_likely);
    ranked.resize(count);
    return ranked.back().logit;
  };
  ranked.clear();
  ranked.reserve(std::min(room, ids.size()));
  float floor = -std::numeric_limits<float>::infinity();
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (!(logits[i] > floor)) continue;
    ranked.push_back({ids[i], logits[i]});
    if (ranked.size() == room && count < room) floor = cut();
  }
  if (ranked.size() > count) cut();
  std::sort(ranked.begin(), ranked.end(), more_likely);
}

std::span<const Stage> stages() { return kStages; }

TokenId pick_greedy(const Candidates& candidates) {
  NB_ASSERT(candidates.size() > 0);
  const auto best = std::max_element(candidates.logits.begin(), candidates.logits.end());  // the first of equals
  return candidates.ids[static_cast<std::size_t>(best - candidates.logits.begin())];
}

TokenId draw(Candidates& candidates, double uniform) {
  NB_ASSERT(candidates.size() > 0);
  candidates.weights.resize(candidates.size());
  exp_weights(candidates.logits, candidates.max_logit(), candidates.weights);
  const double wanted = uniform * sum(candidates.weights);
  double mass = 0.0;
  std::size_t last = 0;  // the last candidate with a weight, in case rounding lets `wanted` reach the whole mass
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    if (candidates.weights[i] <= 0.0) continue;
    last = i;
    mass += candidates.weights[i];
    if (mass > wanted) break;
  }
  return candidates.ids[last];
}

}  // namespace nb::sampling
