// How likely a token was, and which tokens were the most likely: log softmax of a raw row, before any stage.
//
// Not for drawing. Safe from any thread with its own scratch.
#pragma once

#include <cstdint>
#include <span>

#include "base/ids.h"
#include "sampling/candidates.h"

namespace nb::sampling {

struct TokenLogprob {
  TokenId token = kNone;
  std::int32_t rank = 0;  ///< 1 for the most likely token of the row; ties by ascending id
  float logprob = 0.0f;   ///< natural; see log_sum_exp() for its error

  static constexpr TokenId kNone = -1;
};

/// out[0] is `token`, the others are the most likely tokens of the row in descending order (`token` may be among them);
/// entries beyond the tokens that are above -infinity have the token kNone. `out` is not empty.
void score_token(std::span<const float> logits, TokenId token, std::span<TokenLogprob> out, Candidates& scratch);

}  // namespace nb::sampling
