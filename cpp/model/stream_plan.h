// Which layers of a model stay in memory within a budget, and how many staging slots the others are read into.
//
// Arithmetic on sizes only: what is kept beyond the wish is as much as fits, so that a cycle reads as little as can be,
// and lies evenly between what is streamed, so that the reader need not pause. Pure functions; safe from any thread.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/sha256.h"

namespace nb::model {

struct StreamingOptions {
  std::int64_t budget_bytes = 0;  ///< most that all weights take in memory; 0: what must be there, and not more
  int keep_first_k = 0;           ///< layers that stay, from the first on
  int keep_last_k = 0;            ///< layers that stay, up to the last
  int prefetch_layers = 2;        ///< layers that are read ahead of the one in use
  std::string cache_directory{};  ///< where packed layers are kept, see open_layer_file
  Digest content{};               ///< identity of the model's files (io/file_digest.h)
  std::int64_t cache_bytes = 0;   ///< most that the files of packed layers take there, this one included; 0: no limit
};

struct StreamPlan {
  std::vector<int> streamed;     ///< layers, ascending; empty: everything fits
  int num_slots = 0;             ///< that they are read into
  std::int64_t slot_bytes = 0;   ///< the largest of them
  std::int64_t total_bytes = 0;  ///< that all weights take in memory
};

/// `fixed_bytes`: of embeddings, head, norms and column orders; `layer_bytes`: of each layer, rounded to what it takes
/// in memory. Throws invalid_argument naming the option; for a budget that is too small with the numbers.
StreamPlan plan_streaming(const StreamingOptions& options, std::int64_t fixed_bytes,
                          std::span<const std::int64_t> layer_bytes);

}  // namespace nb::model
