#include "io/braid_writer.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <string_view>
#include <utility>

#include "base/align.h"
#include "base/crc32c.h"
#include "base/error.h"
#include "io/braid_format.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

constexpr std::uint32_t kNumSections = 3;
constexpr std::uint64_t kMetadataOffset = kBraidHeaderBytes + kNumSections * kBraidSectionBytes;

// Appends little-endian values.
class Encoder {
 public:
  std::vector<std::byte> bytes;

  void u32(std::uint32_t value) { append(&value, sizeof(value)); }
  void u64(std::uint64_t value) { append(&value, sizeof(value)); }
  void text(std::string_view value) {
    u64(value.size());
    append(value.data(), value.size());
  }
  void append(const void* from, std::size_t num_bytes) {
    if (num_bytes == 0) return;
    const auto* at = static_cast<const std::byte*>(from);
    bytes.insert(bytes.end(), at, at + num_bytes);
  }
  void zeros_until(std::uint64_t size) { bytes.resize(std::max<std::uint64_t>(size, bytes.size())); }
};

}  // namespace

BraidWriter::BraidWriter(std::string path, const MetadataWriter& metadata, std::vector<BraidTensorSpec> tensors)
    : path_(std::move(path)) {
  NB_CHECK(!path_.empty() && path_.find('\0') == std::string::npos, invalid_argument, "the path of a file is ",
           text::in_quotes(path_));
  Encoder section;
  section.u64(metadata.num_entries());
  section.append(metadata.bytes().data(), metadata.bytes().size());
  metadata_ = std::move(section.bytes);
  NB_CHECK(tensors.size() <= kMaxBraidTensors, invalid_argument, path_, ": ", tensors.size(), " tensors are more than ",
           kMaxBraidTensors);
  for (BraidTensorSpec& spec : tensors) add_tensor(std::move(spec));
  check_names();
  place_tensors();
  Encoder size;
  size.u64(metadata_.size());
  hash_.update(size.bytes);
  hash_.update(metadata_);
  skip_complete();
  file_.emplace(path_, "braid", file_bytes_);
  temporary_path_ = file_->temporary_path();
}

BraidWriter::~BraidWriter() { abandon(); }

void BraidWriter::add_tensor(BraidTensorSpec spec) {
  const std::string name = text::in_quotes(spec.name);
  NB_CHECK(!spec.name.empty(), invalid_argument, path_, ": the name of tensor ", tensors_.size(), " is empty");
  NB_CHECK(spec.name.size() <= kMaxBraidNameLength, invalid_argument, path_, ": the tensor name ", name, " has ",
           spec.name.size(), " bytes, more than ", kMaxBraidNameLength);
  NB_CHECK(text::is_utf8(spec.name), invalid_argument, path_, ": the tensor name ", name, " is not UTF-8");
  NB_CHECK(!spec.shape.empty() && spec.shape.size() <= kMaxBraidDims, invalid_argument, path_, ": tensor ", name,
           " has ", spec.shape.size(), " dimensions, expected 1 to ", kMaxBraidDims);
  std::uint64_t elements = 1;
  for (const std::int64_t dim : spec.shape) {
    NB_CHECK(dim > 0 && static_cast<std::uint64_t>(dim) <= kMaxBraidElements / elements, invalid_argument, path_,
             ": tensor ", name, " has a dimension of ", dim);
    elements *= static_cast<std::uint64_t>(dim);
  }
  const std::int64_t cols = spec.shape.back();
  const int block = quant::format_info(spec.format).block_elements;
  NB_CHECK(cols % block == 0, invalid_argument, path_, ": rows of ", cols, " elements of tensor ", name,
           " do not fill ", quant::to_string(spec.format), " blocks of ", block);
  const auto row_bytes = static_cast<std::uint64_t>(quant::row_bytes(spec.format, cols));
  const std::uint64_t bytes = elements / static_cast<std::uint64_t>(cols) * row_bytes;
  tensors_.push_back({.spec = std::move(spec), .offset = 0, .bytes = bytes});
}

void BraidWriter::check_names() const {
  std::set<std::string_view> names;
  for (const Tensor& tensor : tensors_) {
    NB_CHECK(names.insert(tensor.spec.name).second, invalid_argument, path_, ": tensor name ",
             text::in_quotes(tensor.spec.name), " occurs twice");
  }
}

void BraidWriter::place_tensors() {
  tensors_offset_ = round_up(kMetadataOffset + metadata_.size(), kBraidSectionAlignment);
  std::uint64_t at = round_up(tensors_offset_ + tensor_directory().size(), kBraidDataAlignment);
  data_offset_ = at;
  constexpr std::uint64_t kMaxFile = std::uint64_t{1} << 62;
  for (Tensor& tensor : tensors_) {
    tensor.offset = at;
    NB_CHECK(tensor.bytes < kMaxFile - at, invalid_argument, path_, ": tensor ", text::in_quotes(tensor.spec.name),
             " makes the file larger than a file can be");
    at = round_up(at + tensor.bytes, kBraidDataAlignment);
  }
  file_bytes_ = at;
}

void BraidWriter::skip_complete() {
  while (current_ < tensors_.size() && tensors_[current_].written == tensors_[current_].bytes) ++current_;
}

void BraidWriter::write(std::size_t index, std::span<const std::byte> bytes) {
  NB_CHECK(file_.has_value(), invalid_argument, path_, ": the file is closed");
  NB_CHECK(index < tensors_.size(), invalid_argument, path_, ": there is no tensor ", index, " of ", tensors_.size());
  Tensor& tensor = tensors_[index];
  const std::string name = text::in_quotes(tensor.spec.name);
  NB_CHECK(bytes.size() <= tensor.bytes - tensor.written, invalid_argument, path_, ": tensor ", name, " has ",
           tensor.bytes, " bytes; ", tensor.written, " are written and ", bytes.size(), " more do not fit");
  if (bytes.empty()) return;
  NB_CHECK(index == current_, invalid_argument, path_, ": tensor ", name, " cannot be written before ",
           text::in_quotes(tensors_[current_].spec.name), " is complete");
  file_->write_at(tensor.offset + tensor.written, bytes);
  tensor.written += bytes.size();
  tensor.checksum = crc32c(bytes, tensor.checksum);
  hash_.update(bytes);
  skip_complete();
}

std::vector<std::byte> BraidWriter::tensor_directory() const {
  Encoder out;
  out.u64(tensors_.size());
  for (const Tensor& tensor : tensors_) {
    out.text(tensor.spec.name);
    out.u32(braid_code(tensor.spec.format));
    out.u32(static_cast<std::uint32_t>(tensor.spec.shape.size()));
    for (const std::int64_t dim : tensor.spec.shape) out.u64(static_cast<std::uint64_t>(dim));
    out.u64(tensor.offset);
    out.u64(tensor.bytes);
    out.u32(tensor.checksum);
  }
  return std::move(out.bytes);
}

// Everything before the data.
std::vector<std::byte> BraidWriter::head(std::span<const std::byte> directory, const Digest& fingerprint) const {
  Encoder sections;
  const auto section = [&](BraidSectionKind kind, std::uint64_t offset, std::uint64_t bytes, std::uint32_t checksum) {
    sections.u32(static_cast<std::uint32_t>(kind));
    sections.u32(0);
    sections.u64(offset);
    sections.u64(bytes);
    sections.u32(checksum);
    sections.u32(0);
  };
  section(BraidSectionKind::metadata, kMetadataOffset, metadata_.size(), crc32c(metadata_));
  section(BraidSectionKind::tensors, tensors_offset_, directory.size(), crc32c(directory));
  section(BraidSectionKind::data, data_offset_, file_bytes_ - data_offset_, 0);

  Encoder out;
  out.append(kBraidMagic.data(), kBraidMagic.size());
  out.u32(kBraidVersion);
  out.u32(0);
  out.u64(file_bytes_);
  out.u64(kBraidHeaderBytes);
  out.u32(kNumSections);
  out.u32(crc32c(sections.bytes));
  out.append(fingerprint.data(), fingerprint.size());
  out.zeros_until(kBraidHeaderBytes - 4);
  out.u32(crc32c(out.bytes));
  out.append(sections.bytes.data(), sections.bytes.size());
  out.append(metadata_.data(), metadata_.size());
  out.zeros_until(tensors_offset_);
  out.append(directory.data(), directory.size());
  out.zeros_until(data_offset_);
  return std::move(out.bytes);
}

void BraidWriter::finish() {
  NB_CHECK(file_.has_value(), invalid_argument, path_, ": the file is closed");
  if (current_ < tensors_.size()) {
    const Tensor& tensor = tensors_[current_];
    fail(ErrorCode::invalid_argument, path_, ": tensor ", text::in_quotes(tensor.spec.name),
         " is incomplete: ", tensor.written, " of ", tensor.bytes, " bytes");
  }
  const std::vector<std::byte> directory = tensor_directory();
  Sha256 hash = hash_;
  Encoder size;
  size.u64(directory.size());
  hash.update(size.bytes);
  hash.update(directory);
  file_->write_at(0, head(directory, hash.finish()));
  file_->publish();
  is_finished_ = true;
  file_.reset();
}

void BraidWriter::abandon() noexcept { file_.reset(); }

}  // namespace nb::io
