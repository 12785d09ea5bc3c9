#include "io/gguf_source.h"

#include <utility>

#include "base/error.h"
#include "io/gguf_format.h"
#include "io/gguf_types.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

std::string refusal(std::uint32_t type, std::string_view tensor) {
  return "tensor " + text::in_quotes(tensor) + " has format " + gguf_tensor_type_name(type) +
         ", which is not offered; there are F32, F16, BF16, Q4_0, Q4_1 and Q8_0";
}

class GgufSource final : public ModelSource {
 public:
  explicit GgufSource(std::shared_ptr<const GgufFile> file) : file_(std::move(file)) {
    const std::uint64_t parts = metadata().u64("split.count", 1);
    NB_CHECK(parts <= 1, unsupported, path(), ": the model is split over ", parts, " files; join them into one first");
    for (const GgufTensor& tensor : file_->tensors()) {
      tensors_.push_back({.name = std::string(tensor.name),
                          .format = to_format(tensor.type),
                          .format_name = gguf_tensor_type_name(tensor.type),
                          .shape = {tensor.dims.rbegin(), tensor.dims.rend()},
                          .bytes = tensor.bytes,
                          .offset = tensor.offset});
    }
  }

  FileKind kind() const override { return FileKind::gguf; }
  std::uint32_t version() const override { return file_->version(); }
  std::uint64_t file_bytes() const override { return file_->file_bytes(); }
  const Metadata& metadata() const override { return file_->metadata(); }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }

  const TensorInfo* find(std::string_view name) const override {
    const GgufTensor* tensor = file_->find_tensor(name);
    if (tensor == nullptr) return nullptr;
    NB_CHECK(to_format(tensor->type).has_value(), unsupported, path(), ": ", refusal(tensor->type, name));
    return &tensors_[static_cast<std::size_t>(tensor - file_->tensors().data())];
  }

  void read(const TensorInfo& tensor, std::uint64_t offset, std::span<std::byte> out) const override {
    NB_CHECK(offset <= tensor.bytes && out.size() <= tensor.bytes - offset, invalid_argument, path(), ": ", out.size(),
             " bytes at offset ", offset, " are outside tensor ", text::in_quotes(tensor.name), " of ", tensor.bytes,
             " bytes");
    file_->read(tensor.offset + offset, out);
  }

 private:
  std::shared_ptr<const GgufFile> file_;
  std::vector<TensorInfo> tensors_;  // in the order of the file's own
};

}  // namespace

quant::Format format_of_gguf_type(std::uint32_t type, std::string_view tensor) {
  const std::optional<quant::Format> format = to_format(type);
  NB_CHECK(format.has_value(), unsupported, refusal(type, tensor));
  return *format;
}

std::shared_ptr<const ModelSource> open_gguf(std::shared_ptr<const GgufFile> file) {
  return std::make_shared<const GgufSource>(std::move(file));
}

}  // namespace nb::io
