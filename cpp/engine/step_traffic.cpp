#include "engine/step_traffic.h"

#include <algorithm>

#include "base/ids.h"

namespace nb::engine {

StepTraffic::StepTraffic(const model::Model& model, const kv::KvShape& kv_shape)
    : token_bytes_(kv_shape.block_bytes() / kBlockTokens), window_(model.config().sliding_window) {
  const model::ModelWeights& weights = model.weights();
  for (const model::LayerWeights& layer : weights.layers) {
    layers_bytes_ += layer.qkv.bytes + layer.attention_out.bytes + layer.gate_up.bytes + layer.down.bytes;
  }
  head_bytes_ = weights.head_weight().bytes;
  row_bytes_ = weights.embedding.bytes / model.config().vocab_size;
}

std::int64_t StepTraffic::bytes(const model::StepInputs& inputs, int head_passes, std::int64_t saved_keys) const {
  std::int64_t keys = -saved_keys;
  for (const ops::AttentionSegment& segment : inputs.segments) {
    for (int i = segment.run_begin; i < segment.run_begin + segment.run_count; ++i) {
      const int stored = inputs.runs[static_cast<std::size_t>(i)].num_keys;
      keys += window_ > 0 ? std::min(stored, window_ + segment.row_count - 1) : stored;
    }
  }
  return layers_bytes_ + head_passes * head_bytes_ + inputs.num_tokens() * row_bytes_ + keys * token_bytes_;
}

}  // namespace nb::engine
