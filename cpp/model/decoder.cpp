#include "model/decoder.h"

#include <cmath>

#include "base/error.h"

namespace nb::model {
namespace {

// Row p: cos(p * f_i), then sin(p * f_i), with f_i = theta^(-2i/D). Computed in double, rounded once.
// Source: Su et al., "RoFormer", 2021.
Buffer make_rope_table(const ModelConfig& config, int num_positions) {
  const int dim = config.head_dim, half = dim / 2;
  const auto count = static_cast<std::size_t>(num_positions) * static_cast<std::size_t>(dim);
  Buffer memory = HostArena::create(1)->allocate(count * sizeof(float));
  for (int p = 0; p < num_positions; ++p) {
    float* row = memory.as<float>() + static_cast<std::ptrdiff_t>(p) * dim;
    for (int i = 0; i < half; ++i) {
      const double angle = p * std::pow(config.rope_theta, -2.0 * i / dim);
      row[i] = static_cast<float>(std::cos(angle));
      row[half + i] = static_cast<float>(std::sin(angle));
    }
  }
  return memory;
}

}  // namespace

Decoder::Decoder(const ModelConfig& config, const ModelWeights& weights, int max_positions)
    : config_(config),
      weights_(weights),
      max_positions_(max_positions),
      rope_memory_(make_rope_table(config, max_positions)),
      rope_{rope_memory_.as<const float>(), config.head_dim, max_positions} {}

Tensor Decoder::embed(const StepInputs& inputs, ops::ExecContext& ctx) const {
  const std::int64_t num_tokens = inputs.num_tokens();
  Tensor hidden(ctx.workspace->allocate_array<float>(static_cast<std::size_t>(num_tokens * config_.hidden_size)),
                DType::f32, {num_tokens, config_.hidden_size});
  ops::embed(hidden, weights_.embedding, inputs.token_ids, ctx);
  return hidden;
}

void Decoder::run_layers(Tensor hidden, int first, int last, const StepInputs& inputs, const kv::KvStorage& kv,
                         ops::ExecContext& ctx) const {
  const std::int64_t num_tokens = inputs.num_tokens();
  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  const ops::AttentionPlan plan{inputs.positions, inputs.segments, inputs.runs, inputs.blocks};
  for (int i = first; i < last; ++i) {
    const Workspace::Scope scope(*ctx.workspace);
    const auto rows = [&](int cols) {
      return Tensor(ctx.workspace->allocate_array<float>(static_cast<std::size_t>(num_tokens * cols)), DType::f32,
                    {num_tokens, cols});
    };
    const LayerWeights& layer = weights_.acquire(i);
    const ops::KvLayer kv_layer = kv.layer(i);
    Tensor q = rows(config_.q_size());
    Tensor attended = rows(config_.q_size());
    ops::norm_qkv(q, kv_layer, hidden, {layer.attention_norm, config_.rms_norm_eps}, layer.qkv,
                  {layer.q_bias, layer.k_bias, layer.v_bias, layer.q_norm, layer.k_norm}, inputs.key_positions,
                  inputs.slots, rope_, ctx);
    ops::attention(attended, q, config_.num_heads, scale, 0, rope_, kv_layer, plan, ctx);
    ops::linear_residual(hidden, attended, layer.attention_out, Tensor(), ctx);
    const ops::Activation gated =
        ops::norm_gate_up(hidden, {layer.ffn_norm, config_.rms_norm_eps}, layer.gate_up, layer.down.act_type, ctx);
    ops::linear_residual(hidden, gated, layer.down, ctx);
    weights_.release(i);
  }
}

Tensor Decoder::forward(const StepInputs& inputs, const kv::KvStorage& kv, ops::ExecContext& ctx) const {
  Tensor hidden = embed(inputs, ctx);
  run_layers(hidden, 0, config_.num_layers, inputs, kv, ctx);
  return hidden;
}

void Decoder::head(Tensor hidden, std::span<const std::int32_t> rows, Tensor logits, std::span<TokenId> argmax,
                   ops::ExecContext& ctx) const {
  ops::head(logits, argmax, hidden, rows, {weights_.final_norm, config_.rms_norm_eps}, weights_.head_weight(), ctx);
}

}  // namespace nb::model
