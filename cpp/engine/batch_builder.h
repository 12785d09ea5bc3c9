// Turns a plan into the inputs of one forward step.
//
// Not for deciding what is computed (scheduler.h). Writes arrays in place: within their reserved capacity it
// allocates nothing. Used by the thread that runs steps.
#pragma once

#include <vector>

#include "engine/scheduler.h"
#include "model/step_inputs.h"

namespace nb::engine {

/// What the logits of one row are wanted for.
struct LogitUse {
  int entry;     ///< of the plan
  int position;  ///< of the row in its sequence
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

/// Overwrites `batch`. One segment (sharing nothing yet) and one run per sequence, at position offset 0; the run ends
/// with the keys that this step writes. Block tables have been grown by plan().
void build_batch(const StepPlan& plan, StepBatch& batch);

}  // namespace nb::engine
