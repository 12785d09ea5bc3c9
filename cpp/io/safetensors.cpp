#include "io/safetensors.h"

#include <algorithm>
#include <limits>
#include <string_view>

#include "base/error.h"
#include "io/by_name.h"
#include "io/bytes.h"
#include "io/json.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the format's own library
constexpr std::size_t kMaxTensors = 1 << 16;
constexpr std::size_t kMaxNameBytes = 1024;
constexpr std::size_t kMaxDims = 8;

struct SafetensorsType {
  std::string_view name;
  std::uint64_t bits;
  std::optional<quant::Format> format;
};

// Every type of the format, so that a file with others than ours is refused by the tensor's name.
constexpr SafetensorsType kTypes[] = {
    {"F32", 32, quant::Format::f32}, {"F16", 16, quant::Format::f16}, {"BF16", 16, quant::Format::bf16},
    {"F64", 64, std::nullopt},       {"F8_E4M3", 8, std::nullopt},    {"F8_E5M2", 8, std::nullopt},
    {"F8_E8M0", 8, std::nullopt},    {"F6_E2M3", 6, std::nullopt},    {"F6_E3M2", 6, std::nullopt},
    {"F4", 4, std::nullopt},         {"C64", 64, std::nullopt},       {"BOOL", 8, std::nullopt},
    {"U8", 8, std::nullopt},         {"I8", 8, std::nullopt},         {"U16", 16, std::nullopt},
    {"I16", 16, std::nullopt},       {"U32", 32, std::nullopt},       {"I32", 32, std::nullopt},
    {"U64", 64, std::nullopt},       {"I64", 64, std::nullopt},
};

std::string_view name_of(const SafetensorsTensor& tensor) { return tensor.name; }

// Length of the header, checked against the file.
std::uint64_t header_length(std::span<const std::byte> start, std::uint64_t file_bytes, const std::string& path) {
  NB_CHECK(file_bytes >= 8 && start.size() >= 8, format, path, ": at offset 0: the file has ", file_bytes,
           " bytes, too few for a safetensors file");
  const auto length = load<std::uint64_t>(start.data());
  NB_CHECK(length <= file_bytes - 8, format, path, ": at offset 0: a header of ", length,
           " bytes, but the file ends after ", file_bytes - 8);
  NB_CHECK(length <= kMaxHeaderBytes, format, path, ": at offset 0: a header of ", length, " bytes, more than ",
           kMaxHeaderBytes);
  return length;
}

class HeaderParser {
 public:
  HeaderParser(std::string_view text, std::uint64_t data_bytes, const std::string& path)
      : json_(text, path, 8), data_begin_(8 + text.size()), data_bytes_(data_bytes), path_(path) {
    NB_CHECK(text.starts_with('{'), format, path, ": at offset 8: the header does not begin with '{'");
  }

  std::vector<SafetensorsTensor> run() {
    json_.begin_object();
    bool has_metadata = false;
    for (std::string key; json_.next_key(key);) {
      if (key != "__metadata__") {
        tensors_.push_back(tensor(key));
        if (tensors_.size() > kMaxTensors) refuse("more than ", kMaxTensors, " tensors");
        continue;
      }
      if (has_metadata) refuse("the key __metadata__ occurs twice");
      has_metadata = true;
      json_.begin_object();
      for (std::string name; json_.next_key(name);) static_cast<void>(json_.string());
    }
    json_.finish();
    std::vector<std::uint32_t> order;
    const std::int64_t twice = sort_by_name(tensors_, name_of, order);
    if (twice >= 0) {
      refuse("tensor ", text::in_quotes(tensors_[static_cast<std::size_t>(twice)].name), " occurs twice");
    }
    check_coverage();
    return std::move(tensors_);
  }

 private:
  template <class... Pieces>
  [[noreturn]] void refuse(const Pieces&... pieces) const {
    fail(ErrorCode::format, path_, ": at offset ", json_.offset(), ": ", pieces...);
  }

  SafetensorsTensor tensor(const std::string& name) {
    if (name.empty()) refuse("a tensor without a name");
    if (name.size() > kMaxNameBytes) refuse("a tensor name of ", name.size(), " bytes, more than ", kMaxNameBytes);
    const std::string quoted = text::in_quotes(name);
    SafetensorsTensor out;
    out.name = name;
    const SafetensorsType* type = nullptr;
    std::vector<std::uint64_t> offsets;
    bool has_shape = false, has_offsets = false;
    json_.begin_object();
    for (std::string key; json_.next_key(key);) {
      if (key == "dtype" && type == nullptr) {
        out.dtype = json_.string();
        type =
            std::find_if(std::begin(kTypes), std::end(kTypes), [&](const auto& row) { return row.name == out.dtype; });
        if (type == std::end(kTypes)) refuse("tensor ", quoted, " has unknown dtype ", text::in_quotes(out.dtype));
      } else if (key == "shape" && !has_shape) {
        has_shape = true;
        for (json_.begin_array(); json_.next_element();) {
          const std::uint64_t dim = json_.unsigned_integer();
          if (dim > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
            refuse("tensor ", quoted, " has a dimension of ", dim);
          out.shape.push_back(static_cast<std::int64_t>(dim));
          if (out.shape.size() > kMaxDims) refuse("tensor ", quoted, " has more than ", kMaxDims, " dimensions");
        }
      } else if (key == "data_offsets" && !has_offsets) {
        has_offsets = true;
        for (json_.begin_array(); json_.next_element();) {
          offsets.push_back(json_.unsigned_integer());
          if (offsets.size() > 2) break;
        }
        if (offsets.size() != 2) refuse("tensor ", quoted, " does not have two data_offsets");
      } else {
        refuse("tensor ", quoted, ": key ", text::in_quotes(key), " is unknown or occurs twice");
      }
    }
    if (type == nullptr || !has_shape || !has_offsets) refuse("tensor ", quoted, " lacks dtype, shape or data_offsets");
    place(out, *type, offsets[0], offsets[1], quoted);
    return out;
  }

  void place(SafetensorsTensor& out, const SafetensorsType& type, std::uint64_t begin, std::uint64_t end,
             const std::string& quoted) const {
    if (begin > end || end > data_bytes_) {
      refuse("tensor ", quoted, " has data from ", begin, " to ", end, ", outside the ", data_bytes_,
             " bytes there are");
    }
    std::uint64_t bits = type.bits;
    for (const std::int64_t dim : out.shape) {
      if (__builtin_mul_overflow(bits, static_cast<std::uint64_t>(dim), &bits))
        refuse("the size of tensor ", quoted, " is more than 2^64 bits");
    }
    if (bits % 8 != 0 || bits / 8 != end - begin) {
      refuse("tensor ", quoted, " has ", end - begin, " bytes, its shape and dtype want ", bits / 8);
    }
    out.format = type.format;
    out.offset = data_begin_ + begin;
    out.bytes = end - begin;
  }

  // No byte of the data may belong to two tensors, or to none.
  void check_coverage() {
    std::sort(tensors_.begin(), tensors_.end(), [](const auto& a, const auto& b) {
      return a.offset != b.offset ? a.offset < b.offset : a.bytes != b.bytes ? a.bytes < b.bytes : a.name < b.name;
    });
    std::uint64_t at = data_begin_;
    for (const SafetensorsTensor& tensor : tensors_) {
      if (tensor.offset != at) {
        fail(ErrorCode::format, path_, ": at offset ", std::min(at, tensor.offset), ": tensor ",
             text::in_quotes(tensor.name),
             tensor.offset < at ? " overlaps the one before it" : " leaves a hole before it");
      }
      at += tensor.bytes;
    }
    NB_CHECK(at == data_begin_ + data_bytes_, format, path_, ": at offset ", at, ": ", data_begin_ + data_bytes_ - at,
             " bytes at the end belong to no tensor");
  }

  JsonCursor json_;
  std::uint64_t data_begin_, data_bytes_;
  const std::string& path_;
  std::vector<SafetensorsTensor> tensors_;
};

std::vector<SafetensorsTensor> read_header(const FileReader& reader) {
  std::vector<std::byte> head(static_cast<std::size_t>(std::min<std::uint64_t>(8, reader.size())));
  reader.read(0, head);
  head.resize(static_cast<std::size_t>(8 + header_length(head, reader.size(), reader.path())));
  reader.read(8, std::span(head).subspan(8));
  return parse_safetensors(head, reader.size(), reader.path());
}

}  // namespace

std::vector<SafetensorsTensor> parse_safetensors(std::span<const std::byte> head, std::uint64_t file_bytes,
                                                 const std::string& path) {
  const std::uint64_t length = header_length(head, file_bytes, path);
  NB_CHECK(head.size() - 8 >= length, invalid_argument, path, ": only ", head.size(), " bytes of the header");
  return HeaderParser(as_text(head.subspan(8, length)), file_bytes - 8 - length, path).run();
}

SafetensorsFile::SafetensorsFile(const std::string& path) : reader_(path), tensors_(read_header(reader_)) {
  static_cast<void>(sort_by_name(tensors_, name_of, names_));
}

const SafetensorsTensor* SafetensorsFile::find(std::string_view name) const {
  return find_by_name(tensors_, name_of, names_, name);
}

}  // namespace nb::io
