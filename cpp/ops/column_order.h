// Matrices whose columns stand in an order of their own: what enters them is rearranged first, then prepared.
//
// Checkpoints of GPTQ with act-order sort columns by importance, so that those of a group of weights share a scale.
// Devices have no such matrices: their columns are put in order when they are packed. One thread at a time per
// ExecContext.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "ops/ops.h"

namespace nb::ops {

/// Throws format naming the matrix unless `order` is a permutation of 0 .. cols - 1.
void check_order(const std::string& name, const std::vector<std::int32_t>& order, std::int32_t cols);

/// Puts a row of weights in the order of the input: what stands at i goes to order[i].
void restore_order(const std::vector<std::int32_t>& order, std::vector<float>& row);

/// x f32[T, cols] as each segment of `weight` meets it, in the workspace of ctx. Segments of the same order share rows.
std::array<Activation, 3> prepare_each(Tensor x, const LinearWeight& weight, ExecContext& ctx);

}  // namespace nb::ops
