// Safetensors files as a source of a model: tensors under the names the families know, metadata from the caller.
//
// What a checkpoint's own names and configuration mean is decided by the exporter. Not for directories of files as they
// are (safetensors.h). Safe to read from several threads at once.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "io/checkpoint_matrix.h"
#include "io/metadata_writer.h"
#include "io/model_source.h"

namespace nb::io {

/// One tensor of the model: its name, and where it is.
struct SafetensorsName {
  std::string name;
  std::size_t file;  ///< index into the list of files
  std::string stored_name;
};

/// `path` is for messages, `tensors` in the order they are to be listed; `matrices` of quantized checkpoints follow,
/// each behind the order of its columns (io/tensor_rows.h) if it has one. Rows of these are made of whole tensors, of
/// which the last few are kept. Throws io or format as SafetensorsFile and CheckpointMatrix, format naming a tensor
/// that its file does not have, invalid_argument for a name given twice.
std::shared_ptr<const ModelSource> open_safetensors(const std::string& path, const std::vector<std::string>& files,
                                                    const std::vector<SafetensorsName>& tensors,
                                                    const MetadataWriter& metadata,
                                                    const std::vector<CheckpointMatrixName>& matrices = {});

}  // namespace nb::io
