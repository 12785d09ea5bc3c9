// The parameters of one layer as a struct of handles, in execution order, and how its matrices share one blob.
//
// A blob is one piece of memory, or of a file, that holds all packed matrices of a layer: what is streamed is read with
// one request. Norms and biases are no part of it. Plain data.
#pragma once

#include <cstdint>
#include <set>
#include <span>
#include <vector>

#include "base/align.h"
#include "ops/linear_weight.h"
#include "tensor/allocator.h"
#include "tensor/tensor.h"

namespace nb::model {

struct LayerWeights {
  Tensor attention_norm;  ///< f32[hidden]
  ops::LinearWeight qkv;
  Tensor q_bias, k_bias, v_bias;  ///< f32, or empty
  Tensor q_norm, k_norm;          ///< f32[head_dim], or empty
  ops::LinearWeight attention_out;
  Tensor ffn_norm;  ///< f32[hidden]
  ops::LinearWeight gate_up;
  ops::LinearWeight down;
};

/// The matrices of a layer in the order of its blob.
inline constexpr ops::LinearWeight LayerWeights::*kLayerMatrices[] = {&LayerWeights::qkv, &LayerWeights::attention_out,
                                                                      &LayerWeights::gate_up, &LayerWeights::down};

/// Packed bytes of its matrices.
inline std::int64_t matrix_bytes(const LayerWeights& layer) {
  std::int64_t total = 0;
  for (const auto matrix : kLayerMatrices) total += (layer.*matrix).bytes;
  return total;
}

inline std::int64_t matrix_bytes(std::span<const LayerWeights> layers) {
  std::int64_t total = 0;
  for (const LayerWeights& layer : layers) total += matrix_bytes(layer);
  return total;
}

/// Of the orders of a group's columns, which are no part of a blob; equal ones of a group are one.
inline std::int64_t order_bytes(const ops::LinearWeight& weight) {
  std::set<const std::vector<std::int32_t>*> orders;
  for (const ops::ColumnOrder& order : weight.orders) orders.insert(order.get());
  orders.erase(nullptr);
  return static_cast<std::int64_t>(orders.size() * sizeof(std::int32_t)) * weight.cols();
}

inline std::int64_t order_bytes(std::span<const LayerWeights> layers) {
  std::int64_t total = 0;
  for (const LayerWeights& layer : layers) {
    for (const auto matrix : kLayerMatrices) total += order_bytes(layer.*matrix);
  }
  return total;
}

/// Calls `function(matrix, offset in the blob)` for each, and returns the size of the blob.
template <class Layer, class Function>
std::int64_t for_blob(Layer& layer, const Function& function) {
  std::int64_t offset = 0;
  for (const auto matrix : kLayerMatrices) {
    function(layer.*matrix, offset);
    offset += round_up<std::int64_t>((layer.*matrix).bytes, kBufferAlignment);
  }
  return offset;
}

inline std::int64_t blob_bytes(const LayerWeights& layer) {
  return for_blob(layer, [](const ops::LinearWeight&, std::int64_t) {});
}

/// Makes the matrices those of a blob that lies at `base`; null: of none, so that using them fails at once.
inline void place_blob(LayerWeights& layer, std::byte* base) {
  for_blob(layer, [base](ops::LinearWeight& matrix, std::int64_t offset) {
    matrix.place(base == nullptr ? nullptr : reinterpret_cast<std::uint8_t*>(base) + offset);
  });
}

}  // namespace nb::model
