// A GGUF file as a source of a model.
//
// Not for the directory as the format has it (gguf_file.h). Safe to read from several threads at once.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "io/gguf_file.h"
#include "io/model_source.h"

namespace nb::io {

/// Tensors of a GGUF file. Throws unsupported for one part of a model that is split over several files.
std::shared_ptr<const ModelSource> open_gguf(std::shared_ptr<const GgufFile> file);

/// The same from a path; if it is any part of a split model, together with the others, which are found by their names
/// (NAME-00002-of-00003.gguf, as llama.cpp writes them). Metadata and path are those of the first part. Throws io
/// naming a missing part; format if the parts are not those of one model, or a tensor stands in two of them.
std::shared_ptr<const ModelSource> open_gguf(const std::string& path);

/// The weight format of a GGUF tensor type; throws unsupported naming `tensor` and the type.
quant::Format format_of_gguf_type(std::uint32_t type, std::string_view tensor);

}  // namespace nb::io
