#include "io/metadata_writer.h"

#include <algorithm>
#include <bit>

#include "base/error.h"
#include "io/metadata_parser.h"
#include "text/unicode.h"

namespace nb::io {

static_assert(std::endian::native == std::endian::little, "values are written as they stand in memory");

void MetadataWriter::string(std::string_view key, std::string_view value) {
  begin(key, ValueType::string);
  append_string(value);
}

void MetadataWriter::booleans(std::string_view key, std::span<const std::uint8_t> values) {
  NB_CHECK(std::all_of(values.begin(), values.end(), [](std::uint8_t value) { return value <= 1; }), invalid_argument,
           "key ", text::in_quotes(key), " has a boolean that is neither 0 nor 1");
  array(key, ValueType::boolean, values.data(), values.size());
}

void MetadataWriter::strings(std::string_view key, std::span<const std::string> values) {
  array(key, ValueType::string, nullptr, values.size());
  for (const std::string& value : values) append_string(value);
}

void MetadataWriter::copy(const MetadataEntry& entry) {
  const auto& [key, value] = entry;
  begin(key, value.type);
  if (value.type == ValueType::array) {
    const auto element_type = static_cast<std::uint32_t>(value.element_type);
    append(&element_type, sizeof(element_type));
    append(&value.count, sizeof(value.count));
  } else if (value.type == ValueType::string) {
    const std::uint64_t length = value.bytes.size();
    append(&length, sizeof(length));
  }
  append(value.bytes.data(), value.bytes.size());
}

void MetadataWriter::begin(std::string_view key, ValueType type) {
  NB_CHECK(!key.empty(), invalid_argument, "a metadata key is empty");
  NB_CHECK(key.size() <= kMaxKeyLength, invalid_argument, "the metadata key ", text::in_quotes(key), " has ",
           key.size(), " bytes, more than ", kMaxKeyLength);
  NB_CHECK(text::is_utf8(key), invalid_argument, "the metadata key ", text::in_quotes(key), " is not UTF-8");
  NB_CHECK(keys_.size() < kMaxMetadataEntries, invalid_argument, "key ", text::in_quotes(key), " is one more than the ",
           kMaxMetadataEntries, " that a file may have");
  NB_CHECK(keys_.emplace(key).second, invalid_argument, "key ", text::in_quotes(key), " occurs twice");
  append_string(key);
  append(&type, sizeof(type));
}

void MetadataWriter::append(const void* from, std::size_t num_bytes) {
  if (num_bytes == 0) return;
  const auto* bytes = static_cast<const std::byte*>(from);
  bytes_.insert(bytes_.end(), bytes, bytes + num_bytes);
}

void MetadataWriter::append_string(std::string_view text) {
  const std::uint64_t length = text.size();
  append(&length, sizeof(length));
  append(text.data(), text.size());
}

void MetadataWriter::array(std::string_view key, ValueType type, const void* values, std::size_t count) {
  begin(key, ValueType::array);
  const std::uint64_t length = count;
  append(&type, sizeof(type));
  append(&length, sizeof(length));
  if (values != nullptr) append(values, count * value_type_bytes(type));
}

}  // namespace nb::io
