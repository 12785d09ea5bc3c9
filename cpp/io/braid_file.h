// Reader of .braid files, written for hostile input.
//
// Header, directories and metadata are checked once, with their checksums, when the file is opened; afterwards metadata
// are views into the mapping and nothing can be out of bounds. Tensor data are compared with their checksums by
// verify() only. Not for what a model needs (model_source.h). Immutable; safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/sha256.h"
#include "io/braid_format.h"
#include "io/mapped_file.h"
#include "io/metadata.h"
#include "io/progress.h"

namespace nb::io {

struct BraidSection {
  std::uint32_t kind;  ///< may be unknown to us
  std::uint32_t flags;
  std::uint64_t offset;
  std::uint64_t bytes;
  std::uint32_t checksum;  ///< CRC32C; of DATA 0
};

struct BraidTensor {
  std::string_view name;
  std::uint32_t format;             ///< as numbered in the file; may be unknown to us
  std::vector<std::uint64_t> dims;  ///< outermost first, 1 to 4 of them
  std::uint64_t offset;             ///< in the file
  std::uint64_t bytes;
  std::uint32_t checksum;  ///< CRC32C of the data
};

class BraidFile {
 public:
  /// Throws io or format, naming the file, the offset and what was being read; unsupported for another version or a
  /// section of an unknown kind that may not be skipped.
  explicit BraidFile(const std::string& path);
  /// The same over memory that outlives the object; `name` is for messages. For tests and fuzzing.
  BraidFile(std::span<const std::byte> bytes, std::string name);
  BraidFile(const BraidFile&) = delete;
  BraidFile& operator=(const BraidFile&) = delete;

  const std::string& path() const { return path_; }
  std::uint32_t version() const { return version_; }
  std::uint64_t file_bytes() const { return bytes_.size(); }

  /// SHA-256 of the contents, as the header says; verify() compares it.
  const Digest& fingerprint() const { return fingerprint_; }

  /// By offset.
  const std::vector<BraidSection>& sections() const { return sections_; }
  const Metadata& metadata() const { return metadata_; }
  /// See ModelSource::release_pages.
  void release_pages() const {
    if (mapping_) mapping_->advise_dont_need();
  }
  /// By offset, which is the order of execution.
  const std::vector<BraidTensor>& tensors() const { return tensors_; }

  /// Null if there is none. Takes logarithmic time, whatever names a file invents.
  const BraidTensor* find_tensor(std::string_view name) const;

  /// Fills `out` from `offset` of the file: by positioned reads, or from memory. Throws io.
  void read(std::uint64_t offset, std::span<std::byte> out) const;

  /// Reads the whole file and compares every checksum and the fingerprint; throws format naming the section, the tensor
  /// or the offset of padding that differs, io if it cannot be read.
  void verify(const ProgressFunction& progress = {}) const;

 private:
  void adopt_contents();
  std::span<const std::byte> section_bytes(BraidSectionKind kind) const;

  std::unique_ptr<MappedFile> mapping_;
  std::span<const std::byte> bytes_;
  std::string path_;
  std::uint32_t version_ = 0;
  Digest fingerprint_{};
  BraidSection directory_{};
  std::vector<BraidSection> sections_;
  Metadata metadata_;
  std::vector<BraidTensor> tensors_;
  std::vector<std::uint32_t> names_;  // indices of tensors_ in order of name
};

}  // namespace nb::io
