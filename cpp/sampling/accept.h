// Which guesses of coming tokens were right: those that are the tokens which were drawn in their places.
//
// Every token is drawn from the model's own logits with the random number of its position, as it would be without
// guesses, so an answer is the same whoever guessed, how much and how well; and the distribution is the model's.
// (Leviathan et al. 2023 accept by probabilities instead, which keeps the distribution but not the text.) Pure.
#pragma once

#include <span>

#include "base/ids.h"

namespace nb::sampling {

/// Stands for a token that was not drawn.
inline constexpr TokenId kNotDrawn = -1;

/// How many of the first drafts are right: drafts[i] is a guess of drawn[i]. `drawn` may end early or with tokens that
/// were not drawn.
int count_accepted(std::span<const TokenId> drafts, std::span<const TokenId> drawn);

}  // namespace nb::sampling
