#include "io/metadata.h"

#include <cmath>
#include <iterator>
#include <limits>

#include "base/error.h"
#include "io/by_name.h"
#include "io/bytes.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

struct TypeRow {
  const char* name;
  std::uint32_t bytes;
};

// Indexed by ValueType.
constexpr TypeRow kValueTypes[] = {
    {"u8", 1},      {"i8", 1},     {"u16", 2},   {"i16", 2}, {"u32", 4}, {"i32", 4}, {"f32", 4},
    {"boolean", 1}, {"string", 0}, {"array", 0}, {"u64", 8}, {"i64", 8}, {"f64", 8},
};

constexpr std::uint64_t kMaxSigned = std::numeric_limits<std::int64_t>::max();

bool is_integer(ValueType type) {
  switch (type) {
    case ValueType::u8:
    case ValueType::i8:
    case ValueType::u16:
    case ValueType::i16:
    case ValueType::u32:
    case ValueType::i32:
    case ValueType::u64:
    case ValueType::i64:
      return true;
    default:
      return false;
  }
}

// An integer of any width: its bits extended to 64, and whether they mean a negative number.
struct WideInteger {
  std::uint64_t bits;
  bool negative;
};

WideInteger load_integer(ValueType type, const std::byte* at) {
  const auto from_signed = [](std::int64_t value) { return WideInteger{static_cast<std::uint64_t>(value), value < 0}; };
  switch (type) {
    case ValueType::u8:
      return {load<std::uint8_t>(at), false};
    case ValueType::i8:
      return from_signed(load<std::int8_t>(at));
    case ValueType::u16:
      return {load<std::uint16_t>(at), false};
    case ValueType::i16:
      return from_signed(load<std::int16_t>(at));
    case ValueType::u32:
      return {load<std::uint32_t>(at), false};
    case ValueType::i32:
      return from_signed(load<std::int32_t>(at));
    case ValueType::u64:
      return {load<std::uint64_t>(at), false};
    default:
      return from_signed(load<std::int64_t>(at));
  }
}

std::string_view key_of(const MetadataEntry& entry) { return entry.first; }

}  // namespace

const char* to_string(ValueType type) {
  const auto index = static_cast<std::uint32_t>(type);
  return index < std::size(kValueTypes) ? kValueTypes[index].name : "unknown";
}

std::uint32_t value_type_bytes(ValueType type) {
  const auto index = static_cast<std::uint32_t>(type);
  return index < std::size(kValueTypes) ? kValueTypes[index].bytes : 0;
}

bool StringCursor::next(std::string_view& out) {
  if (left_ == 0) return false;
  const std::uint64_t length = load<std::uint64_t>(rest_.data());
  out = as_text(rest_.subspan(sizeof(length), length));
  rest_ = rest_.subspan(sizeof(length) + length);
  --left_;
  return true;
}

Metadata::Metadata(std::string path, std::vector<MetadataEntry> entries)
    : path_(std::move(path)), entries_(std::move(entries)) {
  const std::int64_t twice = sort_by_name(entries_, key_of, keys_);
  if (twice < 0) return;
  const auto& [key, value] = entries_[static_cast<std::size_t>(twice)];
  fail(ErrorCode::format, path_, ": at offset ", value.offset, ": key ", text::in_quotes(key), " occurs twice");
}

const MetadataValue* Metadata::find(std::string_view key) const {
  const MetadataEntry* entry = find_by_name(entries_, key_of, keys_, key);
  return entry != nullptr ? &entry->second : nullptr;
}

const MetadataValue* Metadata::require(std::string_view key, bool optional) const {
  const MetadataValue* value = find(key);
  NB_CHECK(value != nullptr || optional, format, path_, ": key ", text::in_quotes(key), " is missing");
  return value;
}

void Metadata::fail_type(std::string_view key, const MetadataValue& value, const char* wanted) const {
  const std::string prefix = value.type == ValueType::array ? "array of " : "";
  fail(ErrorCode::format, path_, ": at offset ", value.offset, ": key ", text::in_quotes(key), " is of type ", prefix,
       to_string(value.element_type), ", expected ", wanted);
}

std::uint64_t Metadata::u64(std::string_view key, std::optional<std::uint64_t> missing) const {
  const MetadataValue* value = require(key, missing.has_value());
  if (value == nullptr) return *missing;
  if (!is_integer(value->type)) fail_type(key, *value, "an integer");
  const WideInteger wide = load_integer(value->type, value->bytes.data());
  NB_CHECK(!wide.negative, format, path_, ": at offset ", value->offset, ": key ", text::in_quotes(key), " is ",
           static_cast<std::int64_t>(wide.bits), ", expected u64");
  return wide.bits;
}

std::int64_t Metadata::i64(std::string_view key, std::optional<std::int64_t> missing) const {
  const MetadataValue* value = require(key, missing.has_value());
  if (value == nullptr) return *missing;
  if (!is_integer(value->type)) fail_type(key, *value, "an integer");
  const WideInteger wide = load_integer(value->type, value->bytes.data());
  NB_CHECK(wide.negative || wide.bits <= kMaxSigned, format, path_, ": at offset ", value->offset, ": key ",
           text::in_quotes(key), " is ", wide.bits, ", expected i64");
  return static_cast<std::int64_t>(wide.bits);
}

float Metadata::f32(std::string_view key, std::optional<float> missing) const {
  const MetadataValue* value = require(key, missing.has_value());
  if (value == nullptr) return *missing;
  if (value->type == ValueType::f32) return load<float>(value->bytes.data());
  if (value->type != ValueType::f64) fail_type(key, *value, "f32");
  const double wide = load<double>(value->bytes.data());
  // Everything from the middle between the largest float and 2^128 on would round to infinity.
  NB_CHECK(!(std::fabs(wide) >= 0x1.ffffffp127) || std::isinf(wide), format, path_, ": at offset ", value->offset,
           ": key ", text::in_quotes(key), " is ", wide, ", expected f32");
  return static_cast<float>(wide);
}

bool Metadata::boolean(std::string_view key, std::optional<bool> missing) const {
  const MetadataValue* value = require(key, missing.has_value());
  if (value == nullptr) return *missing;
  if (value->type != ValueType::boolean) fail_type(key, *value, "boolean");
  return value->bytes[0] != std::byte{0};
}

std::string_view Metadata::string(std::string_view key, std::optional<std::string_view> missing) const {
  const MetadataValue* value = require(key, missing.has_value());
  if (value == nullptr) return *missing;
  if (value->type != ValueType::string) fail_type(key, *value, "string");
  return as_text(value->bytes);
}

std::vector<std::string_view> Metadata::strings(std::string_view key) const {
  std::vector<std::string_view> strings;
  const MetadataValue* value = find(key);
  if (value == nullptr) return strings;
  if (value->type != ValueType::array || value->element_type != ValueType::string) {
    fail_type(key, *value, "array of strings");
  }
  strings.reserve(value->count);
  StringCursor cursor(*value);
  for (std::string_view text; cursor.next(text);) strings.push_back(text);
  return strings;
}

std::vector<std::int64_t> Metadata::integers(std::string_view key) const {
  std::vector<std::int64_t> integers;
  const MetadataValue* value = find(key);
  if (value == nullptr) return integers;
  if (value->type != ValueType::array || !is_integer(value->element_type)) fail_type(key, *value, "array of integers");
  integers.reserve(value->count);
  const std::size_t stride = value_type_bytes(value->element_type);
  for (std::uint64_t i = 0; i < value->count; ++i) {
    const WideInteger wide = load_integer(value->element_type, value->bytes.data() + i * stride);
    NB_CHECK(wide.negative || wide.bits <= kMaxSigned, format, path_, ": at offset ", value->offset + i * stride,
             ": key ", text::in_quotes(key), " has element ", wide.bits, ", expected i64");
    integers.push_back(static_cast<std::int64_t>(wide.bits));
  }
  return integers;
}

}  // namespace nb::io
