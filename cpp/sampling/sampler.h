// Draws one token from one row of logits by running the active stages in order.
//
// Holds scratch memory only: the token depends on nothing but the arguments. One sampler per thread.
#pragma once

#include <cstdint>
#include <span>

#include "base/ids.h"
#include "sampling/params.h"
#include "sampling/stages.h"

namespace nb::sampling {

/// One row to draw from.
struct SampleInput {
  std::span<const float> logits;    ///< [V], not changed
  const SamplingParams& params;     ///< validated
  std::uint64_t seed;               ///< params.seed, or the one the engine chose
  std::span<const TokenId> tokens;  ///< prompt and output so far; their number is the position of the new token
};

class Sampler {
 public:
  /// The token. Random numbers come from uniform_at(seed, params.choice_index, position) alone. Throws internal if
  /// every logit is -infinity or NaN.
  TokenId sample(const SampleInput& input);

 private:
  Candidates candidates_;
};

}  // namespace nb::sampling
