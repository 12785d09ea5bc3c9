// Decides who computes what in a step, with integers only: no clock, no tensors, no model.
//
// plan() admits and divides the token budget; commit() is the only place that appends tokens, ends sequences and gives
// blocks back. Between the two nothing changes, so a step that fails leaves the state of before. Used by the thread
// that runs steps.
#pragma once

#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "engine/sequence.h"
#include "kv/block_pool.h"

namespace nb::engine {

struct SchedulerLimits {
  int max_batch_tokens = 512;  ///< rows of one step
  int max_num_seqs = 16;       ///< sequences that run at a time
  int max_waiting = 0;         ///< requests beyond max_num_seqs that may wait; 0 = any number
};

/// One sequence's share of a step: rows [first, first + count) of its tokens.
struct PlannedSequence {
  Sequence* sequence;
  int first;  ///< position of the first row: computed_len at planning time
  int count;
  bool samples;  ///< the last row yields a new token
};

struct StepPlan {
  std::vector<PlannedSequence> entries;
  int num_tokens = 0;
};

class Scheduler {
 public:
  Scheduler(const SchedulerLimits& limits, int num_blocks);

  /// Queues a sequence behind all others. Throws, without any change, invalid_argument if the whole pool is too small
  /// for it, and overloaded if too many wait.
  void submit(std::unique_ptr<Sequence> sequence);

  /// The next commit() ends the sequence with `abort`; false if there is none of this id.
  bool cancel(RequestId id);

  /// As cancel() for every running sequence: after a step that failed.
  void cancel_running();

  /// Divides the step: sequences with one pending token first, then slices of the oldest prompts, then admission in
  /// strict order of arrival. Valid until the next plan(). Empty if there is nothing to compute.
  const StepPlan& plan();

  /// Takes the outcome of a plan: `sampled[i]` is the token of entry i (ignored where it does not sample).
  void commit(const StepPlan& plan, std::span<const TokenId> sampled);

  /// Sequences that ended and have not been forgotten, in the order in which they ended.
  std::span<const std::unique_ptr<Sequence>> finished() const { return finished_; }
  void forget_finished() { finished_.clear(); }

  /// Blocks that came into use in plan() and must be cleared before the step; blocks freed by commit(). The caller
  /// handles freed blocks first and empties both lists.
  std::vector<BlockId>& fresh_blocks() { return fresh_blocks_; }
  std::vector<BlockId>& freed_blocks() { return freed_blocks_; }

  bool has_work() const { return !waiting_.empty() || !running_.empty(); }
  int num_running() const { return static_cast<int>(running_.size()); }
  int num_waiting() const { return static_cast<int>(waiting_.size()); }
  const kv::BlockPool& pool() const { return pool_; }
  const SchedulerLimits& limits() const { return limits_; }

  /// Throws internal unless blocks, counts and sequences agree. O(blocks + tokens of the running sequences).
  void check_invariants() const;

 private:
  void add(Sequence& sequence, int& budget);
  bool admit_next();
  static void advance(const PlannedSequence& entry, TokenId sampled);
  template <class Queue>
  void retire(Queue& queue);

  SchedulerLimits limits_;
  kv::BlockPool pool_;
  std::deque<std::unique_ptr<Sequence>> waiting_;   // in order of arrival
  std::vector<std::unique_ptr<Sequence>> running_;  // in order of admission
  std::vector<std::unique_ptr<Sequence>> finished_;
  StepPlan plan_;
  std::vector<BlockId> fresh_blocks_;
  std::vector<BlockId> freed_blocks_;
};

}  // namespace nb::engine
