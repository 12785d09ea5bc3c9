#include "io/braid_file.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/crc32c.h"
#include "base/error.h"
#include "io/braid_parser.h"
#include "io/by_name.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

constexpr std::uint64_t kPieceBytes = 1 << 20;

std::string_view name_of(const BraidTensor& tensor) { return tensor.name; }

std::span<const std::byte> bytes_of(const std::uint64_t& value) {
  return {reinterpret_cast<const std::byte*>(&value), sizeof(value)};
}

// Reads a file from front to back in pieces.
class Verifier {
 public:
  Verifier(const BraidFile& file, const ProgressFunction& progress) : file_(file), progress_(progress) {}

  // Bytes up to `end` must be zero.
  void expect_zeros(std::uint64_t end) {
    while (at_ < end) {
      const std::span<const std::byte> piece = next_piece(end);
      const auto wrong = std::find_if(piece.begin(), piece.end(), [](std::byte byte) { return byte != std::byte{0}; });
      NB_CHECK(wrong == piece.end(), format, file_.path(), ": at offset ",
               at_ - piece.size() + static_cast<std::uint64_t>(wrong - piece.begin()), ": padding is not 0");
    }
  }

  void expect_checksum(std::uint64_t bytes, std::uint32_t checksum, const std::string& what, Sha256* hash) {
    const std::uint64_t begin = at_;
    std::uint32_t found = 0;
    while (at_ < begin + bytes) {
      const std::span<const std::byte> piece = next_piece(begin + bytes);
      found = crc32c(piece, found);
      if (hash != nullptr) hash->update(piece);
    }
    NB_CHECK(found == checksum, format, file_.path(), ": at offset ", begin, ": ", what,
             " does not have its checksum: the file is damaged");
  }

  void skip(std::uint64_t bytes) { at_ += bytes; }

 private:
  std::span<const std::byte> next_piece(std::uint64_t end) {
    buffer_.resize(std::min(end - at_, kPieceBytes));
    file_.read(at_, buffer_);
    at_ += buffer_.size();
    if (progress_) progress_(at_, file_.file_bytes());
    return buffer_;
  }

  const BraidFile& file_;
  const ProgressFunction& progress_;
  std::vector<std::byte> buffer_;
  std::uint64_t at_ = 0;
};

}  // namespace

BraidFile::BraidFile(const std::string& path)
    : mapping_(std::make_unique<MappedFile>(path)), bytes_(mapping_->bytes()), path_(path) {
  adopt_contents();
}

BraidFile::BraidFile(std::span<const std::byte> bytes, std::string name) : bytes_(bytes), path_(std::move(name)) {
  adopt_contents();
}

void BraidFile::adopt_contents() {
  BraidContents contents = parse_braid(bytes_, path_);
  version_ = contents.version;
  fingerprint_ = contents.fingerprint;
  directory_ = contents.directory;
  sections_ = std::move(contents.sections);
  metadata_ = std::move(contents.metadata);
  tensors_ = std::move(contents.tensors);
  names_ = std::move(contents.names);
}

const BraidTensor* BraidFile::find_tensor(std::string_view name) const {
  return find_by_name(tensors_, name_of, names_, name);
}

void BraidFile::read(std::uint64_t offset, std::span<std::byte> out) const {
  if (mapping_) return mapping_->reader().read(offset, out);
  NB_CHECK(offset <= bytes_.size() && out.size() <= bytes_.size() - offset, io, path_, ": cannot read ", out.size(),
           " bytes at offset ", offset, ": the file ends at ", bytes_.size());
  if (!out.empty()) std::memcpy(out.data(), bytes_.data() + offset, out.size());
}

std::span<const std::byte> BraidFile::section_bytes(BraidSectionKind kind) const {
  const auto section = std::find_if(sections_.begin(), sections_.end(), [kind](const BraidSection& candidate) {
    return candidate.kind == static_cast<std::uint32_t>(kind);
  });
  return bytes_.subspan(section->offset, section->bytes);  // the parser has seen one of each kind
}

void BraidFile::verify(const ProgressFunction& progress) const {
  std::vector<BraidSection> sections = sections_;
  sections.push_back(directory_);
  std::sort(sections.begin(), sections.end(),
            [](const BraidSection& a, const BraidSection& b) { return a.offset < b.offset; });
  Sha256 hash;
  const auto metadata = section_bytes(BraidSectionKind::metadata), tensors = section_bytes(BraidSectionKind::tensors);
  hash.update(bytes_of(metadata.size()));
  hash.update(metadata);
  Verifier verifier(*this, progress);
  verifier.skip(kBraidHeaderBytes);  // compared when the file was opened
  for (const BraidSection& section : sections) {
    verifier.expect_zeros(section.offset);
    if (section.kind != static_cast<std::uint32_t>(BraidSectionKind::data)) {
      const std::string name = section.kind == 0 ? "the section directory" : braid_section_name(section.kind);
      verifier.expect_checksum(section.bytes, section.checksum, "section " + name, nullptr);
      continue;
    }
    for (const BraidTensor& tensor : tensors_) {
      verifier.expect_zeros(tensor.offset);
      verifier.expect_checksum(tensor.bytes, tensor.checksum, "tensor " + text::in_quotes(tensor.name), &hash);
    }
    verifier.expect_zeros(section.offset + section.bytes);
  }
  verifier.expect_zeros(file_bytes());
  hash.update(bytes_of(tensors.size()));
  hash.update(tensors);
  const Digest found = hash.finish();
  NB_CHECK(found == fingerprint_, format, path_, ": at offset ", kBraidFingerprintOffset, ": the fingerprint is ",
           to_hex(fingerprint_), ", but that of the contents is ", to_hex(found));
}

}  // namespace nb::io
