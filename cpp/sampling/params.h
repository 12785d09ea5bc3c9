// How a request wants its tokens drawn, and the check that refuses what we cannot honour.
//
// Not for when a request stops (engine/request.h). Plain data; safe from any thread.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "base/ids.h"

namespace nb::sampling {

/// Added to the logit of one token.
struct LogitBias {
  TokenId token = 0;
  double bias = 0.0;  ///< in [-100, 100]
};

struct SamplingParams {
  double temperature = 1.0;             ///< 0 takes the most likely token
  int top_k = -1;                       ///< keep this many; -1 and 0 keep all
  double top_p = 1.0;                   ///< keep the most likely tokens up to this mass, the crossing one included
  double min_p = 0.0;                   ///< keep tokens at least this share as likely as the most likely one
  double repetition_penalty = 1.0;      ///< over distinct tokens of prompt and output; > 1 discourages them
  double presence_penalty = 0.0;        ///< in [-2, 2]: taken from the logit of every token of the output
  double frequency_penalty = 0.0;       ///< in [-2, 2]: the same, times the number of its occurrences
  int min_tokens = 0;                   ///< tokens that would end the output are masked until it has so many
  std::vector<LogitBias> logit_bias{};  ///< entries of one token add up
  /// Sequences that must not appear: a token that would complete one, prompt and output read as one, is masked.
  std::vector<std::vector<TokenId>> bad_words_token_ids{};
  std::optional<std::vector<TokenId>> allowed_token_ids{};  ///< none: all tokens; not empty
  std::optional<int> logprobs{};        ///< with each token its log probability and so many alternatives, 0..20
  std::optional<std::uint64_t> seed{};  ///< none: the engine takes a random one
  std::uint32_t choice_index = 0;       ///< which of several answers to one prompt this is
};

/// Most alternatives that logprobs may ask for.
inline constexpr int kMaxLogprobs = 20;

/// Throws invalid_argument naming field, value and range for anything out of range (NaN included), for tokens outside
/// [0, vocab_size), and for allowed tokens of which each one is a bad word.
void validate(const SamplingParams& params, int vocab_size);

/// True if the token after `num_generated` others is the argmax of the raw logits, whatever these are.
bool is_plain_greedy(const SamplingParams& params, int num_generated);

}  // namespace nb::sampling
