// Typed keys and values of a model file, whichever format holds them.
//
// GGUF files and our own share the types and the vocabulary of keys ("llama.block_count", "tokenizer.ggml.tokens"), so
// that families and tokenizers read both alike. Values are views into the file: not for files that are gone. Immutable;
// safe from any thread. Source of types and keys: ggml's docs/gguf.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace nb::io {

/// Types of values, numbered as in GGUF.
enum class ValueType : std::uint32_t {
  u8 = 0,
  i8 = 1,
  u16 = 2,
  i16 = 3,
  u32 = 4,
  i32 = 5,
  f32 = 6,
  boolean = 7,
  string = 8,
  array = 9,
  u64 = 10,
  i64 = 11,
  f64 = 12,
};

/// "u32", "string", ...
const char* to_string(ValueType type);

/// Bytes of one value in the file; 0 for string and array, whose size varies, and for numbers that name no type.
std::uint32_t value_type_bytes(ValueType type);

/// One metadata value: a view of its bytes in the file.
struct MetadataValue {
  ValueType type;
  ValueType element_type;            ///< of arrays; otherwise the same as `type`
  std::uint64_t count;               ///< elements of an array; 1 otherwise
  std::uint64_t offset;              ///< in the file, of the first of `bytes`
  std::span<const std::byte> bytes;  ///< the value; of a string its text; of arrays the elements, strings with lengths
};

/// Walks the strings of an array without allocating.
class StringCursor {
 public:
  /// `value` must be an array of strings of an open file.
  explicit StringCursor(const MetadataValue& value) : rest_(value.bytes), left_(value.count) {}

  /// Gives the next string; false after the last.
  bool next(std::string_view& out);

 private:
  std::span<const std::byte> rest_;
  std::uint64_t left_;
};

using MetadataEntry = std::pair<std::string_view, MetadataValue>;

class Metadata {
 public:
  Metadata() = default;
  /// `path` is for messages. Throws format naming a key that occurs twice. O(n log n).
  Metadata(std::string path, std::vector<MetadataEntry> entries);

  const std::string& path() const { return path_; }
  /// In file order.
  const std::vector<MetadataEntry>& entries() const { return entries_; }

  bool has(std::string_view key) const { return find(key) != nullptr; }
  const MetadataValue* find(std::string_view key) const;

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
  std::string describe(const MetadataValue& value, int max_items = 8) const;

 private:
  const MetadataValue* require(std::string_view key, bool optional) const;
  [[noreturn]] void fail_type(std::string_view key, const MetadataValue& value, const char* wanted) const;

  std::string path_;
  std::vector<MetadataEntry> entries_;
  std::vector<std::uint32_t> keys_;  // indices in order of key: no hash table that a file could aim at
};

}  // namespace nb::io
