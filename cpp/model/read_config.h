// Reads the facts of a model from its file, without its weights.
//
// Refuses what the decoder has no branch for, and files with tensors that no part of the model reads. Pure; for any
// thread.
#pragma once

#include "io/model_source.h"
#include "model/config.h"

namespace nb::model {

/// vocab_size and tie_word_embeddings come from the tensor directory. Throws format or unsupported, naming the fact.
ModelConfig read_config(const io::ModelSource& source);

}  // namespace nb::model
