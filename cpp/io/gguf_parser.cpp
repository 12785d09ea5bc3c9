// Layout of a file (little-endian, nothing aligned before the data):
//
//   | "GGUF" | u32 version | u64 tensors | u64 entries |
//   entry:   | string key | u32 type | value |          string: | u64 bytes | text |
//   array:   | u32 element type | u64 count | elements |
//   tensor:  | string name | u32 n | u64 dims[n] | u32 type | u64 offset |    offset counts from the start of the data
//   | padding to `alignment` | data: each tensor padded to `alignment` |
#include "io/gguf_parser.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <optional>

#include "base/error.h"
#include "io/bytes.h"
#include "text/unicode.h"

namespace nb::io {

static_assert(std::endian::native == std::endian::little, "GGUF is read in place");

namespace {

// More than any model has. They bound the memory of the directories whatever a file claims.
constexpr std::uint64_t kMaxEntries = 1 << 16;
constexpr std::uint64_t kMaxTensors = 1 << 16;
constexpr std::size_t kMaxKeyLength = 65535;  // GGUF: 2^16 - 1
constexpr std::size_t kMaxNameLength = 64;    // GGUF
constexpr std::uint32_t kMaxDims = 4;         // GGUF
constexpr std::uint32_t kMinAlignment = 8;    // GGUF: a multiple of 8; ggml: a power of two
constexpr std::uint32_t kMaxAlignment = 1 << 16;
constexpr std::uint64_t kMaxSigned = std::numeric_limits<std::int64_t>::max();
constexpr std::uint64_t kHeaderBytes = 24;
constexpr std::uint64_t kMinEntryBytes = 8 + 1 + 4 + 1;           // key of one byte, u8
constexpr std::uint64_t kMinTensorBytes = 8 + 1 + 4 + 8 + 4 + 8;  // name of one byte, one dimension

bool is_utf8(std::string_view text) {
  const char* const end = text.data() + text.size();
  for (const char* at = text.data(); at < end;) {
    const text::DecodedChar decoded = text::decode_utf8(at, end);
    if (decoded.status != text::Utf8Status::valid) return false;
    at += decoded.length;
  }
  return true;
}

std::uint32_t byte_swapped(std::uint32_t value) {
  return value >> 24 | (value >> 8 & 0xff00u) | (value << 8 & 0xff0000u) | value << 24;
}

// Indices 0..n-1 in order of names; -1 or the index of a name that occurs twice.
template <class Items, class NameOf>
std::int64_t sort_by_name(const Items& items, const NameOf& name_of, std::vector<std::uint32_t>& order) {
  order.resize(items.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    const int sign = name_of(items[a]).compare(name_of(items[b]));
    return sign != 0 ? sign < 0 : a < b;
  });
  for (std::size_t i = 1; i < order.size(); ++i) {
    if (name_of(items[order[i - 1]]) == name_of(items[order[i]])) return order[i];
  }
  return -1;
}

std::string_view key_of(const std::pair<std::string_view, GgufValue>& entry) { return entry.first; }
std::string_view name_of(const GgufTensor& tensor) { return tensor.name; }

// Reads the header from front to back; `context_` says in errors what is being read.
class GgufParser {
 public:
  GgufParser(std::span<const std::byte> bytes, const std::string& path) : bytes_(bytes), path_(path) {}

  GgufContents parse() {
    check_magic();
    file_.version = take<std::uint32_t>("version");
    check_version();
    const std::uint64_t num_tensors = take<std::uint64_t>("tensor count");
    const std::uint64_t num_entries = take<std::uint64_t>("metadata count");
    check_count(kHeaderBytes - 8, "metadata count", num_entries, kMaxEntries, kMinEntryBytes);
    check_count(kHeaderBytes - 16, "tensor count", num_tensors, kMaxTensors, kMinTensorBytes);
    file_.metadata.reserve(num_entries);
    for (std::uint64_t i = 0; i < num_entries; ++i) parse_entry(i);
    index_entries();
    read_alignment();
    file_.tensors.reserve(num_tensors);
    for (std::uint64_t i = 0; i < num_tensors; ++i) parse_tensor(i);
    index_tensors();
    place_tensors();
    return std::move(file_);
  }

 private:
  template <class... Pieces>
  [[noreturn]] void refuse(std::uint64_t offset, const Pieces&... pieces) const {
    fail(ErrorCode::format, path_, ": at offset ", offset, ": ", pieces..., context_.empty() ? "" : " (", context_,
         context_.empty() ? "" : ")");
  }

  std::uint64_t left() const { return bytes_.size() - at_; }

  std::span<const std::byte> take_bytes(std::uint64_t length, const char* what) {
    if (length > left()) {
      refuse(at_, what, " needs ", length, " bytes, but the file ends after ", left());
    }
    const std::span<const std::byte> taken = bytes_.subspan(at_, length);
    at_ += length;
    return taken;
  }

  template <class T>
  T take(const char* what) {
    return load<T>(take_bytes(sizeof(T), what).data());
  }

  std::span<const std::byte> take_string(const char* what) {
    const std::uint64_t length = take<std::uint64_t>(what);
    return take_bytes(length, what);
  }

  // A key or a name: short, not empty, UTF-8.
  std::string_view take_name(const char* what, std::size_t max_length) {
    const std::uint64_t offset = at_;
    const std::string_view name = as_text(take_string(what));
    if (name.empty()) refuse(offset, what, " is empty");
    if (name.size() > max_length) refuse(offset, what, " has ", name.size(), " bytes, more than ", max_length);
    if (!is_utf8(name)) refuse(offset, what, " ", text::in_quotes(name), " is not UTF-8");
    return name;
  }

  void check_magic() {
    constexpr std::string_view kMagic = "GGUF";
    const std::string_view magic = as_text(take_bytes(kMagic.size(), "magic"));
    if (magic != kMagic) refuse(0, "not a GGUF file: it begins with ", text::in_quotes(magic));
  }

  void check_version() {
    const std::uint32_t version = file_.version;
    if (version == 2 || version == 3) return;
    const std::uint32_t swapped = byte_swapped(version);
    NB_CHECK(swapped < 1 || swapped > 3, unsupported, path_, ": big-endian GGUF (version ", swapped,
             ") is not offered");
    fail(ErrorCode::unsupported, path_, ": at offset 4: GGUF version ", version,
         " unsupported; this program reads 2 and 3");
  }

  void check_count(std::uint64_t offset, const char* what, std::uint64_t count, std::uint64_t most,
                   std::uint64_t least_bytes) const {
    if (count > left() / least_bytes) refuse(offset, what, " ", count, " is more than the file can hold");
    if (count > most) refuse(offset, what, " ", count, " is more than ", most);
  }

  void parse_entry(std::uint64_t index) {
    context_ = concat("metadata entry ", index);
    const std::string_view key = take_name("key", kMaxKeyLength);
    context_ = "key " + text::in_quotes(key);
    const auto type = take_type();
    file_.metadata.emplace_back(key, take_value(type));
  }

  GgufType take_type() {
    const std::uint64_t offset = at_;
    const auto type = static_cast<GgufType>(take<std::uint32_t>("value type"));
    if (type > GgufType::f64) refuse(offset, "unknown value type ", static_cast<std::uint32_t>(type));
    return type;
  }

  GgufValue take_value(GgufType type) {
    GgufValue value{.type = type, .element_type = type, .count = 1, .offset = at_, .bytes = {}};
    if (type == GgufType::string) {
      value.bytes = take_string("string");
      value.offset += sizeof(std::uint64_t);
    } else if (type == GgufType::array) {
      value.element_type = take_type();
      const std::uint64_t count_offset = at_;
      value.count = take<std::uint64_t>("array length");
      value.offset = at_;
      value.bytes = take_elements(value.element_type, value.count, count_offset);
    } else {
      value.bytes = take_bytes(gguf_type_bytes(type), "value");
      check_booleans(value);
    }
    return value;
  }

  std::span<const std::byte> take_elements(GgufType type, std::uint64_t count, std::uint64_t count_offset) {
    if (type == GgufType::array) refuse(count_offset - 4, "arrays of arrays are not offered");
    const std::uint64_t least_bytes = type == GgufType::string ? sizeof(std::uint64_t) : gguf_type_bytes(type);
    if (count > left() / least_bytes) {
      refuse(count_offset, "an array of ", count, " ", to_string(type), " does not fit the ", left(),
             " bytes left in the file");
    }
    const std::uint64_t begin = at_;
    if (type == GgufType::string) {
      for (std::uint64_t i = 0; i < count; ++i) take_string("string in array");
    } else {
      take_bytes(count * least_bytes, "array");
    }
    const std::span<const std::byte> elements = bytes_.subspan(begin, at_ - begin);
    check_booleans({.type = GgufType::array, .element_type = type, .count = count, .offset = begin, .bytes = elements});
    return elements;
  }

  void check_booleans(const GgufValue& value) const {
    if (value.element_type != GgufType::boolean) return;
    for (std::size_t i = 0; i < value.bytes.size(); ++i) {
      if (value.bytes[i] > std::byte{1}) {
        refuse(value.offset + i, "a boolean is ", static_cast<int>(value.bytes[i]), ", neither 0 nor 1");
      }
    }
  }

  void index_entries() {
    context_.clear();
    const std::int64_t twice = sort_by_name(file_.metadata, key_of, file_.keys);
    if (twice >= 0) {
      const auto& [key, value] = file_.metadata[static_cast<std::size_t>(twice)];
      refuse(value.offset, "key ", text::in_quotes(key), " occurs twice");
    }
  }

  void read_alignment() {
    constexpr std::string_view kKey = "general.alignment";
    const GgufValue* value = nullptr;
    for (const auto& entry : file_.metadata) {
      if (entry.first == kKey) value = &entry.second;
    }
    if (value == nullptr) return;
    if (value->type != GgufType::u32) {
      refuse(value->offset, "key ", kKey, " is of type ", to_string(value->type), ", expected u32");
    }
    const std::uint32_t alignment = load<std::uint32_t>(value->bytes.data());
    if (!std::has_single_bit(alignment) || alignment < kMinAlignment || alignment > kMaxAlignment) {
      refuse(value->offset, "key ", kKey, " is ", alignment, ", not a power of two from ", kMinAlignment, " to ",
             kMaxAlignment);
    }
    alignment_ = alignment;
  }

  void parse_tensor(std::uint64_t index) {
    context_ = concat("tensor ", index);
    GgufTensor tensor{};
    tensor.name = take_name("tensor name", kMaxNameLength);
    context_ = "tensor " + text::in_quotes(tensor.name);
    const std::uint64_t dims_offset = at_;
    const std::uint32_t num_dims = take<std::uint32_t>("number of dimensions");
    if (num_dims < 1 || num_dims > kMaxDims) refuse(dims_offset, num_dims, " dimensions, expected 1 to ", kMaxDims);
    std::uint64_t elements = 1;
    for (std::uint32_t i = 0; i < num_dims; ++i) {
      const std::uint64_t offset = at_;
      const std::uint64_t dim = take<std::uint64_t>("dimension");
      if (dim == 0) refuse(offset, "dimension ", i, " is 0");
      if (dim > kMaxSigned / elements) refuse(offset, "dimension ", i, " is ", dim, ": too many elements to count");
      elements *= dim;
      tensor.dims.push_back(dim);
    }
    const std::uint64_t type_offset = at_;
    tensor.type = take<std::uint32_t>("tensor type");
    tensor.bytes = tensor_bytes(tensor, elements, type_offset);
    offsets_at_.push_back(at_);
    tensor.offset = take<std::uint64_t>("tensor offset");  // relative until place_tensors()
    file_.tensors.push_back(std::move(tensor));
  }

  std::uint64_t tensor_bytes(const GgufTensor& tensor, std::uint64_t elements, std::uint64_t type_offset) const {
    const std::optional<GgufTensorType> type = gguf_tensor_type(tensor.type);
    if (!type) return 0;
    if (tensor.dims[0] % type->block_elements != 0) {
      refuse(type_offset, "rows of ", tensor.dims[0], " elements do not fill ", type->name, " blocks of ",
             type->block_elements);
    }
    const std::uint64_t blocks = elements / type->block_elements;
    if (blocks > bytes_.size() / type->block_bytes) {
      refuse(type_offset, blocks, " blocks of ", type->block_bytes, " bytes are more than the file can hold");
    }
    return blocks * type->block_bytes;
  }

  void index_tensors() {
    context_.clear();
    const std::int64_t twice = sort_by_name(file_.tensors, name_of, file_.names);
    if (twice >= 0) {
      const auto index = static_cast<std::size_t>(twice);
      refuse(offsets_at_[index], "tensor name ", text::in_quotes(file_.tensors[index].name), " occurs twice");
    }
  }

  void place_tensors() {
    const std::uint64_t alignment = alignment_;
    const std::uint64_t data = (at_ + alignment - 1) / alignment * alignment;
    for (std::size_t i = 0; i < file_.tensors.size(); ++i) {
      GgufTensor& tensor = file_.tensors[i];
      context_ = "tensor " + text::in_quotes(tensor.name);
      if (tensor.offset % alignment != 0) {
        refuse(offsets_at_[i], "offset ", tensor.offset, " is not a multiple of the alignment ", alignment);
      }
      const std::uint64_t room = data < bytes_.size() ? bytes_.size() - data : 0;
      if (tensor.offset > room || tensor.bytes > room - tensor.offset) {
        refuse(offsets_at_[i], tensor.bytes, " bytes at offset ", tensor.offset, " of the data, which has only ", room,
               " bytes");
      }
      tensor.offset += data;
    }
    check_overlap();
  }

  void check_overlap() {
    std::vector<std::uint32_t> order(file_.tensors.size());
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
      const GgufTensor& left = file_.tensors[a];
      const GgufTensor& right = file_.tensors[b];
      return left.offset != right.offset ? left.offset < right.offset : left.bytes < right.bytes;
    });
    for (std::size_t i = 1; i < order.size(); ++i) {
      const GgufTensor& before = file_.tensors[order[i - 1]];
      const GgufTensor& after = file_.tensors[order[i]];
      context_ = "tensor " + text::in_quotes(after.name);
      if (after.offset - before.offset < before.bytes) {
        refuse(offsets_at_[order[i]], "its data overlaps that of tensor ", text::in_quotes(before.name));
      }
    }
  }

  std::span<const std::byte> bytes_;
  const std::string& path_;
  GgufContents file_;
  std::uint64_t at_ = 0;
  std::uint32_t alignment_ = 32;  // unless general.alignment says otherwise
  std::string context_;
  std::vector<std::uint64_t> offsets_at_;  // where the offset of each tensor is written
};

}  // namespace

GgufContents parse_gguf(std::span<const std::byte> bytes, const std::string& path) {
  NB_CHECK(!bytes.empty(), format, path, ": the file is empty");
  return GgufParser(bytes, path).parse();
}

}  // namespace nb::io
