// Formulas that a small operator and a fused one share, so that both give the same bits.
#pragma once

#include "base/ids.h"
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

/// The cell of a block and head that has keys (which = 0) or values (1). In the formats of this library (see its table)
/// both are of one size.
NB_DEVICE std::uint8_t* kv_cell(const ops::KvLayer& kv, int block, int which, int head) {
  return kv.base + block * kv.block_stride + (which * kv.num_kv_heads + head) * kv.key_cell_bytes;
}

/// Stores one value of a token's key (which = 0) or value (1) in the cache.
NB_DEVICE void store_kv(const ops::KvLayer& kv, int slot, int which, int head, int dim, float value) {
  std::uint8_t* cell = kv_cell(kv, slot / kBlockTokens, which, head);
  const int at = slot % kBlockTokens * kv.head_dim + dim;
  if (kv.format == quant::KvFormat::f32) {
    reinterpret_cast<float*>(cell)[at] = value;
  } else {
    reinterpret_cast<Bf16*>(cell)[at] = to_bf16(value);
  }
}

}  // namespace nb::cuda
