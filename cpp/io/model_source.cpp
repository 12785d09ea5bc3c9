#include "io/model_source.h"

#include <algorithm>
#include <array>

#include "base/error.h"
#include "io/braid_format.h"
#include "io/braid_source.h"
#include "io/bytes.h"
#include "io/gguf_source.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

// Anything else is left to the GGUF reader, which says what a file that is neither begins with.
bool is_braid(const std::string& path) {
  const FileReader file(path);
  std::array<std::byte, kBraidMagic.size()> start{};
  const std::size_t size = std::min<std::uint64_t>(start.size(), file.size());
  file.read(0, std::span(start).first(size));
  // A magic that is cut, or whose line end is damaged, may still be recognised by its letters.
  const std::size_t letters = std::min<std::size_t>(size, 6);
  return letters > 0 && as_text(std::span(start).first(letters)) == kBraidMagic.substr(0, letters);
}

}  // namespace

const char* to_string(FileKind kind) {
  switch (kind) {
    case FileKind::gguf:
      return "GGUF";
    case FileKind::braid:
      return "braid";
    case FileKind::safetensors:
      return "safetensors";
  }
  return "braid";
}

void ModelSource::check_inside(const TensorInfo& tensor, std::uint64_t offset, std::size_t size) const {
  NB_CHECK(offset <= tensor.bytes && size <= tensor.bytes - offset, invalid_argument, path(), ": ", size,
           " bytes at offset ", offset, " are outside tensor ", text::in_quotes(tensor.name), " of ", tensor.bytes,
           " bytes");
}

std::shared_ptr<const ModelSource> open_model(const std::string& path) {
  if (is_braid(path)) return open_braid(std::make_shared<const BraidFile>(path));
  return open_gguf(path);
}

}  // namespace nb::io
