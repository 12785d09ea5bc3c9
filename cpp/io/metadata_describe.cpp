// Metadata values as text for people.
#include <algorithm>
#include <cstring>
#include <sstream>

#include "io/metadata.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

constexpr std::size_t kMaxText = 200;

template <class T>
std::string number(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(value));
  std::ostringstream out;
  if constexpr (sizeof(T) == 1) {
    out << static_cast<int>(value);
  } else {
    out << value;
  }
  return out.str();
}

std::string scalar(ValueType type, const std::byte* at) {
  switch (type) {
    case ValueType::u8:
      return number<std::uint8_t>(at);
    case ValueType::i8:
      return number<std::int8_t>(at);
    case ValueType::u16:
      return number<std::uint16_t>(at);
    case ValueType::i16:
      return number<std::int16_t>(at);
    case ValueType::u32:
      return number<std::uint32_t>(at);
    case ValueType::i32:
      return number<std::int32_t>(at);
    case ValueType::f32:
      return number<float>(at);
    case ValueType::boolean:
      return *at != std::byte{0} ? "true" : "false";
    case ValueType::u64:
      return number<std::uint64_t>(at);
    case ValueType::i64:
      return number<std::int64_t>(at);
    case ValueType::f64:
      return number<double>(at);
    default:
      return "?";
  }
}

std::string escaped(char32_t character, std::string_view bytes, bool valid) {
  static constexpr char kHex[] = "0123456789abcdef";
  if (valid && character == '\n') return "\\n";
  if (valid && (character == '"' || character == '\\')) return {'\\', bytes[0]};
  if (valid && character >= 0x20 && (character < 0x7f || character > 0x9f)) return std::string(bytes);
  std::string out;
  for (const char byte : bytes) {
    const auto value = static_cast<unsigned char>(byte);
    out += {'\\', 'x', kHex[value >> 4], kHex[value & 15]};
  }
  return out;
}

std::string quoted(std::string_view text) {
  std::string out = "\"";
  const char* const end = text.data() + text.size();
  const char* at = text.data();
  while (at < end && static_cast<std::size_t>(at - text.data()) < kMaxText) {
    const text::DecodedChar decoded = text::decode_utf8(at, end);
    out += escaped(decoded.code_point, {at, decoded.length}, decoded.status == text::Utf8Status::valid);
    at += decoded.length;
  }
  out += '"';
  return at < end ? out + "... (" + std::to_string(text.size()) + " bytes)" : out;
}

std::string items(const MetadataValue& value, std::size_t count) {
  std::string out;
  StringCursor strings(value);
  const std::size_t stride = value_type_bytes(value.element_type);
  for (std::size_t i = 0; i < count; ++i) {
    if (i > 0) out += ", ";
    if (value.element_type == ValueType::string) {
      std::string_view text;
      strings.next(text);
      out += quoted(text);
    } else {
      out += scalar(value.element_type, value.bytes.data() + i * stride);
    }
  }
  return out;
}

}  // namespace

std::string Metadata::describe(const MetadataValue& value, int max_items) const {
  if (value.type == ValueType::string) {
    return quoted({reinterpret_cast<const char*>(value.bytes.data()), value.bytes.size()});
  }
  if (value.type != ValueType::array) return scalar(value.type, value.bytes.data());
  const std::uint64_t shown = std::min<std::uint64_t>(value.count, static_cast<std::uint64_t>(std::max(max_items, 0)));
  std::string out = "[";
  out += items(value, shown);
  if (shown < value.count) {
    out += shown > 0 ? ", ... (" : "... (";
    out += std::to_string(value.count) + " " + to_string(value.element_type) + ")";
  }
  return out + "]";
}

}  // namespace nb::io
