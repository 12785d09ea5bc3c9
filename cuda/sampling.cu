// The sampler: one block draws the token of one row of logits, by the stages and rules of sampling/stages.h.
//
// Logits are copied only where a stage changes them. Filters search for the end of a front by its bits, over a list of
// the few tokens that can be in it: a bound is found first, by what cannot be kept.
#include "cuda/sampling.cuh"

#include "cuda/launch.cuh"
#include "cuda/operators.h"
#include "cuda/ptx.cuh"

namespace nb::cuda {
namespace {

/// The stages that change logits; returns the row they leave. Every list names a token once, or in sequence, so that
/// one thread has it.
template <int kThreads>
NB_DEVICE const float* edit(const ops::SampleRow& p, const float* logits, int vocab, float* edited) {
  const bool penalizes = p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0;
  const int num_history = penalizes ? p.num_history : 0;
  if (p.num_biases == 0 && p.num_masked == 0 && p.allowed_bits == nullptr && num_history == 0) return logits;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < vocab; i += kThreads) {
    const bool allowed =
        p.allowed_bits == nullptr || (i / 32 < p.num_allowed_words && (p.allowed_bits[i / 32] >> (i % 32) & 1u) != 0);
    edited[i] = allowed ? logits[i] : -INFINITY;
  }
  sync_block();
  for (int i = thread; i < p.num_biases; i += kThreads) {
    const int token = p.biases[i].token;
    if (i > 0 && p.biases[i - 1].token == token) continue;
    float logit = edited[token];
    for (int j = i; j < p.num_biases && p.biases[j].token == token; ++j) {
      if (logit > -INFINITY) logit = finite(static_cast<double>(logit) + p.biases[j].bias);
    }
    edited[token] = logit;
  }
  sync_block();
  for (int i = thread; i < p.num_masked; i += kThreads) edited[p.masked[i]] = -INFINITY;
  sync_block();
  for (int i = thread; i < num_history; i += kThreads) {
    const int token = p.history[i].token;
    const int in_output = p.history[i].in_output;
    float logit = edited[token];
    if (!(logit > -INFINITY)) continue;
    if (p.repetition_penalty != 1.0) {
      const double value = static_cast<double>(logit);
      logit = finite(value > 0.0 ? value / p.repetition_penalty : value * p.repetition_penalty);
    }
    if (in_output > 0 && (p.presence_penalty != 0.0 || p.frequency_penalty != 0.0)) {
      const double value = static_cast<double>(logit);
      logit = finite(value - static_cast<double>(in_output) * p.frequency_penalty - p.presence_penalty);
    }
    edited[token] = logit;
  }
  sync_block();
  return edited;
}

/// Writes the ids of tokens with at least these bits, in ascending order.
template <int kThreads>
NB_DEVICE Candidates list_from(RowBlock<kThreads>& block, const Candidates& all, unsigned lowest, std::int32_t* ids) {
  const auto mine = block.range(all.count);
  int found = 0;  // by this warp
  for (int begin = mine.begin; begin < mine.end; begin += 32) {
    const int i = begin + lane_id();
    found += count_bits(ballot(i < mine.end && ordered_bits(all.logits[i]) >= lowest));
  }
  const SharedPtr<double> counts = block.gather(static_cast<double>(found));
  int place = 0, total = 0;
  NB_UNROLL_BY(1)
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    if (warp < static_cast<int>(threadIdx.x) / 32) place += static_cast<int>(counts[warp]);
    total += static_cast<int>(counts[warp]);
  }
  for (int begin = mine.begin; begin < mine.end; begin += 32) {
    const int i = begin + lane_id();
    const bool kept = i < mine.end && ordered_bits(all.logits[i]) >= lowest;
    const unsigned lanes = ballot(kept);
    if (kept) ids[place + count_bits(lanes & ((1u << lane_id()) - 1))] = i;
    place += count_bits(lanes);
  }
  sync_block();
  return {all.logits, ids, total};
}

/// Inverse of the cumulative distribution, candidates in ascending order of id. Returns the token for all lanes of the
/// warp that has it, -1 for others.
template <int kThreads, class Weight>
NB_DEVICE int draw(RowBlock<kThreads>& block, const Candidates& candidates, double uniform, const Weight& weight) {
  const auto mine = block.range(candidates.count);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const auto weight_at = [&](int i) {
    if (i >= mine.end) return 0.0f;
    const int id = candidates.id(i);
    return weight(candidates.logits[id], id);
  };
  double mass = 0.0;
  for (int begin = mine.begin; begin < mine.end; begin += 32) {
    mass += static_cast<double>(warp_sum(weight_at(begin + lane_id())));
  }
  const SharedPtr<double> masses = block.gather(mass);
  double total = 0.0;
  NB_UNROLL_BY(1)
  for (int w = 0; w < kThreads / 32; ++w) total += masses[w];
  const double wanted = uniform * total;
  // The warp in which the sum passes `wanted`, or the last one with any mass, should rounding keep it from passing.
  int chosen = -1;
  double before = 0.0, sum = 0.0;
  NB_UNROLL_BY(1)
  for (int w = 0; w < kThreads / 32; ++w) {
    const double more = masses[w];
    if (more <= 0.0) continue;
    chosen = w;
    before = sum;
    sum += more;
    if (sum > wanted) break;
  }
  if (chosen != warp) return -1;
  // The same for 32 candidates at a time, and for these.
  int group = mine.begin;
  double mass_before_group = 0.0;
  mass = 0.0;
  for (int begin = mine.begin; begin < mine.end; begin += 32) {
    const float more = warp_sum(weight_at(begin + lane_id()));
    if (more <= 0.0f) continue;
    group = begin;
    mass_before_group = mass;
    mass += static_cast<double>(more);
    if (before + mass > wanted) break;
  }
  const float own = weight_at(group + lane_id());
  double up_to = static_cast<double>(own);
  for (int step = 1; step < 32; step *= 2) {
    const double other = shuffle(up_to, lane_id() - step);
    if (lane_id() >= step) up_to += other;
  }
  const unsigned passing = ballot(own > 0.0f && before + (mass_before_group + up_to) > wanted);
  const unsigned possible = ballot(own > 0.0f);
  const int lane = highest_bit(passing != 0 ? passing & (~passing + 1) : possible);  // the first one, else the last
  return candidates.id(group + lane);
}

/// grid: rows.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) sample_kernel(ops::SampleArgs a) {
  NB_SHARED(double, totals, 2 * kThreads / 32);
  NB_SHARED(Rank, ranks, kThreads / 32);
  grid_trigger();
  grid_wait();
  const ops::SampleRow& p = a.params[blockIdx.x];
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x);
  RowBlock<kThreads> block{totals, ranks};
  Candidates candidates{edit<kThreads>(p, a.logits + row * a.logits_stride, a.vocab, a.scratch_logits + row * a.vocab),
                        nullptr, a.vocab};

  Rank best = 0;
  block.for_each(candidates, [&](float logit, int id) {
    const Rank rank = rank_of(ordered_bits(logit), id);
    if (rank > best) best = rank;
  });
  const unsigned own_greatest = static_cast<unsigned>(best >> 32);
  best = block.max(best);
  if (best < kAnyToken || p.temperature == 0.0) {
    if (threadIdx.x == 0) {
      a.out[row] = best < kAnyToken ? -1 : static_cast<std::int32_t>(0xffffffffu - static_cast<unsigned>(best));
    }
    return;
  }
  const unsigned greatest = static_cast<unsigned>(best >> 32);
  const float max = ordered_value(greatest);
  const double inverse = 1.0 / p.temperature;
  const float bits = static_cast<float>(inverse < 1e-37 ? 1e-37 : inverse > 1e38 ? 1e38 : inverse) * 0x1.715476p+0f;
  const auto weigh = [&](float logit) { return exp_weight(logit, max, bits); };

  Rank cut = kAnyToken;
  unsigned lowest = 1;
  if (p.log_min_p > -INFINITY) {
    lowest = ordered_bits(finite(static_cast<double>(max) + p.temperature * p.log_min_p));
    cut = lowest_rank(lowest);
  }
  const bool cuts_count = p.top_k > 0 && p.top_k < a.vocab;
  if (cuts_count && p.top_k <= kThreads) {
    // So many threads have a token of at least this logit.
    lowest = greatest_reaching(lowest, greatest, static_cast<double>(p.top_k),
                               [&](unsigned x) { return block.sum(own_greatest >= x ? 1.0 : 0.0); });
  }
  if (lowest > 1) candidates = list_from(block, candidates, lowest, a.scratch_ids + row * a.vocab);
  if (cuts_count && p.top_k < candidates.count) {
    cut = end_of_front(block, candidates, a.vocab, cut, lowest, greatest, static_cast<double>(p.top_k),
                       [](float) { return 1.0f; });
  }
  if (p.top_p < 1.0) {
    float own = 0.0f;
    block.for_each(candidates, [&](float logit, int id) {
      if (rank_of(ordered_bits(logit), id) >= cut) own += weigh(logit);
    });
    const double total = block.sum(static_cast<double>(own));
    if (candidates.ids == nullptr) {
      // All tokens below this have a mass of at most (1 - top_p) * total; a little room for the rounding of sums.
      const double nats = log((1.0 - p.top_p) * total / static_cast<double>(a.vocab)) - 1e-3;
      lowest = ordered_bits(finite(static_cast<double>(max) + (nats < -88.0 ? -88.0 : nats) * p.temperature));
      candidates = list_from(block, candidates, lowest, a.scratch_ids + row * a.vocab);
    }
    cut = end_of_front(block, candidates, a.vocab, cut, lowest, greatest, p.top_p * total, weigh);
  }
  const int token = draw(block, candidates, uniform_at(p.seed, p.choice, p.position), [&](float logit, int id) {
    return rank_of(ordered_bits(logit), id) >= cut ? weigh(logit) : 0.0f;
  });
  if (token >= 0 && lane_id() == 0) a.out[row] = token;
}

}  // namespace

void sample(const ops::SampleArgs& a, const Part&) {
  constexpr int kFewTokens = 8192;
  const auto rows = static_cast<unsigned>(a.rows);
  if (a.vocab <= kFewTokens) {
    launch({.name = "sample_kernel", .grid_x = rows, .threads = 256}, sample_kernel<256>, a);
  } else {
    launch({.name = "sample_kernel", .grid_x = rows, .threads = 1024}, sample_kernel<1024>, a);
  }
}

}  // namespace nb::cuda
