#include "sampling/params.h"

#include <cmath>

#include "base/error.h"

namespace nb::sampling {

namespace {

constexpr double kMaxBias = 100.0;

}  // namespace

void validate(const SamplingParams& params, int vocab_size) {
  // Every comparison is written so that a NaN fails it.
  NB_CHECK(params.temperature >= 0.0 && std::isfinite(params.temperature), invalid_argument,
           "temperature must be a finite number >= 0, got ", params.temperature);
  NB_CHECK(params.top_k >= -1, invalid_argument, "top_k must be >= 1, or -1 or 0 to keep all tokens, got ",
           params.top_k);
  NB_CHECK(params.top_p > 0.0 && params.top_p <= 1.0, invalid_argument, "top_p must be in (0, 1], got ", params.top_p);
  NB_CHECK(params.min_p >= 0.0 && params.min_p <= 1.0, invalid_argument, "min_p must be in [0, 1], got ", params.min_p);
  NB_CHECK(params.repetition_penalty > 0.0 && std::isfinite(params.repetition_penalty), invalid_argument,
           "repetition_penalty must be a finite number > 0, got ", params.repetition_penalty);
  for (const LogitBias& entry : params.logit_bias) {
    NB_CHECK(entry.token >= 0 && entry.token < vocab_size, invalid_argument, "logit_bias token ", entry.token,
             " is outside the vocabulary [0, ", vocab_size, ")");
    NB_CHECK(entry.bias >= -kMaxBias && entry.bias <= kMaxBias, invalid_argument, "logit_bias of token ", entry.token,
             " must be in [-100, 100], got ", entry.bias);
  }
}

bool is_plain_greedy(const SamplingParams& params) {
  return params.temperature == 0.0 && params.logit_bias.empty() && params.repetition_penalty == 1.0;
}

}  // namespace nb::sampling
