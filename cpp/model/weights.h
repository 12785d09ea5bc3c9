// A model's parameters as a struct of handles, in execution order.
//
// The decoder asks for a layer with acquire() and returns it with release(): no-ops while everything is resident,
// and the place where streaming layers from disk will go. Immutable after load.
#pragma once

#include <vector>

#include "ops/linear_weight.h"
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

class ModelWeights {
 public:
  ops::LinearWeight embedding;
  Tensor final_norm;       ///< f32[hidden]
  ops::LinearWeight head;  ///< empty when tied to the embedding
  std::vector<LayerWeights> layers;
  std::vector<Buffer> small;  ///< memory of norms and biases
  std::int64_t bytes = 0;     ///< packed size of everything
  bool expanded = false;      ///< quantized matrices became bf16, for want of kernels of the device

  const ops::LinearWeight& head_weight() const { return head.segments.empty() ? embedding : head; }

  /// The layer's weights, resident until release().
  const LayerWeights& acquire(int layer) const { return layers[static_cast<std::size_t>(layer)]; }
  void release(int /*layer*/) const {}
};

}  // namespace nb::model
