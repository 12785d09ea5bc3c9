// The scheduler's dealings with policies: how many blocks a sequence takes, and which it gives back while it runs.
#include <algorithm>

#include "base/error.h"
#include "engine/scheduler.h"

namespace nb::engine {

namespace {

/// Admission leaves this part of the pool for the growth of what runs, and at least a block.
constexpr int kSpareShare = 100;

/// What a sequence of `all` blocks at most holds at a time, that gives back what its policy hides and computes slices
/// of up to `slice` tokens.
int most_blocks(const ops::KeyPolicy& policy, int all, int slice) {
  const auto in_blocks = [](std::int64_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; };
  // The tail of the first row of the slice and the slice, neither of which need begin with a block.
  std::int64_t most = in_blocks(policy.prefix) + in_blocks(std::int64_t{policy.window} + slice) + 2;
  if (policy.rule == ops::KeyRule::strided) most += all / policy.period + 1;
  if (policy.rule == ops::KeyRule::block) {
    const int group = policy.period / kBlockTokens;
    most += (all / group + 1) * (policy.keep / kBlockTokens);
  }
  if (policy.rule == ops::KeyRule::budget) most += policy.keep;
  if (policy.rule == ops::KeyRule::summary) most += in_blocks(policy.period);
  return policy.rule == ops::KeyRule::full ? all : static_cast<int>(std::min<std::int64_t>(all, most));
}

}  // namespace

/// Blocks of its own that a sequence may need.
int Scheduler::own_need(const Sequence& sequence) const {
  // Those of a chunk being computed count as the chunk's.
  if (sequence.is_internal() || sequence.request.only_chunks) return 0;
  const int all = kv::BlockTable::blocks_for(sequence.max_own_len());
  if (!sequence.request.keeps_kv) return all;
  const int exact = std::min(sequence.max_own_len(), ops::exact_tokens(sequence.request.key_policy));
  const int published = cache_ ? kv::BlockTable::blocks_for(exact) : 0;  // see drop_unseen()
  return std::min(all, most_blocks(sequence.request.key_policy, all, limits_.max_batch_tokens) + published) +
         kv::BlockTable::blocks_for(num_summaries(sequence, sequence.max_own_len()));
}

/// Summaries that the first `num_tokens` tokens see.
int Scheduler::num_summaries(const Sequence& sequence, int num_tokens) {
  const ops::KeyPolicy& policy = sequence.request.key_policy;
  if (policy.rule != ops::KeyRule::summary) return 0;
  return ops::tail_begin(policy, num_tokens - 1) / policy.period;
}

/// Reserves blocks for `num_tokens` tokens and the summaries that they see; false if the pool has too few.
bool Scheduler::reserve(Sequence& sequence, int num_tokens) {
  return sequence.table.reserve(pool_, num_tokens) &&
         sequence.summaries.reserve(pool_, num_summaries(sequence, num_tokens));
}

/// A few blocks stay for the growth of those that run.
int Scheduler::spare_blocks() const { return std::max(1, pool_.num_blocks() / kSpareShare); }

/// Tokens to have blocks for while those from `from` on are computed: all, or those of the next slice.
int Scheduler::wanted_len(const Sequence& sequence, int from) const {
  const int most = limits_.max_batch_tokens;
  return sequence.drops_kv() && sequence.own_len() - from > most ? from + most : sequence.own_len();
}

/// How many rows the sequence has blocks for. Where it takes them slice by slice, it gets what is free now, but for a
/// few that others may need in order to grow.
int Scheduler::room_for(Sequence& sequence) {
  if (!sequence.drops_kv()) return sequence.next_rows();
  const int wanted = wanted_len(sequence, sequence.computed_len());
  const int missing = kv::BlockTable::blocks_for(wanted - sequence.table.capacity());
  const int free = pool_.num_available() - spare_blocks();
  if (missing > 0 && free > 0) {
    sequence.table.reserve(pool_, sequence.table.capacity() + std::min(missing, free) * kBlockTokens);
  }
  int end = std::min(wanted, sequence.table.capacity());
  while (end > sequence.computed_len() && !reserve(sequence, end)) end -= kBlockTokens;
  return end - sequence.computed_len();
}

/// Reserves blocks for `num_tokens` tokens, from younger sequences if the pool has none. False if the sequence itself
/// was the youngest and was preempted.
bool Scheduler::take_blocks(Sequence& sequence, int num_tokens) {
  while (!reserve(sequence, num_tokens)) {
    if (saves_.drop_one(freed_blocks_)) continue;
    const bool is_youngest = running_.back().get() == &sequence;
    preempt(*running_.back());
    if (is_youngest) return false;
  }
  return true;
}

/// Gives back the blocks that no later row will see; of a sequence that keeps nothing, all once it has a new token.
void Scheduler::drop_unseen(const PlannedSequence& entry) {
  Sequence& sequence = *entry.sequence;
  if (!sequence.request.keeps_kv && entry.samples && !sequence.finished()) sequence.forget_blocks(pool_, freed_blocks_);
  const ops::KeyPolicy& policy = sequence.request.key_policy;
  if (policy.rule == ops::KeyRule::full) return;
  // Summaries are made of what the rows of a step see no more.
  const int row = sequence.computed_len() - (policy.rule == ops::KeyRule::summary ? 1 : 0);
  const int tail = ops::tail_begin(policy, row) / kBlockTokens;
  if (tail == sequence.tail_block) return;
  sequence.tail_block = tail;
  const auto blocks = sequence.table.blocks();
  for (int block = tail - 1; block >= 0; --block) {
    // What is published goes last one first: the prefix cache keeps no block without those before it.
    const bool has_child =
        block + 1 < sequence.num_published && blocks[static_cast<std::size_t>(block) + 1] != kNoBlock;
    if (has_child) break;
    if (ops::is_dead(policy, row, block)) sequence.table.drop(pool_, block, freed_blocks_);
  }
}

}  // namespace nb::engine
