// The scheduler's dealings with chunks: who holds them, who computes them, how much of the pool they may take.
#include <algorithm>
#include <unordered_set>
#include <utility>

#include "base/error.h"
#include "engine/scheduler.h"

namespace nb::engine {

/// Blocks of the chunks that a sequence wants.
int Scheduler::blocks_of_chunks(const Sequence& sequence) {
  int blocks = 0;
  const auto add = [&](const ChunkSpan& span) {
    blocks += kv::BlockTable::blocks_for(static_cast<int>(span.anchor.size()) + span.count);
  };
  const auto& spans = sequence.request.chunks;
  if (sequence.request.only_chunks) std::for_each(spans.begin(), spans.end(), add);
  if (!sequence.composition) return blocks;
  for (const PlacedChunk& chunk : sequence.composition->chunks()) add(spans[static_cast<std::size_t>(chunk.span)]);
  return blocks;
}

/// Evicts chunks until `num_blocks` more for chunks leave room for any running sequence and this one.
bool Scheduler::make_room(int num_blocks, const Sequence& sequence) {
  int largest = own_need(sequence);
  for (const auto& running : running_) largest = std::max(largest, own_need(*running));
  while (chunks_.num_blocks() + num_blocks + largest > pool_.num_blocks()) {
    if (!chunks_.evict_one(freed_blocks_)) return false;
  }
  return true;
}

/// Sees to the chunks of the oldest waiting sequence; false if nobody can be admitted. Where there is no room though
/// nobody runs, the sequence will end with an error.
bool Scheduler::place_oldest() {
  for (auto oldest = find_oldest(); oldest != waiting_.end(); oldest = find_oldest()) {
    Sequence& sequence = **oldest;
    if (!sequence.is_placed && place_chunks(sequence)) continue;  // perhaps there is an older one now: for a chunk
    if (sequence.is_placed && !has_chunks(sequence)) return false;
    if (sequence.is_placed && make_room(0, sequence)) return true;
    if (!running_.empty()) return false;
    if (displace_others(sequence)) continue;
    sequence.end_early(FinishReason::error);
    sequence.error_code = ErrorCode::out_of_memory;
    sequence.error =
        concat("the KV cache of ", pool_.num_blocks(), " blocks of ", kBlockTokens, " tokens has no room for ",
               own_need(sequence), " blocks of the request and ", blocks_of_chunks(sequence), " of its chunks beside ",
               chunks_.num_blocks(), " that chunks hold; raise kv_cache_bytes, or remove or unpin chunks");
  }
  return false;
}

/// Waiting sequences other than this one give their chunks back, and nobody waits to compute any: false if there was
/// none. That happens where one that was preempted finds others placed behind it.
bool Scheduler::displace_others(const Sequence& oldest) {
  bool any = false;
  for (const auto& sequence : waiting_) {
    if (sequence.get() == &oldest || sequence->chunks.empty()) continue;
    any = true;
    const bool is_done = sequence->request.only_chunks && has_chunks(*sequence);
    sequence->is_placed = is_done;
    release_chunks(*sequence);
    if (!sequence->is_internal()) continue;
    chunks_.remove(sequence->encodes, freed_blocks_);
    sequence->end_early(FinishReason::abort);
  }
  return any;
}

/// Names the chunks that the sequence wants: once, however long it waits.
void Scheduler::identify_chunks(Sequence& sequence) {
  if (!sequence.wanted_chunks.empty()) return;
  const Digest root = kv::ChunkStore::root(sequence.request.cache_salt);
  const auto add = [&](const ChunkSpan& span) {
    const auto tokens =
        std::span(sequence.tokens).subspan(static_cast<std::size_t>(span.begin), static_cast<std::size_t>(span.count));
    sequence.wanted_chunks.push_back(kv::ChunkStore::content(root, span.anchor, tokens));
    ++counters_.chunk_keys;
  };
  const auto& spans = sequence.request.chunks;
  if (sequence.request.only_chunks) {
    std::for_each(spans.begin(), spans.end(), add);
  } else if (sequence.composition) {
    for (const PlacedChunk& chunk : sequence.composition->chunks()) add(spans[static_cast<std::size_t>(chunk.span)]);
  }
}

/// Takes hold of the chunks of the oldest waiting sequence, and has those computed that are not there. False, and
/// nothing is held or counted, if there is no room for all of them now.
bool Scheduler::place_chunks(Sequence& sequence) {
  identify_chunks(sequence);
  const auto& wanted = sequence.wanted_chunks;
  std::vector<kv::ChunkId> ids;
  std::vector<Digest> missing;
  int needed = 0;
  for (const kv::ChunkContent& content : wanted) {
    ids.push_back(chunks_.find(content));
    if (ids.back() != 0) {
      chunks_.hold(ids.back());
      sequence.chunks.push_back(ids.back());
    } else if (std::find(missing.begin(), missing.end(), content.key) == missing.end()) {
      missing.push_back(content.key);
      needed += content.num_blocks();
    }
  }
  if (!make_room(needed, sequence)) {
    release_chunks(sequence);
    return false;
  }
  Queue encoders;
  const bool counts = std::exchange(sequence.counts_chunks, false);
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    bool was_there = ids[i] != 0;
    if (!was_there) {
      ids[i] = chunks_.find(wanted[i]);  // it may stand twice in the prompt
      was_there = ids[i] != 0;
      if (was_there) chunks_.hold(ids[i]);
    }
    if (!was_there) {
      ids[i] = chunks_.create(wanted[i]);
      encoders.push_back(make_encoder(sequence, ids[i]));
    }
    if (counts) chunks_.count(ids[i], was_there);
    if (sequence.request.pin_chunks) chunks_.pin(ids[i], true);
    if (!sequence.request.only_chunks) sequence.composition->chunks()[i].id = ids[i];
  }
  sequence.chunks = std::move(ids);
  sequence.is_placed = true;
  // The sequence is the oldest that waits, so they come right before it.
  int choice = sequence.choice - static_cast<int>(encoders.size());
  for (const auto& encoder : encoders) encoder->choice = choice++;
  const auto at =
      std::find_if(waiting_.begin(), waiting_.end(), [&](const auto& other) { return other.get() == &sequence; });
  waiting_.insert(at, std::make_move_iterator(encoders.begin()), std::make_move_iterator(encoders.end()));
  return true;
}

/// The sequence that computes a chunk: an exact prompt of anchor and tokens. It is the chunk's second user.
std::unique_ptr<Sequence> Scheduler::make_encoder(const Sequence& wanted_by, kv::ChunkId id) {
  Request request;
  request.prompt = chunks_.get(id).tokens;
  request.max_tokens = 0;
  request.streams = wanted_by.request.streams;
  request.cache_salt = wanted_by.request.cache_salt;
  request.sampling.seed = 0;
  const int length = static_cast<int>(request.prompt.size());
  auto sequence = std::make_unique<Sequence>(wanted_by.id, std::move(request), std::span<const TokenId>(), length);
  sequence->times.submitted = wanted_by.times.submitted;
  sequence->encodes = id;
  sequence->is_placed = true;
  chunks_.hold(id);
  sequence->chunks.push_back(id);
  prepare(*sequence);
  return sequence;
}

bool Scheduler::has_chunks(const Sequence& sequence) const {
  return sequence.is_internal() || std::all_of(sequence.chunks.begin(), sequence.chunks.end(),
                                               [&](kv::ChunkId id) { return chunks_.get(id).is_ready; });
}

/// Ends those that were to compute a chunk which the archive has given.
void Scheduler::finish_restored() {
  for (const auto& sequence : running_) {
    const bool is_whole = sequence->is_internal() && sequence->pending_len() == 0;
    if (is_whole && !sequence->finished() && !sequence->ends_early()) sequence->finish_reason = FinishReason::length;
  }
}

/// Ends those that only wanted chunks, which are there now.
void Scheduler::finish_tickets() {
  for (const auto& sequence : waiting_) {
    if (!sequence->request.only_chunks || !sequence->is_placed || sequence->ends_early()) continue;
    if (!has_chunks(*sequence)) continue;
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
    if (!sequence->is_selecting() || sequence->ends_early() || sequence->waits() || sequence->follows ||
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
  int num_pending = 0;
  for (const auto& [id, chunk] : chunks_.chunks()) {
    NB_CHECK(users[id] == chunk.num_users, internal, "chunk ", id, " counts ", chunk.num_users, " users of ",
             users[id]);
    NB_ASSERT(chunk.is_ready || chunk.num_users > 0);
    owners.insert(owners.end(), chunk.blocks.begin(), chunk.blocks.end());
    held.insert(chunk.blocks.begin(), chunk.blocks.end());
    if (!chunk.is_ready) num_pending += chunk.num_blocks();
  }
  NB_ASSERT(static_cast<int>(held.size()) + num_pending == chunks_.num_blocks());
  std::vector<BlockId> saved;
  saves_.append_owners(saved);
  owners.insert(owners.end(), saved.begin(), saved.end());
  held.insert(saved.begin(), saved.end());
  NB_ASSERT(has_work() || pool_.num_owned() == static_cast<int>(held.size()));
  pool_.check_invariants(owners);
}

}  // namespace nb::engine
