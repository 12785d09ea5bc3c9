// The only mathematics the engine sees: operators over tensors, dispatched to a backend's kernels.
//
// Each function checks shapes by name, fills the POD arguments and runs the kernel on the thread team as one parallel
// phase. Not for layouts of weights (linear_weight.h). One thread at a time per ExecContext.
#pragma once

#include <span>

#include "base/threads.h"
#include "ops/fusion.h"
#include "ops/kernel_table.h"
#include "ops/linear_weight.h"
#include "tensor/tensor.h"
#include "tensor/workspace.h"

namespace nb::ops {

/// What every operator needs to run. Owned by whoever owns the model.
struct ExecContext {
  const KernelTable* kernels;
  ThreadPool* pool;
  Workspace* workspace;
  FusionCounts* counts = nullptr;  ///< counts the operators that have a fused form, if there is one
};

/// Rows of a step and what they attend to; views into the step's inputs.
struct AttentionPlan {
  std::span<const int32_t> positions;  ///< [T]
  std::span<const AttentionSegment> segments;
  std::span<const AttentionRun> runs;
  std::span<const int32_t> blocks;
  std::span<const int32_t> key_positions{};  ///< see AttentionRun
  std::span<const uint16_t> hidden{};        ///< likewise
  std::span<const KeyPolicy> policies{};     ///< see AttentionSegment
};

/// The segment of each row.
std::vector<int32_t> segments_of_rows(const AttentionPlan& plan);

/// Room for the splits of a row: a power of two that is at least as many as any row has, so that plans differ in it
/// seldom. No result depends on it. 0 where there is no such segment.
struct SplitCounts {
  int32_t of_all;       ///< of rows of all segments
  int32_t of_few_rows;  ///< of those of segments of at most kDecodeRows
};
SplitCounts count_splits(const AttentionPlan& plan);

/// Normalisation facts of a layer. `weight` f32[cols].
struct Norm {
  Tensor weight;
  float eps;
};

/// Optional parts of the QKV projection; empty tensors where the model has none.
struct QkvExtras {
  Tensor q_bias, k_bias, v_bias;  ///< f32[rows of the segment], all or none
  Tensor q_norm, k_norm;          ///< f32[D], both or none
};

// ---- small operators ----

/// out[t] = table row ids[t]. out f32[T, cols]. Throws invalid_argument for an id outside the table.
void embed(Tensor out, const LinearWeight& table, std::span<const int32_t> ids, ExecContext& ctx);
/// Throws what embed() does for ids.
void check_ids(std::span<const int32_t> ids, const LinearWeight& table);

/// out = x / sqrt(mean(x^2) + eps) * weight, row by row. x, out f32[T, cols]; may alias.
void rms_norm(Tensor out, Tensor x, const Norm& norm, ExecContext& ctx);

/// Rows ready for a product with `weight`, in the workspace of ctx. x f32[T, cols].
Activation prepare(Tensor x, ActType type, ExecContext& ctx);

/// The values of rows that are not int8, f32[rows, cols] in the workspace of ctx, row after row.
Tensor values_of(const Activation& x, ExecContext& ctx);

/// out = x W^T (+ bias) or, with accumulate, out += x W^T (+ bias), for one segment. out f32[T, rows].
void linear(Tensor out, const Activation& x, const LinearSegment& weight, Tensor bias, bool accumulate,
            ExecContext& ctx);

/// Rotates f32[T, heads * D] in place, half-split pairs, by positions[t].
void rope(Tensor x, std::span<const int32_t> positions, const RopeTable& table, ExecContext& ctx);

/// Throws unsupported, naming format and backend, if the kernels cannot store and read keys and values of that format.
void require_kv_format(const KernelTable& kernels, quant::KvFormat format);

/// Throws unsupported, naming the backend, if its attention knows no key policies and no biases of scores.
void require_key_policies(const KernelTable& kernels);

/// Stores k, v f32[T, Hkv * D] at slots[t] = block * 16 + index. Of a format that seals, keys go to `open` (there: not
/// rotated, less their bias).
void kv_write(const KvLayer& kv, Tensor k, Tensor v, std::span<const int32_t> slots, ExecContext& ctx,
              const OpenKeys& open = {});

/// Quantizes the keys of open cells into their blocks, of a format that seals. Nobody else writes these cells
/// meanwhile.
void kv_seal(const KvLayer& kv, const OpenKeys& open, std::span<const SealItem> items, ExecContext& ctx);

/// out[t] = squared distance between two stored keys of all heads, of slots_a[t] in `a` and of slots_b[t] in `b`.
void key_deviation(std::span<float> out, const KvLayer& a, std::span<const int32_t> slots_a, const KvLayer& b,
                   std::span<const int32_t> slots_b, ExecContext& ctx, const OpenKeys& open = {});

/// Stores each group's mean value and mean key, taken from its place and rotated to another, in a slot. `blocks` as in
/// AttentionPlan.
void summarize_kv(const KvLayer& kv, std::span<const KvSummary> summaries, std::span<const int32_t> blocks,
                  const RopeTable& rope, ExecContext& ctx);

/// out = silu(gate) * up, all f32[T, cols].
void silu_mul(Tensor out, Tensor gate, Tensor up, ExecContext& ctx);

/// out[t] = smallest index of the largest value of row t. x f32[T, cols].
void argmax(std::span<int32_t> out, Tensor x, ExecContext& ctx);

/// out[t] = the token drawn from row t of logits f32[T, V] as params[t] says, -1 where none can be drawn. Params (T of
/// them) and what they point at are in memory of the device. For backends that have the kernel; see
/// KernelTable::sample.
void sample(std::span<int32_t> out, Tensor logits, const SampleRow* params, ExecContext& ctx);

// ---- the operators the decoder speaks in ----

/// q_out f32[T, Hq * D] = un-rotated queries; keys (rotated by key_positions) and values go to slots of kv. Of a format
/// that seals, keys go to `open` instead, not rotated and less open.bias, which is k_bias then.
void norm_qkv(Tensor q_out, const KvLayer& kv, Tensor x, const Norm& norm, const LinearWeight& qkv,
              const QkvExtras& extras, std::span<const int32_t> key_positions, std::span<const int32_t> slots,
              const RopeTable& rope, ExecContext& ctx, const OpenKeys& open = {});

/// out f32[T, Hq * D] = softmax(q k^T * scale) v over the runs of each segment; q is rotated here, by p - offset.
/// A row sees at most the last `window` keys up to its own; 0 = all. Runs are cut at multiples of 256 keys; partial
/// states are folded in order (see ARCHITECTURE.md).
void attention(Tensor out, Tensor q, int num_heads, float scale, int window, const RopeTable& rope, const KvLayer& kv,
               const AttentionPlan& plan, ExecContext& ctx, const OpenKeys& open = {});

/// residual += x W^T (+ bias). x f32[T, cols].
void linear_residual(Tensor residual, Tensor x, const LinearWeight& weight, Tensor bias, ExecContext& ctx);

/// residual += x W^T for rows that `norm_gate_up` prepared.
void linear_residual(Tensor residual, const Activation& x, const LinearWeight& weight, ExecContext& ctx);

/// silu(x' Wg^T) * (x' Wu^T), x' = rmsnorm(x), prepared as `down_type` in the workspace of ctx.
Activation norm_gate_up(Tensor x, const Norm& norm, const LinearWeight& gate_up, ActType down_type, ExecContext& ctx);

/// argmax[i], and logits f32[rows, V] unless empty, of x[row_ids[i]] after the final norm.
void head(Tensor logits, std::span<int32_t> argmax, Tensor x, std::span<const int32_t> row_ids, const Norm& norm,
          const LinearWeight& weight, ExecContext& ctx);

/// The same, with argmax[i] where kernels write: on a device nothing waits for it.
void head(Tensor logits, int32_t* argmax, Tensor x, std::span<const int32_t> row_ids, const Norm& norm,
          const LinearWeight& weight, ExecContext& ctx);

}  // namespace nb::ops
