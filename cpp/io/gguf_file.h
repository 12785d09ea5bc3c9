// Reader of GGUF files (versions 2 and 3, little-endian), written for hostile input.
//
// The directory is checked once when the file is opened; afterwards metadata are views into the mapping and nothing
// can be out of bounds. No count leads to an allocation before it has been checked against the file's size. Not for
// what a model needs (model_source.h). Immutable; safe from any thread. Source of the format: ggml's docs/gguf.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/mapped_file.h"
#include "io/metadata.h"

namespace nb::io {

struct GgufTensor {
  std::string_view name;
  std::uint32_t type;               ///< as numbered in the format; may be unknown to us
  std::vector<std::uint64_t> dims;  ///< innermost first, 1 to 4 of them, their product within i64
  std::uint64_t offset;             ///< in the file
  std::uint64_t bytes;              ///< 0 if the type is unknown
};

class GgufFile {
 public:
  /// Throws io or format, naming the file, the offset and what was being read; unsupported for version 1 and
  /// big-endian files.
  explicit GgufFile(const std::string& path);
  /// The same over memory that outlives the object; `name` is for messages. For tests and fuzzing.
  GgufFile(std::span<const std::byte> bytes, std::string name);
  GgufFile(const GgufFile&) = delete;
  GgufFile& operator=(const GgufFile&) = delete;

  const std::string& path() const { return path_; }
  std::uint32_t version() const { return version_; }
  std::uint64_t file_bytes() const { return bytes_.size(); }

  const Metadata& metadata() const { return metadata_; }
  /// See ModelSource::release_pages.
  void release_pages() const {
    if (mapping_) mapping_->advise_dont_need();
  }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }

  /// Null if there is none. Takes logarithmic time, whatever names a file invents.
  const GgufTensor* find_tensor(std::string_view name) const;

  /// Fills `out` from `offset` of the file: by positioned reads, or from memory. Throws io.
  void read(std::uint64_t offset, std::span<std::byte> out) const;

 private:
  void adopt_contents();

  std::unique_ptr<MappedFile> mapping_;
  std::span<const std::byte> bytes_;
  std::string path_;
  std::uint32_t version_ = 0;
  Metadata metadata_;
  std::vector<GgufTensor> tensors_;
  std::vector<std::uint32_t> names_;  // indices of tensors_ in order of name: no hash table that a file could aim at
};

}  // namespace nb::io
