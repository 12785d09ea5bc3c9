#include "io/safetensors_source.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <mutex>
#include <utility>

#include "base/error.h"
#include "io/by_name.h"
#include "io/metadata_parser.h"
#include "io/safetensors.h"
#include "io/tensor_rows.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

std::string_view name_of(const TensorInfo& tensor) { return tensor.name; }

class SafetensorsSource final : public ModelSource {
 public:
  SafetensorsSource(const std::string& path, const std::vector<std::string>& files,
                    const std::vector<SafetensorsName>& tensors, const MetadataWriter& metadata,
                    const std::vector<CheckpointMatrixName>& matrices)
      : metadata_bytes_(metadata.bytes().begin(), metadata.bytes().end()) {
    ByteCursor cursor(metadata_bytes_, path, 0, "metadata");
    metadata_ = Metadata(path, parse_entries(cursor, metadata.num_entries()));
    for (const std::string& file : files) files_.push_back(std::make_unique<const SafetensorsFile>(file));
    for (const SafetensorsName& item : tensors) tensors_.push_back(info_of(item));
    num_stored_ = tensors_.size();
    for (const CheckpointMatrixName& item : matrices) add(item);
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
    const auto index = static_cast<std::size_t>(&tensor - tensors_.data());
    if (index < num_stored_) return files_[tensor.part]->read(tensor.offset + offset, out);
    const std::shared_ptr<const std::vector<std::byte>> made = rows_of(index - num_stored_);
    std::copy_n(made->begin() + static_cast<std::ptrdiff_t>(offset), out.size(), out.begin());
  }

 private:
  /// Tensors that are made and not stored: a matrix, or the order of its columns.
  struct Made {
    std::shared_ptr<const CheckpointMatrix> matrix;
    bool is_order;
  };
  using Bytes = std::shared_ptr<const std::vector<std::byte>>;
  static constexpr std::size_t kKept = 8;  ///< more than a layer has matrices

  void add(const CheckpointMatrixName& item) {
    const auto matrix = std::make_shared<const CheckpointMatrix>(files_, item);
    const auto part = static_cast<std::uint32_t>(item.codes.file);
    if (!matrix->order().empty()) {
      tensors_.push_back({.name = order_name(item.name),
                          .format = quant::Format::f32,
                          .format_name = quant::to_string(quant::Format::f32),
                          .shape = {matrix->cols()},
                          .bytes = matrix->order().size() * sizeof(float),
                          .part = part});
      made_.push_back({matrix, true});
    }
    tensors_.push_back(
        {.name = item.name,
         .format = matrix->format(),
         .format_name = quant::to_string(matrix->format()),
         .shape = {matrix->rows(), matrix->cols()},
         .bytes = static_cast<std::uint64_t>(matrix->rows() * quant::row_bytes(matrix->format(), matrix->cols())),
         .part = part});
    made_.push_back({matrix, false});
  }

  /// The bytes of a made tensor. One thread makes, others wait: they will want the same one.
  Bytes rows_of(std::size_t index) const {
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(kept_.begin(), kept_.end(), [&](const auto& item) { return item.first == index; });
    if (found != kept_.end()) return found->second;
    if (kept_.size() >= kKept) kept_.pop_front();
    const Made& made = made_[index];
    std::vector<std::byte> bytes;
    if (made.is_order) {
      const std::vector<float> values(made.matrix->order().begin(), made.matrix->order().end());
      bytes.resize(values.size() * sizeof(float));
      std::memcpy(bytes.data(), values.data(), bytes.size());
    } else {
      bytes = made.matrix->read();
    }
    kept_.emplace_back(index, std::make_shared<const std::vector<std::byte>>(std::move(bytes)));
    return kept_.back().second;
  }

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
  std::size_t num_stored_ = 0;        // tensors_ behind these are made_
  std::vector<Made> made_;
  mutable std::mutex mutex_;
  mutable std::deque<std::pair<std::size_t, Bytes>> kept_;  // indices into made_, the oldest first
};

}  // namespace

std::shared_ptr<const ModelSource> open_safetensors(const std::string& path, const std::vector<std::string>& files,
                                                    const std::vector<SafetensorsName>& tensors,
                                                    const MetadataWriter& metadata,
                                                    const std::vector<CheckpointMatrixName>& matrices) {
  return std::make_shared<const SafetensorsSource>(path, files, tensors, metadata, matrices);
}

}  // namespace nb::io
