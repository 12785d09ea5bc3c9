// What the kernels of attention have in common: which keys a row sees, states of splits and how they are folded, rows
// by number.
//
// Rules that keep a row's bits independent of everything else (promise 1): a run is cut into splits at multiples of 256
// keys; each split starts from the empty state; a row folds its splits in order, run by run. A split of which a row
// sees nothing is the empty state, which changes nothing. Source of the online softmax and of the merge: Milakov &
// Gimelshein 2018, Dao et al. 2022.
#pragma once

#include "base/ids.h"
#include "cuda/formulas.cuh"
#include "cuda/kv_cells.cuh"
#include "ops/args.h"

namespace nb::cuda {

/// Keys [begin, end) of a run; empty if begin >= end.
struct KeyRange {
  int begin, end;
};

/// How many of the ascending positions are below `limit`. All of them is what rows of a decode find, with one read.
NB_DEVICE int count_below(const std::int32_t* positions, int count, int limit) {
  if (count == 0 || positions[count - 1] < limit) return count;
  int begin = 0;
  while (count > 0) {
    const int half = count / 2;
    const bool below = positions[begin + half] < limit;
    begin = below ? begin + half + 1 : begin;
    count = below ? count - half - 1 : half;
  }
  return begin;
}

/// The range of a run's keys that a row sees, hidden ones included.
NB_DEVICE KeyRange visible_keys(const ops::AttentionArgs& a, const ops::AttentionRun& run, int row) {
  int limit = a.positions[row] - run.position_offset + 1;
  int first = a.window > 0 && limit > a.window ? limit - a.window : 0;
  if (run.positions_begin >= 0) {
    const std::int32_t* positions = a.key_positions + run.positions_begin;
    if (first > 0) first = count_below(positions, run.num_keys, first);
    limit = count_below(positions, run.num_keys, limit);
  }
  if (first < run.first_key) first = run.first_key;
  return {first, limit < run.num_keys ? limit : run.num_keys};
}

/// The number of the policy by which rows of a segment see the keys of its run `r`; -1: none. Only the last run has
/// one.
NB_DEVICE int policy_of(const ops::AttentionSegment& segment, int r) {
  const bool is_last = r + 1 == segment.run_begin + segment.run_count;
  return is_last ? segment.policy : -1;
}

NB_DEVICE int splits_of(const ops::AttentionRun& run) { return (run.num_keys + kSplitTokens - 1) / kSplitTokens; }

constexpr float kLog2e = 1.44269504f;

/// Numbers `pair` and pair + D / 2 of a query head, rotated to `position` and scaled so that exp2 of a product with a
/// key is its weight.
NB_DEVICE float2 rotated_pair(const ops::AttentionArgs& a, int row, int head, int position, int pair) {
  const int dim = a.kv.head_dim, half = dim / 2;
  const float* q = a.q + row * a.q_stride + head * dim + pair;
  const float* angle = a.rope.cos_sin + static_cast<std::int64_t>(position) * dim + pair;
  const float scale = a.scale * kLog2e;
  float first = q[0], second = q[half];
  rotate(first, second, angle, half);
  return {first * scale, second * scale};
}

/// Of the scores of some keys in base 2: the largest, and the sum of exp2(score - max). Empty: {-infinity, 0}.
struct SplitState {
  float max;
  float sum;
};

NB_DEVICE SplitState empty_state() { return {-INFINITY, 0.0f}; }

/// What a run adds to the scores of all its keys, it adds to their maximum. For kernels that know policies.
template <bool kPolicies>
NB_DEVICE float biased(float max, const ops::AttentionRun& run) {
  if constexpr (kPolicies) max += run.score_bias * kLog2e;
  return max;
}

/// What a fold does to weighted values: out = out * keep + split * add.
struct FoldScale {
  float keep, add;
};

/// total <- total folded with split. Folding into the empty state gives the split itself, to the bit.
NB_DEVICE FoldScale fold(SplitState& total, const SplitState& split) {
  if (split.sum == 0.0f) return {1.0f, 0.0f};
  const float next = fmaxf(total.max, split.max);
  const FoldScale scale = {exp2f(total.max - next), exp2f(split.max - next)};
  total.sum = fmaf(split.sum, scale.add, total.sum * scale.keep);
  total.max = next;
  return scale;
}

NB_DEVICE float fold_value(const FoldScale& scale, float total, float split) {
  return fmaf(split, scale.add, total * scale.keep);
}

/// What the sum of weighted values is to be multiplied with; a row that sees no key gives zeros.
NB_DEVICE float inverse_of(const SplitState& total) { return total.sum == 0.0f ? 0.0f : 1.0f / total.sum; }

/// Item `index` of a segment.
struct SegmentItem {
  int segment, index;
};

/// Item `number` of all, where segment s has count(s) of them; segment -1 if there are not so many. For whole warps.
template <class Count>
NB_DEVICE SegmentItem find_item(const ops::AttentionArgs& a, int number, Count&& count) {
  for (int base = 0; base < a.num_segments; base += 32) {
    const int lane = lane_id();
    const int own = base + lane < a.num_segments ? count(a.segments[base + lane]) : 0;
    int until = own;  // items of the lanes up to this one
    for (int step = 1; step < 32; step *= 2) {
      const int more = shuffle(until, lane - step);
      if (lane >= step) until += more;
    }
    const int all = shuffle(until, 31);
    if (number < all) {
      int found = 0;  // lanes all of whose items come before
      for (int step = 16; step > 0; step /= 2) {
        if (shuffle(until, found + step - 1) <= number) found += step;
      }
      return {base + found, number - shuffle(until - own, found)};
    }
    number -= all;
  }
  return {-1, 0};
}

}  // namespace nb::cuda
