// Which earlier keys a row sees under a lossy KV policy, from positions alone.
//
// For sequences whose keys are one run from position 0, so that a key's index is its position. Rules nest: a key that a
// row does not see is seen by no later row, so its block can be given back. Sinks and a window: Xiao et al. 2023
// (StreamingLLM, arXiv:2309.17453). C headers only: compiled for every instruction set and for devices; functions are
// static, so that the linker keeps no copy of one instruction set for all.
#pragma once

#include <stdint.h>

#include "base/ids.h"

#if defined(__CUDACC__)
#define NB_KEY_POLICY __host__ __device__ static inline
#else
#define NB_KEY_POLICY static inline
#endif

namespace nb::ops {

/// See KeyPolicy.
enum class KeyRule : uint8_t { full, window, strided, block, budget, summary };

/// The row at position p sees a key at s <= p if s < prefix, or s is in the tail: the last `window` keys, its own
/// included, with what is before them in their block (strided, block, budget) or group (summary), or the rule keeps it:
///   full     all keys
///   window   none
///   strided  those of every period-th block of kBlockTokens
///   block    the last `keep` of each group of `period` tokens, both multiples of kBlockTokens
///   budget   those of the `keep` best of the blocks that lie between prefix and tail entirely. The more often 2
///   divides
///            a block's number, from 1 on, the better; of equals the younger one
///   summary  none: each group of `period` tokens before the tail is seen through its summary instead, a key of another
///            run
struct KeyPolicy {
  KeyRule rule = KeyRule::full;
  int32_t prefix = 0;  ///< at least 0
  int32_t window = 1;  ///< at least 1, except with `full`
  int32_t period = 0;
  int32_t keep = 0;
};

/// The first key of the tail of the row at `position`.
NB_KEY_POLICY int32_t tail_begin(const KeyPolicy& policy, int32_t position) {
  const int32_t first = position - policy.window + 1;
  if (policy.rule == KeyRule::full || first <= 0) return 0;
  if (policy.rule == KeyRule::window) return first;
  const int32_t unit = policy.rule == KeyRule::summary ? policy.period : kBlockTokens;
  return first - first % unit;
}

/// The first block with no key of the prefix.
NB_KEY_POLICY int32_t first_block_behind(int32_t prefix) {
  return prefix / kBlockTokens + (prefix % kBlockTokens != 0 ? 1 : 0);
}

/// Whether a block before the tail, which begins with block `tail`, stays because of the rule; not with `full`.
NB_KEY_POLICY bool stays(const KeyPolicy& policy, int32_t tail, int32_t block) {
  if (policy.rule == KeyRule::strided) return block % policy.period == 0;
  if (policy.rule == KeyRule::block) return kBlockTokens * block % policy.period >= policy.period - policy.keep;
  if (policy.rule != KeyRule::budget) return false;
  // Candidates have numbers from 1 on, first < number <= tail. Better are the multiples of twice the largest power of 2
  // in `number`, and of its odd multiples those behind it.
  const int32_t first = first_block_behind(policy.prefix), number = block + 1;
  if (number <= first) return false;
  const int32_t power = number & -number;
  const int32_t better = tail / (2 * power) - first / (2 * power);
  const int32_t younger = tail / power - number / power - (tail / (2 * power) - number / (2 * power));
  return better + younger < policy.keep;
}

/// Bit i: because of the policy the row at `position` does not see key kBlockTokens * block + i. Keys behind the row
/// have no bit.
NB_KEY_POLICY uint16_t hidden_bits(const KeyPolicy& policy, int32_t position, int32_t block) {
  const int32_t begin = kBlockTokens * block, tail = tail_begin(policy, position);
  const int32_t first = policy.prefix > begin ? policy.prefix - begin : 0;
  const int32_t last = tail - begin < kBlockTokens ? tail - begin : kBlockTokens;
  if (first >= last || stays(policy, tail / kBlockTokens, block)) return 0;
  return static_cast<uint16_t>((1u << last) - (1u << first));
}

/// No row at `position` or later sees any key of the block.
NB_KEY_POLICY bool is_dead(const KeyPolicy& policy, int32_t position, int32_t block) {
  return hidden_bits(policy, position, block) == 0xffff;
}

/// The first block from `block` on of which the policy shows the row at `position` any key.
NB_KEY_POLICY int32_t next_seen_block(const KeyPolicy& policy, int32_t position, int32_t block) {
  const int32_t tail = tail_begin(policy, position) / kBlockTokens;
  if (block >= tail || kBlockTokens * block < policy.prefix) return block;
  int32_t next = tail;
  if (policy.rule == KeyRule::strided) {
    const int32_t within = block % policy.period;
    const int32_t ahead = within == 0 ? 0 : policy.period - within;
    next = ahead < tail - block ? block + ahead : tail;
  } else if (policy.rule == KeyRule::block && policy.keep > 0) {
    const int32_t blocks = policy.period / kBlockTokens, gone = blocks - policy.keep / kBlockTokens;
    const int32_t within = block % blocks;
    next = within >= gone ? block : block - within + gone;
  } else if (policy.rule == KeyRule::budget) {
    // All multiples of `power` stay, some of its half and none of a quarter.
    const int32_t first = first_block_behind(policy.prefix);
    int32_t power = 1;
    while (tail / power - first / power > policy.keep) power *= 2;
    const int32_t half = power > 1 ? power / 2 : 1;
    const int32_t number = (block + half) / half * half;  // block + 1, rounded up
    next = number <= tail && !stays(policy, tail, number - 1) ? number - 1 + half : number - 1;
  }
  return next < tail ? next : tail;
}

/// Rows [0, exact_tokens) see all keys before them, the next one does not. INT32_MAX if all rows do.
NB_KEY_POLICY int32_t exact_tokens(const KeyPolicy& policy) {
  if (policy.rule == KeyRule::full) return INT32_MAX;
  const int64_t prefix = policy.prefix, window = policy.window, period = policy.period;
  const int64_t first = prefix / kBlockTokens;  // block with a key behind the prefix
  int64_t tail = prefix + 1;                    // where one must begin that leaves out a key
  if (policy.rule == KeyRule::summary) {
    tail = (prefix / period + 1) * period;
  } else if (policy.rule == KeyRule::strided) {
    if (period == 1) return INT32_MAX;
    tail = (first % period == 0 ? first + 2 : first + 1) * kBlockTokens;
  } else if (policy.rule == KeyRule::block) {
    if (policy.keep == period) return INT32_MAX;
    const int64_t within = first * kBlockTokens % period;
    tail = (within < period - policy.keep ? first : first + (period - within) / kBlockTokens) * kBlockTokens +
           kBlockTokens;
  } else if (policy.rule == KeyRule::budget) {
    tail = (prefix % kBlockTokens != 0 ? first + 1 : first + policy.keep + 1) * kBlockTokens;
  }
  const int64_t rows = tail + window - 1;
  return rows < INT32_MAX ? static_cast<int32_t>(rows) : INT32_MAX;
}

}  // namespace nb::ops
