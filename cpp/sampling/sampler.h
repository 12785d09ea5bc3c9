// Draws one token from one row of logits by running the active stages in order, and says how likely tokens were.
//
// Holds scratch memory only: the token depends on nothing but the arguments. One sampler per thread.
#pragma once

#include <cstdint>
#include <span>

#include "base/ids.h"
#include "sampling/candidates.h"
#include "sampling/logprobs.h"
#include "sampling/params.h"

namespace nb::sampling {

/// One row to draw from.
struct SampleInput {
  std::span<const float> logits;        ///< [V], not changed
  const SamplingParams& params;         ///< validated
  std::uint64_t seed;                   ///< params.seed, or the one the engine chose
  std::span<const TokenId> tokens;      ///< prompt and output so far; their number is the position of the new token
  std::size_t num_prompt = 0;           ///< how many of them are the prompt
  std::span<const TokenId> stop_ids{};  ///< tokens that would end the sequence; masked by min_tokens
  /// If not empty, only these tokens: token t is bit t % 32 (from the lowest) of word t / 32; missing words are 0.
  std::span<const std::uint32_t> allowed_bits{};
};

class Sampler {
 public:
  /// The token. Random numbers come from uniform_at(seed, params.choice_index, position) alone. Throws
  /// invalid_argument naming the fields if masks leave no token, and internal if every logit is -infinity or NaN.
  TokenId sample(const SampleInput& input);

  /// As score_token() in logprobs.h.
  void score(std::span<const float> logits, TokenId token, std::span<TokenLogprob> out) {
    score_token(logits, token, out, candidates_);
  }

 private:
  Candidates candidates_;
};

}  // namespace nb::sampling
