// How many bytes a step reads from memory: weights once, keys and values of every run once, shared ones once for all.
//
// What a step must read, not what the processor's caches made of it: activations are left out, and so is a second pass
// over weights that a large batch may need. Follows from shapes alone. Safe from any thread.
#pragma once

#include <cstdint>

#include "kv/kv_storage.h"
#include "model/model.h"
#include "model/step_inputs.h"

namespace nb::engine {

class StepTraffic {
 public:
  StepTraffic(const model::Model& model, const kv::KvShape& kv_shape);

  /// For a step of which `head_passes` groups of rows went through the head, and `saved_keys` of which plan_cascade()
  /// says that they need not be read again.
  std::int64_t bytes(const model::StepInputs& inputs, int head_passes, std::int64_t saved_keys = 0) const;

 private:
  std::int64_t layers_bytes_ = 0;  // matrices of all layers
  std::int64_t head_bytes_ = 0;
  std::int64_t row_bytes_ = 0;    // of the embedding
  std::int64_t token_bytes_ = 0;  // keys and values of one token over all layers
  int window_ = 0;                // of attention; 0: none
};

}  // namespace nb::engine
