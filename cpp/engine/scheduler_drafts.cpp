// The scheduler's dealings with drafts: who may have how many, and what becomes of the tokens that were drawn.
#include <algorithm>

#include "base/error.h"
#include "engine/scheduler.h"
#include "sampling/accept.h"

namespace nb::engine {

/// How many drafts an entry may have, but for the room that they need.
int Scheduler::most_drafts(const PlannedSequence& entry) const {
  const Sequence& sequence = *entry.sequence;
  if (!entry.samples || entry.count != 1 || sequence.is_internal() || !sequence.request.keeps_kv) return 0;
  if (!sequence.request.speculative.value_or(true)) return 0;
  // With all drafts right there is one more token.
  int most = sequence.max_len - sequence.len() - 1;
  // No draft fills a group of keys that would be sealed: they are sealed once, and all of them are tokens.
  if (limits_.seals_keys) most = std::min(most, kBlockTokens - 1 - (entry.first + 1) % kBlockTokens);
  // Nor does any bring a summary about, whose group is then given up.
  while (most > 0 && num_summaries(sequence, entry.first + 1 + most) > sequence.summaries.length()) --most;
  return most;
}

/// How many of the drafts there are blocks for, without taking from anybody: they are reserved.
int Scheduler::cut_to_room(Sequence& sequence, int num_drafts) {
  const int missing = kv::BlockTable::blocks_for(sequence.own_len() + num_drafts) -
                      kv::BlockTable::blocks_for(sequence.table.capacity());
  if (missing <= 0) return num_drafts;
  if (pool_.num_available() >= missing + spare_blocks() &&
      sequence.table.reserve(pool_, sequence.own_len() + num_drafts)) {
    return num_drafts;
  }
  return std::min(num_drafts, sequence.table.capacity() - sequence.own_len());
}

/// Brings the blocks of coming tokens into use.
void Scheduler::grow(Sequence& sequence, int num_tokens) {
  const auto fresh = sequence.table.grow_to(num_tokens);
  fresh_blocks_.insert(fresh_blocks_.end(), fresh.begin(), fresh.end());
}

/// Adds drafts to the entries that decode, as far as the budget goes.
void Scheduler::add_drafts(int budget) {
  if (draft_source_ == nullptr || budget == 0) return;
  const int num_stored = draft_source_->num_stored();
  candidates_.clear();
  for (const PlannedSequence& entry : plan_.entries) {
    Sequence& sequence = *entry.sequence;
    sequence.drafts.clear();
    int most = most_drafts(entry);
    if (num_stored > 0 && most > 0) most = cut_to_room(sequence, std::min({most, num_stored, budget}));
    if (most <= 0) continue;
    if (num_stored > 0) grow(sequence, entry.first + 1 + most);
    candidates_.push_back({.sequence = &sequence, .most = most});
  }
  if (candidates_.empty()) return;
  draft_source_->propose(candidates_, {.planned_rows = plan_.num_tokens, .free_rows = budget});
  for (PlannedSequence& entry : plan_.entries) {
    Sequence& sequence = *entry.sequence;
    const int most = most_drafts(entry);
    if (most == 0) continue;
    const int proposed = static_cast<int>(sequence.drafts.size());
    const int count = cut_to_room(sequence, std::min({proposed, most, budget}));
    if (num_stored > 0) sequence.table.truncate(std::min(sequence.table.length(), entry.first + 1 + count));
    if (proposed == 0) continue;
    sequence.set_drafts(count);
    grow(sequence, entry.first + 1 + count);
    entry.num_drafts = count;
    entry.count += count;
    plan_.num_tokens += count;
    budget -= count;
  }
}

/// What a step did to one sequence: KV is stored, and perhaps there are tokens: one, and one more for each draft that
/// is right.
void Scheduler::advance(const PlannedSequence& entry, std::span<const TokenId> drawn) {
  Sequence& sequence = *entry.sequence;
  NB_ASSERT(!sequence.finished() && sequence.computed_len_ == entry.first);
  sequence.was_computed = true;
  if (entry.selects) {
    sequence.composition->measured(entry.count);
    return;
  }
  const int num_accepted = sampling::count_accepted(sequence.drafts, drawn);
  const auto add_computed = [&](int count) {
    if (sequence.open.is_there()) sequence.open.advance(sequence.computed_len_, count);
    sequence.computed_len_ += count;
  };
  add_computed(entry.count - entry.num_drafts);
  if (entry.samples) {
    take_token(sequence, drawn[0], 0);
    for (int i = 1; i <= num_accepted && !sequence.finished(); ++i) {
      add_computed(1);
      take_token(sequence, drawn[static_cast<std::size_t>(i)], i);
    }
  } else if (!sequence.error.empty()) {
    sequence.finish_reason = FinishReason::error;
  }
  if (entry.num_drafts > 0) {
    sequence.num_drafted += entry.num_drafts;
    sequence.num_accepted += num_accepted;
    sequence.table.truncate(sequence.computed_len_);
    sequence.drafts.clear();
    sequence.num_constrained = 0;
  }
  // A full sequence ends once nothing of it waits to be computed but its last output token, which nobody will read.
  const bool prompt_done = sequence.computed_len_ >= sequence.num_own_prompt();
  if (!sequence.finished() && prompt_done && sequence.len() == sequence.max_len) {
    sequence.finish_reason = FinishReason::length;
  }
}

/// Appends the token that was drawn in a step after `index` others, and ends the sequence if it is the last one.
void Scheduler::take_token(Sequence& sequence, TokenId token, int index) {
  if (token == sampling::kNotDrawn) {
    NB_ASSERT(!sequence.error.empty());
    sequence.finish_reason = FinishReason::error;
    return;
  }
  if (sequence.stops_at(token)) {
    sequence.finish_reason = FinishReason::stop;
  } else {
    sequence.tokens.push_back(token);
    const bool is_watched = sequence.monitor != nullptr;
    if (is_watched && sequence.monitor->ends_with(token)) {
      sequence.finish_reason = FinishReason::stop;
    } else if (sequence.constraint != nullptr) {
      // It has seen drafts that are right before the tokens behind them were drawn.
      const bool was_last = index + 1 == sequence.num_constrained && sequence.constraint_ends;
      const bool is_complete = index < sequence.num_constrained ? was_last : sequence.constraint->accept(token);
      if (is_complete && sequence.num_generated() >= sequence.request.sampling.min_tokens) {
        sequence.finish_reason = FinishReason::stop;
      }
    }
  }
  if (sequence.finished()) sequence.error.clear();  // of a token that nobody wants any more
}

}  // namespace nb::engine
