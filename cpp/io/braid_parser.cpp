#include "io/braid_parser.h"

#include <algorithm>
#include <bit>

#include "base/crc32c.h"
#include "base/error.h"
#include "io/by_name.h"
#include "io/byte_cursor.h"
#include "io/bytes.h"
#include "io/metadata_parser.h"
#include "text/unicode.h"

namespace nb::io {

static_assert(std::endian::native == std::endian::little, ".braid files are read in place");

namespace {

constexpr std::uint64_t kMinTensorBytes = 8 + 1 + 4 + 4 + 8 + 8 + 8 + 4;  // name of one byte, one dimension

std::uint32_t byte_swapped(std::uint32_t value) {
  return value >> 24 | (value >> 8 & 0xff00u) | (value << 8 & 0xff0000u) | value << 24;
}

std::string_view name_of(const BraidTensor& tensor) { return tensor.name; }

bool is_zero(std::span<const std::byte> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte byte) { return byte == std::byte{0}; });
}

class BraidParser {
 public:
  BraidParser(std::span<const std::byte> bytes, const std::string& path) : bytes_(bytes), path_(path) {}

  BraidContents parse() {
    parse_header();
    parse_sections();
    parse_metadata();
    parse_tensors();
    return std::move(file_);
  }

 private:
  void parse_header() {
    ByteCursor in(bytes_, path_);
    const std::string_view magic = as_text(in.take_bytes(std::min<std::uint64_t>(kBraidMagic.size(), in.left()), ""));
    if (magic != kBraidMagic) in.refuse(0, "not a .braid file: it begins with ", text::in_quotes(magic));
    file_.version = in.take<std::uint32_t>("version");
    check_version();
    in.context = "header";
    const auto flags = in.take<std::uint32_t>("flags");
    const auto file_bytes = in.take<std::uint64_t>("file size");
    file_.directory.offset = in.take<std::uint64_t>("offset of the section directory");
    num_sections_ = in.take<std::uint32_t>("number of sections");
    file_.directory.checksum = in.take<std::uint32_t>("checksum of the section directory");
    const auto fingerprint = in.take_bytes(file_.fingerprint.size(), "fingerprint");
    std::copy(fingerprint.begin(), fingerprint.end(), file_.fingerprint.begin());
    const auto unused = in.take_bytes(kBraidHeaderBytes - 4 - in.at(), "rest of the header");
    const std::uint32_t checksum = in.take<std::uint32_t>("checksum of the header");
    if (checksum != crc32c(bytes_.first(kBraidHeaderBytes - 4))) {
      in.refuse(kBraidHeaderBytes - 4, "the header does not have its checksum: the file is damaged");
    }
    if (flags != 0) in.refuse(12, "flags are ", flags, ", expected 0");
    if (!is_zero(unused)) in.refuse(kBraidHeaderBytes - 4 - unused.size(), "unused bytes are not 0");
    if (file_bytes != bytes_.size()) {
      in.refuse(16, "the file has ", bytes_.size(), " bytes and should have ", file_bytes, ": it is ",
                bytes_.size() < file_bytes ? "incomplete" : "too long");
    }
  }

  void check_version() const {
    if (file_.version == kBraidVersion) return;
    constexpr std::uint32_t kMaxSwapped = 0xff;  // no version of a file that another byte order could be
    const std::uint32_t swapped = byte_swapped(file_.version);
    NB_CHECK(swapped == 0 || swapped > kMaxSwapped, unsupported, path_, ": at offset 8: big-endian .braid (version ",
             swapped, ") is not offered");
    fail(ErrorCode::unsupported, path_, ": at offset 8: .braid version ", file_.version,
         " unsupported; this program reads ", kBraidVersion);
  }

  void parse_sections() {
    ByteCursor in(bytes_, path_);
    in.context = "section directory";
    if (num_sections_ > kMaxBraidSections) in.refuse(32, num_sections_, " sections are more than ", kMaxBraidSections);
    BraidSection& directory = file_.directory;
    directory.bytes = num_sections_ * kBraidSectionBytes;
    check_extent(in, 24, directory, kBraidSectionAlignment);
    if (crc32c(bytes_.subspan(directory.offset, directory.bytes)) != directory.checksum) {
      in.refuse(directory.offset, "the section directory does not have its checksum: the file is damaged");
    }
    for (std::uint32_t i = 0; i < num_sections_; ++i) parse_section(i);
    check_overlap();
    for (const auto kind : {BraidSectionKind::metadata, BraidSectionKind::tensors, BraidSectionKind::data}) {
      if (find_section(kind) == nullptr) {
        in.refuse(directory.offset, "section ", braid_section_name(static_cast<std::uint32_t>(kind)), " is missing");
      }
    }
  }

  void parse_section(std::uint32_t index) {
    const std::uint64_t at = file_.directory.offset + index * kBraidSectionBytes;
    ByteCursor in(bytes_, path_, at);
    BraidSection section{};
    section.kind = in.take<std::uint32_t>("kind");
    in.context = "section " + braid_section_name(section.kind);
    section.flags = in.take<std::uint32_t>("flags");
    section.offset = in.take<std::uint64_t>("offset");
    section.bytes = in.take<std::uint64_t>("size");
    section.checksum = in.take<std::uint32_t>("checksum");
    if (in.take<std::uint32_t>("unused") != 0) in.refuse(at + 28, "unused bytes are not 0");
    if ((section.flags & ~kBraidSkippable) != 0) in.refuse(at + 4, "unknown flags ", section.flags);
    const bool is_known = section.kind >= 1 && section.kind <= static_cast<std::uint32_t>(BraidSectionKind::data);
    NB_CHECK(is_known || (section.flags & kBraidSkippable) != 0, unsupported, path_, ": at offset ", at,
             ": a section of unknown ", braid_section_name(section.kind), ", which only a later version can read");
    const bool is_data = section.kind == static_cast<std::uint32_t>(BraidSectionKind::data);
    check_extent(in, at + 8, section, is_data ? kBraidDataAlignment : kBraidSectionAlignment);
    if (is_data && section.checksum != 0) in.refuse(at + 24, "the checksum is not 0; each tensor has its own");
    if (is_known && find_section(static_cast<BraidSectionKind>(section.kind)) != nullptr) {
      in.refuse(at, "occurs twice");
    }
    file_.sections.push_back(section);
  }

  // Refuses what is unaligned or not within the file; `at` is where the offset is written.
  void check_extent(const ByteCursor& in, std::uint64_t at, const BraidSection& extent, std::uint64_t alignment) const {
    if (extent.offset % alignment != 0) in.refuse(at, "offset ", extent.offset, " is not a multiple of ", alignment);
    if (extent.offset < kBraidHeaderBytes) in.refuse(at, "offset ", extent.offset, " is within the header");
    if (extent.offset > bytes_.size() || extent.bytes > bytes_.size() - extent.offset) {
      in.refuse(at, extent.bytes, " bytes at offset ", extent.offset, " do not fit a file of ", bytes_.size());
    }
  }

  void check_overlap() {
    std::sort(file_.sections.begin(), file_.sections.end(), [](const BraidSection& a, const BraidSection& b) {
      return a.offset != b.offset ? a.offset < b.offset : a.bytes < b.bytes;
    });
    const std::uint64_t directory_end = file_.directory.offset + file_.directory.bytes;
    const BraidSection* before = nullptr;
    for (const BraidSection& section : file_.sections) {
      const std::uint64_t end = section.offset + section.bytes;
      NB_CHECK(end <= file_.directory.offset || section.offset >= directory_end, format, path_, ": at offset ",
               section.offset, ": section ", braid_section_name(section.kind), " overlaps the section directory");
      NB_CHECK(before == nullptr || section.offset - before->offset >= before->bytes, format, path_, ": at offset ",
               section.offset, ": section ", braid_section_name(section.kind), " overlaps section ",
               braid_section_name(before->kind));
      before = &section;
    }
  }

  const BraidSection* find_section(BraidSectionKind kind) const {
    for (const BraidSection& section : file_.sections) {
      if (section.kind == static_cast<std::uint32_t>(kind)) return &section;
    }
    return nullptr;
  }

  // A cursor over a section whose checksum has been compared.
  ByteCursor open_section(BraidSectionKind kind) const {
    const BraidSection& section = *find_section(kind);
    const std::string name = braid_section_name(section.kind);
    ByteCursor in(bytes_.first(section.offset + section.bytes), path_, section.offset, "section");
    if (crc32c(bytes_.subspan(section.offset, section.bytes)) != section.checksum) {
      in.refuse(section.offset, "section ", name, " does not have its checksum: the file is damaged");
    }
    in.context = "section " + name;
    return in;
  }

  static void check_end(ByteCursor& in, BraidSectionKind kind) {
    in.context = "section " + braid_section_name(static_cast<std::uint32_t>(kind));
    if (in.left() != 0) in.refuse(in.at(), in.left(), " bytes follow the last entry");
  }

  void parse_metadata() {
    ByteCursor in = open_section(BraidSectionKind::metadata);
    const std::uint64_t at = in.at();
    const std::uint64_t count = in.take<std::uint64_t>("metadata count");
    in.check_count(at, "metadata count", count, kMaxMetadataEntries, kMinMetadataEntryBytes);
    file_.metadata = Metadata(path_, parse_entries(in, count));
    check_end(in, BraidSectionKind::metadata);
  }

  void parse_tensors() {
    ByteCursor in = open_section(BraidSectionKind::tensors);
    const std::uint64_t at = in.at();
    const std::uint64_t count = in.take<std::uint64_t>("tensor count");
    in.check_count(at, "tensor count", count, kMaxBraidTensors, kMinTensorBytes);
    data_ = *find_section(BraidSectionKind::data);
    data_end_ = data_.offset;
    file_.tensors.reserve(count);
    std::vector<std::uint64_t> entries;  // where each begins
    for (std::uint64_t i = 0; i < count; ++i) {
      entries.push_back(in.at());
      parse_tensor(in, i);
    }
    check_end(in, BraidSectionKind::tensors);
    const std::int64_t twice = sort_by_name(file_.tensors, name_of, file_.names);
    if (twice >= 0) {
      const auto index = static_cast<std::size_t>(twice);
      in.refuse(entries[index], "tensor name ", text::in_quotes(file_.tensors[index].name), " occurs twice");
    }
  }

  void parse_tensor(ByteCursor& in, std::uint64_t index) {
    in.context = concat("section TENSORS, tensor ", index);
    BraidTensor tensor{};
    tensor.name = in.take_name("tensor name", kMaxBraidNameLength);
    in.context = "tensor " + text::in_quotes(tensor.name);
    const std::uint64_t format_at = in.at();
    tensor.format = in.take<std::uint32_t>("format");
    const std::uint64_t rank_at = in.at();
    const auto rank = in.take<std::uint32_t>("number of dimensions");
    if (rank < 1 || rank > kMaxBraidDims) in.refuse(rank_at, rank, " dimensions, expected 1 to ", kMaxBraidDims);
    std::uint64_t elements = 1;
    for (std::uint32_t i = 0; i < rank; ++i) {
      const std::uint64_t at = in.at();
      const std::uint64_t dim = in.take<std::uint64_t>("dimension");
      if (dim == 0) in.refuse(at, "dimension ", i, " is 0");
      if (dim > kMaxBraidElements / elements) in.refuse(at, "dimension ", i, " is ", dim, ": too many elements");
      elements *= dim;
      tensor.dims.push_back(dim);
    }
    const std::uint64_t offset_at = in.at();
    tensor.offset = in.take<std::uint64_t>("tensor offset");
    tensor.bytes = in.take<std::uint64_t>("tensor size");
    tensor.checksum = in.take<std::uint32_t>("tensor checksum");
    check_size(in, tensor, elements, format_at, offset_at + 8);
    check_place(in, tensor, offset_at);
    file_.tensors.push_back(std::move(tensor));
  }

  // Of a format that we do not know, any size will do: nothing reads it but verify().
  static void check_size(const ByteCursor& in, const BraidTensor& tensor, std::uint64_t elements,
                         std::uint64_t format_at, std::uint64_t bytes_at) {
    const std::optional<quant::Format> format = braid_format(tensor.format);
    if (!format) return;
    const std::uint64_t cols = tensor.dims.back();
    const auto block = static_cast<std::uint64_t>(quant::format_info(*format).block_elements);
    if (cols % block != 0) {
      in.refuse(format_at, "rows of ", cols, " elements do not fill ", quant::to_string(*format), " blocks of ", block);
    }
    const auto row_bytes = static_cast<std::uint64_t>(quant::row_bytes(*format, static_cast<std::int64_t>(cols)));
    const std::uint64_t expected = elements / cols * row_bytes;
    if (tensor.bytes != expected) {
      in.refuse(bytes_at, tensor.bytes, " bytes, but its shape in ", quant::to_string(*format), " takes ", expected);
    }
  }

  void check_place(const ByteCursor& in, const BraidTensor& tensor, std::uint64_t at) {
    if (tensor.offset % kBraidDataAlignment != 0) {
      in.refuse(at, "offset ", tensor.offset, " is not a multiple of ", kBraidDataAlignment);
    }
    if (tensor.offset < data_end_) {
      in.refuse(at, "offset ", tensor.offset, " lies before ", data_end_, ", ",
                file_.tensors.empty() ? "the start of section DATA" : "where the data of the tensor before it end");
    }
    const std::uint64_t end = data_.offset + data_.bytes;
    if (tensor.offset > end || tensor.bytes > end - tensor.offset) {
      in.refuse(at, tensor.bytes, " bytes at offset ", tensor.offset, " do not fit section DATA, which ends at ", end);
    }
    data_end_ = tensor.offset + tensor.bytes;
  }

  std::span<const std::byte> bytes_;
  const std::string& path_;
  BraidContents file_;
  std::uint32_t num_sections_ = 0;
  BraidSection data_{};
  std::uint64_t data_end_ = 0;  // of the tensors seen so far
};

}  // namespace

BraidContents parse_braid(std::span<const std::byte> bytes, const std::string& path) {
  NB_CHECK(!bytes.empty(), format, path, ": the file is empty");
  return BraidParser(bytes, path).parse();
}

}  // namespace nb::io
