// The scheduler's dealings with the archive: what is filled instead of computed, and what is to be kept.
#include <algorithm>
#include <utility>

#include "base/error.h"
#include "engine/scheduler.h"

namespace nb::engine {

/// Has the archive fill blocks that the sequence has reserved for its next tokens, as if they had been computed.
void Scheduler::restore(Sequence& sequence) {
  if (archive_ == nullptr || sequence.computed_len() % kBlockTokens != 0) return;
  begin_chunk(sequence);
  if (sequence.load == 0) begin_prefix(sequence);
  take_load(sequence);  // an archive may be quick
}

/// Of a sequence that computes a chunk: all of its tokens.
void Scheduler::begin_chunk(Sequence& sequence) {
  if (!sequence.is_internal()) return;
  const kv::Chunk& chunk = chunks_.get(sequence.encodes);
  const auto blocks = sequence.table.reserved();
  NB_ASSERT(static_cast<int>(blocks.size()) == chunk.num_blocks());
  const int first = sequence.computed_len() / kBlockTokens;
  sequence.load = archive_->begin_chunk(chunk.key, sequence.tokens, blocks, first);
  sequence.loads_chunk = sequence.load != 0;
}

/// Whole blocks, under the rules of the prefix cache.
void Scheduler::begin_prefix(Sequence& sequence) {
  const int first = sequence.computed_len() / kBlockTokens;
  const int most = std::min(sequence.reusable_blocks(), sequence.table.capacity() / kBlockTokens);
  if (!cache_ || first >= most) return;
  const auto count = static_cast<std::size_t>(most);
  const auto tokens = std::span<const TokenId>(sequence.tokens).first(count * kBlockTokens);
  cache_->extend_keys(sequence.prefix, tokens, count);
  sequence.load = archive_->begin_prefix(sequence.prefix, tokens, sequence.table.reserved().first(count), first);
}

/// Sequences whose loads have ended go on. One that is to end does so without what it loads.
void Scheduler::take_loads() {
  for (const auto& sequence : running_) {
    if (!sequence->ends_early()) take_load(*sequence);
  }
}

void Scheduler::take_load(Sequence& sequence) {
  while (sequence.load != 0) {
    const std::optional<int> restored = archive_->take(sequence.load);
    if (!restored) return;
    sequence.load = 0;
    const int end = sequence.computed_len() / kBlockTokens + *restored;
    if (!std::exchange(sequence.loads_chunk, false)) {
      NB_ASSERT(*restored >= 0 && end <= sequence.reusable_blocks());
      if (*restored > 0) take_restored(sequence, *restored * kBlockTokens);
    } else if (end == static_cast<int>(sequence.table.reserved().size())) {
      take_restored(sequence, sequence.pending_len());
      ++counters_.restored_chunks;
    } else {
      begin_prefix(sequence);
    }
  }
}

/// Before the blocks of a sequence are given back.
void Scheduler::stop_load(Sequence& sequence) {
  if (sequence.load != 0) archive_->stop(sequence.load);
  sequence.load = 0;
  sequence.loads_chunk = false;
}

bool Scheduler::is_loading() const {
  return std::any_of(running_.begin(), running_.end(), [](const auto& sequence) { return sequence->load != 0; });
}

void Scheduler::take_restored(Sequence& sequence, int num_tokens) {
  const auto grown =
      sequence.table.grow_to(sequence.computed_len() + num_tokens);  // not fresh: they have their content
  if (draft_source_ != nullptr) draft_source_->restored(grown);
  sequence.computed_len_ += num_tokens;
  if (!sequence.was_computed) sequence.num_cached_tokens += num_tokens;
  counters_.restored_tokens += num_tokens;
  publish(sequence);
}

/// Queues the blocks that a sequence which has ended leaves in the prefix cache. What they hold is exact, whatever came
/// behind them; only after an error nothing of the sequence is trusted.
void Scheduler::keep_prefix(Sequence& sequence) {
  if (archive_ == nullptr || !sequence.error.empty() || sequence.num_published == 0) return;
  const auto published = sequence.table.reserved().first(static_cast<std::size_t>(sequence.num_published));
  const auto hole = std::find(published.begin(), published.end(), kNoBlock);
  const auto count = static_cast<std::size_t>(hole - published.begin());
  cache_->extend_keys(sequence.prefix, sequence.tokens, count);  // whoever forked another one has not needed them
  saves_.add_prefix(sequence.prefix, sequence.tokens, published.first(count));
}

void Scheduler::drop_saves() {
  while (saves_.drop_one(freed_blocks_)) continue;
}

bool Scheduler::remove_chunk(kv::ChunkId id) {
  const auto found = chunks_.chunks().find(id);
  if (found != chunks_.chunks().end()) saves_.drop_chunk(found->second.key, freed_blocks_);
  return chunks_.remove(id, freed_blocks_);
}

}  // namespace nb::engine
