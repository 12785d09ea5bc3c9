// Reader of GGUF files (versions 2 and 3, little-endian), written for hostile input.
//
// The directory is checked once when the file is opened; afterwards metadata are views into the mapping and nothing
// can be out of bounds. No count leads to an allocation before it has been checked against the file's size. Not for
// tensor data (weight_source.h). Immutable; safe from any thread. Source of the format: ggml's docs/gguf.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io/gguf_types.h"
#include "io/mapped_file.h"

namespace nb::io {

/// One metadata value: a view of its bytes in the file.
struct GgufValue {
  GgufType type;
  GgufType element_type;             ///< of arrays; otherwise the same as `type`
  std::uint64_t count;               ///< elements of an array; 1 otherwise
  std::uint64_t offset;              ///< in the file, of the first of `bytes`
  std::span<const std::byte> bytes;  ///< the value; of a string its text; of arrays the elements, strings with lengths
};

/// Walks the strings of an array without allocating.
class GgufStringCursor {
 public:
  /// `value` must be an array of strings of an open file.
  explicit GgufStringCursor(const GgufValue& value) : rest_(value.bytes), left_(value.count) {}

  /// Gives the next string; false after the last.
  bool next(std::string_view& out);

 private:
  std::span<const std::byte> rest_;
  std::uint64_t left_;
};

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

  /// Keys in file order.
  const std::vector<std::pair<std::string_view, GgufValue>>& metadata() const { return metadata_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }

  /// Null if there is none. Takes logarithmic time, whatever names a file invents.
  const GgufTensor* find_tensor(std::string_view name) const;

  bool has(std::string_view key) const { return find(key) != nullptr; }
  const GgufValue* find(std::string_view key) const;

  /// Typed getters. Integers convert between widths where the value fits, f64 is rounded to f32 unless that
  /// overflows. Without a default a missing key throws format; a wrong type always does, naming key, wanted and found.
  std::uint64_t u64(std::string_view key, std::optional<std::uint64_t> missing = std::nullopt) const;
  std::int64_t i64(std::string_view key, std::optional<std::int64_t> missing = std::nullopt) const;
  float f32(std::string_view key, std::optional<float> missing = std::nullopt) const;
  bool boolean(std::string_view key, std::optional<bool> missing = std::nullopt) const;
  /// Any bytes: GGUF asks for UTF-8, the reader does not insist.
  std::string_view string(std::string_view key, std::optional<std::string_view> missing = std::nullopt) const;
  /// Empty if the key is missing.
  std::vector<std::string_view> strings(std::string_view key) const;
  std::vector<std::int64_t> integers(std::string_view key) const;

  /// A value as text for people, always UTF-8: at most `max_items` elements of an array, strings cut at 200 bytes,
  /// control characters and bytes that are not UTF-8 escaped.
  std::string describe(const GgufValue& value, int max_items = 8) const;

  /// Fills `out` from `offset` of the file: by positioned reads, or from memory. Throws io.
  void read(std::uint64_t offset, std::span<std::byte> out) const;

 private:
  void adopt_contents();
  const GgufValue* require(std::string_view key, bool optional) const;
  [[noreturn]] void fail_type(std::string_view key, const GgufValue& value, const char* wanted) const;

  std::unique_ptr<MappedFile> mapping_;
  std::span<const std::byte> bytes_;
  std::string path_;
  std::uint32_t version_ = 0;
  std::vector<std::pair<std::string_view, GgufValue>> metadata_;
  std::vector<std::uint32_t> keys_;  // indices in order of key: no hash table that a file could aim at
  std::vector<GgufTensor> tensors_;
  std::vector<std::uint32_t> names_;
};

}  // namespace nb::io
