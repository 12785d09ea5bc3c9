#include "io/gguf_file.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "base/error.h"
#include "io/bytes.h"
#include "io/gguf_parser.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

constexpr std::uint64_t kMaxSigned = std::numeric_limits<std::int64_t>::max();

bool is_integer(GgufType type) {
  switch (type) {
    case GgufType::u8:
    case GgufType::i8:
    case GgufType::u16:
    case GgufType::i16:
    case GgufType::u32:
    case GgufType::i32:
    case GgufType::u64:
    case GgufType::i64:
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

WideInteger load_integer(GgufType type, const std::byte* at) {
  const auto from_signed = [](std::int64_t value) { return WideInteger{static_cast<std::uint64_t>(value), value < 0}; };
  switch (type) {
    case GgufType::u8:
      return {load<std::uint8_t>(at), false};
    case GgufType::i8:
      return from_signed(load<std::int8_t>(at));
    case GgufType::u16:
      return {load<std::uint16_t>(at), false};
    case GgufType::i16:
      return from_signed(load<std::int16_t>(at));
    case GgufType::u32:
      return {load<std::uint32_t>(at), false};
    case GgufType::i32:
      return from_signed(load<std::int32_t>(at));
    case GgufType::u64:
      return {load<std::uint64_t>(at), false};
    default:
      return from_signed(load<std::int64_t>(at));
  }
}

template <class Items, class NameOf>
auto find_by_name(const Items& items, const NameOf& name_of, const std::vector<std::uint32_t>& order,
                  std::string_view name) -> decltype(items.data()) {
  const auto place = std::lower_bound(order.begin(), order.end(), name, [&](std::uint32_t index, std::string_view key) {
    return name_of(items[index]) < key;
  });
  return place != order.end() && name_of(items[*place]) == name ? &items[*place] : nullptr;
}

std::string_view key_of(const std::pair<std::string_view, GgufValue>& entry) { return entry.first; }
std::string_view name_of(const GgufTensor& tensor) { return tensor.name; }

}  // namespace

bool GgufStringCursor::next(std::string_view& out) {
  if (left_ == 0) return false;
  const std::uint64_t length = load<std::uint64_t>(rest_.data());
  out = as_text(rest_.subspan(sizeof(length), length));
  rest_ = rest_.subspan(sizeof(length) + length);
  --left_;
  return true;
}

GgufFile::GgufFile(const std::string& path)
    : mapping_(std::make_unique<MappedFile>(path)), bytes_(mapping_->bytes()), path_(path) {
  adopt_contents();
}

GgufFile::GgufFile(std::span<const std::byte> bytes, std::string name) : bytes_(bytes), path_(std::move(name)) {
  adopt_contents();
}

void GgufFile::adopt_contents() {
  GgufContents contents = parse_gguf(bytes_, path_);
  version_ = contents.version;
  metadata_ = std::move(contents.metadata);
  keys_ = std::move(contents.keys);
  tensors_ = std::move(contents.tensors);
  names_ = std::move(contents.names);
}

// ---- metadata ----

const GgufValue* GgufFile::find(std::string_view key) const {
  const auto* entry = find_by_name(metadata_, key_of, keys_, key);
  return entry != nullptr ? &entry->second : nullptr;
}

const GgufValue* GgufFile::require(std::string_view key, bool optional) const {
  const GgufValue* value = find(key);
  NB_CHECK(value != nullptr || optional, format, path_, ": key ", text::in_quotes(key), " is missing");
  return value;
}

void GgufFile::fail_type(std::string_view key, const GgufValue& value, const char* wanted) const {
  const std::string prefix = value.type == GgufType::array ? "array of " : "";
  fail(ErrorCode::format, path_, ": at offset ", value.offset, ": key ", text::in_quotes(key), " is of type ", prefix,
       to_string(value.element_type), ", expected ", wanted);
}

std::uint64_t GgufFile::u64(std::string_view key, std::optional<std::uint64_t> missing) const {
  const GgufValue* value = require(key, missing.has_value());
  if (value == nullptr) return *missing;
  if (!is_integer(value->type)) fail_type(key, *value, "an integer");
  const WideInteger wide = load_integer(value->type, value->bytes.data());
  NB_CHECK(!wide.negative, format, path_, ": at offset ", value->offset, ": key ", text::in_quotes(key), " is ",
           static_cast<std::int64_t>(wide.bits), ", expected u64");
  return wide.bits;
}

std::int64_t GgufFile::i64(std::string_view key, std::optional<std::int64_t> missing) const {
  const GgufValue* value = require(key, missing.has_value());
  if (value == nullptr) return *missing;
  if (!is_integer(value->type)) fail_type(key, *value, "an integer");
  const WideInteger wide = load_integer(value->type, value->bytes.data());
  NB_CHECK(wide.negative || wide.bits <= kMaxSigned, format, path_, ": at offset ", value->offset, ": key ",
           text::in_quotes(key), " is ", wide.bits, ", expected i64");
  return static_cast<std::int64_t>(wide.bits);
}

float GgufFile::f32(std::string_view key, std::optional<float> missing) const {
  const GgufValue* value = require(key, missing.has_value());
  if (value == nullptr) return *missing;
  if (value->type == GgufType::f32) return load<float>(value->bytes.data());
  if (value->type != GgufType::f64) fail_type(key, *value, "f32");
  const double wide = load<double>(value->bytes.data());
  // Everything from the middle between the largest float and 2^128 on would round to infinity.
  NB_CHECK(!(std::fabs(wide) >= 0x1.ffffffp127) || std::isinf(wide), format, path_, ": at offset ", value->offset,
           ": key ", text::in_quotes(key), " is ", wide, ", expected f32");
  return static_cast<float>(wide);
}

bool GgufFile::boolean(std::string_view key, std::optional<bool> missing) const {
  const GgufValue* value = require(key, missing.has_value());
  if (value == nullptr) return *missing;
  if (value->type != GgufType::boolean) fail_type(key, *value, "boolean");
  return value->bytes[0] != std::byte{0};
}

std::string_view GgufFile::string(std::string_view key, std::optional<std::string_view> missing) const {
  const GgufValue* value = require(key, missing.has_value());
  if (value == nullptr) return *missing;
  if (value->type != GgufType::string) fail_type(key, *value, "string");
  return as_text(value->bytes);
}

std::vector<std::string_view> GgufFile::strings(std::string_view key) const {
  std::vector<std::string_view> strings;
  const GgufValue* value = find(key);
  if (value == nullptr) return strings;
  if (value->type != GgufType::array || value->element_type != GgufType::string) {
    fail_type(key, *value, "array of strings");
  }
  strings.reserve(value->count);
  GgufStringCursor cursor(*value);
  for (std::string_view text; cursor.next(text);) strings.push_back(text);
  return strings;
}

std::vector<std::int64_t> GgufFile::integers(std::string_view key) const {
  std::vector<std::int64_t> integers;
  const GgufValue* value = find(key);
  if (value == nullptr) return integers;
  if (value->type != GgufType::array || !is_integer(value->element_type)) fail_type(key, *value, "array of integers");
  integers.reserve(value->count);
  const std::size_t stride = gguf_type_bytes(value->element_type);
  for (std::uint64_t i = 0; i < value->count; ++i) {
    const WideInteger wide = load_integer(value->element_type, value->bytes.data() + i * stride);
    NB_CHECK(wide.negative || wide.bits <= kMaxSigned, format, path_, ": at offset ", value->offset + i * stride,
             ": key ", text::in_quotes(key), " has element ", wide.bits, ", expected i64");
    integers.push_back(static_cast<std::int64_t>(wide.bits));
  }
  return integers;
}

// ---- tensors ----

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
  return find_by_name(tensors_, name_of, names_, name);
}

void GgufFile::read(std::uint64_t offset, std::span<std::byte> out) const {
  if (mapping_) return mapping_->reader().read(offset, out);
  NB_CHECK(offset <= bytes_.size() && out.size() <= bytes_.size() - offset, io, path_, ": cannot read ", out.size(),
           " bytes at offset ", offset, ": the file ends at ", bytes_.size());
  if (!out.empty()) std::memcpy(out.data(), bytes_.data() + offset, out.size());
}

}  // namespace nb::io
