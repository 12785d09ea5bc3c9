// The forward pass of a dense pre-norm decoder, as one honest function. The file to read first.
//
// No prefill flag, no hidden state: a step is its StepInputs, the KV it writes and the workspace it uses. One thread.
#pragma once

#include <functional>
#include <span>

#include "kv/kv_storage.h"
#include "model/config.h"
#include "model/step_inputs.h"
#include "model/weights.h"
#include "ops/ops.h"

namespace nb::model {

/// The inputs of a layer's matrices, as a layer meets them.
enum class LayerInput { qkv, attention_out, gate_up, down };

/// Sees the rows that are about to enter matrices of a layer: f32[T, cols]. Those of qkv and gate_up come before their
/// normalisation, those of down as they were prepared; rows prepared as int8 are not shown.
using LayerObserver = std::function<void(int layer, LayerInput input, Tensor rows)>;

class Decoder {
 public:
  /// References must outlive the decoder. Computes the rotation table for `max_positions` positions, in the memory
  /// where the weights are.
  Decoder(const ModelConfig& config, const ModelWeights& weights, int max_positions,
          const DeviceMemory* memory = nullptr);

  /// Runs all layers over the rows of `inputs`, storing their KV; returns the residual stream f32[T, hidden_size],
  /// which lives in ctx.workspace until its reset.
  Tensor forward(const StepInputs& inputs, const kv::KvStorage& kv, ops::ExecContext& ctx) const;

  /// The same in pieces: embedding, then layers [first, last) in place, watched by `observer` if there is one.
  Tensor embed(const StepInputs& inputs, ops::ExecContext& ctx) const;
  /// Rows attend to `kv`; their own keys and values go to `written` instead, if there is one of the same shape.
  void run_layers(Tensor hidden, int first, int last, const StepInputs& inputs, const kv::KvStorage& kv,
                  ops::ExecContext& ctx, const LayerObserver& observer = {},
                  const kv::KvStorage* written = nullptr) const;

  /// Stores the keys and values of one layer for rows of its input, at inputs.slots rotated to inputs.key_positions.
  void store_kv(Tensor hidden, int layer, const StepInputs& inputs, const kv::KvStorage& kv,
                ops::ExecContext& ctx) const;

  /// Greedy token of each hidden row in `rows`, and its logits f32[rows, vocab_size] unless `logits` is empty.
  void head(Tensor hidden, std::span<const std::int32_t> rows, Tensor logits, std::span<TokenId> argmax,
            ops::ExecContext& ctx) const;

  /// The same, with the tokens where kernels write: on a device nothing waits for them.
  void head(Tensor hidden, std::span<const std::int32_t> rows, Tensor logits, TokenId* argmax,
            ops::ExecContext& ctx) const;

  /// Throws as forward() does for inputs that cannot be computed, and starts nothing.
  void check(const StepInputs& inputs) const;

  int max_positions() const { return max_positions_; }

 private:
  ops::OpenKeys project(Tensor q, Tensor hidden, int index, const LayerWeights& layer, const StepInputs& inputs,
                        const kv::KvStorage& kv, ops::ExecContext& ctx) const;

  const ModelConfig& config_;
  const ModelWeights& weights_;
  int max_positions_;
  Buffer rope_memory_;
  ops::RopeTable rope_;
};

}  // namespace nb::model
