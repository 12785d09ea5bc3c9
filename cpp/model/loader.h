// Opens a model file and packs its weights for a backend.
//
// Everything is checked against the family's facts before it is read. Peak memory is the packed weights plus a few
// rows per thread. Not for tokenizers (io/gguf_tokenizer.h).
#pragma once

#include <memory>
#include <string>

#include "io/model_source.h"
#include "model/family.h"
#include "model/model.h"

namespace nb::model {

/// Throws io, format or unsupported, naming file and tensor.
std::unique_ptr<Model> load_model(const io::ModelSource& source, const ModelOptions& options);

/// The same from a path.
std::unique_ptr<Model> load_model(const std::string& path, const ModelOptions& options);

/// Moves norms and biases into the memory of a device. Throws out_of_memory or device.
void move_vectors(const DeviceMemory& memory, ModelWeights& weights);

/// Packs every tensor of a model for `backend`. Shapes are checked against `config`.
ModelWeights load_weights(const ModelConfig& config, const TensorNames& names, const io::ModelSource& source,
                          const std::string& dtype, const ops::Backend& backend, ThreadPool& pool);

/// The same within a budget: layers that do not fit are streamed, from a file that is made first if there is none. With
/// everything in the budget, no layer is. `names` and `backend` outlive the weights: a layer whose packed bytes are
/// damaged is packed again from the model's file. On a device the budget is of its memory, and the rest lies packed in
/// the host's. Throws invalid_argument naming the option or, for a budget that is too small, the numbers; io; device.
ModelWeights load_streamed_weights(const ModelConfig& config, const TensorNames& names, const io::ModelSource& source,
                                   const std::string& dtype, const ops::Backend& backend, ThreadPool& pool,
                                   const StreamingOptions& streaming);

/// Packs one layer, as layer 0 of what is returned, and nothing else.
ModelWeights load_layer(const ModelConfig& config, const TensorNames& names, const io::ModelSource& source,
                        const std::string& dtype, const ops::Backend& backend, ThreadPool& pool, int layer);

}  // namespace nb::model
