#include "model/decoder.h"

#include <cmath>

#include "base/error.h"
#include "ops/check_plan.h"
#include "tensor/device_memory.h"

namespace nb::model {

namespace {

Buffer make_rotations(const ModelConfig& config, int max_positions, const DeviceMemory* memory) {
  Buffer table = make_rope_table(config.rope, config.head_dim, max_positions);
  return memory == nullptr ? table : copy_to(*memory, table.data(), table.bytes());
}

}  // namespace

Decoder::Decoder(const ModelConfig& config, const ModelWeights& weights, int max_positions, const DeviceMemory* memory)
    : config_(config),
      weights_(weights),
      max_positions_(max_positions),
      rope_memory_(make_rotations(config, max_positions, memory)),
      rope_{rope_memory_.as<const float>(), config.head_dim, max_positions} {}

Tensor Decoder::embed(const StepInputs& inputs, ops::ExecContext& ctx) const {
  const std::int64_t num_tokens = inputs.num_tokens();
  Tensor hidden(ctx.workspace->allocate_array<float>(static_cast<std::size_t>(num_tokens * config_.hidden_size)),
                DType::f32, {num_tokens, config_.hidden_size});
  ops::embed(hidden, weights_.embedding, inputs.token_ids, ctx);
  return hidden;
}

void Decoder::run_layers(Tensor hidden, int first, int last, const StepInputs& inputs, const kv::KvStorage& kv,
                         ops::ExecContext& ctx, const LayerObserver& observer, const kv::KvStorage* written) const {
  const std::int64_t num_tokens = inputs.num_tokens();
  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  const ops::AttentionPlan plan = plan_of(inputs);
  NB_CHECK(written == nullptr || inputs.summaries.empty(), unsupported,
           "summaries of keys and values that are written apart from those that rows attend to are not offered");
  for (int i = first; i < last; ++i) {
    const Workspace::Scope scope(*ctx.workspace);
    const auto rows = [&](int cols) {
      return Tensor(ctx.workspace->allocate_array<float>(static_cast<std::size_t>(num_tokens * cols)), DType::f32,
                    {num_tokens, cols});
    };
    const auto observe = [&](LayerInput input, Tensor seen) {
      if (observer) observer(i, input, seen);
    };
    const LayerUse use(weights_, i);
    const LayerWeights& layer = *use;
    const ops::KvLayer kv_layer = kv.layer(i);
    Tensor q = rows(config_.q_size());
    Tensor attended = rows(config_.q_size());
    observe(LayerInput::qkv, hidden);
    const ops::OpenKeys open = project(q, hidden, i, layer, inputs, written == nullptr ? kv : *written, ctx);
    if (!inputs.summaries.empty()) ops::summarize_kv(kv_layer, inputs.summaries, inputs.blocks, rope_, ctx);
    ops::attention(attended, q, config_.num_heads, scale, config_.sliding_window, rope_, kv_layer, plan, ctx, open);
    observe(LayerInput::attention_out, attended);
    ops::linear_residual(hidden, attended, layer.attention_out, Tensor(), ctx);
    observe(LayerInput::gate_up, hidden);
    const ops::Activation gated =
        ops::norm_gate_up(hidden, {layer.ffn_norm, config_.rms_norm_eps}, layer.gate_up, layer.down.act_type, ctx);
    if (observer && gated.values != nullptr) observer(i, LayerInput::down, ops::values_of(gated, ctx));
    ops::linear_residual(hidden, gated, layer.down, ctx);
  }
}

/// Queries, and keys and values into `kv`. Returns where keys are that are in no block yet.
ops::OpenKeys Decoder::project(Tensor q, Tensor hidden, int index, const LayerWeights& layer, const StepInputs& inputs,
                               const kv::KvStorage& kv, ops::ExecContext& ctx) const {
  ops::OpenKeys open = kv.open_layer(index);
  const bool seals = quant::seals_keys(kv.shape().format);
  if (seals) {
    const std::int64_t cell_floats = std::int64_t{config_.kv_size()} * kBlockTokens;
    open.step_cells =
        ctx.workspace->allocate_array<float>(static_cast<std::size_t>(inputs.num_step_cells * cell_floats));
    open.row_cells = inputs.open_cells.data();
    open.row_groups = inputs.open_groups.data();
    // Normalisation takes the bias away, or makes something else of it.
    if (layer.k_bias && !layer.k_norm) open.bias = layer.k_bias.as<const float>();
  }
  const ops::KvLayer kv_layer = kv.layer(index);
  ops::norm_qkv(q, kv_layer, hidden, {layer.attention_norm, config_.rms_norm_eps}, layer.qkv,
                {layer.q_bias, layer.k_bias, layer.v_bias, layer.q_norm, layer.k_norm}, inputs.key_positions,
                inputs.slots, rope_, ctx, open);
  if (seals) ops::kv_seal(kv_layer, open, inputs.seals, ctx);
  return open;
}

void Decoder::store_kv(Tensor hidden, int layer, const StepInputs& inputs, const kv::KvStorage& kv,
                       ops::ExecContext& ctx) const {
  const Workspace::Scope scope(*ctx.workspace);
  const std::int64_t count = std::int64_t{inputs.num_tokens()} * config_.q_size();
  Tensor q(ctx.workspace->allocate_array<float>(static_cast<std::size_t>(count)), DType::f32,
           {inputs.num_tokens(), config_.q_size()});
  const LayerUse weights(weights_, layer);
  project(q, hidden, layer, *weights, inputs, kv, ctx);
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

void Decoder::head(Tensor hidden, std::span<const std::int32_t> rows, Tensor logits, TokenId* argmax,
                   ops::ExecContext& ctx) const {
  ops::head(logits, argmax, hidden, rows, {weights_.final_norm, config_.rms_norm_eps}, weights_.head_weight(), ctx);
}

void Decoder::check(const StepInputs& inputs) const {
  ops::check_ids(inputs.token_ids, weights_.embedding);
  ops::check_positions(inputs.positions, rope_);
  ops::check_positions(inputs.key_positions, rope_);
  ops::check_plan(plan_of(inputs), rope_);
}

}  // namespace nb::model
