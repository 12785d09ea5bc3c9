#include "io/weight_source.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "io/gguf_format.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

std::string refusal(std::uint32_t type, std::string_view tensor) {
  return "tensor " + text::in_quotes(tensor) + " has format " + gguf_tensor_type_name(type) +
         ", which is not offered; there are F32, F16, BF16, Q4_0, Q4_1 and Q8_0";
}

class GgufWeights final : public WeightSource {
 public:
  explicit GgufWeights(std::shared_ptr<const GgufFile> file) : file_(std::move(file)) {
    const std::uint64_t parts = file_->u64("split.count", 1);
    NB_CHECK(parts <= 1, unsupported, file_->path(), ": the model is split over ", parts,
             " files; join them into one first");
    for (const GgufTensor& tensor : file_->tensors()) {
      const std::optional<quant::Format> format = to_format(tensor.type);
      if (!format) continue;
      std::vector<std::int64_t> shape(tensor.dims.rbegin(), tensor.dims.rend());
      index_.push_back(&tensor);
      tensors_.push_back({.name = std::string(tensor.name),
                          .format = *format,
                          .shape = std::move(shape),
                          .bytes = tensor.bytes,
                          .offset = tensor.offset});
    }
  }

  const TensorInfo* find(std::string_view name) const override {
    const GgufTensor* tensor = file_->find_tensor(name);
    if (tensor == nullptr) return nullptr;
    NB_CHECK(to_format(tensor->type).has_value(), unsupported, file_->path(), ": ", refusal(tensor->type, name));
    // Both lists are in file order, and the directory is one array.
    const auto place = std::lower_bound(index_.begin(), index_.end(), tensor);
    return &tensors_[static_cast<std::size_t>(place - index_.begin())];
  }

  void read(const TensorInfo& tensor, std::uint64_t offset, std::span<std::byte> out) const override {
    NB_CHECK(offset <= tensor.bytes && out.size() <= tensor.bytes - offset, invalid_argument, file_->path(), ": ",
             out.size(), " bytes at offset ", offset, " are outside tensor ", text::in_quotes(tensor.name), " of ",
             tensor.bytes, " bytes");
    file_->read(tensor.offset + offset, out);
  }

 private:
  std::shared_ptr<const GgufFile> file_;
  std::vector<TensorInfo> tensors_;
  std::vector<const GgufTensor*> index_;  // of tensors_, into the directory of the file
};

}  // namespace

quant::Format format_of_gguf_type(std::uint32_t type, std::string_view tensor) {
  const std::optional<quant::Format> format = to_format(type);
  NB_CHECK(format.has_value(), unsupported, refusal(type, tensor));
  return *format;
}

std::unique_ptr<WeightSource> open_gguf_weights(std::shared_ptr<const GgufFile> file) {
  return std::make_unique<GgufWeights>(std::move(file));
}

}  // namespace nb::io
