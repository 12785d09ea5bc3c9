#include "io/braid_source.h"

#include <utility>

#include "base/error.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

class BraidSource final : public ModelSource {
 public:
  explicit BraidSource(std::shared_ptr<const BraidFile> file) : file_(std::move(file)) {
    for (const BraidTensor& tensor : file_->tensors()) {
      tensors_.push_back({.name = std::string(tensor.name),
                          .format = braid_format(tensor.format),
                          .format_name = braid_format_name(tensor.format),
                          .shape = {tensor.dims.begin(), tensor.dims.end()},
                          .bytes = tensor.bytes,
                          .offset = tensor.offset});
    }
  }

  FileKind kind() const override { return FileKind::braid; }
  std::uint32_t version() const override { return file_->version(); }
  std::uint64_t file_bytes() const override { return file_->file_bytes(); }
  const Metadata& metadata() const override { return file_->metadata(); }
  void release_pages() const override { file_->release_pages(); }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  std::string fingerprint() const override { return to_hex(file_->fingerprint()); }

  const TensorInfo* find(std::string_view name) const override {
    const BraidTensor* tensor = file_->find_tensor(name);
    if (tensor == nullptr) return nullptr;
    const TensorInfo& info = tensors_[static_cast<std::size_t>(tensor - file_->tensors().data())];
    NB_CHECK(info.format.has_value(), unsupported, path(), ": tensor ", text::in_quotes(name), " has format ",
             info.format_name, ", which is not offered");
    return &info;
  }

  void read(const TensorInfo& tensor, std::uint64_t offset, std::span<std::byte> out) const override {
    check_inside(tensor, offset, out.size());
    file_->read(tensor.offset + offset, out);
  }

  std::vector<SectionInfo> sections() const override {
    std::vector<SectionInfo> sections;
    for (const BraidSection& section : file_->sections()) {
      sections.push_back({braid_section_name(section.kind), section.offset, section.bytes});
    }
    return sections;
  }

  bool verify(const ProgressFunction& progress) const override {
    file_->verify(progress);
    return true;
  }

 private:
  std::shared_ptr<const BraidFile> file_;
  std::vector<TensorInfo> tensors_;  // in the order of the file's own
};

}  // namespace

std::shared_ptr<const ModelSource> open_braid(std::shared_ptr<const BraidFile> file) {
  return std::make_shared<const BraidSource>(std::move(file));
}

}  // namespace nb::io
