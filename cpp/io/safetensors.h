// Safetensors files: a JSON directory of tensors, then their bytes.
//
//   | u64 length of the header | header (JSON, may end in spaces) | data |
//   header: {"name": {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [begin, end]}, ..., "__metadata__":
//   {...}}
//
// Read with the paranoia of the other formats: what a file claims is checked before anything is allocated for it, and
// the data must be covered by tensors without holes and overlaps. Not for pickles. Immutable; safe from any thread.
// Source of the format: the README of the safetensors project.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "io/mapped_file.h"
#include "quant/format.h"

namespace nb::io {

struct SafetensorsTensor {
  std::string name;
  std::string dtype;                    ///< as the file spells it, e.g. "BF16"
  std::optional<quant::Format> format;  ///< of F32, F16 and BF16
  std::vector<std::int64_t> shape;
  std::uint64_t offset = 0;  ///< in the file
  std::uint64_t bytes = 0;
};

/// The directory of a file of `file_bytes` bytes that begins with `head`: all of the header, at least. In the order of
/// the data. Throws format naming `path`, offset and tensor. At most 65536 tensors.
std::vector<SafetensorsTensor> parse_safetensors(std::span<const std::byte> head, std::uint64_t file_bytes,
                                                 const std::string& path);

class SafetensorsFile {
 public:
  /// Reads the header only. Throws io or format naming the path.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return reader_.path(); }
  std::uint64_t file_bytes() const { return reader_.size(); }
  /// In the order of the data.
  const std::vector<SafetensorsTensor>& tensors() const { return tensors_; }
  /// Null if there is none.
  const SafetensorsTensor* find(std::string_view name) const;

  /// Bytes of the file, for instance of a tensor.
  void read(std::uint64_t offset, std::span<std::byte> out) const { reader_.read(offset, out); }

 private:
  FileReader reader_;
  std::vector<SafetensorsTensor> tensors_;
  std::vector<std::uint32_t> names_;  // indices of tensors in order of name
};

}  // namespace nb::io
