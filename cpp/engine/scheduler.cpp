#include "engine/scheduler.h"

#include <algorithm>

#include "base/error.h"

namespace nb::engine {

Scheduler::Scheduler(const SchedulerLimits& limits, int num_blocks) : limits_(limits), pool_(num_blocks) {
  NB_CHECK(limits.max_batch_tokens >= 1, invalid_argument, "max_batch_tokens must be >= 1, got ",
           limits.max_batch_tokens);
  NB_CHECK(limits.max_num_seqs >= 1, invalid_argument, "max_num_seqs must be >= 1, got ", limits.max_num_seqs);
  NB_CHECK(limits.max_waiting >= 0, invalid_argument, "max_waiting must be >= 1, or 0 for no limit, got ",
           limits.max_waiting);
  running_.reserve(static_cast<std::size_t>(limits.max_num_seqs));
  plan_.entries.reserve(static_cast<std::size_t>(limits.max_num_seqs));
  fresh_blocks_.reserve(static_cast<std::size_t>(num_blocks));
  freed_blocks_.reserve(static_cast<std::size_t>(num_blocks));
}

void Scheduler::submit(std::unique_ptr<Sequence> sequence) {
  const int needed = kv::BlockTable::blocks_for(sequence->max_len);
  NB_CHECK(needed <= pool_.num_blocks(), invalid_argument, "the request needs ", needed, " KV blocks of ", kBlockTokens,
           " tokens (prompt of ", sequence->num_prompt, " tokens, ", sequence->max_len,
           " with its output), the whole pool has ", pool_.num_blocks(), "; lower max_tokens or raise kv_cache_bytes");
  const int places = limits_.max_num_seqs + limits_.max_waiting;
  NB_CHECK(limits_.max_waiting == 0 || num_running() + num_waiting() < places, overloaded, num_running(),
           " requests run and ", num_waiting(), " wait; max_num_seqs is ", limits_.max_num_seqs, ", max_waiting ",
           limits_.max_waiting);
  waiting_.push_back(std::move(sequence));
}

bool Scheduler::cancel(RequestId id) {
  const auto mark = [id](auto& queue) {
    const auto found = std::find_if(queue.begin(), queue.end(), [id](const auto& entry) { return entry->id == id; });
    if (found == queue.end()) return false;
    (*found)->cancel_requested = true;
    return true;
  };
  return mark(running_) || mark(waiting_);
}

void Scheduler::cancel_running() {
  for (auto& sequence : running_) sequence->cancel_requested = true;
}

const StepPlan& Scheduler::plan() {
  plan_.entries.clear();
  plan_.num_tokens = 0;
  int budget = limits_.max_batch_tokens;
  for (auto& sequence : running_) {
    if (sequence->pending_len() == 1) add(*sequence, budget);
  }
  for (auto& sequence : running_) {
    if (sequence->pending_len() > 1) add(*sequence, budget);
  }
  while (budget > 0 && admit_next()) add(*running_.back(), budget);
  return plan_;
}

/// Gives the sequence as many rows as it needs and the budget has.
void Scheduler::add(Sequence& sequence, int& budget) {
  if (sequence.cancel_requested || budget == 0) return;
  const int first = sequence.computed_len();
  const int count = std::min(sequence.pending_len(), budget);
  const auto fresh = sequence.table.grow_to(first + count);
  fresh_blocks_.insert(fresh_blocks_.end(), fresh.begin(), fresh.end());
  const bool samples = count == sequence.pending_len() && sequence.generates();
  plan_.entries.push_back({.sequence = &sequence, .first = first, .count = count, .samples = samples});
  plan_.num_tokens += count;
  budget -= count;
}

/// Moves the oldest waiting sequence to the running ones with every block it can ever need, so that nothing running
/// is ever out of blocks. If the oldest does not fit, nobody younger overtakes it.
bool Scheduler::admit_next() {
  if (num_running() == limits_.max_num_seqs) return false;
  const auto oldest =
      std::find_if(waiting_.begin(), waiting_.end(), [](const auto& sequence) { return !sequence->cancel_requested; });
  if (oldest == waiting_.end()) return false;
  if (!(*oldest)->table.reserve(pool_, (*oldest)->max_len)) return false;
  (*oldest)->computed_len_ = 0;  // a cache hit will start further on
  running_.push_back(std::move(*oldest));
  waiting_.erase(oldest);
  return true;
}

void Scheduler::commit(const StepPlan& plan, std::span<const TokenId> sampled) {
  NB_ASSERT(sampled.size() == plan.entries.size());
  for (std::size_t i = 0; i < sampled.size(); ++i) advance(plan.entries[i], sampled[i]);
  retire(running_);
  retire(waiting_);
}

/// What a step did to one sequence: KV is stored, and perhaps there is a token.
void Scheduler::advance(const PlannedSequence& entry, TokenId sampled) {
  Sequence& sequence = *entry.sequence;
  NB_ASSERT(!sequence.finished() && sequence.computed_len_ == entry.first);
  sequence.computed_len_ += entry.count;
  if (!sequence.error.empty()) {
    sequence.finish_reason = FinishReason::error;
    return;
  }
  if (entry.samples && sequence.stops_at(sampled)) {
    sequence.finish_reason = FinishReason::stop;
    return;
  }
  if (entry.samples) sequence.tokens.push_back(sampled);
  // A full sequence ends once nothing of it waits to be computed but its last output token, which nobody will read.
  const bool prompt_done = sequence.computed_len_ >= sequence.num_prompt;
  if (prompt_done && sequence.len() == sequence.max_len) sequence.finish_reason = FinishReason::length;
}

/// Moves the sequences that ended, or were asked to, from a queue to finished_, and frees their blocks.
template <class Queue>
void Scheduler::retire(Queue& queue) {
  finished_.reserve(finished_.size() + queue.size());
  for (auto& sequence : queue) {
    if (sequence->cancel_requested && !sequence->finished()) sequence->finish_reason = FinishReason::abort;
    if (!sequence->finished()) continue;
    sequence->table.release(pool_, freed_blocks_);
    finished_.push_back(std::move(sequence));
  }
  std::erase(queue, nullptr);
}

void Scheduler::check_invariants() const {
  std::vector<BlockId> owners;
  for (const auto& sequence : running_) {
    const auto blocks = sequence->table.reserved();
    owners.insert(owners.end(), blocks.begin(), blocks.end());
    NB_ASSERT(sequence->table.capacity() >= sequence->max_len);
    NB_ASSERT(sequence->computed_len() <= sequence->table.length());
    NB_ASSERT(sequence->pending_len() >= 1 && sequence->len() <= sequence->max_len);
    NB_ASSERT(!sequence->finished());
  }
  for (const auto& sequence : waiting_) NB_ASSERT(sequence->table.capacity() == 0 && !sequence->finished());
  pool_.check_invariants(owners);
  NB_ASSERT(num_running() <= limits_.max_num_seqs);
  NB_ASSERT(has_work() || pool_.num_owned() == 0);
  const auto older = [](const auto& a, const auto& b) { return a->id < b->id; };
  NB_ASSERT(std::is_sorted(running_.begin(), running_.end(), older));
  NB_ASSERT(std::is_sorted(waiting_.begin(), waiting_.end(), older));
}

}  // namespace nb::engine
