// The scheduler's dealings with chunks: who holds them, who computes them, how much of the pool they may take.
#include <algorithm>
#include <unordered_set>
#include <utility>

#include "base/error.h"
#include "engine/scheduler.h"

namespace nb::engine {

/// Blocks of the longest answer of a sequence that is not finished. Whatever chunks hold, these must be left.
int Scheduler::largest_need() const {
  int most = 0;
  const auto consider = [&](const auto& sequence) {
    if (!sequence->is_internal() && !sequence->request.only_chunks)
      most = std::max(most, kv::BlockTable::blocks_for(sequence->max_own_len()));
  };
  std::for_each(running_.begin(), running_.end(), consider);
  std::for_each(waiting_.begin(), waiting_.end(), consider);
  return most;
}

/// Evicts chunks until `num_blocks` more for chunks leave room for any sequence, of which the largest needs `largest`.
bool Scheduler::make_room(int num_blocks, int largest) {
  while (chunks_.num_blocks() + num_blocks + largest > pool_.num_blocks()) {
    if (!chunks_.evict_one(freed_blocks_)) return false;
  }
  return true;
}

/// Takes hold of the chunks of a sequence that is about to wait, and has those computed that are not there, by
/// sequences numbered from `first_choice` on. Where there is no room, the sequence will end with an error.
void Scheduler::place_chunks(Sequence& sequence, int first_choice) {
  const int own = sequence.request.only_chunks ? 0 : kv::BlockTable::blocks_for(sequence.max_own_len());
  const int largest = std::max(largest_need(), own);
  const auto fail = [&](int num_blocks) {
    sequence.end_early(FinishReason::error);
    sequence.error_code = ErrorCode::out_of_memory;
    sequence.error = concat("the KV cache of ", pool_.num_blocks(), " blocks of ", kBlockTokens,
                            " tokens has no room for ", num_blocks, " blocks of a chunk beside ", chunks_.num_blocks(),
                            " of chunks that are in use or pinned and ", largest,
                            " for the longest request; raise kv_cache_bytes, or delete or unpin chunks");
  };
  if (!make_room(0, largest)) return fail(0);
  const kv::PrefixRoot root = kv::ChunkStore::root(sequence.request.cache_salt);
  const auto place = [&](const ChunkSpan& span) -> kv::ChunkId {
    const auto tokens =
        std::span(sequence.tokens).subspan(static_cast<std::size_t>(span.begin), static_cast<std::size_t>(span.count));
    kv::ChunkId id = chunks_.acquire(root, span.anchor, tokens);
    if (id == 0) {
      const int needed = kv::BlockTable::blocks_for(static_cast<int>(span.anchor.size()) + span.count);
      if (!make_room(needed, largest)) {
        fail(needed);
        return 0;
      }
      id = chunks_.create(root, span.anchor, tokens);
      begin_chunk(sequence, span, id, first_choice++);
    }
    sequence.chunks.push_back(id);
    return id;
  };
  if (sequence.request.only_chunks) {
    for (const ChunkSpan& span : sequence.request.chunks) {
      const kv::ChunkId id = place(span);
      if (id == 0) return;
      if (sequence.request.pin_chunks) chunks_.pin(id, true);
    }
  } else if (sequence.composition) {
    for (PlacedChunk& chunk : sequence.composition->chunks()) {
      chunk.id = place(sequence.request.chunks[static_cast<std::size_t>(chunk.span)]);
      if (chunk.id == 0) return;
    }
  }
}

/// Queues the sequence that computes a chunk: an exact prompt of anchor and tokens, older than `wanted_by`. It is the
/// chunk's second user.
void Scheduler::begin_chunk(const Sequence& wanted_by, const ChunkSpan& span, kv::ChunkId id, int choice) {
  Request request;
  request.prompt = span.anchor;
  const auto begin = wanted_by.tokens.begin() + span.begin;
  request.prompt.insert(request.prompt.end(), begin, begin + span.count);
  request.max_tokens = 0;
  request.streams = wanted_by.request.streams;
  request.cache_salt = wanted_by.request.cache_salt;
  request.sampling.seed = 0;
  const int length = static_cast<int>(request.prompt.size());
  auto sequence = std::make_unique<Sequence>(wanted_by.id, std::move(request), std::span<const TokenId>(), length);
  sequence->choice = choice;
  sequence->times.submitted = wanted_by.times.submitted;
  sequence->encodes = id;
  chunks_.hold(id);
  sequence->chunks.push_back(id);
  enqueue(std::move(sequence));
}

bool Scheduler::has_chunks(const Sequence& sequence) const {
  return sequence.is_internal() || std::all_of(sequence.chunks.begin(), sequence.chunks.end(),
                                               [&](kv::ChunkId id) { return chunks_.get(id).is_ready; });
}

/// Ends those that only wanted chunks, which are there now, and those that should compute one the archive gave.
void Scheduler::finish_tickets() {
  for (const auto& sequence : running_) {
    const bool is_whole = sequence->is_internal() && sequence->pending_len() == 0;
    if (is_whole && !sequence->finished() && !sequence->ends_early()) sequence->finish_reason = FinishReason::length;
  }
  for (const auto& sequence : waiting_) {
    if (!sequence->request.only_chunks || sequence->ends_early() || !has_chunks(*sequence)) continue;
    sequence->finish_reason = FinishReason::length;
  }
}

/// A sequence that computed a chunk has ended: its blocks are the chunk's, or whoever waits for the chunk ends too.
void Scheduler::end_encoding(Sequence& encoder) {
  if (encoder.finish_reason == FinishReason::length) {
    chunks_.complete(encoder.encodes, encoder.detach_blocks(), freed_blocks_);
    const kv::Chunk& chunk = chunks_.get(encoder.encodes);
    if (archive_ != nullptr && !chunk.is_removed) saves_.add_chunk(chunk);
    return;
  }
  chunks_.remove(encoder.encodes, freed_blocks_);
  const auto tell = [&](const auto& sequence) {
    if (sequence == nullptr || sequence->is_internal()) return;
    const auto& held = sequence->chunks;
    if (std::find(held.begin(), held.end(), encoder.encodes) == held.end()) return;
    if (!sequence->end_early(FinishReason::abort)) return;
    sequence->error = concat("a chunk could not be computed: ", encoder.error);
    sequence->error_code = encoder.error_code;
  };
  std::for_each(running_.begin(), running_.end(), tell);
  std::for_each(waiting_.begin(), waiting_.end(), tell);
}

void Scheduler::release_chunks(Sequence& sequence) {
  for (const kv::ChunkId id : std::exchange(sequence.chunks, {})) chunks_.release(id, freed_blocks_);
}

/// One slice of the oldest sequence that must know which tokens of its chunks to compute: a pass over one layer, which
/// is a small part of a step whatever else is in it.
void Scheduler::add_selection() {
  for (const auto& sequence : running_) {
    if (!sequence->is_selecting() || sequence->ends_early() || sequence->leader != nullptr || sequence->follows ||
        sequence->next_rows() > 0) {
      continue;
    }
    const Composition& composition = *sequence->composition;
    const auto fresh = sequence->table.grow_to(composition.num_plain());
    fresh_blocks_.insert(fresh_blocks_.end(), fresh.begin(), fresh.end());
    const int left = composition.num_chunk_tokens() - composition.num_measured();
    plan_.entries.push_back({.sequence = sequence.get(),
                             .first = sequence->computed_len(),
                             .count = std::min(left, limits_.max_batch_tokens),
                             .samples = false,
                             .selects = true});
    return;
  }
}

/// Blocks and users of chunks agree with the sequences; `owners` are the blocks of the running ones.
void Scheduler::check_owners(std::vector<BlockId> owners) {
  std::map<kv::ChunkId, int> users;
  const auto count = [&](const auto& sequence) {
    for (const kv::ChunkId id : sequence->chunks) ++users[id];
  };
  std::for_each(running_.begin(), running_.end(), count);
  std::for_each(waiting_.begin(), waiting_.end(), count);
  std::unordered_set<BlockId> held;
  int num_blocks = 0;
  for (const auto& [id, chunk] : chunks_.chunks()) {
    NB_CHECK(users[id] == chunk.num_users, internal, "chunk ", id, " counts ", chunk.num_users, " users of ",
             users[id]);
    NB_ASSERT(chunk.is_ready || chunk.num_users > 0);
    owners.insert(owners.end(), chunk.blocks.begin(), chunk.blocks.end());
    held.insert(chunk.blocks.begin(), chunk.blocks.end());
    num_blocks += chunk.num_blocks();
  }
  std::vector<BlockId> saved;
  saves_.append_owners(saved);
  owners.insert(owners.end(), saved.begin(), saved.end());
  held.insert(saved.begin(), saved.end());
  NB_ASSERT(num_blocks == chunks_.num_blocks());
  NB_ASSERT(has_work() || pool_.num_owned() == static_cast<int>(held.size()));
  pool_.check_invariants(owners);
}

}  // namespace nb::engine
