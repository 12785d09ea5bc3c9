// Decides who computes what in a step, with integers only: no clock, no tensors, no model.
//
// First come, first served. plan() admits, preempts and divides the token budget; commit() appends tokens, publishes
// blocks in the prefix cache and ends sequences. Between the two nothing changes, so a step that fails leaves nothing
// half done. Used by the thread that runs steps.
//
// Blocks: a sequence is admitted with those of its prompt, takes the others as it grows, and when the pool is empty the
// youngest sequence is preempted: it gives its blocks back and waits, in its old place, to be computed again from its
// tokens. The oldest always goes on, and the pool holds any one sequence, so everything ends.
//
// Policies: who gives blocks back while it runs takes them as they are needed for its next slice, so that what it holds
// stays bounded; commit() gives back those that no later row will see. Who keeps nothing is computed anew, as a prompt,
// after every token.
//
// Chunks: who is put together from chunks takes hold of them when it is the oldest that waits, is admitted when they
// are ready, and holds them to its end. One that is not there is computed by a sequence of its own, which stands right
// before. What chunks hold always leaves room for any running sequence; who would break that waits.
//
// Sharing: an admitted sequence takes the cached blocks that its prompt begins with. If an older one is computing what
// comes next, it waits and takes those blocks too when they are there. Further answers to one prompt wait for the
// first, then fork it.
//
// Drafts: who decodes may have guesses of its next tokens in the same step, from what the budget and the pool leave
// once everybody has what it needs. Where guesses are stored as they are made, their blocks come into use before; those
// of none that came go out of use again. commit() keeps those that came true; the others are as if they had never been:
// positions behind the last computed token are not in use, and nothing of them is published, shared or kept.
//
// Archive, if there is one: what the prefix cache does not have of an admitted sequence, or of a chunk, is filled from
// it while others are computed; the sequence runs and has its blocks, but gets no rows before that has ended. Who ends
// or is preempted meanwhile stops it first, so that no block is written to after it was given back. And what sequences
// and chunks leave behind is queued to be kept in it, as long as nobody needs the blocks.
#pragma once

#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/block_archive.h"
#include "engine/draft_source.h"
#include "engine/save_queue.h"
#include "engine/sequence.h"
#include "kv/block_pool.h"
#include "kv/chunk_store.h"
#include "kv/prefix_cache.h"

namespace nb::engine {

struct SchedulerLimits {
  int max_batch_tokens = 512;  ///< rows of one step
  int max_num_seqs = 16;       ///< sequences that run at a time
  int max_waiting = 0;         ///< sequences beyond max_num_seqs that may wait; 0 = any number
  bool seals_keys = false;     ///< the KV format does: see open_groups.h
};

/// What prompts may compute in a step while others decode. A row weighs `row_weight` and, for each key it attends to,
/// `key_weight`.
struct PromptBudget {
  std::int64_t work = std::numeric_limits<std::int64_t>::max();
  std::int64_t row_weight = 1;
  std::int64_t key_weight = 0;

  /// Of the row of a token at this position.
  std::int64_t weight(int position) const { return row_weight + key_weight * (position + 1); }
};

/// Who gains when prompts are computed soon, and who loses.
struct Demand {
  int streaming = 0;  ///< sequences that decode and whose tokens somebody reads as they come
  int waiting = 0;    ///< sequences that do not decode yet and have a slot, or would find one
};

/// What the scheduler has done so far.
struct SchedulerCounters {
  std::int64_t preemptions = 0;
  std::int64_t prefix_hit_tokens = 0;  ///< tokens taken from the prefix cache instead of being computed
  std::int64_t forked_tokens = 0;      ///< tokens shared with another answer to the same prompt
  std::int64_t restored_tokens = 0;    ///< tokens whose KV the archive gave
  std::int64_t restored_chunks = 0;    ///< chunks whose KV the archive gave
  std::int64_t chunk_keys = 0;         ///< contents of chunks that were hashed, to be looked for
};

/// One sequence's share of a step: rows for its own tokens [first, first + count); or, where it `selects`, the tokens
/// of its chunks with these numbers are measured.
struct PlannedSequence {
  Sequence* sequence;
  int first;  ///< computed_len at planning time
  int count;
  bool samples;           ///< the last row yields a new token; with drafts, each of the last 1 + num_drafts rows
  bool selects = false;   ///< see Composition::selecting()
  int first_summary = 0;  ///< summaries from this one on are to be made
  int num_drafts = 0;     ///< the last rows, whose tokens are Sequence::drafts
  int first_draw = 0;     ///< of the step's draws: where those of this entry begin

  int num_draws() const { return 1 + num_drafts; }
  /// Whether it computes nothing but its last token and drafts.
  bool decodes() const { return samples && count == num_draws(); }
};

struct StepPlan {
  std::vector<PlannedSequence> entries;
  int num_tokens = 0;  ///< rows, without those that are only measured
  int num_draws = 0;   ///< of all entries: one each, drawn or not, and one for each draft
};

class Scheduler {
 public:
  /// `fingerprint`: see PrefixCache; none: nothing is cached.
  Scheduler(const SchedulerLimits& limits, int num_blocks, std::optional<std::string> fingerprint = {});

  /// What follows is looked for in `archive`, which must outlive the scheduler, and queued in saves(). It is asked
  /// within plan(), and may empty the three lists below, as the caller does.
  void set_archive(BlockArchive& archive) { archive_ = &archive; }

  /// Sequences that decode get drafts from `source`, which must outlive the scheduler; it is asked within plan().
  void set_draft_source(DraftSource& source) { draft_source_ = &source; }

  /// Throws invalid_argument if the whole pool is too small for the sequence. Any thread may ask at any time.
  void check_fits(const Sequence& sequence) const;

  /// Queues a sequence behind all others. Throws, without any change, invalid_argument if the whole pool is too small
  /// for it, and overloaded if too many wait.
  void submit(std::unique_ptr<Sequence> sequence);

  /// The same for all answers to one prompt, in the order of `choice`. A sequence whose chunks find no room, though
  /// nothing else runs, ends with an error.
  void submit(std::vector<std::unique_ptr<Sequence>> sequences);

  /// The next commit() ends the sequences of this id with `abort`; false if there is none.
  bool cancel(RequestId id);

  /// As cancel() for every running sequence, with what went wrong: after a step that failed.
  void cancel_running(ErrorCode code, const std::string& error);

  /// The next commit() ends the sequences whose deadline has passed with `timeout`.
  void end_overdue(Clock::time_point now);

  /// Divides the step: sequences with one pending token first, then slices of the oldest prompts, then admission in
  /// strict order of arrival. While anything decodes, prompts get no more rows than `prompts` has work for, but always
  /// one, if there is any work. Valid until the next plan(). Empty if there is nothing to compute.
  const StepPlan& plan(PromptBudget prompts = {});

  /// For the next plan(). Who waits for the archive is not counted, since that is not a matter of rows.
  Demand demand() const;

  /// Takes the outcome of a plan: the tokens of entry e are `sampled` from e.first_draw on (ignored where it does not
  /// sample), the token behind each row as long as the drafts before it are right; kNotDrawn where the request failed.
  void commit(const StepPlan& plan, std::span<const TokenId> sampled);

  /// Sequences that ended and have not been forgotten, in the order in which they ended.
  std::span<const std::unique_ptr<Sequence>> finished() const { return finished_; }
  void forget_finished() { finished_.clear(); }

  /// What plan() and commit() ask to be done with the memory, in this order: copies, then freed blocks may be
  /// poisoned, then fresh ones must be cleared. The caller empties the lists.
  std::vector<kv::BlockCopy>& copies() { return copies_; }
  std::vector<BlockId>& freed_blocks() { return freed_blocks_; }
  std::vector<BlockId>& fresh_blocks() { return fresh_blocks_; }

  /// Whether a sequence waits for the archive.
  bool is_loading() const;
  /// The earliest of those of all sequences.
  Clock::time_point next_deadline() const;

  bool has_work() const { return !waiting_.empty() || !running_.empty(); }
  int num_running() const { return static_cast<int>(running_.size()); }
  auto kv_use() const {
    std::array<KvUse, kKvPolicyNames.size()> use;
    for (const auto& sequence : running_) use[sequence->kv_kind()].add(sequence->num_owned_blocks());
    return use;
  }
  int num_waiting() const { return static_cast<int>(waiting_.size()); }
  const kv::BlockPool& pool() const { return pool_; }
  const SchedulerLimits& limits() const { return limits_; }
  const SchedulerCounters& counters() const { return counters_; }
  const kv::ChunkStore& chunks() const { return chunks_; }
  /// How many of the first tokens of a prompt the prefix cache of a namespace could give now: whole blocks.
  int num_cached(std::span<const TokenId> tokens, std::string_view salt);

  /// The chunk cannot be found any more and goes when nobody uses it; false if there is none.
  bool remove_chunk(kv::ChunkId id);
  bool pin_chunk(kv::ChunkId id, bool pinned) { return chunks_.pin(id, pinned); }

  /// What is to be kept, between two steps.
  const SaveQueue& saves() const { return saves_; }
  /// Its next record is done.
  void pop_save() { saves_.pop(freed_blocks_); }
  /// Nothing of it will be kept.
  void drop_saves();

  /// Throws internal unless blocks, counts and sequences agree. O(blocks + tokens of the running sequences).
  void check_invariants();

 private:
  using Queue = std::vector<std::unique_ptr<Sequence>>;
  using Waiting = std::deque<std::unique_ptr<Sequence>>;

  int add(Sequence& sequence, int budget);
  void add_selection();
  Waiting::iterator find_oldest();
  bool place_oldest();
  bool displace_others(const Sequence& oldest);
  bool place_chunks(Sequence& sequence);
  void identify_chunks(Sequence& sequence);
  std::unique_ptr<Sequence> make_encoder(const Sequence& wanted_by, kv::ChunkId id);
  void prepare(Sequence& sequence) const;
  bool make_room(int num_blocks, const Sequence& sequence);
  int own_need(const Sequence& sequence) const;
  static int blocks_of_chunks(const Sequence& sequence);
  bool has_chunks(const Sequence& sequence) const;
  void finish_restored();
  void finish_tickets();
  void end_encoding(Sequence& sequence);
  void release_chunks(Sequence& sequence);
  void check_owners(std::vector<BlockId> owners);
  void restore(Sequence& sequence);
  void begin_chunk(Sequence& sequence);
  void begin_prefix(Sequence& sequence);
  void take_loads();
  void take_load(Sequence& sequence);
  void stop_load(Sequence& sequence);
  void take_restored(Sequence& sequence, int num_tokens);
  void keep_prefix(Sequence& sequence);
  void follow();
  bool admit_next();
  void adopt(Sequence& sequence);
  bool follow_sibling(Sequence& sequence);
  bool find_leader(Sequence& sequence);
  bool take_blocks(Sequence& sequence, int num_tokens);
  int wanted_len(const Sequence& sequence, int from) const;
  static int num_summaries(const Sequence& sequence, int num_tokens);
  bool reserve(Sequence& sequence, int num_tokens);
  int room_for(Sequence& sequence);
  int spare_blocks() const;
  void drop_unseen(const PlannedSequence& entry);
  void preempt(Sequence& sequence);
  void leave(const Sequence& leader);
  void grow(Sequence& sequence, int num_tokens);
  void add_drafts(int budget);
  int most_drafts(const PlannedSequence& entry) const;
  int cut_to_room(Sequence& sequence, int num_drafts);
  static void advance(const PlannedSequence& entry, std::span<const TokenId> drawn);
  static void take_token(Sequence& sequence, TokenId token, int index);
  void publish(Sequence& sequence);
  const Sequence* find_sibling(const Sequence& sequence) const;
  bool fork(Sequence& sequence, const Sequence* sibling);
  template <class Sequences>
  void retire(Sequences& queue);

  SchedulerLimits limits_;
  kv::BlockPool pool_;
  OpenPairs open_pairs_;
  std::optional<kv::PrefixCache> cache_;
  kv::ChunkStore chunks_;
  BlockArchive* archive_ = nullptr;      // none: nothing is kept
  DraftSource* draft_source_ = nullptr;  // none: nothing is guessed
  std::vector<DraftCandidate> candidates_;
  SaveQueue saves_;
  Waiting waiting_;  // in order of arrival
  Queue running_;    // in order of arrival
  Queue finished_;
  StepPlan plan_;
  bool preempted_ = false;  // in this plan
  SchedulerCounters counters_;
  std::vector<kv::BlockCopy> copies_;
  std::vector<BlockId> fresh_blocks_;
  std::vector<BlockId> freed_blocks_;
};

}  // namespace nb::engine
