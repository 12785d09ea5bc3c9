// Attention of single rows: a block computes one row for up to kHeads query heads of one KV head, so that keys and
// values are read once. Bound by memory.
//
// A split of 256 keys goes in three phases: scores into shared memory, softmax over the split, weighted values. kLanes
// neighbouring threads hold a key, 8 dimensions each. A block does all splits of its row and folds them, or one split
// only, whose state attention_merge_kernel (attention.cu) folds: the same arithmetic in the same order.
//
// Policies hide keys as a run does, by bits beside the ids of a split's blocks. Splits that a policy hides are skipped,
// and in place of a key of a hidden block the first key of a seen one is loaded, so that hidden blocks are not read.
// Kernels with policies are instances of their own: the others stay what they are.
//
// Sealed keys become rotated floats in registers. A key of the row's own group is read in its open cell.
#pragma once

#include <type_traits>

#include "cuda/attention.cuh"
#include "cuda/ptx.cuh"
#include "cuda/sealed_keys.cuh"

namespace nb::cuda {

/// More heads need more registers a thread.
template <int kHeads>
inline constexpr int kDecodeThreads = kHeads > 4 ? 128 : 256;
/// On a multiprocessor, at least; codes of 4 bits, f32 and policies need more registers, sealed keys with policies
/// most.
template <class Key, class Value, int kHeads, bool kPolicies>
inline constexpr int kDecodeBlocks =
    kIsSealed<Key>&& kPolicies                                                                   ? 1
    : kHeads > 4 && !kPolicies && !std::is_same_v<Value, Code4> && !std::is_same_v<Value, float> ? 3
                                                                                                 : 2;

struct DecodeArgs {
  ops::AttentionArgs a;
  bool all_rows;   ///< or only those of segments of at most kDecodeRows rows, which are then counted alone
  int first_row;   ///< the number of the row of block 0
  int group;       ///< query heads per KV head
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

/// What scores are computed from.
template <class Key>
using ReadyKey = std::conditional_t<kIsSealed<Key>, RotatedEight, Eight<Key>>;

/// grid: (rows, head tiles of all KV heads, splits or 1). `kPolicies`: for plans with policies or biases.
template <class Key, class Value, int kLanes, int kHeads, bool kPolicies>
__global__ void __launch_bounds__(kDecodeThreads<kHeads>, kDecodeBlocks<Key, Value, kHeads, kPolicies>)
    attention_decode_kernel(DecodeArgs args) {
  constexpr int kThreads = kDecodeThreads<kHeads>;
  constexpr int kDims = 8 * kLanes;
  constexpr int kWarps = kThreads / 32;
  constexpr int kAtOnce = kThreads / kLanes;  // keys that the block loads side by side
  constexpr bool kIsWide = std::is_same_v<Key, float> || kIsCode<Key>;
  constexpr bool kIsWidest = kIsSealed<Key> || (kPolicies && std::is_same_v<Key, float>);
  constexpr int kAhead = kIsWidest ? 1 : kIsWide ? 2 : 4;  // such loads under way
  constexpr int kSplitBlocks = kSplitTokens / kBlockTokens;
  constexpr int kStepKeys = kAhead * kAtOnce;
  constexpr int kScores = kAhead * kHeads;
  constexpr int kOutputs = kHeads * kDims / kThreads;  // of a thread
  NB_SHARED(float4, queries, kHeads * kDims / 4);      // [head][low or high 4 of 8][lane]
  NB_SHARED(float, weights, kSplitTokens* kHeads);
  NB_SHARED(float, sums_of_warps, kWarps* kHeads* kDims);
  NB_SHARED(int, blocks, 2 * kSplitBlocks);       // of this split and the next one
  NB_SHARED(unsigned, hidden, 2 * kSplitBlocks);  // keys of these blocks, a bit each, where the run hides any
  NB_SHARED(float, maxima, kHeads);
  NB_SHARED(float, sums, kHeads);
  NB_SHARED(float4, biases, kIsSealed<Key> ? kDims / 4 : 1);  // of sealed keys: [low or high 4 of 8][lane]

  grid_trigger();
  grid_wait();
  const ops::AttentionArgs& a = args.a;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int group = thread / kLanes, lane = thread % kLanes;
  const int dim = a.kv.head_dim;
  const int kv_head = static_cast<int>(blockIdx.y) / args.head_tiles;
  const int first_head = static_cast<int>(blockIdx.y) % args.head_tiles * kHeads;  // of the KV head
  const DecodeRow found = find_row(args, args.first_row + static_cast<int>(blockIdx.x));
  if (found.segment < 0) return;
  const int row = found.row;
  const ops::AttentionSegment segment = a.segments[found.segment];
  const int own_dims = 8 * lane < dim ? 8 * lane : 0;  // the queries of what there is not are zeros

  // Of the outputs of a thread, all of one head. Output i of a head is dimension 8 (i % kLanes) + i / kLanes.
  constexpr int kThreadsPerHead = kThreads / kHeads;
  const int out_head = thread / kThreadsPerHead;
  const auto output = [&](int o) { return o * kThreadsPerHead + thread % kThreadsPerHead; };
  // Dimension d of a head in shared memory: as a lane reads it, 8 that follow each other, or an eighth of sealed keys.
  const auto place_in_head = [&](int d) {
    if constexpr (kIsSealed<Key>) return (d / (dim / 2) * kLanes + d % (dim / 2) / 4) * 4 + d % 4;
    return (d / 4 % 2 * kLanes + d / 8) * 4 + d % 4;
  };
  if constexpr (kIsSealed<Key>) {
    for (int d = thread; d < kDims; d += kThreads) {
      if (d >= dim) continue;
      const float bias = a.open.bias == nullptr ? 0.0f : a.open.bias[kv_head * dim + d];
      shared_cast<float>(biases)[place_in_head(d)] = bias;
    }
  }

  SplitState total = empty_state();
  float out[kOutputs];
  NB_UNROLL
  for (int o = 0; o < kOutputs; ++o) out[o] = 0.0f;

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
    [[maybe_unused]] const int policy = kPolicies ? policy_of(segment, r) : -1;
    [[maybe_unused]] int own_group = -1;  // of the row, which reads it in its open cell
    if constexpr (kIsSealed<Key>) {
      if (r + 1 == segment.run_begin + segment.run_count) own_group = a.open.row_groups[row];
    }
    const bool hides = run.hidden_begin >= 0 || (kPolicies && policy >= 0);
    // The first key of a seen block at `key` or behind it.
    const auto next_seen_key = [&](int key) {
      if constexpr (kPolicies) {
        if (policy >= 0) {
          const int next = kBlockTokens * ops::next_seen_block(a.policies[policy], position, key / kBlockTokens);
          return next > key ? next : key;
        }
      }
      return key;
    };
    const auto next_seen_split = [&](int split) {
      if constexpr (kPolicies) {
        const int base = split * kSplitTokens;
        const int key = next_seen_key(seen.begin > base ? seen.begin : base);
        return key < seen.end ? key / kSplitTokens : last;
      }
      return split;
    };
    first = next_seen_split(first);
    if (kPolicies && first >= last) continue;
    int turn = 0;  // of two places for what is known of a split's blocks: they follow each other in turns
    const auto place_of = [&](int split, bool is_next) { return kPolicies ? turn ^ (is_next ? 1 : 0) : split % 2; };
    const auto fetch_blocks = [&](int split, bool is_next) {
      const int block = split * kSplitBlocks + thread;
      if (thread >= kSplitBlocks || block * kBlockTokens >= seen.end || (block + 1) * kBlockTokens <= seen.begin)
        return;
      const int place = place_of(split, is_next) * kSplitBlocks + thread;
      blocks[place] = a.blocks[run.block_begin + block];
      if constexpr (kPolicies) {
        unsigned bits = run.hidden_begin >= 0 ? a.hidden[run.hidden_begin + block] : 0u;
        if (policy >= 0) bits |= ops::hidden_bits(a.policies[policy], position, block);
        hidden[place] = bits;
      } else {
        if (run.hidden_begin >= 0) hidden[place] = a.hidden[run.hidden_begin + block];
      }
    };
    fetch_blocks(first, false);
    for (int i = thread; i < kHeads * kDims / 4; i += kThreads) queries[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
    sync_block();
    const SharedPtr<float> query_values = shared_cast<float>(queries);
    const auto query_at = [&](int head, int d) { return head * kDims + place_in_head(d); };
    for (int i = thread; i < kHeads * dim / 2; i += kThreads) {
      const int head = i / (dim / 2), pair = i % (dim / 2);
      if (first_head + head >= args.group) break;
      const float2 q = rotated_pair(a, row, kv_head * args.group + first_head + head, position, pair);
      query_values[query_at(head, pair)] = q.x;
      query_values[query_at(head, pair + dim / 2)] = q.y;
    }
    sync_block();

    for (int split = first, next; split < last; split = next) {
      next = next_seen_split(split + 1);
      const int base = split * kSplitTokens, place = place_of(split, false) * kSplitBlocks;
      const int begin = next_seen_key(seen.begin > base ? seen.begin : base) - base;
      const int end = seen.end - base < kSplitTokens ? seen.end - base : kSplitTokens;
      const int first_step = begin / kStepKeys, last_step = (end + kStepKeys - 1) / kStepKeys;
      if (next < last) fetch_blocks(next, true);
      // In place of a key that is not seen another one is loaded, whose weight becomes zero.
      const auto key_at = [&](int step, int u) {
        const int key = step * kStepKeys + u * kAtOnce + group;
        const int near = key < begin ? begin : key < end ? key : end - 1;
        if constexpr (kPolicies) {
          if (hides && hidden[place + near / kBlockTokens] == 0xffffu) return begin;
        }
        return near;
      };
      const auto cell_of = [&](int which, int key) {
        return kv_cell(a.kv, blocks[place + key / kBlockTokens], which, kv_head);
      };
      const auto load_key = [&](int step, int u) {
        const int key = key_at(step, u);
        if constexpr (kIsSealed<Key>) {
          Eight<Key> eight;
          if ((base + key) / kBlockTokens == own_group) {
            const float* const cell = open_cell(a.kv, a.open, a.open.row_cells[row], kv_head);
            take_open(cell, dim, key % kBlockTokens, own_dims / 8, eight);
          } else {
            take_sealed(cell_of(0, key), dim, key % kBlockTokens, own_dims / 8, eight);
          }
          return eight;
        } else {
          return load_eight<Key>(cell_of(0, key), dim, key % kBlockTokens, own_dims);
        }
      };
      const auto load_value = [&](int step, int u) {
        const int key = key_at(step, u);
        return load_eight<Value>(cell_of(1, key), dim, key % kBlockTokens, own_dims);
      };

      Eight<Key> next_keys[kAhead];
      NB_UNROLL
      for (int u = 0; u < kAhead; ++u) next_keys[u] = load_key(first_step, u);
      for (int step = first_step; step < last_step; ++step) {
        ReadyKey<Key> keys[kAhead];
        NB_UNROLL
        for (int u = 0; u < kAhead; ++u) {
          if constexpr (kIsSealed<Key>) {
            const int eighth = own_dims / 8;
            const Angles angles = take_angles(a.rope, key_position(a, run, base + key_at(step, u)), eighth);
            keys[u] = rotated(next_keys[u], angles, biases[eighth], biases[kLanes + eighth]);
          } else {
            keys[u] = next_keys[u];
          }
          next_keys[u] = load_key(step + 1, u);
        }
        float scores[kScores];
        NB_UNROLL
        for (int h = 0; h < kHeads; ++h) {
          const float4 low = queries[h * 2 * kLanes + lane], high = queries[(h * 2 + 1) * kLanes + lane];
          NB_UNROLL
          for (int u = 0; u < kAhead; ++u) {
            float score = keys[u].code(0) * low.x;
            score = fmaf(keys[u].code(1), low.y, score);
            score = fmaf(keys[u].code(2), low.z, score);
            score = fmaf(keys[u].code(3), low.w, score);
            score = fmaf(keys[u].code(4), high.x, score);
            score = fmaf(keys[u].code(5), high.y, score);
            score = fmaf(keys[u].code(6), high.z, score);
            score = fmaf(keys[u].code(7), high.w, score);
            if constexpr (kIsCode<Key> && !kIsSealed<Key>) score *= keys[u].factor();
            scores[u * kHeads + h] = score;
          }
        }
        int own = 0;
        reduce_scatter<kScores, kLanes / 2, 1>(scores, own);
        constexpr int kOwn = kScores > kLanes ? kScores / kLanes : 1;
        constexpr int kCopies = kScores < kLanes ? kLanes / kScores : 1;
        NB_UNROLL
        for (int i = 0; i < kOwn; ++i) {
          const int u = (own + i) / kHeads, h = (own + i) % kHeads;
          const int key = step * kStepKeys + u * kAtOnce + group;
          if (lane % kCopies == 0) weights[key * kHeads + h] = key >= begin && key < end ? scores[i] : -INFINITY;
        }
      }
      Eight<Value> next_values[kAhead];
      NB_UNROLL
      for (int u = 0; u < kAhead; ++u) next_values[u] = load_value(first_step, u);
      sync_block();

      for (int h = warp; h < kHeads; h += kWarps) {
        float x[kSplitTokens / 32];
        float largest = -INFINITY;
        NB_UNROLL
        for (int i = 0; i < kSplitTokens / 32; ++i) {
          const int key = 32 * i + lane_id();
          const bool computed = key >= first_step * kStepKeys && key < last_step * kStepKeys;
          x[i] = computed ? static_cast<float>(weights[key * kHeads + h]) : -INFINITY;
          if (hides && key >= begin && key < end) {
            const unsigned bits = hidden[place + key / kBlockTokens];
            if ((bits >> key % kBlockTokens & 1u) != 0) x[i] = -INFINITY;
          }
          largest = fmaxf(largest, x[i]);
        }
        largest = warp_max(largest);
        const float zero = largest == -INFINITY ? 0.0f : largest;  // where all keys are hidden
        float sum = 0.0f;
        NB_UNROLL
        for (int i = 0; i < kSplitTokens / 32; ++i) {
          const float weight = exp2f(x[i] - zero);
          sum += weight;
          weights[(32 * i + lane_id()) * kHeads + h] = weight;
        }
        sum = warp_sum(sum);
        if (lane_id() == 0) {
          maxima[h] = biased<kPolicies>(largest, run);
          sums[h] = sum;
        }
      }
      sync_block();

      float acc[kHeads * 8];
      NB_UNROLL
      for (int i = 0; i < kHeads * 8; ++i) acc[i] = 0.0f;
      const SharedPtr<float4> weights_of_key = shared_cast<float4>(weights);
      const auto is_hidden = [&](int key) {
        return hides && (hidden[place + key / kBlockTokens] >> key % kBlockTokens & 1u) != 0;
      };
      for (int step = first_step; step < last_step; ++step) {
        NB_UNROLL
        for (int u = 0; u < kAhead; ++u) {
          Eight<Value> values = next_values[u];
          next_values[u] = load_value(step + 1, u);
          const int key = step * kStepKeys + u * kAtOnce + group;
          if constexpr (kIsCode<Value>) {  // hidden values weigh nothing, but a scale of NaN would show
            if (values.is_spoilt() && is_hidden(key_at(step, u))) values.forget();
          }
          NB_UNROLL
          for (int h = 0; h < kHeads; h += 4) {
            const float4 weight = weights_of_key[(key * kHeads + h) / 4];
            NB_UNROLL
            for (int i = 0; i < 8; ++i) {
              const float value = values.at(i);
              acc[h * 8 + i] = fmaf(value, weight.x, acc[h * 8 + i]);
              acc[h * 8 + 8 + i] = fmaf(value, weight.y, acc[h * 8 + 8 + i]);
              acc[h * 8 + 16 + i] = fmaf(value, weight.z, acc[h * 8 + 16 + i]);
              acc[h * 8 + 24 + i] = fmaf(value, weight.w, acc[h * 8 + 24 + i]);
            }
          }
        }
      }
      int own = 0;
      reduce_scatter<kHeads * 8, 16, kLanes>(acc, own);
      NB_UNROLL
      for (int i = 0; i < kHeads * 8 * kLanes / 32; ++i) {
        sums_of_warps[(warp * kHeads * 8 + own + i) * kLanes + lane] = acc[i];
      }
      sync_block();
      const FoldScale scale = fold(total, {maxima[out_head], sums[out_head]});
      NB_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        float value = 0.0f;
        for (int w = 0; w < kWarps; ++w) value += sums_of_warps[(w * kHeads + out_head) * kDims + output(o)];
        out[o] = fold_value(scale, out[o], value);
      }
      turn ^= 1;
    }
  }
  if (first_head + out_head >= args.group) return;
  const int head = kv_head * args.group + first_head + out_head;
  float* to = a.out + row * a.out_stride + head * dim;
  float inverse = inverse_of(total);
  if (args.partials != nullptr) {
    const std::int64_t row_and_head = static_cast<std::int64_t>(blockIdx.x) * a.num_heads + head;
    float* state = args.partials + (row_and_head * args.splits + static_cast<int>(blockIdx.z)) * (dim + 2);
    if (thread % kThreadsPerHead == 0) {
      state[0] = total.max;
      state[1] = total.sum;
    }
    to = state + 2;
    inverse = 1.0f;
  }
  NB_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    const int d = output(o) % kLanes * 8 + output(o) / kLanes;
    if (d < dim) to[d] = out[o] * inverse;
  }
}

}  // namespace nb::cuda
