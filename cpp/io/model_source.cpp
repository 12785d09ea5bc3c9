#include "io/model_source.h"

#include "io/gguf_source.h"

namespace nb::io {

const char* to_string(FileKind kind) { return kind == FileKind::gguf ? "GGUF" : "braid"; }

std::shared_ptr<const ModelSource> open_model(const std::string& path) {
  return open_gguf(std::make_shared<const GgufFile>(path));
}

}  // namespace nb::io
