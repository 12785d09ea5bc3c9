#include "engine/step_traffic.h"

#include <algorithm>

#include "base/ids.h"

namespace nb::engine {

namespace {

/// Keys of a segment's last run in blocks of which some row sees something: of its first row, nearly always.
int seen_keys(const model::StepInputs& inputs, const ops::AttentionSegment& segment, int run) {
  const int stored = inputs.runs[static_cast<std::size_t>(run)].num_keys;
  if (segment.policy < 0) return stored;
  const ops::KeyPolicy& policy = inputs.policies[static_cast<std::size_t>(segment.policy)];
  const int row = inputs.positions[static_cast<std::size_t>(segment.row_begin)];
  int keys = 0;
  for (int block = 0; block * kBlockTokens < stored; ++block) {
    if (!ops::is_dead(policy, row, block)) keys += std::min(kBlockTokens, stored - block * kBlockTokens);
  }
  return keys;
}

}  // namespace

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
      const bool is_own = i + 1 == segment.run_begin + segment.run_count;
      const int stored = is_own ? seen_keys(inputs, segment, i) : inputs.runs[static_cast<std::size_t>(i)].num_keys;
      keys += window_ > 0 ? std::min(stored, window_ + segment.row_count - 1) : stored;
    }
  }
  return layers_bytes_ + head_passes * head_bytes_ + inputs.num_tokens() * row_bytes_ + keys * token_bytes_;
}

}  // namespace nb::engine
