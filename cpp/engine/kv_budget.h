// What a KV block of a model is, and how many an engine gets: from a budget in bytes, or from the machine's memory.
//
// Not for the memory itself (kv/kv_storage.h). Pure functions of their arguments.
#pragma once

#include <cstdint>

#include "kv/kv_storage.h"
#include "model/config.h"

namespace nb::engine {

kv::KvShape kv_shape_of(const model::ModelConfig& config, quant::KvFormat format);

/// What the number of blocks follows from.
struct KvBudget {
  std::int64_t block_bytes = 0;
  std::int64_t kv_cache_bytes = 0;   ///< 0: enough for max_num_seqs full sequences, at most `share` of available_bytes
  std::int64_t available_bytes = 0;  ///< of the machine or the device; 0 = unknown, then no limit follows from it
  double share = 0.25;               ///< the rest is for others, and on a device for the workspace of steps
  int max_num_seqs = 0;
  int max_model_len = 0;
};

/// The number of blocks. An explicit budget may be smaller than one full sequence (submit refuses what cannot fit)
/// but not than one block: invalid_argument. The default throws out_of_memory with the numbers if the share of the
/// available memory does not hold one full sequence.
int choose_num_blocks(const KvBudget& budget);

}  // namespace nb::engine
