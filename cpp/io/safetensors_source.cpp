#include "io/safetensors_source.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "io/by_name.h"
#include "io/metadata_parser.h"
#include "io/safetensors.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

std::string_view name_of(const TensorInfo& tensor) { return tensor.name; }

class SafetensorsSource final : public ModelSource {
 public:
  SafetensorsSource(const std::string& path, const std::vector<std::string>& files,
                    const std::vector<SafetensorsName>& tensors, const MetadataWriter& metadata)
      : metadata_bytes_(metadata.bytes().begin(), metadata.bytes().end()) {
    ByteCursor cursor(metadata_bytes_, path, 0, "metadata");
    metadata_ = Metadata(path, parse_entries(cursor, metadata.num_entries()));
    for (const std::string& file : files) files_.push_back(std::make_unique<const SafetensorsFile>(file));
    for (const SafetensorsName& item : tensors) tensors_.push_back(info_of(item));
    const std::int64_t twice = sort_by_name(tensors_, name_of, names_);
    NB_CHECK(twice < 0, invalid_argument, path, ": tensor ",
             text::in_quotes(tensors_[static_cast<std::size_t>(std::max<std::int64_t>(twice, 0))].name),
             " is given twice");
  }

  FileKind kind() const override { return FileKind::safetensors; }
  std::uint32_t version() const override { return 0; }
  std::uint64_t file_bytes() const override {
    std::uint64_t bytes = 0;
    for (const auto& file : files_) bytes += file->file_bytes();
    return bytes;
  }
  std::vector<std::string> parts() const override {
    std::vector<std::string> paths;
    for (const auto& file : files_) paths.push_back(file->path());
    return paths;
  }
  const Metadata& metadata() const override { return metadata_; }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }

  const TensorInfo* find(std::string_view name) const override {
    const TensorInfo* info = find_by_name(tensors_, name_of, names_, name);
    if (info == nullptr) return nullptr;
    NB_CHECK(info->format.has_value(), unsupported, files_[info->part]->path(), ": tensor ", text::in_quotes(name),
             " has dtype ", info->format_name, ", which is not offered");
    return info;
  }

  void read(const TensorInfo& tensor, std::uint64_t offset, std::span<std::byte> out) const override {
    check_inside(tensor, offset, out.size());
    files_[tensor.part]->read(tensor.offset + offset, out);
  }

 private:
  TensorInfo info_of(const SafetensorsName& item) const {
    NB_CHECK(item.file < files_.size(), invalid_argument, "there is no safetensors file ", item.file);
    const SafetensorsTensor* tensor = files_[item.file]->find(item.stored_name);
    NB_CHECK(tensor != nullptr, format, files_[item.file]->path(), ": there is no tensor ",
             text::in_quotes(item.stored_name));
    return {.name = item.name,
            .format = tensor->format,
            .format_name = tensor->dtype,
            .shape = tensor->shape,
            .bytes = tensor->format ? tensor->bytes : 0,
            .offset = tensor->offset,
            .part = static_cast<std::uint32_t>(item.file)};
  }

  std::vector<std::byte> metadata_bytes_;  // what metadata_ points into
  Metadata metadata_;
  std::vector<std::unique_ptr<const SafetensorsFile>> files_;
  std::vector<TensorInfo> tensors_;
  std::vector<std::uint32_t> names_;  // indices of tensors in order of name
};

}  // namespace

std::shared_ptr<const ModelSource> open_safetensors(const std::string& path, const std::vector<std::string>& files,
                                                    const std::vector<SafetensorsName>& tensors,
                                                    const MetadataWriter& metadata) {
  return std::make_shared<const SafetensorsSource>(path, files, tensors, metadata);
}

}  // namespace nb::io
