// Formulas that a small operator and a fused one share, so that both give the same bits.
#pragma once

#include "cuda/number.cuh"
#include "ops/args.h"

namespace nb::cuda {

/// Rotates a pair of values of a head that stand half a head apart. `angle`: the cosine of the pair, and half a head
/// further its sine; see RopeTable.
NB_DEVICE void rotate(float& first, float& second, const float* angle, int half) {
  const float x = first, y = second;
  first = fmaf(x, angle[0], -(y * angle[half]));
  second = fmaf(y, angle[0], x * angle[half]);
}

NB_DEVICE float silu_times(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

}  // namespace nb::cuda
