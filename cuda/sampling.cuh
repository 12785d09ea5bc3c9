// What the sampler's kernel is built of: an order of tokens as integers, weights, random numbers, and the search for
// the place where a front of that order ends.
//
// Every filter keeps the front of one order, descending logit and then ascending id, so a set of candidates is one
// number, its `cut`: a token is kept if its rank is not below. Weights are those of sampling/softmax.cpp, bit for bit;
// sums over a row are in another order, but in the same one for every row and launch.
#pragma once

#include <cfloat>

#include "cuda/number.cuh"
#include "ops/args.h"

namespace nb::cuda {

using Rank = unsigned long long;

/// Bits in the order of the numbers: greater for a greater logit, the same for both zeros, +infinity as the largest
/// finite value; 0 for -infinity and NaN, which cannot be drawn.
NB_DEVICE unsigned ordered_bits(float logit) {
  if (!(logit > -INFINITY)) return 0;
  const float value = logit > FLT_MAX ? FLT_MAX : logit == 0.0f ? 0.0f : logit;
  const unsigned bits = float_to_bits(value);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

/// The logit of such bits; not of 0.
NB_DEVICE float ordered_value(unsigned bits) {
  return bits_to_float((bits & 0x80000000u) != 0 ? bits ^ 0x80000000u : ~bits);
}

/// Greater for a token that is more likely; a tie goes to the lower id.
NB_DEVICE Rank rank_of(unsigned ordered, int id) {
  return static_cast<Rank>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(id));
}

/// The lowest rank of a token that can be drawn, and of any token with such bits.
inline constexpr Rank kAnyToken = Rank{1} << 32;
NB_DEVICE Rank lowest_rank(unsigned ordered) { return static_cast<Rank>(ordered) << 32; }

NB_DEVICE int count_bits(unsigned bits) {
#if defined(__CUDACC__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

/// The number of the highest bit; `bits` is not 0.
NB_DEVICE int highest_bit(unsigned bits) {
#if defined(__CUDACC__)
  return 31 - __clz(static_cast<int>(bits));
#else
  return 31 - __builtin_clz(bits);
#endif
}

/// exp((logit - max) * scale) as in sampling/softmax.cpp, with the same operations. `bits` is scale * log2(e).
NB_DEVICE float exp_weight(float logit, float max, float bits) {
  constexpr float kLowestBits = -125.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded number in the low bits
  const float x = ((logit > FLT_MAX ? FLT_MAX : logit) - max) * bits;
  const float bounded = x > kLowestBits ? x : kLowestBits;
  const float shifted = bounded + kRound;
  const float f = bounded - (shifted - kRound);
  float p = 0x1.430912p-13f;
  p = p * f + 0x1.5d87fep-10f;
  p = p * f + 0x1.3b2ab6p-7f;
  p = p * f + 0x1.c6b08ep-5f;
  p = p * f + 0x1.ebfbe0p-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  return x >= kLowestBits ? bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23)) : 0.0f;
}

/// uniform_at() of base/rng.h: Philox4x32-10 of (seed, choice, position), 53 bits of it in [0, 1).
NB_DEVICE double uniform_at(std::uint64_t seed, unsigned choice, std::uint64_t position) {
  unsigned counter[4] = {static_cast<unsigned>(position), static_cast<unsigned>(position >> 32), choice, 0};
  unsigned key[2] = {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32)};
  NB_UNROLL
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t first = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t second = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter[0] = static_cast<unsigned>(second >> 32) ^ counter[1] ^ key[0];
    counter[1] = static_cast<unsigned>(second);
    counter[2] = static_cast<unsigned>(first >> 32) ^ counter[3] ^ key[1];
    counter[3] = static_cast<unsigned>(first);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  const std::uint64_t bits = (static_cast<std::uint64_t>(counter[0]) << 32 | counter[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

/// Rounds to float and keeps a finite value finite.
NB_DEVICE float finite(double value) {
  constexpr double kMax = static_cast<double>(FLT_MAX);
  return static_cast<float>(value < -kMax ? -kMax : value > kMax ? kMax : value);
}

/// Candidates by ascending id: all tokens of a row, or those of a list.
struct Candidates {
  const float* logits;      ///< by token id
  const std::int32_t* ids;  ///< null: all
  int count;

  NB_DEVICE int id(int index) const { return ids == nullptr ? index : ids[index]; }
};

/// A block of threads over a row. Warps own consecutive ranges of candidates, lanes take turns in them.
template <int kThreads>
struct RowBlock {
  static constexpr int kWarps = kThreads / 32;
  SharedPtr<double> totals;  ///< two sets of a value for every warp, used in turn: so one barrier a sum is enough
  SharedPtr<Rank> ranks;     ///< one for every warp
  int turn = 0;

  struct Range {
    int begin;
    int end;
  };
  static NB_DEVICE Range range(int count) {
    const int each = (count + 32 * kWarps - 1) / (32 * kWarps) * 32;
    const int begin = static_cast<int>(threadIdx.x) / 32 * each;
    return {begin < count ? begin : count, begin + each < count ? begin + each : count};
  }

  /// Calls visit(logit, id) for the share of this thread.
  template <class Visit>
  NB_DEVICE void for_each(const Candidates& candidates, const Visit& visit) const {
    const Range mine = range(candidates.count);
    NB_UNROLL_BY(4)
    for (int i = mine.begin + lane_id(); i < mine.end; i += 32) {
      const int id = candidates.id(i);
      visit(candidates.logits[id], id);
    }
  }

  /// The values of all warps; lanes of a warp have the same. Valid until the call after the next.
  NB_DEVICE SharedPtr<double> gather(double value) {
    const SharedPtr<double> set = totals + turn * kWarps;
    turn ^= 1;
    if (lane_id() == 0) set[threadIdx.x / 32] = value;
    sync_block();
    return set;
  }

  /// The sum over the block, for all threads. No term that is not negative makes it less.
  NB_DEVICE double sum(double value) {
    for (int step = 16; step > 0; step /= 2) value += shuffle_xor(value, step);
    const SharedPtr<double> set = gather(value);
    double total = lane_id() < kWarps ? static_cast<double>(set[lane_id()]) : 0.0;
    for (int step = 16; step > 0; step /= 2) total += shuffle_xor(total, step);
    return total;
  }

  /// The greatest rank of the block, for all threads. To be called once.
  NB_DEVICE Rank max(Rank rank) const {
    for (int step = 16; step > 0; step /= 2) {
      const Rank other = shuffle_xor(rank, step);
      if (other > rank) rank = other;
    }
    if (lane_id() == 0) ranks[threadIdx.x / 32] = rank;
    sync_block();
    NB_UNROLL_BY(1)
    for (int warp = 0; warp < kWarps; ++warp) {
      const Rank other = ranks[warp];
      if (other > rank) rank = other;
    }
    return rank;
  }
};

/// The greatest x in [lowest, greatest] with reach(x) >= wanted, bit by bit from the highest, where reach() never rises
/// with x; `lowest` if there is none. reach() is called by all threads together.
template <class Reach>
NB_DEVICE unsigned greatest_reaching(unsigned lowest, unsigned greatest, double wanted, const Reach& reach) {
  unsigned found = 0;
  for (unsigned bit = 0x80000000u; bit != 0; bit >>= 1) {
    const unsigned x = found | bit;
    if (x > greatest) continue;
    if (x <= lowest || reach(x) >= wanted) found = x;
  }
  return found > lowest ? found : lowest;
}

/// The rank at which the shortest front of the candidates ends whose measures sum up to at least `wanted`. `lowest` and
/// `greatest` are bounds of the ordered bits of those at or above `cut`; all of these if their sum is below.
template <int kThreads, class Measure>
NB_DEVICE Rank end_of_front(RowBlock<kThreads>& block, const Candidates& candidates, int vocab, Rank cut,
                            unsigned lowest, unsigned greatest, double wanted, const Measure& measure) {
  const auto mass_from = [&](Rank from) {
    float mass = 0.0f;
    block.for_each(candidates, [&](float logit, int id) {
      if (rank_of(ordered_bits(logit), id) >= from) mass += measure(logit);
    });
    return block.sum(static_cast<double>(mass));
  };
  if (static_cast<unsigned>(cut >> 32) > lowest) lowest = static_cast<unsigned>(cut >> 32);
  const auto above_cut = [cut](Rank from) { return from > cut ? from : cut; };
  const unsigned value =
      greatest_reaching(lowest, greatest, wanted, [&](unsigned x) { return mass_from(above_cut(lowest_rank(x))); });
  // Of the tokens with this logit, those with lower ids; usually there is one.
  float equal = 0.0f;
  block.for_each(candidates, [&](float logit, int) { equal += ordered_bits(logit) == value ? 1.0f : 0.0f; });
  if (block.sum(static_cast<double>(equal)) <= 1.0) return above_cut(lowest_rank(value));
  const unsigned last = 0xffffffffu - static_cast<unsigned>(vocab - 1);  // of the highest id
  const unsigned place = greatest_reaching(last, 0xffffffffu, wanted,
                                           [&](unsigned x) { return mass_from(above_cut(lowest_rank(value) | x)); });
  return above_cut(lowest_rank(value) | place);
}

}  // namespace nb::cuda
