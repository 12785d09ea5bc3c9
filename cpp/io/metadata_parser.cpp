#include "io/metadata_parser.h"

#include <utility>

#include "text/unicode.h"

namespace nb::io {
namespace {

class EntryParser {
 public:
  explicit EntryParser(ByteCursor& in) : in_(in) {}

  MetadataEntry take_entry(std::uint64_t index) {
    in_.context = concat("metadata entry ", index);
    const std::string_view key = in_.take_name("key", kMaxKeyLength);
    in_.context = "key " + text::in_quotes(key);
    const auto type = take_type();
    return {key, take_value(type)};
  }

 private:
  ValueType take_type() {
    const std::uint64_t offset = in_.at();
    const auto type = static_cast<ValueType>(in_.take<std::uint32_t>("value type"));
    if (type > ValueType::f64) in_.refuse(offset, "unknown value type ", static_cast<std::uint32_t>(type));
    return type;
  }

  MetadataValue take_value(ValueType type) {
    MetadataValue value{.type = type, .element_type = type, .count = 1, .offset = in_.at(), .bytes = {}};
    if (type == ValueType::string) {
      value.bytes = in_.take_string("string");
      value.offset += sizeof(std::uint64_t);
    } else if (type == ValueType::array) {
      value.element_type = take_type();
      const std::uint64_t count_offset = in_.at();
      value.count = in_.take<std::uint64_t>("array length");
      value.offset = in_.at();
      value.bytes = take_elements(value.element_type, value.count, count_offset);
    } else {
      value.bytes = in_.take_bytes(value_type_bytes(type), "value");
      check_booleans(value);
    }
    return value;
  }

  std::span<const std::byte> take_elements(ValueType type, std::uint64_t count, std::uint64_t count_offset) {
    if (type == ValueType::array) in_.refuse(count_offset - 4, "arrays of arrays are not offered");
    const std::uint64_t least_bytes = type == ValueType::string ? sizeof(std::uint64_t) : value_type_bytes(type);
    if (count > in_.left() / least_bytes) {
      in_.refuse(count_offset, "an array of ", count, " ", to_string(type), " does not fit the ", in_.left(),
                 " bytes left in the ", in_.whole());
    }
    const std::uint64_t begin = in_.at();
    if (type == ValueType::string) {
      for (std::uint64_t i = 0; i < count; ++i) in_.take_string("string in array");
    } else {
      in_.take_bytes(count * least_bytes, "array");
    }
    const std::span<const std::byte> elements = in_.since(begin);
    check_booleans(
        {.type = ValueType::array, .element_type = type, .count = count, .offset = begin, .bytes = elements});
    return elements;
  }

  void check_booleans(const MetadataValue& value) const {
    if (value.element_type != ValueType::boolean) return;
    for (std::size_t i = 0; i < value.bytes.size(); ++i) {
      if (value.bytes[i] > std::byte{1}) {
        in_.refuse(value.offset + i, "a boolean is ", static_cast<int>(value.bytes[i]), ", neither 0 nor 1");
      }
    }
  }

  ByteCursor& in_;
};

}  // namespace

std::vector<MetadataEntry> parse_entries(ByteCursor& in, std::uint64_t count) {
  std::vector<MetadataEntry> entries;
  entries.reserve(count);
  EntryParser parser(in);
  for (std::uint64_t i = 0; i < count; ++i) entries.push_back(parser.take_entry(i));
  in.context.clear();
  return entries;
}

}  // namespace nb::io
