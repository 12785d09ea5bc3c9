// Read-only access to files: a bounds-checked mapping for headers, positioned reads for tensor data.
//
// Only regular files: folders, pipes and devices are refused. Not for writing. Both are immutable after opening and
// safe to use from any thread. If another process shortens a file while it is mapped, touching the lost pages raises
// SIGBUS, as for every mapping: replace model files by renaming, never by overwriting. Reads report it as an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace nb::io {

/// A file read at positions, without mapping it: its pages do not count as this process's memory.
class FileReader {
 public:
  /// Throws io naming the path.
  explicit FileReader(const std::string& path);
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  const std::string& path() const { return path_; }

  /// The size when the file was opened.
  std::uint64_t size() const { return size_; }

  int descriptor() const { return descriptor_; }

  /// Fills `out` from `offset`; throws io naming path, offset and length if the file ends before.
  void read(std::uint64_t offset, std::span<std::byte> out) const;

 private:
  std::string path_;
  std::uint64_t size_ = 0;
  int descriptor_ = -1;
};

/// A file mapped into memory; unmapped with the object.
class MappedFile {
 public:
  /// Throws io (missing, unreadable, not a regular file) or format (empty), naming the path.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return bytes_; }

  /// `length` bytes from `offset` on; throws format if the file has fewer.
  std::span<const std::byte> bytes_at(std::uint64_t offset, std::uint64_t length) const;

  /// Tells the system that the mapped pages may leave memory until they are touched again.
  void advise_dont_need() const;

  /// The same open file, so that replacing the path between mapping and reading changes nothing.
  const FileReader& reader() const { return reader_; }

 private:
  FileReader reader_;
  std::span<const std::byte> bytes_;
};

}  // namespace nb::io
