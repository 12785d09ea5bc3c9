#include "io/gguf_file.h"

#include <cstring>
#include <utility>

#include "base/error.h"
#include "io/by_name.h"
#include "io/gguf_parser.h"

namespace nb::io {
namespace {

std::string_view name_of(const GgufTensor& tensor) { return tensor.name; }

}  // namespace

GgufFile::GgufFile(const std::string& path)
    : mapping_(std::make_unique<MappedFile>(path)), bytes_(mapping_->bytes()), path_(path) {
  adopt_contents();
}

GgufFile::GgufFile(std::span<const std::byte> bytes, std::string name) : bytes_(bytes), path_(std::move(name)) {
  adopt_contents();
}

void GgufFile::adopt_contents() {
  GgufContents contents = parse_gguf(bytes_, path_);
  version_ = contents.version;
  metadata_ = std::move(contents.metadata);
  tensors_ = std::move(contents.tensors);
  names_ = std::move(contents.names);
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
  return find_by_name(tensors_, name_of, names_, name);
}

void GgufFile::read(std::uint64_t offset, std::span<std::byte> out) const {
  if (mapping_) return mapping_->reader().read(offset, out);
  NB_CHECK(offset <= bytes_.size() && out.size() <= bytes_.size() - offset, io, path_, ": cannot read ", out.size(),
           " bytes at offset ", offset, ": the file ends at ", bytes_.size());
  if (!out.empty()) std::memcpy(out.data(), bytes_.data() + offset, out.size());
}

}  // namespace nb::io
