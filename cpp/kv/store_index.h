// What a disk store knows about the files of its directory: names, sizes, times of last use, and the heads of its own
// records; and which of them to give up first.
//
//   name of a record: <key, 64 hex digits>-<fingerprint, 16>.kv<version>
//
// A mirror of the directory that may be out of date; it never touches a file (store_directory.h). The owner locks.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kv/store_record.h"

namespace nb::kv {

using RecordPtr = std::shared_ptr<const RecordInfo>;

/// The name of the file of a record.
std::string record_file_name(const Digest& key, const Digest& fingerprint);
/// Whether a file is a record by its name, of any fingerprint and version.
bool is_record_file_name(std::string_view name);

struct StoreEntry {
  RecordPtr record;             ///< null: of another fingerprint or version, or unreadable
  std::int64_t bytes = 0;       ///< of the file
  std::int64_t used_at_ns = 0;  ///< the file's time of modification, which every use sets
  bool pinned = false;
};

class StoreIndex {
 public:
  const StoreEntry* find(const std::string& name) const;
  /// Adds or replaces what is known of `name`.
  void set(const std::string& name, StoreEntry entry);
  void set_used(const std::string& name, std::int64_t used_at_ns, bool pinned);
  void remove(const std::string& name);
  const std::map<std::string, StoreEntry>& entries() const { return entries_; }

  std::int64_t bytes() const { return bytes_; }
  std::int64_t bytes_of(const Digest& root) const;
  std::int64_t num_own() const { return num_own_; }

  std::vector<RecordPtr> children(const Digest& parent) const;
  std::vector<RecordPtr> records(const Digest& root) const;

  /// Names in the order in which to give them up, of one root or, with null, of all: least recently used first, where
  /// a record counts as used when one that follows it was; of equal ones the last of a chain first. Without pinned
  /// records and what these follow.
  std::vector<std::string> eviction_order(const Digest* root) const;

 private:
  struct HashDigest {
    std::size_t operator()(const Digest& digest) const;
  };

  std::map<std::string, StoreEntry> entries_;
  std::unordered_multimap<Digest, RecordPtr, HashDigest> by_parent_;
  std::int64_t bytes_ = 0;
  std::int64_t num_own_ = 0;
};

}  // namespace nb::kv
