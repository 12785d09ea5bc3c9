// Exponentials and sums over a row of logits, in double, in one fixed order.
//
// Own arithmetic instead of the C library's, so that a token never depends on the version of libm. Not for the
// attention softmax (a kernel's business). Safe from any thread.
#pragma once

#include <span>

#include "base/ids.h"

namespace nb::sampling {

/// exp(x) for x <= 0 with relative error below 4e-16; 0 below -700 and for -infinity. x must not be NaN.
double exp_nonpositive(double x);

/// weights[i] = exp(logits[i] - max); a NaN logit weighs 0. Sizes agree; `max` is finite.
void exp_weights(std::span<const float> logits, float max, std::span<double> weights);

/// The largest value, NaN ignored; -infinity if there is none.
float max_value(std::span<const float> logits);

/// Sum in index order.
double sum(std::span<const double> weights);

/// log softmax(logits)[token] = logit - max - log(sum exp(logit - max)), NaN and +infinity as in the sampler; NaN if
/// no logit is above -infinity.
double log_probability(std::span<const float> logits, TokenId token);

}  // namespace nb::sampling
