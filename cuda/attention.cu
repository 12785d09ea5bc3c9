// Attention over paged keys and values: which kernel serves which rows, and how much of it runs side by side.
//
// Long segments go to tensor cores where there is a kernel for them (every format but f32, head_dim 64, 96 or 128); all
// other rows, and all rows in the deterministic mode, go to the kernel of single rows.
#include <algorithm>

#include "base/align.h"
#include "base/error.h"
#include "cuda/attention_start.cuh"
#include "cuda/operators.h"

namespace nb::cuda {
namespace {

constexpr int kMaxHeadDim = 256;
constexpr int kMergeThreads = 128;
constexpr int kEnoughBlocks = 256;  // to keep a large GPU busy without cutting rows into splits
constexpr std::int64_t kMaxScratchBytes = std::int64_t{64} << 20;  // except where one row needs more

bool has_prefill_kernel(const ops::KvLayer& kv) {
  return kv.format != quant::KvFormat::f32 && (kv.head_dim == 64 || kv.head_dim == 96 || kv.head_dim == 128);
}

/// What is known on the host about the rows for the kernel of single rows.
struct DecodePlan {
  int rows;                // at most
  int splits;              // of a row, at most
  int heads;               // per block
  int head_tiles;          // per KV head
  bool apart;              // whether every split has a block of its own
  std::int64_t row_bytes;  // of the states of a row's splits
};

DecodePlan plan_decode(const ops::AttentionArgs& a, bool all_rows) {
  DecodePlan plan{};
  plan.rows = a.rows;
  if (!all_rows && a.max_segment_rows > ops::kDecodeRows) {
    plan.rows = std::min(a.rows - a.max_segment_rows, ops::kDecodeRows * (a.num_segments - 1));
  }
  plan.splits = all_rows ? a.max_splits : a.max_decode_splits;
  const int group = a.num_heads / a.kv.num_kv_heads;
  plan.heads = group <= 4 || a.kv.head_dim > 128 ? 4 : 8;
  plan.head_tiles = ceil_div(group, plan.heads);
  plan.apart = plan.splits > 1 && plan.rows * a.kv.num_kv_heads * plan.head_tiles < kEnoughBlocks;
  plan.row_bytes = std::int64_t{a.num_heads} * plan.splits * (a.kv.head_dim + 2) * std::int64_t{sizeof(float)};
  return plan;
}

std::int64_t scratch_bytes(const DecodePlan& plan) {
  if (!plan.apart || plan.rows <= 0) return 0;
  return std::clamp<std::int64_t>(kMaxScratchBytes / plan.row_bytes, 1, plan.rows) * plan.row_bytes;
}

/// Folds what the blocks of single splits have left. grid: (rows, heads).
__global__ void __launch_bounds__(kMergeThreads) attention_merge_kernel(DecodeArgs args) {
  grid_trigger();
  grid_wait();
  const ops::AttentionArgs& a = args.a;
  const int dim = a.kv.head_dim, head = static_cast<int>(blockIdx.y);
  const DecodeRow found = find_row(args, args.first_row + static_cast<int>(blockIdx.x));
  if (found.segment < 0) return;
  const ops::AttentionSegment segment = a.segments[found.segment];
  int splits = 0;
  for (int r = segment.run_begin; r < segment.run_begin + segment.run_count; ++r) splits += splits_of(a.runs[r]);
  for (int d = static_cast<int>(threadIdx.x); d < dim; d += kMergeThreads) {
    const float* partial =
        args.partials + (static_cast<std::int64_t>(blockIdx.x) * a.num_heads + head) * args.splits * (dim + 2);
    SplitState total = empty_state();
    float out = 0.0f;
    for (int split = 0; split < splits; ++split, partial += dim + 2) {
      const FoldScale scale = fold(total, {partial[0], partial[1]});
      out = fold_value(scale, out, partial[2 + d]);
    }
    a.out[found.row * a.out_stride + head * dim + d] = out * inverse_of(total);
  }
}

void decode(const ops::AttentionArgs& a, bool all_rows) {
  const DecodePlan plan = plan_decode(a, all_rows);
  // As many rows at a time as there is room for; without room a block does all splits, which gives the same bits.
  int step = std::max(plan.rows, 1);
  if (plan.apart) step = static_cast<int>(std::min<std::int64_t>(a.scratch_bytes / plan.row_bytes, step));
  const bool apart = plan.apart && step > 0;
  if (step == 0) step = plan.rows;
  for (int row = 0; row < plan.rows; row += step) {
    const int rows = std::min(step, plan.rows - row);
    const DecodeArgs args{.a = a,
                          .all_rows = all_rows,
                          .first_row = row,
                          .group = a.num_heads / a.kv.num_kv_heads,
                          .head_tiles = plan.head_tiles,
                          .splits = plan.splits,
                          .partials = apart ? reinterpret_cast<float*>(a.scratch) : nullptr};
    a.has_policies ? start_decode<true>(args, plan.heads, rows) : start_decode<false>(args, plan.heads, rows);
    if (!apart) continue;
    launch({.name = "attention_merge_kernel",
            .grid_x = static_cast<unsigned>(rows),
            .grid_y = static_cast<unsigned>(a.num_heads),
            .threads = kMergeThreads},
           attention_merge_kernel, args);
  }
}

}  // namespace

void attention(const ops::AttentionArgs& a, const Part&) {
  if (!has_prefill_kernel(a.kv) || a.max_segment_rows <= ops::kDecodeRows) return decode(a, true);
  a.has_policies ? start_prefill<true>(a) : start_prefill<false>(a);
  decode(a, false);
}

void attention_deterministic(const ops::AttentionArgs& a, const Part&) { decode(a, true); }

std::int64_t attention_scratch_bytes(const ops::AttentionArgs& a, int) {
  NB_CHECK(a.kv.head_dim % 8 == 0 && a.kv.head_dim <= kMaxHeadDim, unsupported, "attention on a GPU with head_dim ",
           a.kv.head_dim, ": it must be a multiple of 8 up to ", kMaxHeadDim);
  return std::max(scratch_bytes(plan_decode(a, true)), scratch_bytes(plan_decode(a, false)));
}

}  // namespace nb::cuda
