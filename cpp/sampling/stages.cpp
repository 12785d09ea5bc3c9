#include "sampling/stages.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "base/error.h"

namespace nb::sampling {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr TokenId kAnyId = std::numeric_limits<TokenId>::max();
constexpr std::size_t kWordBits = 32;

/// Rounds to float and keeps a finite value finite.
float finite(double value) {
  constexpr double kMax = static_cast<double>(std::numeric_limits<float>::max());
  return static_cast<float>(std::clamp(value, -kMax, kMax));
}

/// Replaces the logit of a token by change(logit), unless the token cannot be drawn.
template <class Change>
void change_logit(std::span<float> logits, TokenId token, const Change& change) {
  NB_ASSERT(token >= 0 && static_cast<std::size_t>(token) < logits.size());
  float& logit = logits[static_cast<std::size_t>(token)];
  if (logit > kMinusInfinity) logit = finite(change(static_cast<double>(logit)));
}

/// Calls visit(token, count) once for each distinct token.
template <class Visit>
void for_distinct(Candidates& candidates, std::span<const TokenId> tokens, const Visit& visit) {
  auto& counts = candidates.counts();
  auto& touched = candidates.touched();
  if (counts.size() < candidates.vocab_size()) counts.resize(candidates.vocab_size(), 0);
  touched.clear();
  for (const TokenId token : tokens) {
    NB_ASSERT(token >= 0 && static_cast<std::size_t>(token) < counts.size());
    if (counts[static_cast<std::size_t>(token)]++ == 0) touched.push_back(token);
  }
  for (const TokenId token : touched) visit(token, std::exchange(counts[static_cast<std::size_t>(token)], 0));
}

// ---- stages that edit ----

void apply_logit_bias(Candidates& candidates, const StageInput& input) {
  const auto logits = candidates.edit();
  for (const LogitBias& entry : input.params.logit_bias) {
    change_logit(logits, entry.token, [&](double logit) { return logit + entry.bias; });
  }
}

/// Masks the last token of every sequence whose other tokens are the end of the text so far.
void apply_bad_words(Candidates& candidates, const StageInput& input) {
  bool masked = false;
  for (const std::vector<TokenId>& word : input.params.bad_words_token_ids) {
    const auto begin = std::span(word).first(word.size() - 1);
    if (begin.size() > input.tokens.size()) continue;
    if (!std::equal(begin.begin(), begin.end(), input.tokens.last(begin.size()).begin())) continue;
    candidates.mask(word.back());
    masked = true;
  }
  if (masked) candidates.blame("bad_words_token_ids");
}

/// Masks every token whose bit is 0 or missing.
void keep_bits(Candidates& candidates, std::span<const std::uint32_t> bits) {
  const auto logits = candidates.edit();
  for (std::size_t begin = 0; begin < logits.size(); begin += kWordBits) {
    const std::size_t count = std::min(kWordBits, logits.size() - begin);
    const std::uint32_t word = begin / kWordBits < bits.size() ? bits[begin / kWordBits] : 0;
    if (word == ~std::uint32_t{0}) continue;
    for (std::size_t i = 0; i < count; ++i) {
      if ((word >> i & 1u) == 0) logits[begin + i] = kMinusInfinity;
    }
  }
}

void apply_allowed_tokens(Candidates& candidates, const StageInput& input) {
  if (!input.allowed_bits.empty()) {
    keep_bits(candidates, input.allowed_bits);
    candidates.blame("guided");
  }
  if (!input.params.allowed_token_ids) return;
  auto& bits = candidates.counts();  // all zero, and long enough once there is a word for each 32 tokens
  const std::size_t words = (candidates.vocab_size() + kWordBits - 1) / kWordBits;
  if (bits.size() < words) bits.resize(words, 0);
  for (const TokenId token : *input.params.allowed_token_ids) {
    const auto index = static_cast<std::size_t>(token);
    bits[index / kWordBits] |= std::uint32_t{1} << index % kWordBits;
  }
  keep_bits(candidates, std::span(bits).first(words));
  std::fill_n(bits.begin(), words, 0);
  candidates.blame("allowed_token_ids");
}

void apply_min_tokens(Candidates& candidates, const StageInput& input) {
  for (const TokenId token : input.stop_ids) candidates.mask(token);
  candidates.blame("min_tokens");
}

/// Keskar et al., "CTRL", 2019, section 4.1, with the sign rule of the usual implementations: a positive logit is
/// divided, a negative one multiplied, once per distinct token.
void apply_repetition_penalty(Candidates& candidates, const StageInput& input) {
  const double penalty = input.params.repetition_penalty;
  const auto logits = candidates.edit();
  for_distinct(candidates, input.tokens, [&](TokenId token, std::uint32_t) {
    change_logit(logits, token, [&](double logit) { return logit > 0.0 ? logit / penalty : logit * penalty; });
  });
}

/// The formula of OpenAI's API reference: logit - count * frequency - (count > 0) * presence, over the output.
void apply_output_penalties(Candidates& candidates, const StageInput& input) {
  const auto logits = candidates.edit();
  for_distinct(candidates, input.tokens.subspan(input.num_prompt), [&](TokenId token, std::uint32_t count) {
    change_logit(logits, token, [&](double logit) {
      return logit - static_cast<double>(count) * input.params.frequency_penalty - input.params.presence_penalty;
    });
  });
}

// ---- stages that filter ----

void apply_temperature(Candidates& candidates, const StageInput& input) {
  candidates.set_temperature(input.params.temperature);
}

/// p >= min_p * p_max is logit >= max + temperature * log(min_p).
void apply_min_p(Candidates& candidates, const StageInput& input) {
  const double floor =
      static_cast<double>(candidates.max_logit()) + candidates.temperature() * std::log(input.params.min_p);
  candidates.keep_from(finite(floor), kAnyId);
}

void apply_top_k(Candidates& candidates, const StageInput& input) {
  candidates.keep_most_likely(static_cast<std::size_t>(input.params.top_k));
}

void apply_top_p(Candidates& candidates, const StageInput& input) { candidates.keep_share(input.params.top_p); }

constexpr std::array kStages = {
    Stage{"logit_bias", true, [](const StageInput& in) { return !in.params.logit_bias.empty(); }, apply_logit_bias},
    Stage{"bad_words", true, [](const StageInput& in) { return !in.params.bad_words_token_ids.empty(); },
          apply_bad_words},
    Stage{"allowed_tokens", true,
          [](const StageInput& in) { return in.params.allowed_token_ids || !in.allowed_bits.empty(); },
          apply_allowed_tokens},
    Stage{"min_tokens", true,
          [](const StageInput& in) {
            return in.num_generated() < static_cast<std::size_t>(in.params.min_tokens) && !in.stop_ids.empty();
          },
          apply_min_tokens},
    Stage{"repetition_penalty", true, [](const StageInput& in) { return in.params.repetition_penalty != 1.0; },
          apply_repetition_penalty},
    Stage{"presence_and_frequency_penalty", true,
          [](const StageInput& in) {
            const bool wanted = in.params.presence_penalty != 0.0 || in.params.frequency_penalty != 0.0;
            return wanted && in.num_generated() > 0;
          },
          apply_output_penalties},
    Stage{"temperature", false, [](const StageInput& in) { return in.params.temperature != 1.0; }, apply_temperature},
    Stage{"min_p", false, [](const StageInput& in) { return in.params.min_p > 0.0; }, apply_min_p},
    Stage{"top_k", false, [](const StageInput& in) { return in.params.top_k > 0; }, apply_top_k},
    Stage{"top_p", false, [](const StageInput& in) { return in.params.top_p < 1.0; }, apply_top_p},
};

}  // namespace

std::span<const Stage> stages() { return kStages; }

}  // namespace nb::sampling
