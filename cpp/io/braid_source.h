// A .braid file as a source of a model.
//
// Not for the directory as the format has it (braid_file.h). Safe to read from several threads at once.
#pragma once

#include <memory>

#include "io/braid_file.h"
#include "io/model_source.h"

namespace nb::io {

/// Tensors of a .braid file.
std::shared_ptr<const ModelSource> open_braid(std::shared_ptr<const BraidFile> file);

}  // namespace nb::io
