// A file that appears under its name only when it is complete.
//
// Written beside its place under a hidden name, with its disk space taken at the start where the file system can; at
// the end it is synchronised, renamed, and its folder synchronised. A failure leaves nothing; a killed process may
// leave the hidden file. For one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace nb::io {

class NewFile {
 public:
  /// The hidden name is `.PREFIX-PID-N.tmp`, short, so that it fits wherever the final name does. Throws io naming the
  /// path.
  NewFile(std::string path, const std::string& prefix, std::uint64_t bytes);
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  /// Throws io.
  void write_at(std::uint64_t offset, std::span<const std::byte> bytes) const;

  /// Gives the file its name, in place of one that has it, and closes it. Throws io.
  void publish();

  const std::string& temporary_path() const { return temporary_path_; }

 private:
  void reserve_space(std::uint64_t bytes) const;
  void abandon() noexcept;

  std::string path_;
  std::string temporary_path_;
  int descriptor_ = -1;
};

/// The part of a path before its last component; "." if there is none.
std::string folder_of(const std::string& path);

}  // namespace nb::io
