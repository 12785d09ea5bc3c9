// A file of blobs that can be made again at any time: pieces of known sizes, each read whole, with a checksum.
//
// For packed weights that a model reads again and again: reads go past the page cache where the file system allows it
// (O_DIRECT), else what they left there is given back, so that the cache is no second place where the weights lie. An
// open file is locked for others that look for room (io/blob_cache.h). Reading is safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/align.h"
#include "base/sha256.h"
#include "io/mapped_file.h"
#include "io/new_file.h"

namespace nb::io {

/// Of blobs in the file, and of the memory they are read into.
inline constexpr std::size_t kBlobAlignment = 4096;

/// What a blob takes, in the file and in memory.
constexpr std::uint64_t blob_room(std::uint64_t bytes) {
  return round_up<std::uint64_t>(bytes, std::uint64_t{kBlobAlignment});
}

/// What a file must hold to be the one that is wanted.
struct BlobFileSpec {
  Digest identity{};  ///< of what the blobs are made from, and how
  std::vector<std::uint64_t> blob_bytes{};

  std::uint64_t file_bytes() const;
};

/// Makes such a file, see NewFile. For one thread.
class BlobWriter {
 public:
  /// Takes the disk space. Throws io.
  BlobWriter(const std::string& path, BlobFileSpec spec);

  /// Appends the next blob, which has the size the spec says. Throws io.
  void write(std::span<const std::byte> blob);

  /// After the last one. Throws io.
  void finish();

 private:
  BlobFileSpec spec_;
  NewFile file_;
  std::uint64_t offset_;
  std::vector<std::uint32_t> checksums_;
};

class BlobFile {
 public:
  /// Reads the directory. Throws io, or format if the file is damaged or not the one that is wanted, naming path and
  /// reason.
  BlobFile(const std::string& path, const BlobFileSpec& spec);
  ~BlobFile();
  BlobFile(const BlobFile&) = delete;
  BlobFile& operator=(const BlobFile&) = delete;

  const std::string& path() const { return file_.path(); }
  std::uint64_t file_bytes() const { return file_.size(); }
  /// Whether reads go past the page cache.
  bool is_direct() const { return is_direct_; }

  std::uint64_t blob_bytes(int index) const;

  /// Reads a blob and compares its checksum. `out` is aligned to kBlobAlignment and has blob_room() bytes. Throws io;
  /// or format for a blob that is damaged.
  void read(int index, std::span<std::byte> out) const;

  /// Compares what was made again with the checksum of what was there. Throws format if it is something else.
  void check(int index, std::span<const std::byte> blob) const;
  /// Puts a blob back that was damaged. Throws what check() throws, and io.
  void mend(int index, std::span<const std::byte> blob) const;
  /// Takes its name away, so that the next one who wants it makes it; who has it open goes on.
  void remove() const;

 private:
  struct Entry {
    std::uint64_t offset;
    std::uint64_t bytes;
    std::uint32_t checksum;
  };

  class Queue;

  std::uint32_t read_in_turn(int index, std::span<std::byte> out) const;
  std::optional<std::uint32_t> read_queued(const Entry& entry, std::span<std::byte> out) const;

  FileReader file_;
  std::vector<Entry> entries_;
  bool is_direct_ = false;
  std::unique_ptr<Queue> queue_;  // null where the system has none
};

}  // namespace nb::io
