// Runs a text through a model one layer at a time and measures what enters its matrices.
//
// For exports: the mean square of each input column says how much an error of that column's weights matters. Holds the
// residual stream of the text, one packed layer and the step of one sequence; never the model. Not for generation.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"
#include "base/threads.h"
#include "io/model_source.h"
#include "io/progress.h"
#include "ops/backends.h"

namespace nb::model {

/// Mean squares of the columns that enter each matrix of a layer, over all tokens.
struct LayerStatistics {
  std::vector<float> qkv;            ///< [hidden_size], after the normalisation
  std::vector<float> attention_out;  ///< [q_size]
  std::vector<float> gate_up;        ///< [hidden_size], after the normalisation
  std::vector<float> down;           ///< [intermediate_size]
};

struct InputStatistics {
  std::vector<LayerStatistics> layers;
  std::vector<float> head;  ///< [hidden_size], after the final normalisation
};

/// `token_ids` are cut into sequences of at most `sequence_len` tokens that do not see each other; activations are f32.
/// `progress` is told layers. Throws invalid_argument for no tokens, an unknown token or a length outside the model's
/// context, and what read_config and load_layer throw.
InputStatistics measure_inputs(const io::ModelSource& source, std::span<const TokenId> token_ids, int sequence_len,
                               const ops::Backend& backend, ThreadPool& pool,
                               const io::ProgressFunction& progress = {});

}  // namespace nb::model
