// The file system side of a disk store: one directory, its listing, and files that appear only when they are whole.
//
// Not for what files mean (store_record.h) nor which to keep (store_index.h). Only regular files are opened, links are
// not followed. Errors are numbers of errno, never exceptions, except for a directory that cannot be used at all.
// Safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <sys/types.h>

namespace nb::kv {

/// The system calls that fail in practice, replaceable in tests. Each behaves as its namesake.
struct FileCalls {
  std::function<ssize_t(int descriptor, const void* from, std::size_t bytes)> write;
  std::function<ssize_t(int descriptor, void* to, std::size_t bytes, off_t offset)> pread;
  std::function<int(int descriptor)> fsync;
  std::function<int(int folder, const char* from, const char* to)> rename;

  /// The system's for those that are empty.
  void fill_in();
};

struct ListedFile {
  std::string name{};
  std::int64_t bytes = 0;
  std::int64_t modified_ns = 0;
  bool pinned = false;
};

/// A file open for reading.
class StoreFile {
 public:
  StoreFile(int descriptor, ListedFile facts, const FileCalls& calls);
  ~StoreFile();
  StoreFile(StoreFile&& other) noexcept;
  StoreFile(const StoreFile&) = delete;
  StoreFile& operator=(const StoreFile&) = delete;
  StoreFile& operator=(StoreFile&&) = delete;

  const ListedFile& facts() const { return facts_; }
  /// Fills `out`; 0, or the error, EOVERFLOW if the file ends before.
  int read(std::uint64_t offset, std::span<std::byte> out) const;
  /// Sets the time of modification to now. Failing is no harm.
  void touch() const;
  void prefetch() const;

 private:
  int descriptor_;
  ListedFile facts_;
  const FileCalls& calls_;
};

class StoreDirectory {
 public:
  /// Throws io naming the path.
  StoreDirectory(const std::string& path, FileCalls calls);
  ~StoreDirectory();
  StoreDirectory(const StoreDirectory&) = delete;
  StoreDirectory& operator=(const StoreDirectory&) = delete;

  const std::string& path() const { return path_; }

  /// Time of modification of the directory, in ns; -1 if it cannot be trusted to change with the next change, because
  /// the last one is as recent as a tick of the clock of file systems.
  std::int64_t modified_ns() const;

  /// All regular files whose names `wanted` accepts.
  std::vector<ListedFile> list(const std::function<bool(const std::string&)>& wanted) const;

  /// Nothing if there is no such regular file; `error` is then the reason, ENOENT for an absent one.
  std::optional<StoreFile> open(const std::string& name, int* error) const;

  /// Writes a file (mode 0600, or 0400 if pinned) of these pieces that replaces one of this name. 0, or the error,
  /// after which no temporary file is left.
  int create(const std::string& name, std::span<const std::span<const std::byte>> pieces, bool pinned) const;

  bool exists(const std::string& name) const;

  /// False if there was none.
  bool remove(const std::string& name) const;

  /// A pinned file is one that its owner may not write: this is seen by every process and needs no other file.
  bool set_pinned(const std::string& name, bool pinned) const;

  /// Removes temporary files whose writers have ended. Returns how many.
  int remove_abandoned() const;

 private:
  int write_all(int descriptor, std::span<const std::byte> bytes) const;
  int open_temporary(std::string* name) const;

  std::string path_;
  FileCalls calls_;
  int folder_ = -1;
};

}  // namespace nb::kv
