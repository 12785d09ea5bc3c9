#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace nb::engine {

namespace {

/// Tokens at the beginning of both.
int common_len(std::span<const TokenId> a, std::span<const TokenId> b) {
  const std::size_t most = std::min(a.size(), b.size());
  return static_cast<int>(std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(most), b.begin()).first -
                          a.begin());
}

/// Takes the weight of the sequence's next rows from a budget; returns how many, at most `most`. If it must advance,
/// one row is had for whatever is left.
int pay(PromptBudget& budget, const Sequence& sequence, int most, bool must_advance) {
  most = std::min(most, sequence.next_rows());
  int rows = 0;
  for (; rows < most; ++rows) {
    const std::int64_t weight = budget.weight(sequence.position_of(sequence.computed_len() + rows));
    if (weight > budget.work && !(must_advance && rows == 0)) break;
    budget.work = std::max(budget.work - weight, std::int64_t{0});
  }
  if (rows < most) budget.work = 0;  // nobody younger gets what is left
  return rows;
}

bool decodes(const Sequence& sequence) {
  return !sequence.waits() && sequence.pending_len() == 1 && !sequence.is_selecting();
}

}  // namespace

Scheduler::Scheduler(const SchedulerLimits& limits, int num_blocks, std::optional<std::string> fingerprint)
    : limits_(limits),
      pool_(num_blocks),
      open_pairs_(limits.seals_keys ? limits.max_num_seqs : 0),
      chunks_(pool_),
      saves_(pool_) {
  NB_CHECK(limits.max_batch_tokens >= 1, invalid_argument, "max_batch_tokens must be >= 1, got ",
           limits.max_batch_tokens);
  NB_CHECK(limits.max_num_seqs >= 1, invalid_argument, "max_num_seqs must be >= 1, got ", limits.max_num_seqs);
  NB_CHECK(limits.max_waiting >= 0, invalid_argument, "max_waiting must be >= 1, or 0 for no limit, got ",
           limits.max_waiting);
  if (fingerprint) cache_.emplace(pool_, *fingerprint);
  running_.reserve(static_cast<std::size_t>(limits.max_num_seqs));
  plan_.entries.reserve(static_cast<std::size_t>(limits.max_num_seqs));
  fresh_blocks_.reserve(static_cast<std::size_t>(num_blocks));
  freed_blocks_.reserve(static_cast<std::size_t>(num_blocks));
}

void Scheduler::submit(std::unique_ptr<Sequence> sequence) {
  Queue one;
  one.push_back(std::move(sequence));
  submit(std::move(one));
}

void Scheduler::check_fits(const Sequence& sequence) const {
  const int in_chunks = blocks_of_chunks(sequence);
  const int needed = own_need(sequence) + in_chunks;
  NB_CHECK(needed <= pool_.num_blocks(), invalid_argument, "the request needs ", needed, " KV blocks of ", kBlockTokens,
           " tokens (prompt of ", sequence.num_prompt, " tokens, ", sequence.max_len, " with its output",
           in_chunks > 0 ? concat(", ", in_chunks, " blocks of chunks") : "", "), the whole pool has ",
           pool_.num_blocks(), "; lower max_tokens or raise kv_cache_bytes");
}

void Scheduler::submit(Queue sequences) {
  for (const auto& sequence : sequences) check_fits(*sequence);
  const int places = limits_.max_num_seqs + limits_.max_waiting;
  const int arriving = static_cast<int>(sequences.size());
  NB_CHECK(limits_.max_waiting == 0 || num_running() + num_waiting() + arriving <= places, overloaded, num_running(),
           " requests run and ", num_waiting(), " wait; max_num_seqs is ", limits_.max_num_seqs, ", max_waiting ",
           limits_.max_waiting, arriving > 1 ? concat(", and ", arriving, " answers are wanted") : "");
  for (auto& sequence : sequences) {
    prepare(*sequence);
    waiting_.push_back(std::move(sequence));
  }
}

void Scheduler::prepare(Sequence& sequence) const {
  if (!cache_) return;
  sequence.prefix.root = cache_->root(sequence.request.cache_salt);
  // So that commit() never allocates.
  sequence.prefix.keys.reserve(static_cast<std::size_t>(sequence.max_len / kBlockTokens));
}

bool Scheduler::cancel(RequestId id) {
  bool found = false;
  const auto mark = [&](auto& queue) {
    for (auto& sequence : queue) {
      if (sequence->id != id || sequence->is_internal()) continue;
      sequence->end_early(FinishReason::abort);
      found = true;
    }
  };
  mark(running_);
  mark(waiting_);
  return found;
}

void Scheduler::cancel_running(ErrorCode code, const std::string& error) {
  for (auto& sequence : running_) {
    if (!sequence->end_early(FinishReason::abort)) continue;
    sequence->error = error;
    sequence->error_code = code;
  }
}

void Scheduler::end_overdue(Clock::time_point now) {
  const auto mark = [&](auto& queue) {
    for (auto& sequence : queue) {
      if (now >= sequence->times.deadline) sequence->end_early(FinishReason::timeout);
    }
  };
  mark(running_);
  mark(waiting_);
}

Clock::time_point Scheduler::next_deadline() const {
  Clock::time_point earliest = Clock::time_point::max();
  for (const auto& sequence : running_) earliest = std::min(earliest, sequence->times.deadline);
  for (const auto& sequence : waiting_) earliest = std::min(earliest, sequence->times.deadline);
  return earliest;
}

// ---- planning ----

const StepPlan& Scheduler::plan(PromptBudget prompts) {
  plan_.entries.clear();
  plan_.num_tokens = 0;
  preempted_ = false;
  take_loads();
  follow();
  int budget = limits_.max_batch_tokens;
  // Preemption takes from the end, so that an index stays valid.
  for (std::size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    if (sequence.ends_early() || sequence.waits() || budget == 0) continue;
    if (decodes(sequence)) {
      if (take_blocks(sequence, sequence.own_len())) budget -= add(sequence, budget);
    } else if (sequence.drops_kv() && sequence.pending_len() > 0) {
      take_blocks(sequence, std::min(sequence.own_len(), sequence.computed_len() + kBlockTokens));
    }
  }
  const auto streams = [](const PlannedSequence& entry) { return entry.sequence->request.streams; };
  if (std::none_of(plan_.entries.begin(), plan_.entries.end(), streams)) prompts = {};
  bool must_advance = true;
  const auto add_slice = [&](Sequence& sequence) {
    const int most = std::min(budget, room_for(sequence));
    const int rows = most > 0 ? pay(prompts, sequence, most, must_advance) : 0;
    if (rows > 0) budget -= add(sequence, rows);
    must_advance = must_advance && rows == 0;
  };
  for (const auto& sequence : running_) {
    const bool computes = !sequence->ends_early() && !sequence->waits() && sequence->next_rows() > 0;
    if (computes && !decodes(*sequence) && budget > 0 && prompts.work > 0) add_slice(*sequence);
  }
  while (budget > 0 && prompts.work > 0 && !preempted_ && admit_next()) {
    const Sequence& newest = *running_.back();
    if (!newest.waits() && newest.next_rows() > 0) add_slice(*running_.back());
  }
  add_drafts(budget);
  add_selection();
  plan_.num_draws = 0;
  for (PlannedSequence& entry : plan_.entries) {
    entry.first_draw = plan_.num_draws;
    plan_.num_draws += entry.num_draws();
  }
  return plan_;
}

Demand Scheduler::demand() const {
  Demand demand;
  const auto counts = [](const auto& sequence) {
    return !sequence->ends_early() && !sequence->is_internal() && sequence->load == 0;
  };
  for (const auto& sequence : running_) {
    if (!counts(sequence)) continue;
    if (!decodes(*sequence)) {
      ++demand.waiting;
    } else if (sequence->request.streams) {
      ++demand.streaming;
    }
  }
  int slots = limits_.max_num_seqs - num_running();
  for (auto next = waiting_.begin(); next != waiting_.end() && slots > 0; ++next) {
    if (!counts(*next)) continue;
    ++demand.waiting;
    --slots;
  }
  return demand;
}

/// Gives the sequence as many rows as it needs and the budget has; returns how many.
int Scheduler::add(Sequence& sequence, int budget) {
  const int first = sequence.computed_len();
  const int count = std::min(sequence.next_rows(), budget);
  if (limits_.seals_keys && !sequence.open.is_there()) open_pairs_.take(sequence.open);
  const auto fresh = sequence.table.grow_to(first + count);
  fresh_blocks_.insert(fresh_blocks_.end(), fresh.begin(), fresh.end());
  const int first_summary = sequence.summaries.length();
  const auto summaries = sequence.summaries.grow_to(num_summaries(sequence, first + count));
  fresh_blocks_.insert(fresh_blocks_.end(), summaries.begin(), summaries.end());
  const bool samples = count == sequence.pending_len() && sequence.generates();
  plan_.entries.push_back(
      {.sequence = &sequence, .first = first, .count = count, .samples = samples, .first_summary = first_summary});
  plan_.num_tokens += count;
  return count;
}

/// Sequences that wait for another one's blocks take what is there, and go on alone when there is nothing to wait for.
void Scheduler::follow() {
  for (std::size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    if (sequence.ends_early() || !sequence.follows) continue;
    if (sequence.leader != nullptr && !sequence.forks_leader) {
      adopt(sequence);
      if (sequence.leader->computed_len() >= sequence.shared_len) sequence.leader = nullptr;
    }
    if (sequence.leader != nullptr) continue;
    if (follow_sibling(sequence) || find_leader(sequence)) continue;
    sequence.follows = !take_blocks(sequence, wanted_len(sequence, sequence.computed_len()));
    if (!sequence.follows) restore(sequence);
  }
}

/// The waiting sequence that is to be admitted next, if there is one.
Scheduler::Waiting::iterator Scheduler::find_oldest() {
  return std::find_if(waiting_.begin(), waiting_.end(), [](const auto& sequence) {
    return !sequence->ends_early() && !(sequence->request.only_chunks && sequence->is_placed);
  });
}

/// Moves the oldest waiting sequence to the running ones, with the cached blocks it begins with and the others that its
/// tokens need. If the oldest does not fit, nobody younger overtakes it.
bool Scheduler::admit_next() {
  if (num_running() == limits_.max_num_seqs) return false;
  if (!place_oldest()) return false;
  const auto oldest = find_oldest();
  Sequence& sequence = **oldest;
  const SchedulerCounters before = counters_;
  const int cached_before = sequence.num_cached_tokens;
  if (!fork(sequence, find_sibling(sequence)) && !follow_sibling(sequence)) {
    adopt(sequence);
    find_leader(sequence);
  }
  const int from = std::max(sequence.computed_len(), sequence.shared_len);
  const int wanted = wanted_len(sequence, from);
  const int needed = kv::BlockTable::blocks_for(wanted) - from / kBlockTokens +
                     kv::BlockTable::blocks_for(num_summaries(sequence, wanted));
  // So that admission is not followed by preemption at once.
  const int spare = running_.empty() ? 0 : spare_blocks();
  while (pool_.num_available() < needed + spare && saves_.drop_one(freed_blocks_)) continue;
  if (pool_.num_available() < needed + spare) {
    counters_ = before;
    sequence.num_cached_tokens = cached_before;
    sequence.forget_blocks(pool_, freed_blocks_);
    return false;
  }
  sequence.follows = sequence.leader != nullptr;
  const bool has_blocks = sequence.follows || reserve(sequence, wanted);
  NB_ASSERT(has_blocks);
  if (!sequence.follows) restore(sequence);
  running_.push_back(std::move(*oldest));
  waiting_.erase(oldest);
  return true;
}

/// Takes the cached blocks that continue what the sequence has.
void Scheduler::adopt(Sequence& sequence) {
  if (!cache_ || sequence.table.length() % kBlockTokens != 0) return;
  const int adopted =
      kBlockTokens * sequence.table.adopt(*cache_, sequence.prefix, sequence.tokens, sequence.reusable_blocks());
  sequence.computed_len_ += adopted;
  sequence.num_published += adopted / kBlockTokens;
  if (!sequence.was_computed) sequence.num_cached_tokens += adopted;
  counters_.prefix_hit_tokens += adopted;
}

int Scheduler::num_cached(std::span<const TokenId> tokens, std::string_view salt) {
  if (!cache_) return 0;
  kv::PrefixKeys keys{.root = cache_->root(salt), .keys = {}};
  return kBlockTokens * cache_->match(keys, tokens, static_cast<int>(tokens.size()) / kBlockTokens);
}

/// An answer of which nothing is computed waits for an older one to the same prompt that is computing it.
bool Scheduler::follow_sibling(Sequence& sequence) {
  if (sequence.computed_len() > 0 || sequence.num_generated() > 0 || sequence.scores_prompt()) return false;
  if (!sequence.shares_prompt()) return false;
  for (const auto& other : running_) {
    if (other->id != sequence.id || !other->is_older_than(sequence) || other->ends_early()) continue;
    if (other->is_internal() || other->computed_len() >= other->num_own_prompt()) continue;
    sequence.leader = other.get();
    sequence.forks_leader = true;
    sequence.shared_len = sequence.num_own_prompt() - 1;
    return true;
  }
  return false;
}

/// Finds the older running sequence of the same namespace that is computing most of what this one's tokens begin with
/// and the cache does not have. Only older ones are waited for, so the oldest waits for nobody.
bool Scheduler::find_leader(Sequence& sequence) {
  sequence.leader = nullptr;
  sequence.forks_leader = false;
  sequence.shared_len = 0;
  for (const auto& other : running_) {
    if (!other->is_older_than(sequence) || other->ends_early()) continue;
    const int shareable = std::min(other->num_prompt, other->exact_len());
    if (!cache_ || other->prefix.root != sequence.prefix.root || other->computed_len() >= shareable) continue;
    const int most = sequence.reusable_blocks() * kBlockTokens;
    const auto their_prompt = std::span(other->tokens).first(static_cast<std::size_t>(shareable));
    const int common = std::min(most, common_len(sequence.tokens, their_prompt) / kBlockTokens * kBlockTokens);
    if (common > std::max(sequence.computed_len(), sequence.shared_len)) {
      sequence.leader = other.get();
      sequence.shared_len = common;
    }
  }
  return sequence.leader != nullptr;
}

/// Sends the youngest running sequence back to the queue, with its tokens and without its blocks.
void Scheduler::preempt(Sequence& sequence) {
  NB_ASSERT(running_.back().get() == &sequence);
  leave(sequence);
  stop_load(sequence);
  open_pairs_.give_back(sequence.open);
  sequence.forget_blocks(pool_, freed_blocks_);
  waiting_.push_front(std::move(running_.back()));
  running_.pop_back();
  preempted_ = true;
  ++counters_.preemptions;
}

/// Nobody waits for a sequence that does not run any more.
void Scheduler::leave(const Sequence& leader) {
  for (const auto& sequence : running_) {
    if (sequence != nullptr && sequence->leader == &leader) sequence->leader = nullptr;
  }
}

// ---- committing ----

void Scheduler::commit(const StepPlan& plan, std::span<const TokenId> sampled) {
  NB_ASSERT(sampled.size() == static_cast<std::size_t>(plan.num_draws));
  for (const PlannedSequence& entry : plan.entries) {
    advance(entry,
            sampled.subspan(static_cast<std::size_t>(entry.first_draw), static_cast<std::size_t>(entry.num_draws())));
    publish(*entry.sequence);
  }
  for (const auto& sequence : running_) {
    if (sequence->leader == nullptr || !sequence->forks_leader) continue;
    if (sequence->leader->computed_len() < sequence->num_own_prompt()) continue;
    const Sequence* first = std::exchange(sequence->leader, nullptr);
    // Of a rest that could not be copied it needs blocks before it goes on.
    sequence->follows = !fork(*sequence, first) || sequence->pending_len() > 1;
  }
  for (const PlannedSequence& entry : plan.entries) drop_unseen(entry);
  finish_restored();
  retire(running_);
  finish_tickets();
  retire(waiting_);
}

/// Puts the blocks that have become full into the prefix cache.
void Scheduler::publish(Sequence& sequence) {
  if (!cache_) return;
  const int exact = std::min(sequence.computed_len(), sequence.exact_len());
  for (; sequence.num_published < exact / kBlockTokens; ++sequence.num_published) {
    sequence.table.publish(*cache_, pool_, sequence.prefix, sequence.tokens, sequence.num_published, freed_blocks_);
  }
}

/// A running answer to the same prompt that has all of it stored.
const Sequence* Scheduler::find_sibling(const Sequence& sequence) const {
  const auto found = std::find_if(running_.begin(), running_.end(), [&](const auto& other) {
    return other->id == sequence.id && !other->is_internal() && other->computed_len() >= other->num_own_prompt();
  });
  const bool may_fork = sequence.num_generated() == 0 && !sequence.is_internal();
  return found != running_.end() && may_fork ? found->get() : nullptr;
}

/// An answer of which nothing is computed shares the prompt of another one: full blocks as they are, the rest as a
/// copy, or to be computed if keys are sealed. The last prompt token is computed once more, for logits to draw from.
/// False, and it must compute the prompt itself, without a sibling or a block for the copy.
bool Scheduler::fork(Sequence& sequence, const Sequence* sibling) {
  if (sibling == nullptr || sequence.scores_prompt() || !sequence.shares_prompt()) return false;
  if (sibling->table.num_holes() > 0) return false;
  NB_ASSERT(sequence.computed_len() == 0);
  int shared = sequence.num_own_prompt() - 1;
  if (limits_.seals_keys) shared -= shared % kBlockTokens;  // keys in open cells are the sibling's
  while (!sequence.table.fork(pool_, sibling->table, shared, copies_)) {
    if (!saves_.drop_one(freed_blocks_)) return false;
  }
  // A block that was freed a moment ago must not be poisoned once it is the copy.
  if (shared % kBlockTokens != 0) std::erase(freed_blocks_, copies_.back().to);
  if (sequence.composition) *sequence.composition = *sibling->composition;  // with the tokens it has chosen
  sequence.computed_len_ = shared;
  sequence.num_published = std::min(sibling->num_published, shared / kBlockTokens);
  sequence.num_cached_tokens = shared;
  counters_.forked_tokens += shared;
  return true;
}

/// Moves the sequences that ended, or were asked to, from a queue to finished_, and frees their blocks.
template <class Sequences>
void Scheduler::retire(Sequences& queue) {
  finished_.reserve(finished_.size() + queue.size());
  for (auto& sequence : queue) {
    if (sequence->ends_early() && !sequence->finished()) sequence->finish_reason = sequence->early_end;
    if (!sequence->finished()) continue;
    leave(*sequence);
    stop_load(*sequence);
    if (sequence->is_internal()) end_encoding(*sequence);
    keep_prefix(*sequence);
    release_chunks(*sequence);
    open_pairs_.give_back(sequence->open);
    sequence->forget_blocks(pool_, freed_blocks_);
    finished_.push_back(std::move(sequence));
  }
  std::erase(queue, nullptr);
}

void Scheduler::check_invariants() {
  std::vector<BlockId> owners;
  for (const auto& sequence : running_) {
    const auto blocks = sequence->table.reserved(), summaries = sequence->summaries.reserved();
    owners.insert(owners.end(), blocks.begin(), blocks.end());
    owners.insert(owners.end(), summaries.begin(), summaries.end());
    NB_ASSERT(std::count(blocks.begin(), blocks.end(), kNoBlock) == sequence->table.num_holes());
    NB_ASSERT(sequence->table.num_owned() <= own_need(*sequence) || !sequence->drops_kv());
    NB_ASSERT(sequence->computed_len() <= sequence->table.length());
    NB_ASSERT(sequence->pending_len() >= 1 && sequence->len() <= sequence->max_len);
    NB_ASSERT(!sequence->finished());
    NB_ASSERT(sequence->follows || sequence->leader == nullptr);
    NB_ASSERT(sequence->load == 0 || (!sequence->follows && sequence->pending_len() > 0));
    NB_ASSERT(sequence->num_published <= std::min(sequence->computed_len(), sequence->exact_len()) / kBlockTokens);
    for (int i = 0; i < sequence->num_published; ++i) {
      const BlockId block = blocks[static_cast<std::size_t>(i)];
      NB_ASSERT(block == kNoBlock || (cache_ && cache_->is_published(block)));
    }
    const auto is_leader = [&](const auto& other) { return other.get() == sequence->leader; };
    NB_ASSERT(sequence->leader == nullptr || std::any_of(running_.begin(), running_.end(), is_leader));
  }
  for (const auto& sequence : waiting_) {
    NB_ASSERT(sequence->table.capacity() == 0 && sequence->computed_len() == 0 && !sequence->finished());
    NB_ASSERT(sequence->load == 0 && !sequence->open.is_there());
  }
  std::erase(owners, kNoBlock);
  const auto holds_open = [](const auto& sequence) { return sequence->open.is_there(); };
  const auto num_open = std::count_if(running_.begin(), running_.end(), holds_open);
  NB_ASSERT(!limits_.seals_keys || open_pairs_.num_free() + num_open == limits_.max_num_seqs);
  check_owners(std::move(owners));
  if (cache_) cache_->check_invariants();
  NB_ASSERT(num_running() <= limits_.max_num_seqs);
  const auto older = [](const auto& a, const auto& b) { return a->is_older_than(*b); };
  NB_ASSERT(std::is_sorted(running_.begin(), running_.end(), older));
  NB_ASSERT(std::is_sorted(waiting_.begin(), waiting_.end(), older));
}

}  // namespace nb::engine
