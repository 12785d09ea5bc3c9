#include "ops/ops.h"

#include <algorithm>

#include "base/align.h"
#include "base/error.h"
#include "base/ids.h"
#include "ops/check_plan.h"
#include "ops/column_order.h"
#include "ops/launch.h"
#include "quant/kv_format.h"
#include "tensor/device_memory.h"

namespace nb::ops {
namespace {

Activation allocate_activation(ActType type, int rows, std::int64_t cols, ExecContext& ctx) {
  Workspace& workspace = *ctx.workspace;
  Activation act{};
  act.type = type;
  act.rows = rows;
  act.cols = static_cast<int>(round_up<std::int64_t>(cols, 32));
  const auto size = static_cast<std::size_t>(rows) * static_cast<std::size_t>(act.cols);
  if (type == ActType::int8) {
    act.codes = workspace.allocate_array<int8_t>(size);
    act.scales = workspace.allocate_array<float>(size / 32);
    act.shifts = workspace.allocate_array<float>(size / 32);
    act.minus_sums = workspace.allocate_array<int32_t>(size / 32);
    act.minus_half_sums = workspace.allocate_array<int32_t>(size / 32);
  } else {
    act.values = workspace.allocate_array<float>(size);
    if (type == ActType::bf16 && ctx.kernels->packs_bf16) {
      act.packed = workspace.allocate_array<uint16_t>(size);
      act.shifts = workspace.allocate_array<float>(size / 32);
    }
  }
  return act;
}

// Room for prepared rows inside a fused kernel: one set per thread for few rows, else one shared set. A device has its
// own ways.
Activation* allocate_scratch(ActType type, int rows, std::int64_t cols, ExecContext& ctx) {
  if (ctx.kernels->memory != nullptr) return nullptr;
  const int sets = rows <= kPrivateRows ? ctx.pool->num_threads() : 1;
  auto* acts = ctx.workspace->allocate_array<Activation>(static_cast<std::size_t>(sets));
  for (int i = 0; i < sets; ++i) acts[i] = allocate_activation(type, rows, cols, ctx);
  return acts;
}

Tensor allocate_f32(std::int64_t rows, std::int64_t cols, Workspace& workspace) {
  return Tensor(workspace.allocate_array<float>(static_cast<std::size_t>(rows * cols)), DType::f32, {rows, cols});
}

// Writes what a kernel has written on the device, or has been given to write on the host, to the host.
template <class T>
void copy_out(std::span<T> out, const T* data, ExecContext& ctx) {
  if (ctx.kernels->memory == nullptr) return;
  ctx.kernels->memory->copy_out(out.data(), data, out.size_bytes());
  check(*ctx.kernels->memory);
}

// Where a kernel writes what belongs in a host array.
template <class T>
T* writable(std::span<T> out, ExecContext& ctx) {
  return ctx.kernels->memory == nullptr ? out.data() : ctx.workspace->allocate_array<T>(out.size());
}

void check_bias(const Tensor& bias, const LinearSegment& weight) {
  if (bias) check_tensor(bias, "bias", DType::f32, {weight.rows});
}

void argmax_of(int32_t* out, Tensor x, ExecContext& ctx) {
  launch(ctx.kernels->argmax,
         ArgmaxArgs{x.as<const float>(), x.row_stride, rows_of(x), static_cast<int32_t>(x.dim(1)), out}, "argmax", ctx);
}

const float* optional(const Tensor& tensor) { return tensor.as<const float>(); }

}  // namespace

void check_ids(std::span<const int32_t> ids, const LinearWeight& table) {
  const int32_t rows = table.segments.front().rows;
  for (int32_t id : ids) {
    NB_CHECK(id >= 0 && id < rows, invalid_argument, "token id ", id, " is outside the vocabulary of ", rows);
  }
}

void embed(Tensor out, const LinearWeight& table, std::span<const int32_t> ids, ExecContext& ctx) {
  const LinearSegment& segment = table.segments.front();
  check_tensor(out, "embed: out", DType::f32, {static_cast<std::int64_t>(ids.size()), segment.cols});
  check_ids(ids, table);
  launch(ctx.kernels->embed,
         EmbedArgs{segment, ctx.workspace->on_device(ids), rows_of(out), out.as<float>(), out.row_stride}, "embed",
         ctx);
}

void rms_norm(Tensor out, Tensor x, const Norm& norm, ExecContext& ctx) {
  check_tensor(x, "rms_norm: x", DType::f32, {-1, -1});
  check_tensor(out, "rms_norm: out", DType::f32, {x.dim(0), x.dim(1)});
  check_tensor(norm.weight, "rms_norm: weight", DType::f32, {x.dim(1)});
  launch(ctx.kernels->rms_norm,
         RmsNormArgs{x.as<const float>(), x.row_stride, norm.weight.as<const float>(), norm.eps, rows_of(x),
                     static_cast<int32_t>(x.dim(1)), out.as<float>(), out.row_stride},
         "rms_norm", ctx);
}

Activation prepare(Tensor x, ActType type, ExecContext& ctx) {
  check_tensor(x, "prepare: x", DType::f32, {-1, -1});
  const Activation out = allocate_activation(type, rows_of(x), x.dim(1), ctx);
  launch(ctx.kernels->prepare, PrepareArgs{x.as<const float>(), x.row_stride, static_cast<int32_t>(x.dim(1)), out},
         "prepare", ctx);
  return out;
}

Tensor values_of(const Activation& x, ExecContext& ctx) {
  NB_ASSERT(x.values != nullptr && ctx.kernels->memory == nullptr);
  Tensor out = allocate_f32(x.rows, x.cols, *ctx.workspace);
  const int panel = ctx.kernels->layout == WeightLayout::tile16 ? kPanelRows : 1;
  for (int t = 0; t < x.rows; ++t) {
    const int first = t / panel * panel, count = std::min(panel, x.rows - first);
    for (int g = 0; g < x.cols / 32; ++g) {
      const std::int64_t at = std::int64_t{first} * x.cols + std::int64_t{32} * (g * count + t - first);
      std::copy_n(x.values + at, 32, out.as<float>() + t * out.row_stride + 32 * g);
    }
  }
  return out;
}

void linear(Tensor out, const Activation& x, const LinearSegment& weight, Tensor bias, bool accumulate,
            ExecContext& ctx) {
  NB_CHECK(x.cols == round_up(weight.cols, 32), invalid_argument, "linear: x has ", x.cols, " columns, the weight ",
           weight.cols);
  check_tensor(out, "linear: out", DType::f32, {x.rows, weight.rows});
  check_bias(bias, weight);
  launch(ctx.kernels->linear, LinearArgs{weight, x, optional(bias), accumulate, out.as<float>(), out.row_stride},
         "linear", ctx);
}

void rope(Tensor x, std::span<const int32_t> positions, const RopeTable& table, ExecContext& ctx) {
  check_tensor(x, "rope: x", DType::f32, {static_cast<std::int64_t>(positions.size()), -1});
  NB_CHECK(x.dim(1) % table.head_dim == 0, invalid_argument, "rope: ", x.dim(1), " columns are not heads of ",
           table.head_dim);
  check_positions(positions, table);
  launch(ctx.kernels->rope,
         RopeArgs{x.as<float>(), x.row_stride, rows_of(x), static_cast<int32_t>(x.dim(1) / table.head_dim),
                  ctx.workspace->on_device(positions), table},
         "rope", ctx);
}

void kv_write(const KvLayer& kv, Tensor k, Tensor v, std::span<const int32_t> slots, ExecContext& ctx,
              const OpenKeys& open) {
  require_kv_format(*ctx.kernels, kv.format);
  check_open(kv, open, "kv_write");
  const std::int64_t cols = std::int64_t{kv.num_kv_heads} * kv.head_dim;
  check_tensor(k, "kv_write: k", DType::f32, {static_cast<std::int64_t>(slots.size()), cols});
  check_tensor(v, "kv_write: v", DType::f32, {static_cast<std::int64_t>(slots.size()), cols});
  launch(ctx.kernels->kv_write,
         KvWriteArgs{k.as<const float>(), k.row_stride, v.as<const float>(), v.row_stride, rows_of(k),
                     ctx.workspace->on_device(slots), kv, on_device(open, slots.size(), ctx)},
         "kv_write", ctx);
}

void kv_seal(const KvLayer& kv, const OpenKeys& open, std::span<const SealItem> items, ExecContext& ctx) {
  require_kv_format(*ctx.kernels, kv.format);
  check_open(kv, open, "kv_seal");
  for (const SealItem& item : items) {
    NB_CHECK(item.num_tokens >= 1 && item.num_tokens <= kBlockTokens, invalid_argument, "kv_seal: block ", item.block,
             " of ", item.num_tokens, " tokens");
  }
  if (items.empty()) return;
  launch(ctx.kernels->kv_seal,
         KvSealArgs{kv, open, ctx.workspace->on_device(items), static_cast<int32_t>(items.size())}, "kv_seal", ctx);
}

void silu_mul(Tensor out, Tensor gate, Tensor up, ExecContext& ctx) {
  check_tensor(gate, "silu_mul: gate", DType::f32, {-1, -1});
  check_tensor(up, "silu_mul: up", DType::f32, {gate.dim(0), gate.dim(1)});
  check_tensor(out, "silu_mul: out", DType::f32, {gate.dim(0), gate.dim(1)});
  launch(ctx.kernels->silu_mul,
         SiluMulArgs{gate.as<const float>(), gate.row_stride, up.as<const float>(), up.row_stride, rows_of(gate),
                     static_cast<int32_t>(gate.dim(1)), out.as<float>(), out.row_stride},
         "silu_mul", ctx);
}

void argmax(std::span<int32_t> out, Tensor x, ExecContext& ctx) {
  check_tensor(x, "argmax: x", DType::f32, {static_cast<std::int64_t>(out.size()), -1});
  const Workspace::Scope scope(*ctx.workspace);
  int32_t* const found = writable(out, ctx);
  argmax_of(found, x, ctx);
  copy_out(out, static_cast<const int32_t*>(found), ctx);
}

void key_deviation(std::span<float> out, const KvLayer& a, std::span<const int32_t> slots_a, const KvLayer& b,
                   std::span<const int32_t> slots_b, ExecContext& ctx, const OpenKeys& open) {
  require_kv_format(*ctx.kernels, a.format);
  check_open(a, open, "key_deviation");
  NB_CHECK(slots_a.size() == out.size() && slots_b.size() == out.size(), invalid_argument,
           "key_deviation: one slot of each side per row");
  NB_CHECK(a.format == b.format && a.num_kv_heads == b.num_kv_heads && a.head_dim == b.head_dim, invalid_argument,
           "key_deviation: the layers differ in shape");
  const Workspace::Scope scope(*ctx.workspace);
  float* const found = writable(out, ctx);
  launch(ctx.kernels->key_deviation,
         KeyDeviationArgs{a, b, ctx.workspace->on_device(slots_a), ctx.workspace->on_device(slots_b),
                          static_cast<int32_t>(out.size()), found, on_device(open, out.size(), ctx)},
         "key_deviation", ctx);
  copy_out(out, static_cast<const float*>(found), ctx);
}

void summarize_kv(const KvLayer& kv, std::span<const KvSummary> summaries, std::span<const int32_t> blocks,
                  const RopeTable& rope_table, ExecContext& ctx) {
  require_kv_format(*ctx.kernels, kv.format);
  NB_CHECK(!quant::seals_keys(kv.format), unsupported, "summaries are not offered in KV format ",
           quant::to_string(kv.format), ", whose keys are sealed by the block");
  check_summaries(summaries, blocks, rope_table);
  const Workspace::Scope scope(*ctx.workspace);
  const int threads = ctx.kernels->memory == nullptr ? ctx.pool->num_threads() : 0;
  const Tensor scratch = allocate_f32(threads, 2 * kv.head_dim, *ctx.workspace);
  launch(ctx.kernels->summarize_kv,
         SummarizeKvArgs{kv, ctx.workspace->on_device(summaries), static_cast<int32_t>(summaries.size()),
                         ctx.workspace->on_device(blocks), rope_table, scratch.as<float>()},
         "summarize_kv", ctx);
}

void sample(std::span<int32_t> out, Tensor logits, const SampleRow* params, ExecContext& ctx) {
  check_tensor(logits, "sample: logits", DType::f32, {static_cast<std::int64_t>(out.size()), -1});
  const Workspace::Scope scope(*ctx.workspace);
  const std::size_t count = out.size() * static_cast<std::size_t>(logits.dim(1));
  SampleArgs args{};
  args.logits = logits.as<const float>();
  args.logits_stride = logits.row_stride;
  args.rows = rows_of(logits);
  args.vocab = static_cast<int32_t>(logits.dim(1));
  args.params = params;
  args.scratch_logits = ctx.workspace->allocate_array<float>(count);
  args.scratch_ids = ctx.workspace->allocate_array<int32_t>(count);
  args.out = writable(out, ctx);
  launch(ctx.kernels->sample, args, "sample", ctx);
  copy_out(out, args.out, ctx);
}

void norm_qkv(Tensor q_out, const KvLayer& kv, Tensor x, const Norm& norm, const LinearWeight& qkv,
              const QkvExtras& extras, std::span<const int32_t> key_positions, std::span<const int32_t> slots,
              const RopeTable& rope_table, ExecContext& ctx, const OpenKeys& open) {
  require_kv_format(*ctx.kernels, kv.format);
  check_open(kv, open, "norm_qkv");
  const LinearSegment &q = qkv.segments[0], &k = qkv.segments[1], &v = qkv.segments[2];
  const auto num_rows = static_cast<std::int64_t>(slots.size());
  check_tensor(x, "norm_qkv: x", DType::f32, {num_rows, q.cols});
  check_tensor(norm.weight, "norm_qkv: norm weight", DType::f32, {q.cols});
  check_tensor(q_out, "norm_qkv: q_out", DType::f32, {num_rows, q.rows});
  NB_CHECK(k.rows == kv.num_kv_heads * kv.head_dim && v.rows == k.rows && rope_table.head_dim == kv.head_dim,
           invalid_argument, "norm_qkv: the KV layer has ", kv.num_kv_heads, " heads of ", kv.head_dim,
           ", the projection ", k.rows, " rows");
  NB_CHECK(key_positions.size() == slots.size(), invalid_argument, "norm_qkv: one key position per row");
  check_positions(key_positions, rope_table);
  check_bias(extras.q_bias, q);
  check_bias(extras.k_bias, k);
  check_bias(extras.v_bias, v);
  const Tensor k_bias = open.bias == nullptr ? extras.k_bias : Tensor();
  const Workspace::Scope scope(*ctx.workspace);
  Tensor keys = allocate_f32(num_rows, k.rows, *ctx.workspace);
  Tensor values = allocate_f32(num_rows, v.rows, *ctx.workspace);
  if (takes_fused(FusedOp::norm_qkv, num_rows, qkv, ctx)) {
    NormQkvArgs args{};
    args.x = x.as<const float>();
    args.x_stride = x.row_stride;
    args.rows = rows_of(x);
    args.norm_weight = norm.weight.as<const float>();
    args.eps = norm.eps;
    args.q = q;
    args.k = k;
    args.v = v;
    args.q_bias = optional(extras.q_bias);
    args.k_bias = optional(k_bias);
    args.v_bias = optional(extras.v_bias);
    args.q_norm = optional(extras.q_norm);
    args.k_norm = optional(extras.k_norm);
    args.key_positions = ctx.workspace->on_device(key_positions);
    args.slots = ctx.workspace->on_device(slots);
    args.rope = rope_table;
    args.kv = kv;
    args.open = on_device(open, slots.size(), ctx);
    args.act_type = qkv.act_type;
    args.scratch_act = allocate_scratch(qkv.act_type, args.rows, q.cols, ctx);
    args.scratch_k = keys.as<float>();
    args.scratch_v = values.as<float>();
    args.q_out = q_out.as<float>();
    args.q_stride = q_out.row_stride;
    launch(ctx.kernels->norm_qkv, args, "norm_qkv", ctx);
    return;
  }
  Tensor normed = allocate_f32(num_rows, q.cols, *ctx.workspace);
  rms_norm(normed, x, norm, ctx);
  const std::array<Activation, 3> acts = prepare_each(normed, qkv, ctx);
  linear(q_out, acts[0], q, extras.q_bias, false, ctx);
  linear(keys, acts[1], k, k_bias, false, ctx);
  linear(values, acts[2], v, extras.v_bias, false, ctx);
  if (extras.q_norm) {
    const auto heads = [&](const Tensor& rows) {
      return Tensor(rows.data, DType::f32, {num_rows * rows.dim(1) / kv.head_dim, kv.head_dim});
    };
    rms_norm(heads(q_out), heads(q_out), Norm{extras.q_norm, norm.eps}, ctx);
    rms_norm(heads(keys), heads(keys), Norm{extras.k_norm, norm.eps}, ctx);
  }
  if (!quant::seals_keys(kv.format)) rope(keys, key_positions, rope_table, ctx);
  kv_write(kv, keys, values, slots, ctx, open);
}

void linear_residual(Tensor residual, Tensor x, const LinearWeight& weight, Tensor bias, ExecContext& ctx) {
  const LinearSegment& segment = weight.segments.front();
  check_tensor(x, "linear_residual: x", DType::f32, {-1, segment.cols});
  check_tensor(residual, "linear_residual: residual", DType::f32, {x.dim(0), segment.rows});
  check_bias(bias, segment);
  const Workspace::Scope scope(*ctx.workspace);
  if (!takes_fused(FusedOp::linear_residual, x.dim(0), weight, ctx)) {
    linear(residual, prepare_each(x, weight, ctx)[0], segment, bias, true, ctx);
    return;
  }
  LinearResidualArgs args{};
  args.x = x.as<const float>();
  args.x_stride = x.row_stride;
  args.rows = rows_of(x);
  args.weight = segment;
  args.bias = optional(bias);
  args.act_type = weight.act_type;
  args.scratch_act = allocate_scratch(weight.act_type, args.rows, segment.cols, ctx);
  args.residual = residual.as<float>();
  args.residual_stride = residual.row_stride;
  launch(ctx.kernels->linear_residual, args, "linear_residual", ctx);
}

void linear_residual(Tensor residual, const Activation& x, const LinearWeight& weight, ExecContext& ctx) {
  NB_ASSERT(x.type == weight.act_type && !weight.is_ordered());
  linear(residual, x, weight.segments.front(), Tensor(), true, ctx);
}

Activation norm_gate_up(Tensor x, const Norm& norm, const LinearWeight& gate_up, ActType down_type, ExecContext& ctx) {
  const LinearSegment &gate = gate_up.segments[0], &up = gate_up.segments[1];
  check_tensor(x, "norm_gate_up: x", DType::f32, {-1, gate.cols});
  check_tensor(norm.weight, "norm_gate_up: norm weight", DType::f32, {gate.cols});
  const Activation out = allocate_activation(down_type, rows_of(x), gate.rows, ctx);
  const Workspace::Scope scope(*ctx.workspace);
  if (takes_fused(FusedOp::norm_gate_up, x.dim(0), gate_up, ctx)) {
    NormGateUpArgs args{};
    args.x = x.as<const float>();
    args.x_stride = x.row_stride;
    args.rows = rows_of(x);
    args.norm_weight = norm.weight.as<const float>();
    args.eps = norm.eps;
    args.gate = gate;
    args.up = up;
    args.act_type = gate_up.act_type;
    args.scratch_act = allocate_scratch(gate_up.act_type, args.rows, gate.cols, ctx);
    args.out = out;
    launch(ctx.kernels->norm_gate_up, args, "norm_gate_up", ctx);
    return out;
  }
  Tensor normed = allocate_f32(x.dim(0), gate.cols, *ctx.workspace);
  Tensor gates = allocate_f32(x.dim(0), gate.rows, *ctx.workspace);
  Tensor ups = allocate_f32(x.dim(0), up.rows, *ctx.workspace);
  rms_norm(normed, x, norm, ctx);
  const std::array<Activation, 3> acts = prepare_each(normed, gate_up, ctx);
  linear(gates, acts[0], gate, Tensor(), false, ctx);
  linear(ups, acts[1], up, Tensor(), false, ctx);
  silu_mul(gates, gates, ups, ctx);
  launch(ctx.kernels->prepare, PrepareArgs{gates.as<const float>(), gates.row_stride, gate.rows, out}, "prepare", ctx);
  return out;
}

void head(Tensor logits, std::span<int32_t> best, Tensor x, std::span<const int32_t> row_ids, const Norm& norm,
          const LinearWeight& weight, ExecContext& ctx) {
  NB_CHECK(best.size() == row_ids.size(), invalid_argument, "head: one argmax per row");
  const Workspace::Scope scope(*ctx.workspace);
  int32_t* const found = writable(best, ctx);
  head(logits, found, x, row_ids, norm, weight, ctx);
  copy_out(best, static_cast<const int32_t*>(found), ctx);
}

void head(Tensor logits, int32_t* best, Tensor x, std::span<const int32_t> row_ids, const Norm& norm,
          const LinearWeight& weight, ExecContext& ctx) {
  const LinearSegment& segment = weight.segments.front();
  const auto num_rows = static_cast<std::int64_t>(row_ids.size());
  check_tensor(x, "head: x", DType::f32, {-1, segment.cols});
  check_tensor(norm.weight, "head: norm weight", DType::f32, {segment.cols});
  if (logits) check_tensor(logits, "head: logits", DType::f32, {num_rows, segment.rows});
  for (int32_t row : row_ids) NB_CHECK(row >= 0 && row < x.dim(0), invalid_argument, "head: no row ", row);
  const Workspace::Scope scope(*ctx.workspace);
  if (takes_fused(FusedOp::head, num_rows, weight, ctx)) {
    const int parts = ctx.kernels->memory == nullptr ? ctx.pool->num_threads() : kHeadBlocks;
    const auto slots = static_cast<std::size_t>(num_rows) * static_cast<std::size_t>(parts);
    HeadArgs args{};
    args.x = x.as<const float>();
    args.x_stride = x.row_stride;
    args.row_ids = ctx.workspace->on_device(row_ids);
    args.rows = static_cast<int32_t>(num_rows);
    args.norm_weight = norm.weight.as<const float>();
    args.eps = norm.eps;
    args.weight = segment;
    args.act_type = weight.act_type;
    args.scratch_act = allocate_scratch(weight.act_type, args.rows, segment.cols, ctx);
    args.scratch_best = ctx.workspace->allocate_array<float>(slots);
    args.scratch_best_id = ctx.workspace->allocate_array<int32_t>(slots);
    args.logits = logits.as<float>();
    args.logits_stride = logits.row_stride;
    args.argmax = best;
    launch(ctx.kernels->head, args, "head", ctx);
    return;
  }
  Tensor normed = allocate_f32(num_rows, segment.cols, *ctx.workspace);
  Tensor all = logits ? logits : allocate_f32(num_rows, segment.rows, *ctx.workspace);
  for (std::int64_t i = 0; i < num_rows; ++i) {
    Tensor source(x.as<float>() + row_ids[static_cast<std::size_t>(i)] * x.row_stride, DType::f32, {1, segment.cols});
    Tensor target(normed.as<float>() + i * normed.row_stride, DType::f32, {1, segment.cols});
    rms_norm(target, source, norm, ctx);
  }
  linear(all, prepare_each(normed, weight, ctx)[0], segment, Tensor(), false, ctx);
  argmax_of(best, all, ctx);
}

}  // namespace nb::ops
