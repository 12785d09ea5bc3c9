// Encodes metadata entries as metadata_parser.h reads them, and owns the bytes.
//
// For files that are written. Not for reading (metadata.h). One function a type, named as the getters of Metadata.
// Used by one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/metadata.h"

namespace nb::io {

class MetadataWriter {
 public:
  /// Each adds one entry; throws invalid_argument, naming the key, if it is empty, longer than 65535 bytes, not UTF-8
  /// or there already, or if there are too many entries.
  void u32(std::string_view key, std::uint32_t value) { number(key, ValueType::u32, value); }
  void u64(std::string_view key, std::uint64_t value) { number(key, ValueType::u64, value); }
  void i64(std::string_view key, std::int64_t value) { number(key, ValueType::i64, value); }
  void f32(std::string_view key, float value) { number(key, ValueType::f32, value); }
  void boolean(std::string_view key, bool value) { number(key, ValueType::boolean, static_cast<std::uint8_t>(value)); }
  /// Any bytes.
  void string(std::string_view key, std::string_view value);

  /// Arrays.
  void u32s(std::string_view key, std::span<const std::uint32_t> values) { numbers(key, ValueType::u32, values); }
  void u64s(std::string_view key, std::span<const std::uint64_t> values) { numbers(key, ValueType::u64, values); }
  void i64s(std::string_view key, std::span<const std::int64_t> values) { numbers(key, ValueType::i64, values); }
  void f32s(std::string_view key, std::span<const float> values) { numbers(key, ValueType::f32, values); }
  /// Each 0 or 1.
  void booleans(std::string_view key, std::span<const std::uint8_t> values);
  void strings(std::string_view key, std::span<const std::string> values);

  /// A value of an open file, whatever its type.
  void copy(const MetadataEntry& entry);

  std::uint64_t num_entries() const { return keys_.size(); }
  /// The entries one after another, without their count.
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  void begin(std::string_view key, ValueType type);
  void append(const void* from, std::size_t num_bytes);
  void append_string(std::string_view text);
  void array(std::string_view key, ValueType type, const void* values, std::size_t count);

  template <class T>
  void number(std::string_view key, ValueType type, T value) {
    begin(key, type);
    append(&value, sizeof(value));
  }
  template <class T>
  void numbers(std::string_view key, ValueType type, std::span<const T> values) {
    array(key, type, values.data(), values.size());
  }

  std::vector<std::byte> bytes_;
  std::set<std::string, std::less<>> keys_;
};

}  // namespace nb::io
