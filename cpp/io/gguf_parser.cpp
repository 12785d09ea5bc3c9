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
#include "io/by_name.h"
#include "io/byte_cursor.h"
#include "io/bytes.h"
#include "io/gguf_types.h"
#include "io/metadata_parser.h"
#include "text/unicode.h"

namespace nb::io {

static_assert(std::endian::native == std::endian::little, "GGUF is read in place");

namespace {

// More than any model has; bounds the memory of the directory whatever a file claims.
constexpr std::uint64_t kMaxTensors = 1 << 16;
constexpr std::size_t kMaxNameLength = 64;  // GGUF
constexpr std::uint32_t kMaxDims = 4;       // GGUF
constexpr std::uint32_t kMinAlignment = 8;  // GGUF: a multiple of 8; ggml: a power of two
constexpr std::uint32_t kMaxAlignment = 1 << 16;
constexpr std::uint64_t kMaxSigned = std::numeric_limits<std::int64_t>::max();
constexpr std::uint64_t kHeaderBytes = 24;
constexpr std::uint64_t kMinTensorBytes = 8 + 1 + 4 + 8 + 4 + 8;  // name of one byte, one dimension

std::uint32_t byte_swapped(std::uint32_t value) {
  return value >> 24 | (value >> 8 & 0xff00u) | (value << 8 & 0xff0000u) | value << 24;
}

std::string_view name_of(const GgufTensor& tensor) { return tensor.name; }

// Reads the header from front to back.
class GgufParser : ByteCursor {
 public:
  using ByteCursor::ByteCursor;

  GgufContents parse() {
    check_magic();
    file_.version = take<std::uint32_t>("version");
    check_version();
    const std::uint64_t num_tensors = take<std::uint64_t>("tensor count");
    const std::uint64_t num_entries = take<std::uint64_t>("metadata count");
    check_count(kHeaderBytes - 8, "metadata count", num_entries, kMaxMetadataEntries, kMinMetadataEntryBytes);
    check_count(kHeaderBytes - 16, "tensor count", num_tensors, kMaxTensors, kMinTensorBytes);
    file_.metadata = Metadata(path(), parse_entries(*this, num_entries));
    read_alignment();
    file_.tensors.reserve(num_tensors);
    for (std::uint64_t i = 0; i < num_tensors; ++i) parse_tensor(i);
    index_tensors();
    place_tensors();
    return std::move(file_);
  }

 private:
  void check_magic() {
    constexpr std::string_view kMagic = "GGUF";
    const std::string_view magic = as_text(take_bytes(kMagic.size(), "magic"));
    if (magic != kMagic) refuse(0, "not a GGUF file: it begins with ", text::in_quotes(magic));
  }

  void check_version() {
    const std::uint32_t version = file_.version;
    if (version == 2 || version == 3) return;
    const std::uint32_t swapped = byte_swapped(version);
    NB_CHECK(swapped < 1 || swapped > 3, unsupported, path(), ": big-endian GGUF (version ", swapped,
             ") is not offered");
    fail(ErrorCode::unsupported, path(), ": at offset 4: GGUF version ", version,
         " unsupported; this program reads 2 and 3");
  }

  void read_alignment() {
    constexpr std::string_view kKey = "general.alignment";
    const MetadataValue* value = file_.metadata.find(kKey);
    if (value == nullptr) return;
    if (value->type != ValueType::u32) {
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
    context = concat("tensor ", index);
    GgufTensor tensor{};
    tensor.name = take_name("tensor name", kMaxNameLength);
    context = "tensor " + text::in_quotes(tensor.name);
    const std::uint64_t dims_offset = at();
    const std::uint32_t num_dims = take<std::uint32_t>("number of dimensions");
    if (num_dims < 1 || num_dims > kMaxDims) refuse(dims_offset, num_dims, " dimensions, expected 1 to ", kMaxDims);
    std::uint64_t elements = 1;
    for (std::uint32_t i = 0; i < num_dims; ++i) {
      const std::uint64_t offset = at();
      const std::uint64_t dim = take<std::uint64_t>("dimension");
      if (dim == 0) refuse(offset, "dimension ", i, " is 0");
      if (dim > kMaxSigned / elements) refuse(offset, "dimension ", i, " is ", dim, ": too many elements to count");
      elements *= dim;
      tensor.dims.push_back(dim);
    }
    const std::uint64_t type_offset = at();
    tensor.type = take<std::uint32_t>("tensor type");
    tensor.bytes = tensor_bytes(tensor, elements, type_offset);
    offsets_at_.push_back(at());
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
    if (blocks > size() / type->block_bytes) {
      refuse(type_offset, blocks, " blocks of ", type->block_bytes, " bytes are more than the file can hold");
    }
    return blocks * type->block_bytes;
  }

  void index_tensors() {
    context.clear();
    const std::int64_t twice = sort_by_name(file_.tensors, name_of, file_.names);
    if (twice >= 0) {
      const auto index = static_cast<std::size_t>(twice);
      refuse(offsets_at_[index], "tensor name ", text::in_quotes(file_.tensors[index].name), " occurs twice");
    }
  }

  void place_tensors() {
    const std::uint64_t alignment = alignment_;
    const std::uint64_t data = (at() + alignment - 1) / alignment * alignment;
    for (std::size_t i = 0; i < file_.tensors.size(); ++i) {
      GgufTensor& tensor = file_.tensors[i];
      context = "tensor " + text::in_quotes(tensor.name);
      if (tensor.offset % alignment != 0) {
        refuse(offsets_at_[i], "offset ", tensor.offset, " is not a multiple of the alignment ", alignment);
      }
      const std::uint64_t room = data < size() ? size() - data : 0;
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
      context = "tensor " + text::in_quotes(after.name);
      if (after.offset - before.offset < before.bytes) {
        refuse(offsets_at_[order[i]], "its data overlaps that of tensor ", text::in_quotes(before.name));
      }
    }
  }

  GgufContents file_;
  std::uint32_t alignment_ = 32;           // unless general.alignment says otherwise
  std::vector<std::uint64_t> offsets_at_;  // where the offset of each tensor is written
};

}  // namespace

GgufContents parse_gguf(std::span<const std::byte> bytes, const std::string& path) {
  NB_CHECK(!bytes.empty(), format, path, ": the file is empty");
  return GgufParser(bytes, path).parse();
}

}  // namespace nb::io
