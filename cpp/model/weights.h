// A model's parameters as a struct of handles, in execution order.
//
// Whoever computes with a layer asks for it with acquire() and returns it with release(), or lets a LayerUse do both:
// no-ops for layers that are resident; the others come through a LayerStream. Immutable after load.
#pragma once

#include <memory>
#include <vector>

#include "model/layer_stream.h"
#include "model/layer_weights.h"
#include "ops/linear_weight.h"
#include "tensor/tensor.h"

namespace nb::model {

class ModelWeights {
 public:
  ops::LinearWeight embedding;
  Tensor final_norm;       ///< f32[hidden]
  ops::LinearWeight head;  ///< empty when tied to the embedding
  /// Norms, biases, sizes and formats of all; the matrices of those that are streamed are nowhere, see acquire().
  std::vector<LayerWeights> layers;
  std::vector<Buffer> small;            ///< memory of norms and biases, and of resident blobs
  std::int64_t bytes = 0;               ///< packed size of everything
  bool expanded = false;                ///< quantized matrices became bf16, for want of kernels of the device
  std::shared_ptr<LayerStream> stream;  ///< of layers that are not resident; null: all are
  std::int64_t budget_bytes = 0;        ///< that the memory of all weights was given; 0: no limit
  std::int64_t resident_bytes = 0;      ///< with a budget: that it takes, staging slots included

  const ops::LinearWeight& head_weight() const { return head.segments.empty() ? embedding : head; }

  /// The layer's weights, in memory until release(). Waits for a layer that is streamed, throws what reading it threw,
  /// and of those has one acquired at a time. One thread.
  const LayerWeights& acquire(int layer) const {
    return stream != nullptr && stream->has(layer) ? stream->acquire(layer) : layers[static_cast<std::size_t>(layer)];
  }
  /// Throws internal for a streamed layer that is not the acquired one.
  void release(int layer) const {
    if (stream != nullptr && stream->has(layer)) stream->release(layer);
  }

  StreamStats stream_stats() const {
    StreamStats stats = stream != nullptr ? stream->stats() : StreamStats{};
    stats.budget_bytes = budget_bytes;
    stats.resident_bytes = resident_bytes;
    return stats;
  }
};

/// A layer, acquired as long as this lives.
class LayerUse {
 public:
  LayerUse(const ModelWeights& weights, int layer) : weights_(weights), index_(layer), layer_(weights.acquire(layer)) {}
  ~LayerUse() { weights_.release(index_); }
  LayerUse(const LayerUse&) = delete;
  LayerUse& operator=(const LayerUse&) = delete;

  const LayerWeights& operator*() const { return layer_; }
  const LayerWeights* operator->() const { return &layer_; }

 private:
  const ModelWeights& weights_;
  int index_;
  const LayerWeights& layer_;
};

}  // namespace nb::model
