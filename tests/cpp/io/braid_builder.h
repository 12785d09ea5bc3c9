// Writes .braid files for tests, valid ones and ones that lie: any byte can be changed and the checksums made right
// again.
//
// Shares with the reader the checksum and hash of cpp/base only, which have tests of their own. Not for real models.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/crc32c.h"
#include "base/sha256.h"
#include "io/gguf_builder.h"

namespace nb::io::test {

// A file in memory that knows where its parts stand.
struct BraidImage {
  Bytes bytes;
  std::size_t num_sections = 0;
  std::size_t metadata = 0, metadata_bytes = 0;  // offsets and sizes of sections
  std::size_t tensors = 0, tensors_bytes = 0;
  std::size_t data = 0;
  std::vector<std::size_t> entries;  // where each entry of TENSORS begins

  static constexpr std::size_t kDirectory = 128;
  // Offsets of fields of section entry `index`.
  static std::size_t section(std::size_t index) { return kDirectory + 32 * index; }

  template <class T>
  BraidImage& put(std::size_t offset, T value) {
    std::memcpy(bytes.data() + offset, &value, sizeof(value));
    return *this;
  }

  std::span<const std::byte> part(std::size_t offset, std::size_t size) const {
    return std::span<const std::byte>(bytes).subspan(offset, size);
  }

  // Makes the checksums of header, directory, METADATA and TENSORS right for the bytes as they are now. The fingerprint
  // stays.
  BraidImage& seal() {
    put(section(0) + 24, crc32c(part(metadata, metadata_bytes)));
    put(section(1) + 24, crc32c(part(tensors, tensors_bytes)));
    put(36, crc32c(part(kDirectory, 32 * num_sections)));
    put(124, crc32c(part(0, 124)));
    return *this;
  }
};

struct BraidTensorEntry {
  std::string name;
  std::uint32_t format = 0;
  std::vector<std::uint64_t> dims;
  std::size_t bytes = 0;
};

class BraidBuilder {
 public:
  // Sections METADATA, TENSORS, DATA, and after the directory room for entries of `spare_sections` more.
  std::size_t spare_sections = 0;

  // An entry from its parts; `payload` is written as it is.
  BraidBuilder& raw(std::string_view key, std::uint32_t type, const Bytes& payload) {
    append_string(entries_, key);
    append(entries_, type);
    entries_.insert(entries_.end(), payload.begin(), payload.end());
    ++num_entries_;
    return *this;
  }

  BraidBuilder& string(std::string_view key, std::string_view text) {
    Bytes payload;
    append_string(payload, text);
    return raw(key, kString, payload);
  }

  template <class T>
  BraidBuilder& number(std::string_view key, std::uint32_t type, T value) {
    Bytes payload;
    append(payload, value);
    return raw(key, type, payload);
  }

  BraidBuilder& tensor(BraidTensorEntry entry) {
    tensors_.push_back(std::move(entry));
    return *this;
  }

  // Byte i of tensor t's data is (t * 7 + i) & 255.
  BraidImage build() const {
    BraidImage image;
    image.num_sections = 3 + spare_sections;
    Bytes metadata;
    append(metadata, num_entries_);
    metadata.insert(metadata.end(), entries_.begin(), entries_.end());
    image.metadata = padded(BraidImage::section(image.num_sections), 8);
    image.metadata_bytes = metadata.size();
    image.tensors = padded(image.metadata + metadata.size(), 8);
    image.tensors_bytes = directory(image, 0).size();
    image.data = padded(image.tensors + image.tensors_bytes, 4096);
    image.entries.clear();
    const Bytes tensors = directory(image, image.data);
    std::size_t end = image.data;
    for (const BraidTensorEntry& tensor : tensors_) end += padded(tensor.bytes, 4096);
    image.bytes.resize(end);
    std::copy(metadata.begin(), metadata.end(), image.bytes.begin() + static_cast<std::ptrdiff_t>(image.metadata));
    std::copy(tensors.begin(), tensors.end(), image.bytes.begin() + static_cast<std::ptrdiff_t>(image.tensors));
    Sha256 hash;
    const std::uint64_t sizes[] = {metadata.size(), tensors.size()};
    hash.update(std::as_bytes(std::span(sizes).first(1)));
    hash.update(metadata);
    std::size_t at = image.data;
    for (std::size_t t = 0; t < tensors_.size(); ++t) {
      const Bytes data = data_of(t);
      std::copy(data.begin(), data.end(), image.bytes.begin() + static_cast<std::ptrdiff_t>(at));
      hash.update(data);
      at += padded(data.size(), 4096);
    }
    hash.update(std::as_bytes(std::span(sizes).last(1)));
    hash.update(tensors);
    write_header(image, hash.finish());
    return image.seal();
  }

 private:
  static std::size_t padded(std::size_t size, std::size_t to) { return (size + to - 1) / to * to; }

  Bytes data_of(std::size_t t) const {
    Bytes data;
    for (std::size_t i = 0; i < tensors_[t].bytes; ++i) data.push_back(static_cast<std::byte>(t * 7 + i));
    return data;
  }

  Bytes directory(BraidImage& image, std::size_t data) const {
    Bytes out;
    append(out, static_cast<std::uint64_t>(tensors_.size()));
    for (std::size_t t = 0; t < tensors_.size(); ++t) {
      const BraidTensorEntry& tensor = tensors_[t];
      image.entries.push_back(image.tensors + out.size());
      append_string(out, tensor.name);
      append(out, tensor.format);
      append(out, static_cast<std::uint32_t>(tensor.dims.size()));
      for (const std::uint64_t dim : tensor.dims) append(out, dim);
      append(out, static_cast<std::uint64_t>(data));
      append(out, static_cast<std::uint64_t>(tensor.bytes));
      append(out, crc32c(data_of(t)));
      data += padded(tensor.bytes, 4096);
    }
    return out;
  }

  static void write_header(BraidImage& image, const Digest& fingerprint) {
    const char magic[] =
        "\x89"
        "BRAID\r\n";
    std::memcpy(image.bytes.data(), magic, 8);
    image.put<std::uint32_t>(8, 1).put<std::uint64_t>(16, image.bytes.size());
    image.put<std::uint64_t>(24, BraidImage::kDirectory).put(32, static_cast<std::uint32_t>(image.num_sections));
    image.put(40, fingerprint);
    const std::uint64_t sections[3][3] = {{1, image.metadata, image.metadata_bytes},
                                          {2, image.tensors, image.tensors_bytes},
                                          {3, image.data, image.bytes.size() - image.data}};
    for (std::size_t i = 0; i < 3; ++i) {
      image.put(BraidImage::section(i), static_cast<std::uint32_t>(sections[i][0]));
      image.put(BraidImage::section(i) + 8, sections[i][1]).put(BraidImage::section(i) + 16, sections[i][2]);
    }
  }

  Bytes entries_;
  std::uint64_t num_entries_ = 0;
  std::vector<BraidTensorEntry> tensors_;
};

// A small valid file with metadata of several types and tensors of several formats, one of them reserved.
inline BraidBuilder small_braid() {
  BraidBuilder builder;
  builder.string("general.architecture", "llama").number<std::uint32_t>("a.u32", kU32, 4000000000u);
  builder.number<float>("a.f32", kF32, 1.5f).number<std::uint8_t>("a.true", kBool, 1);
  builder.tensor({.name = "norm", .format = 0, .dims = {8}, .bytes = 32})
      .tensor({.name = "matrix", .format = 16, .dims = {3, 32}, .bytes = 54})
      .tensor({.name = "cube", .format = 1, .dims = {2, 3, 2}, .bytes = 24})
      .tensor({.name = "later", .format = 4, .dims = {2, 128}, .bytes = 150});
  return builder;
}

}  // namespace nb::io::test
