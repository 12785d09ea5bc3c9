// Measures which tokens of a sequence's chunks have changed most by where they stand: a pass over the first layer.
//
// The keys and values of the first layer depend on a token alone, so those in a chunk are right anywhere; with them the
// first layer gives every token the state it would have if all of the prompt were computed. The keys that the second
// layer makes of it are compared with the chunk's. Source of the idea: Yao et al. 2024 (CacheBlend). Not for choosing
// (composition.h). Used by the thread that runs steps.
#pragma once

#include "engine/scheduler.h"
#include "kv/kv_storage.h"
#include "model/model.h"
#include "model/step_inputs.h"
#include "ops/ops.h"

namespace nb::engine {

class SelectionRunner {
 public:
  /// `model` must outlive this.
  explicit SelectionRunner(const model::Model& model) : model_(model) {}

  /// Writes the deviations of the tokens that `entry` selects to its composition. Stores keys and values of plain
  /// tokens in the first layer of `storage`, where the sequence has room for its own ones: whoever computes those
  /// afterwards overwrites them. Throws unsupported for a model with one layer.
  void run(const PlannedSequence& entry, const kv::KvStorage& storage, const kv::ChunkStore& chunks,
           ops::ExecContext& ctx);

 private:
  void store_plain(const Sequence& sequence, const kv::KvStorage& storage, int max_rows, ops::ExecContext& ctx);

  const model::Model& model_;
  std::unique_ptr<kv::KvStorage> scratch_;  // two layers, for the rows of a slice
  model::StepInputs inputs_;
  std::vector<std::int32_t> stored_slots_;
};

}  // namespace nb::engine
