// Attention over paged keys and values: which kernel serves which rows, and how much of it runs side by side.
//
// Long segments go to tensor cores where there is a kernel for them (every format but f32, head_dim 64, 96 or 128); all
// other rows, and all rows in the deterministic mode, go to the kernel of single rows.
#include <algorithm>

#include "base/align.h"
#include "base/error.h"
#include "cuda/attention_decode.cuh"
#include "cuda/attention_prefill.cuh"
#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace nb::cuda {
namespace {

constexpr int kMaxHeadDim = 256;
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

template <class Key, class Value, int kLanes, int kHeads>
void launch_decode(const DecodeArgs& args, const DecodePlan& plan, int rows) {
  launch({.name = "attention_decode_kernel",
          .grid_x = static_cast<unsigned>(rows),
          .grid_y = static_cast<unsigned>(args.a.kv.num_kv_heads * plan.head_tiles),
          .grid_z = static_cast<unsigned>(args.partials == nullptr ? 1 : plan.splits),
          .threads = kDecodeThreads<kHeads>},
         attention_decode_kernel<Key, Value, kLanes, kHeads>, args);
}

template <class Key, class Value>
void launch_decode(const DecodeArgs& args, const DecodePlan& plan, int rows) {
  if (args.a.kv.head_dim > 128) return launch_decode<Key, Value, 32, 4>(args, plan, rows);
  if (args.a.kv.head_dim > 64) {
    return plan.heads == 4 ? launch_decode<Key, Value, 16, 4>(args, plan, rows)
                           : launch_decode<Key, Value, 16, 8>(args, plan, rows);
  }
  return plan.heads == 4 ? launch_decode<Key, Value, 8, 4>(args, plan, rows)
                         : launch_decode<Key, Value, 8, 8>(args, plan, rows);
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
    with_kv_numbers(a.kv.format,
                    [&](auto key, auto value) { launch_decode<decltype(key), decltype(value)>(args, plan, rows); });
    if (!apart) continue;
    launch({.name = "attention_merge_kernel",
            .grid_x = static_cast<unsigned>(rows),
            .grid_y = static_cast<unsigned>(a.num_heads),
            .threads = kMergeThreads},
           attention_merge_kernel, args);
  }
}

template <class Key, class Value, int kDim>
void launch_prefill(const ops::AttentionArgs& a) {
  // Every long segment may have one tile that is not full.
  const int full = a.rows * (a.num_heads / a.kv.num_kv_heads) / kTileColumns;
  const int rest = std::min(a.num_segments, a.rows / (ops::kDecodeRows + 1));
  launch({.name = "attention_prefill_kernel",
          .grid_x = static_cast<unsigned>(full + rest),
          .grid_y = static_cast<unsigned>(a.kv.num_kv_heads),
          .threads = kPrefillThreads,
          .dynamic_shared_bytes = prefill_shared_bytes<Key, Value, kDim>()},
         attention_prefill_kernel<Key, Value, kDim>, a);
}

}  // namespace

void attention(const ops::AttentionArgs& a, const Part&) {
  if (!has_prefill_kernel(a.kv) || a.max_segment_rows <= ops::kDecodeRows) return decode(a, true);
  with_kv_numbers(a.kv.format, [&](auto key, auto value) {
    using Key = decltype(key);
    using Value = decltype(value);
    if constexpr (!std::is_same_v<Key, float>) {
      if (a.kv.head_dim == 64) {
        launch_prefill<Key, Value, 64>(a);
      } else if (a.kv.head_dim == 96) {
        launch_prefill<Key, Value, 96>(a);
      } else {
        launch_prefill<Key, Value, 128>(a);
      }
    }
  });
  decode(a, false);
}

void attention_deterministic(const ops::AttentionArgs& a, const Part&) { decode(a, true); }

std::int64_t attention_scratch_bytes(const ops::AttentionArgs& a, int) {
  NB_CHECK(a.kv.head_dim % 8 == 0 && a.kv.head_dim <= kMaxHeadDim, unsupported, "attention on a GPU with head_dim ",
           a.kv.head_dim, ": it must be a multiple of 8 up to ", kMaxHeadDim);
  return std::max(scratch_bytes(plan_decode(a, true)), scratch_bytes(plan_decode(a, false)));
}

}  // namespace nb::cuda
