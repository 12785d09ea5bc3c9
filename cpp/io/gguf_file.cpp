// Layout of a file (little-endian, nothing aligned before the data):
//
//   | "GGUF" | u32 version | u64 tensors | u64 entries |
//   entry:   | string key | u32 type | value |          string: | u64 bytes | text |
//   array:   | u32 element type | u64 count | elements |
//   tensor:  | string name | u32 n | u64 dims[n] | u32 type | u64 offset |    offset counts from the start of the data
//   | padding to `alignment` | data: each tensor padded to `alignment` |
#include "io/gguf_file.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "base/error.h"
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
constexpr std::uint64_t kMinEntryBytes = 8 + 1 + 4 + 1;         // key of one byte, u8
constexpr std::uint64_t kMinTensorBytes = 8 + 1 + 4 + 8 + 4 + 8;  // name of one byte, one dimension

template <class T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

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

bool is_integer(GgufType type) {
  switch (type) {
    case GgufType::u8:
    case GgufType::i8:
    case GgufType::u16:
    case GgufType::i16:
    case GgufType::u32:
    case GgufType::i32:
    case GgufType::u64:
    case GgufType::i64: return true;
    default: return false;
  }
}

// An integer of any width: its bits extended to 64, and whether they mean a negative number.
struct WideInteger {
  std::uint64_t bits;
  bool negative;
};

WideInteger load_integer(GgufType type, const std::byte* at) {
  const auto from_signed = [](std::int64_t value) {
    return WideInteger{static_cast<std::uint64_t>(value), value < 0};
  };
  switch (type) {
    case GgufType::u8: return {load<std::uint8_t>(at), false};
    case GgufType::i8: return from_signed(load<std::int8_t>(at));
    case GgufType::u16: return {load<std::uint16_t>(at), false};
    case GgufType::i16: return from_signed(load<std::int16_t>(at));
    case GgufType::u32: return {load<std::uint32_t>(at), false};
    case GgufType::i32: return from_signed(load<std::int32_t>(at));
    case GgufType::u64: return {load<std::uint64_t>(at), false};
    default: return from_signed(load<std::int64_t>(at));
  }
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

// ---- parsing ----

// Reads the header from front to back; `context_` says in errors what is being read.
class GgufParser {
 public:
  explicit GgufParser(GgufFile& file) : file_(file), bytes_(file.bytes_) {}

  void parse() {
    check_magic();
    file_.version_ = take<std::uint32_t>("version");
    check_version();
    const std::uint64_t num_tensors = take<std::uint64_t>("tensor count");
    const std::uint64_t num_entries = take<std::uint64_t>("metadata count");
    check_count(kHeaderBytes - 8, "metadata count", num_entries, kMaxEntries, kMinEntryBytes);
    check_count(kHeaderBytes - 16, "tensor count", num_tensors, kMaxTensors, kMinTensorBytes);
    file_.metadata_.reserve(num_entries);
    for (std::uint64_t i = 0; i < num_entries; ++i) parse_entry(i);
    index_entries();
    read_alignment();
    file_.tensors_.reserve(num_tensors);
    for (std::uint64_t i = 0; i < num_tensors; ++i) parse_tensor(i);
    index_tensors();
    place_tensors();
  }

 private:
  template <class... Pieces>
  [[noreturn]] void refuse(std::uint64_t offset, const Pieces&... pieces) const {
    fail(ErrorCode::format, file_.path_, ": at offset ", offset, ": ", pieces..., context_.empty() ? "" : " (", context_,
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
    const std::uint32_t version = file_.version_;
    if (version == 2 || version == 3) return;
    const std::uint32_t swapped = byte_swapped(version);
    NB_CHECK(swapped < 1 || swapped > 3, unsupported, file_.path_, ": big-endian GGUF (version ", swapped,
             ") is not offered");
    fail(ErrorCode::unsupported, file_.path_, ": at offset 4: GGUF version ", version,
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
    file_.metadata_.emplace_back(key, take_value(type));
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
    const std::int64_t twice = sort_by_name(file_.metadata_, key_of, file_.keys_);
    if (twice >= 0) {
      const auto& [key, value] = file_.metadata_[static_cast<std::size_t>(twice)];
      refuse(value.offset, "key ", text::in_quotes(key), " occurs twice");
    }
  }

  void read_alignment() {
    constexpr std::string_view kKey = "general.alignment";
    const GgufValue* value = file_.find(kKey);
    if (value == nullptr) return;
    if (value->type != GgufType::u32) file_.fail_type(kKey, *value, "u32");
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
    file_.tensors_.push_back(std::move(tensor));
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
    const std::int64_t twice = sort_by_name(file_.tensors_, name_of, file_.names_);
    if (twice >= 0) {
      const auto index = static_cast<std::size_t>(twice);
      refuse(offsets_at_[index], "tensor name ", text::in_quotes(file_.tensors_[index].name), " occurs twice");
    }
  }

  void place_tensors() {
    const std::uint64_t alignment = alignment_;
    const std::uint64_t data = (at_ + alignment - 1) / alignment * alignment;
    for (std::size_t i = 0; i < file_.tensors_.size(); ++i) {
      GgufTensor& tensor = file_.tensors_[i];
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
    std::vector<std::uint32_t> order(file_.tensors_.size());
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
      const GgufTensor& left = file_.tensors_[a];
      const GgufTensor& right = file_.tensors_[b];
      return left.offset != right.offset ? left.offset < right.offset : left.bytes < right.bytes;
    });
    for (std::size_t i = 1; i < order.size(); ++i) {
      const GgufTensor& before = file_.tensors_[order[i - 1]];
      const GgufTensor& after = file_.tensors_[order[i]];
      context_ = "tensor " + text::in_quotes(after.name);
      if (after.offset - before.offset < before.bytes) {
        refuse(offsets_at_[order[i]], "its data overlaps that of tensor ", text::in_quotes(before.name));
      }
    }
  }

  GgufFile& file_;
  std::span<const std::byte> bytes_;
  std::uint64_t at_ = 0;
  std::uint32_t alignment_ = 32;  // unless general.alignment says otherwise
  std::string context_;
  std::vector<std::uint64_t> offsets_at_;  // where the offset of each tensor is written
};

GgufFile::GgufFile(const std::string& path)
    : mapping_(std::make_unique<MappedFile>(path)), bytes_(mapping_->bytes()), path_(path) {
  GgufParser(*this).parse();
}

GgufFile::GgufFile(std::span<const std::byte> bytes, std::string name) : bytes_(bytes), path_(std::move(name)) {
  NB_CHECK(!bytes.empty(), format, path_, ": the file is empty");
  GgufParser(*this).parse();
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
