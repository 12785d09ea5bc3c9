#include <algorithm>
#include <bit>
#include <vector>

#include "base/align.h"
#include "base/error.h"
#include "ops/check_plan.h"
#include "ops/launch.h"
#include "ops/ops.h"
#include "quant/kv_format.h"

namespace nb::ops {

std::vector<int32_t> segments_of_rows(const AttentionPlan& plan) {
  std::vector<int32_t> row_segments(plan.positions.size());
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    const AttentionSegment& segment = plan.segments[s];
    std::fill_n(row_segments.begin() + segment.row_begin, segment.row_count, static_cast<int32_t>(s));
  }
  return row_segments;
}

SplitCounts count_splits(const AttentionPlan& plan) {
  uint32_t of_all = 0, of_few = 0;
  for (const AttentionSegment& segment : plan.segments) {
    uint32_t splits = 0;
    for (int32_t r = segment.run_begin; r < segment.run_begin + segment.run_count; ++r) {
      splits += static_cast<uint32_t>(ceil_div(plan.runs[static_cast<std::size_t>(r)].num_keys, kSplitTokens));
    }
    of_all = std::max(of_all, splits);
    if (segment.row_count <= kDecodeRows) of_few = std::max(of_few, splits);
  }
  const auto room = [](uint32_t splits) { return splits == 0 ? 0 : static_cast<int32_t>(std::bit_ceil(splits)); };
  return {.of_all = room(of_all), .of_few_rows = room(of_few)};
}

namespace {

// Sizes of the work, which only the host can see before a kernel starts, and the segment of every row.
void describe_to_device(const AttentionPlan& plan, AttentionArgs& args, ExecContext& ctx) {
  for (const AttentionSegment& segment : plan.segments) {
    args.max_segment_rows = std::max(args.max_segment_rows, segment.row_count);
  }
  const SplitCounts splits = count_splits(plan);
  args.max_splits = splits.of_all;
  args.max_decode_splits = splits.of_few_rows;
  args.row_segments = ctx.workspace->derived_on_device(plan.segments.data(), [&] { return segments_of_rows(plan); });
}

}  // namespace

void attention(Tensor out, Tensor q, int num_heads, float scale, int window, const RopeTable& rope_table,
               const KvLayer& kv, const AttentionPlan& plan, ExecContext& ctx, const OpenKeys& open) {
  require_kv_format(*ctx.kernels, kv.format);
  check_open(kv, open, "attention");
  NB_CHECK(!quant::seals_keys(kv.format) || open.row_groups != nullptr, invalid_argument, "attention: KV format ",
           quant::to_string(kv.format), " needs the group of each row");
  const auto num_rows = static_cast<std::int64_t>(plan.positions.size());
  check_tensor(q, "attention: q", DType::f32, {num_rows, std::int64_t{num_heads} * kv.head_dim});
  check_tensor(out, "attention: out", DType::f32, {num_rows, q.dim(1)});
  NB_CHECK(num_heads % kv.num_kv_heads == 0, invalid_argument, "attention: ", num_heads, " heads do not share ",
           kv.num_kv_heads, " KV heads evenly");
  NB_CHECK(window >= 0, invalid_argument, "attention: window is ", window);
  check_positions(plan.positions, rope_table);
  check_plan(plan, rope_table);
  AttentionArgs args{};
  args.has_policies = uses_policies(plan);
  if (args.has_policies) require_key_policies(*ctx.kernels);
  args.q = q.as<const float>();
  args.q_stride = q.row_stride;
  args.out = out.as<float>();
  args.out_stride = out.row_stride;
  args.num_heads = num_heads;
  args.scale = scale;
  args.window = window;
  args.rope = rope_table;
  args.kv = kv;
  args.open = on_device(open, plan.positions.size(), ctx);
  args.positions = ctx.workspace->on_device(plan.positions);
  args.segments = ctx.workspace->on_device(plan.segments);
  args.num_segments = static_cast<int32_t>(plan.segments.size());
  args.runs = ctx.workspace->on_device(plan.runs);
  args.blocks = ctx.workspace->on_device(plan.blocks);
  args.key_positions = plan.key_positions.empty() ? nullptr : ctx.workspace->on_device(plan.key_positions);
  args.hidden = plan.hidden.empty() ? nullptr : ctx.workspace->on_device(plan.hidden);
  args.policies = plan.policies.empty() ? nullptr : ctx.workspace->on_device(plan.policies);
  args.num_policies = static_cast<int32_t>(plan.policies.size());
  args.rows = static_cast<int32_t>(num_rows);
  const Workspace::Scope scope(*ctx.workspace);
  if (ctx.kernels->memory != nullptr) describe_to_device(plan, args, ctx);
  args.scratch_bytes = ctx.kernels->attention_scratch_bytes(args, ctx.pool->num_threads());
  args.scratch = reinterpret_cast<uint8_t*>(ctx.workspace->allocate(static_cast<std::size_t>(args.scratch_bytes)));
  launch(ctx.kernels->attention, args, "attention", ctx);
}

}  // namespace nb::ops
