// A GGUF file as a source of a model.
//
// Not for the directory as the format has it (gguf_file.h). Safe to read from several threads at once.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "io/gguf_file.h"
#include "io/model_source.h"

namespace nb::io {

/// Tensors of a GGUF file. Throws unsupported for one part of a model that is split over several files.
std::shared_ptr<const ModelSource> open_gguf(std::shared_ptr<const GgufFile> file);

/// The weight format of a GGUF tensor type; throws unsupported naming `tensor` and the type.
quant::Format format_of_gguf_type(std::uint32_t type, std::string_view tensor);

}  // namespace nb::io
