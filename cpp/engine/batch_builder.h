// Turns a plan into the inputs of one forward step.
//
// Not for deciding what is computed (scheduler.h). Writes arrays in place: within their reserved capacity it
// allocates nothing. Used by the thread that runs steps.
#pragma once

#include <span>
#include <vector>

#include "engine/scheduler.h"
#include "kv/chunk_store.h"
#include "model/step_inputs.h"

namespace nb::engine {

/// What the logits of one row are wanted for.
struct LogitUse {
  int entry;     ///< of the plan
  int position;  ///< of the row in its sequence
  int draft;     ///< 0, or the row has the sequence's so many-th draft, and is void unless all up to it are right
  bool samples;  ///< its successor is drawn
  bool scores;   ///< its logits go into the request's prompt scores
};

/// One step: what the decoder reads, and what becomes of each of its logit_rows.
struct StepBatch {
  model::StepInputs inputs;
  std::vector<LogitUse> logit_uses;  ///< one per inputs.logit_rows

  /// Makes room for every step within these limits.
  void reserve(int max_tokens, int max_sequences, int max_blocks);
};

/// Overwrites `batch`. One segment (sharing nothing yet) per sequence that computes tokens of its own: a run for each
/// of its chunks (which are ready) in order, then one of its own tokens, which ends with the keys that this step
/// writes. Block tables have been grown by plan().
void build_batch(const StepPlan& plan, const kv::ChunkStore& chunks, StepBatch& batch);

/// Adds the row of the token at a position, whose key is stored at `slot` rotated to `key_position`.
void add_row(const Sequence& sequence, int position, int key_position, int slot, model::StepInputs& inputs);

/// Adds the run of the sequence's first `num_keys` own tokens.
void add_own_run(const Sequence& sequence, int num_keys, model::StepInputs& inputs);

/// Adds a chunk's run at its place, with the blocks of the stored chunk; `hides`: without its hidden keys.
void add_chunk_run(const PlacedChunk& chunk, std::span<const BlockId> blocks, bool hides, model::StepInputs& inputs);

}  // namespace nb::engine
