// Exponentials, sums and maxima over a row of logits, in blocks of 64 and in one fixed order.
//
// Own arithmetic instead of the C library's, and the same operations whatever the instruction set (row_kernels.h), so
// that a token depends neither on the version of libm nor on the processor. A weight is exp((logit - max) * scale) in
// float: 0 for NaN and for anything below 2^-125, with +infinity counted as the largest finite value. For a scaled
// distance of x nats from the maximum its relative error is below 3e-7 + 3e-7 * x; sums of a block are in float, over
// blocks in double. Not for the attention softmax (a kernel's business). Safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/ids.h"
#include "sampling/row_kernels.h"

namespace nb::sampling {

inline std::size_t num_blocks(std::size_t num_logits) { return (num_logits + kBlockLogits - 1) / kBlockLogits; }

/// maxima[b] = the largest logit of block b, NaN ignored; -infinity if there is none. Returns the largest of all,
/// but not more than the largest finite value. `maxima` has num_blocks(logits.size()) entries.
float block_maxima(std::span<const float> logits, std::span<float> maxima);

/// The weight of each logit. `max` is finite and not below any of them, `scale` is in [1e-37, 1e38].
void exp_weights(std::span<const float> logits, float max, float scale, std::span<float> weights);

/// sums[b] = the weights of block b added up; returns the sum over all blocks. Same conditions as exp_weights.
double exp_sums(std::span<const float> logits, float max, float scale, std::span<float> sums);

/// Bit i says that logit i of one block, which may be short, is at least `floor` > -infinity; NaN is not.
std::uint64_t reaching(std::span<const float> block, float floor);

/// log sum exp(logits) with an absolute error below 5e-6 (plus that of a double near the result), NaN and +infinity as
/// above; NaN if no logit is above -infinity.
double log_sum_exp(std::span<const float> logits);

/// The same, given what block_maxima() returns.
double log_sum_exp(std::span<const float> logits, float max);

/// log softmax(logits)[token] given log_sum_exp(logits): -infinity for a token that is NaN or -infinity; NaN if
/// no token is above that.
double log_probability(std::span<const float> logits, TokenId token, double log_sum_exp);

}  // namespace nb::sampling
