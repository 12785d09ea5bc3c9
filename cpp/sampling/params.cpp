#include "sampling/params.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace nb::sampling {

namespace {

constexpr double kMaxBias = 100.0;
constexpr double kMaxPenalty = 2.0;

void check_penalty(const char* field, double value) {
  NB_CHECK(value >= -kMaxPenalty && value <= kMaxPenalty, invalid_argument, field, " must be in [-2, 2], got ", value);
}

void check_token(const char* field, TokenId token, int vocab_size) {
  NB_CHECK(token >= 0 && token < vocab_size, invalid_argument, field, " token ", token,
           " is outside the vocabulary [0, ", vocab_size, ")");
}

/// Masks that leave nothing whatever the text is.
void check_masks(const SamplingParams& params) {
  if (!params.allowed_token_ids) return;
  std::vector<TokenId> single;
  for (const auto& word : params.bad_words_token_ids) {
    if (word.size() == 1) single.push_back(word.front());
  }
  std::sort(single.begin(), single.end());
  const bool any = std::any_of(params.allowed_token_ids->begin(), params.allowed_token_ids->end(),
                               [&](TokenId token) { return !std::binary_search(single.begin(), single.end(), token); });
  NB_CHECK(any, invalid_argument, "bad_words_token_ids forbids every token of allowed_token_ids");
}

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
  check_penalty("presence_penalty", params.presence_penalty);
  check_penalty("frequency_penalty", params.frequency_penalty);
  NB_CHECK(params.min_tokens >= 0, invalid_argument, "min_tokens must be >= 0, got ", params.min_tokens);
  for (const LogitBias& entry : params.logit_bias) {
    check_token("logit_bias", entry.token, vocab_size);
    NB_CHECK(entry.bias >= -kMaxBias && entry.bias <= kMaxBias, invalid_argument, "logit_bias of token ", entry.token,
             " must be in [-100, 100], got ", entry.bias);
  }
  for (std::size_t i = 0; i < params.bad_words_token_ids.size(); ++i) {
    NB_CHECK(!params.bad_words_token_ids[i].empty(), invalid_argument, "bad_words_token_ids[", i, "] is empty");
    for (const TokenId token : params.bad_words_token_ids[i]) check_token("bad_words_token_ids", token, vocab_size);
  }
  if (params.allowed_token_ids) {
    NB_CHECK(!params.allowed_token_ids->empty(), invalid_argument, "allowed_token_ids is empty: no token could follow");
    for (const TokenId token : *params.allowed_token_ids) check_token("allowed_token_ids", token, vocab_size);
  }
  check_masks(params);
  NB_CHECK(!params.logprobs || (*params.logprobs >= 0 && *params.logprobs <= kMaxLogprobs), invalid_argument,
           "logprobs must be in [0, ", kMaxLogprobs, "], got ", params.logprobs.value_or(0));
}

bool is_plain_greedy(const SamplingParams& params, int num_generated) {
  return params.temperature == 0.0 && params.logit_bias.empty() && params.bad_words_token_ids.empty() &&
         !params.allowed_token_ids && num_generated >= params.min_tokens && params.repetition_penalty == 1.0 &&
         params.presence_penalty == 0.0 && params.frequency_penalty == 0.0;
}

}  // namespace nb::sampling
