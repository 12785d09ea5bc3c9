// Attention of single rows: a block computes one row for up to kHeads query heads of one KV head, so that keys and
// values are read once. Bound by memory.
//
// A split of 256 keys goes in three phases: scores into shared memory, softmax over the split, weighted values. kLanes
// neighbouring threads hold a key, 8 dimensions each. A block does all splits of its row and folds them, or one split
// only, whose state attention_merge_kernel folds: the same arithmetic in the same order.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/ptx.cuh"

namespace nb::cuda {

inline constexpr int kDecodeThreads = 256;
inline constexpr int kMergeThreads = 128;

struct DecodeArgs {
  ops::AttentionArgs a;
  bool all_rows;   ///< or only those of segments of at most kDecodeRows rows, which are then counted alone
  int first_row;   ///< the number of the row of block 0
  int head_tiles;  ///< blocks per KV head
  int splits;      ///< states that `partials` has room for, per row and head
  float*
      partials;  ///< null: a block does all splits; else [rows of the launch, heads, splits, 2 + D]: max, sum, values
};

/// A row by its number; segment -1 if there is none.
struct DecodeRow {
  int row, segment;
};

NB_DEVICE DecodeRow find_row(const DecodeArgs& args, int number) {
  const ops::AttentionArgs& a = args.a;
  if (args.all_rows || a.max_segment_rows <= ops::kDecodeRows) return {number, a.row_segments[number]};
  const SegmentItem item = find_item(a, number, [](const ops::AttentionSegment& segment) {
    return segment.row_count <= ops::kDecodeRows ? segment.row_count : 0;
  });
  return {item.segment < 0 ? 0 : a.segments[item.segment].row_begin + item.index, item.segment};
}

/// 8 numbers of a key or value as they are in memory.
template <class Number>
struct Eight {
  uint4 vectors[sizeof(Number) / 2];

  NB_DEVICE float at(int i) const { return element<Number>(vectors[i / kPerVector<Number>], i % kPerVector<Number>); }
};

template <class Number>
NB_DEVICE Eight<Number> load_eight(const Number* from, bool valid) {
  Eight<Number> eight;
  NB_UNROLL
  for (int v = 0; v < static_cast<int>(sizeof(Number) / 2); ++v) {
    eight.vectors[v] = valid ? reinterpret_cast<const uint4*>(from)[v] : uint4{0, 0, 0, 0};
  }
  return eight;
}

/// Adds values up over the lanes that differ in the bits kFrom, kFrom / 2, .. kTo, and shares the sums out: afterwards
/// a lane has those from `begin` on, at the front. The order of additions is the same for all of them.
template <int kCount, int kFrom, int kTo, int kSize>
NB_DEVICE void reduce_scatter(float (&values)[kSize], int& begin) {
  if constexpr (kFrom >= kTo && kCount > 1) {
    constexpr int kHalf = kCount / 2;
    const bool upper = (lane_id() & kFrom) != 0;
    NB_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const float keep = upper ? values[i + kHalf] : values[i];
      const float give = upper ? values[i] : values[i + kHalf];
      values[i] = keep + shuffle_xor(give, kFrom);
    }
    if (upper) begin += kHalf;
    reduce_scatter<kHalf, kFrom / 2, kTo>(values, begin);
  } else if constexpr (kFrom >= kTo) {
    values[0] += shuffle_xor(values[0], kFrom);
    reduce_scatter<1, kFrom / 2, kTo>(values, begin);
  }
}

/// grid: (rows, head tiles of all KV heads, splits or 1).
template <class Number, int kLanes, int kHeads>
__global__ void __launch_bounds__(kDecodeThreads, 2) attention_decode_kernel(DecodeArgs args) {
  constexpr int kDims = 8 * kLanes;
  constexpr int kWarps = kDecodeThreads / 32;
  constexpr int kAtOnce = kDecodeThreads / kLanes;                    // keys that the block loads side by side
  constexpr int kAhead = kHeads == 8 || sizeof(Number) == 4 ? 2 : 4;  // and loads under way: what the registers hold
  constexpr int kStepKeys = kAhead * kAtOnce;
  constexpr int kScores = kAhead * kHeads;
  constexpr int kOutputs = kHeads * kDims / kDecodeThreads;  // of a thread
  NB_SHARED(float4, queries, kHeads * kDims / 4);            // [head][low or high 4 of 8][lane]
  NB_SHARED(float, weights, kSplitTokens* kHeads);
  NB_SHARED(float, sums_of_warps, kWarps* kHeads* kDims);
  NB_SHARED(float, maxima, kHeads);
  NB_SHARED(float, sums, kHeads);

  grid_trigger();
  grid_wait();
  const ops::AttentionArgs& a = args.a;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int group = thread / kLanes, lane = thread % kLanes;
  const int dim = a.kv.head_dim, heads_per_kv = a.num_heads / a.kv.num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.y) / args.head_tiles;
  const int first_head = static_cast<int>(blockIdx.y) % args.head_tiles * kHeads;  // of the KV head
  const DecodeRow found = find_row(args, args.first_row + static_cast<int>(blockIdx.x));
  if (found.segment < 0) return;
  const int row = found.row;
  const ops::AttentionSegment segment = a.segments[found.segment];
  const bool has_dims = 8 * lane < dim;

  SplitState total[kOutputs];
  float out[kOutputs];
  NB_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    total[o] = empty_state();
    out[o] = 0.0f;
  }

  int number = 0;  // of the run's first split
  for (int r = segment.run_begin; r < segment.run_begin + segment.run_count; ++r) {
    const ops::AttentionRun run = a.runs[r];
    const KeyRange seen = visible_keys(a, run, row);
    int first = seen.begin / kSplitTokens, last = (seen.end + kSplitTokens - 1) / kSplitTokens;
    if (args.partials != nullptr) {
      const int own = static_cast<int>(blockIdx.z) - number;
      first = first > own ? first : own;
      last = last < own + 1 ? last : own + 1;
    }
    number += splits_of(run);
    if (seen.begin >= seen.end || first >= last) continue;

    const int position = a.positions[row] - run.position_offset;
    for (int i = thread; i < kHeads * kDims / 4; i += kDecodeThreads) queries[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
    sync_block();
    const SharedPtr<float> query_values = shared_cast<float>(queries);
    const auto query_at = [&](int head, int d) { return ((head * 2 + d / 4 % 2) * kLanes + d / 8) * 4 + d % 4; };
    for (int i = thread; i < kHeads * dim / 2; i += kDecodeThreads) {
      const int head = i / (dim / 2), pair = i % (dim / 2);
      if (first_head + head >= heads_per_kv) break;
      const float2 q = rotated_pair(a, row, kv_head * heads_per_kv + first_head + head, position, pair);
      query_values[query_at(head, pair)] = q.x;
      query_values[query_at(head, pair + dim / 2)] = q.y;
    }
    sync_block();

    for (int split = first; split < last; ++split) {
      const int base = split * kSplitTokens;
      const KeyRange range = {seen.begin > base ? seen.begin - base : 0,
                              seen.end - base < kSplitTokens ? seen.end - base : kSplitTokens};
      const int first_step = range.begin / kStepKeys, last_step = (range.end + kStepKeys - 1) / kStepKeys;
      const auto is_seen = [&](int key) { return key >= range.begin && key < range.end; };
      const auto load = [&](Eight<Number>(&eights)[kAhead], int which, int step) {
        NB_UNROLL
        for (int u = 0; u < kAhead; ++u) {
          const int key = step * kStepKeys + u * kAtOnce + group;
          const bool valid = has_dims && step < last_step && is_seen(key);
          const int block = valid ? a.blocks[run.block_begin + (base + key) / kBlockTokens] : 0;
          eights[u] = load_eight(kv_row<Number>(a.kv, block, which, kv_head, key % kBlockTokens) + 8 * lane, valid);
        }
      };

      Eight<Number> next[kAhead];
      load(next, 0, first_step);
      for (int step = first_step; step < last_step; ++step) {
        Eight<Number> keys[kAhead];
        NB_UNROLL
        for (int u = 0; u < kAhead; ++u) keys[u] = next[u];
        load(next, 0, step + 1);
        float scores[kScores];
        NB_UNROLL
        for (int h = 0; h < kHeads; ++h) {
          const float4 low = queries[h * 2 * kLanes + lane], high = queries[(h * 2 + 1) * kLanes + lane];
          NB_UNROLL
          for (int u = 0; u < kAhead; ++u) {
            float score = keys[u].at(0) * low.x;
            score = fmaf(keys[u].at(1), low.y, score);
            score = fmaf(keys[u].at(2), low.z, score);
            score = fmaf(keys[u].at(3), low.w, score);
            score = fmaf(keys[u].at(4), high.x, score);
            score = fmaf(keys[u].at(5), high.y, score);
            score = fmaf(keys[u].at(6), high.z, score);
            scores[u * kHeads + h] = fmaf(keys[u].at(7), high.w, score);
          }
        }
        int begin = 0;
        reduce_scatter<kScores, kLanes / 2, 1>(scores, begin);
        constexpr int kOwn = kScores > kLanes ? kScores / kLanes : 1;
        constexpr int kCopies = kScores < kLanes ? kLanes / kScores : 1;
        NB_UNROLL
        for (int i = 0; i < kOwn; ++i) {
          const int u = (begin + i) / kHeads, h = (begin + i) % kHeads;
          const int key = step * kStepKeys + u * kAtOnce + group;
          if (lane % kCopies == 0) weights[key * kHeads + h] = is_seen(key) ? scores[i] : -INFINITY;
        }
      }
      load(next, 1, first_step);
      sync_block();

      for (int h = warp; h < kHeads; h += kWarps) {
        float x[kSplitTokens / 32];
        float largest = -INFINITY;
        NB_UNROLL
        for (int i = 0; i < kSplitTokens / 32; ++i) {
          const int key = 32 * i + lane_id();
          const bool computed = key >= first_step * kStepKeys && key < last_step * kStepKeys;
          x[i] = computed ? static_cast<float>(weights[key * kHeads + h]) : -INFINITY;
          largest = fmaxf(largest, x[i]);
        }
        largest = warp_max(largest);
        float sum = 0.0f;
        NB_UNROLL
        for (int i = 0; i < kSplitTokens / 32; ++i) {
          const float weight = exp2f(x[i] - largest);
          sum += weight;
          weights[(32 * i + lane_id()) * kHeads + h] = weight;
        }
        sum = warp_sum(sum);
        if (lane_id() == 0) {
          maxima[h] = largest;
          sums[h] = sum;
        }
      }
      sync_block();

      float acc[kHeads * 8];
      NB_UNROLL
      for (int i = 0; i < kHeads * 8; ++i) acc[i] = 0.0f;
      const SharedPtr<float4> weights_of_key = shared_cast<float4>(weights);
      for (int step = first_step; step < last_step; ++step) {
        Eight<Number> values[kAhead];
        NB_UNROLL
        for (int u = 0; u < kAhead; ++u) values[u] = next[u];
        load(next, 1, step + 1);
        NB_UNROLL
        for (int u = 0; u < kAhead; ++u) {
          const int key = step * kStepKeys + u * kAtOnce + group;
          NB_UNROLL
          for (int h = 0; h < kHeads; h += 4) {
            const float4 weight = weights_of_key[(key * kHeads + h) / 4];
            NB_UNROLL
            for (int i = 0; i < 8; ++i) {
              const float value = values[u].at(i);
              acc[h * 8 + i] = fmaf(value, weight.x, acc[h * 8 + i]);
              acc[h * 8 + 8 + i] = fmaf(value, weight.y, acc[h * 8 + 8 + i]);
              acc[h * 8 + 16 + i] = fmaf(value, weight.z, acc[h * 8 + 16 + i]);
              acc[h * 8 + 24 + i] = fmaf(value, weight.w, acc[h * 8 + 24 + i]);
            }
          }
        }
      }
      int begin = 0;
      reduce_scatter<kHeads * 8, 16, kLanes>(acc, begin);
      NB_UNROLL
      for (int i = 0; i < kHeads * 8 * kLanes / 32; ++i) {
        sums_of_warps[(warp * kHeads * 8 + begin + i) * kLanes + lane] = acc[i];
      }
      sync_block();
      NB_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        const int at = o * kDecodeThreads + thread, head = at / kDims;
        float value = 0.0f;
        for (int w = 0; w < kWarps; ++w) value += sums_of_warps[w * kHeads * kDims + at];
        const FoldScale scale = fold(total[o], {maxima[head], sums[head]});
        out[o] = fold_value(scale, out[o], value);
      }
    }
  }
  if (args.partials != nullptr && static_cast<int>(blockIdx.z) >= number) return;

  NB_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    const int at = o * kDecodeThreads + thread;
    const int head = at / kDims, d = at % kLanes * 8 + at / kLanes % 8;
    if (first_head + head >= heads_per_kv || d >= dim) continue;
    const int all_head = kv_head * heads_per_kv + first_head + head;
    if (args.partials == nullptr) {
      a.out[row * a.out_stride + all_head * dim + d] = out[o] * inverse_of(total[o]);
      continue;
    }
    const std::int64_t state =
        (static_cast<std::int64_t>(blockIdx.x) * a.num_heads + all_head) * args.splits + static_cast<int>(blockIdx.z);
    float* partial = args.partials + state * (dim + 2);
    if (d == 0) {
      partial[0] = total[o].max;
      partial[1] = total[o].sum;
    }
    partial[2 + d] = out[o];
  }
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

}  // namespace nb::cuda
