// A directory that keeps the KV of prefix blocks and chunks over restarts. Several processes may use it at once.
//
// A record is found by its key, and served only if its fingerprint, its tokens and the checksums of all that is read
// are right; anything else is a miss with a reason, and a damaged file is removed. Nothing found on disk throws. Writes
// happen on a thread of the store: put() copies and returns, and what does not fit into the queue is dropped. Files
// appear by renaming and are never changed, so that no lock is needed to read. Not for memory blocks (block_pool.h) nor
// for making keys (prefix_cache.h). Safe from any thread.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "kv/store_directory.h"
#include "kv/store_index.h"
#include "kv/store_record.h"

namespace nb::kv {

/// Why open() or load() gave nothing.
enum class MissReason { absent, torn, checksum, fingerprint, tokens, version, io, count };
/// Why a record was not written.
enum class WriteFailure { no_space, io, access, quota, queue, memory, other, count };

const char* to_string(MissReason reason);
const char* to_string(WriteFailure reason);

struct DiskStoreOptions {
  std::int64_t quota_bytes = 0;                        ///< of all records in the directory, foreign ones too
  std::int64_t namespace_quota_bytes = 0;              ///< of the records of one root; 0: as many as the quota allows
  std::int64_t queue_bytes = std::int64_t{256} << 20;  ///< waiting to be written; one record is always accepted
  FileCalls calls{};
};

/// Counters since the store was opened, and what is in the directory as far as this process knows.
struct DiskStoreStats {
  std::int64_t hits = 0;
  std::array<std::int64_t, static_cast<std::size_t>(MissReason::count)> misses{};
  std::int64_t bytes_read = 0;  ///< of hits, without heads
  std::int64_t writes = 0;
  std::int64_t bytes_written = 0;
  std::array<std::int64_t, static_cast<std::size_t>(WriteFailure::count)> write_failures{};
  std::int64_t evictions = 0;
  std::int64_t damaged_removed = 0;      ///< files
  std::int64_t temporaries_removed = 0;  ///< left behind by writers that died
  std::int64_t records = 0;              ///< of this fingerprint
  std::int64_t foreign_records = 0;      ///< of other fingerprints or versions
  std::int64_t bytes = 0;                ///< of all records
  std::int64_t waiting_bytes = 0;        ///< of records to be written

  std::int64_t missed(MissReason reason) const { return misses[static_cast<std::size_t>(reason)]; }
  std::int64_t failed(WriteFailure reason) const { return write_failures[static_cast<std::size_t>(reason)]; }
};

struct FreeStoreMemory {
  void operator()(std::byte* memory) const;
};
/// Page-aligned memory.
using StoreMemory = std::unique_ptr<std::byte, FreeStoreMemory>;
/// Not cleared; null if there is none.
StoreMemory allocate_store_memory(std::uint64_t bytes);

/// A record in memory, verified.
class DiskRecord {
 public:
  const RecordInfo& info() const { return *info_; }
  /// Blocks that were asked for: those of the tokens given to open().
  std::size_t num_blocks() const { return num_blocks_; }
  std::span<const std::byte> block(std::size_t index) const;

 private:
  friend class DiskStore;
  std::shared_ptr<const RecordInfo> info_;
  StoreMemory memory_;
  std::size_t num_blocks_ = 0;
};

class DiskStore {
 public:
  using Filler = std::function<void(std::size_t block, std::span<std::byte> out)>;
  enum class PutResult { queued, present, refused };

  /// A record that begins with the tokens asked for, and how many of them (whole blocks).
  struct Match {
    RecordPtr record;
    std::size_t num_tokens;
  };

  /// Opens `directory`, making it (mode 0700) if it is not there, and reads the heads of its records. `fingerprint`
  /// names everything besides keys and tokens that the content of a block depends on. Throws io naming the path if it
  /// cannot be made, listed or written; invalid_argument unless the quota is positive.
  DiskStore(const std::string& directory, const Digest& fingerprint, DiskStoreOptions options);
  /// Writes what is waiting.
  ~DiskStore();
  DiskStore(const DiskStore&) = delete;
  DiskStore& operator=(const DiskStore&) = delete;

  /// Takes a copy of a record to be written soon; `fill` is called before put() returns, once per block with
  /// `info.block_bytes` bytes. A key that is there or waiting is `present`, and nothing is copied. `refused` is counted
  /// as a write failure. Throws invalid_argument for what no record can be, and what `fill` throws.
  PutResult put(const RecordInfo& info, const Filler& fill, bool pinned = false);
  /// The same from memory.
  PutResult put(const RecordInfo& info, std::span<const std::span<const std::byte>> blocks, bool pinned = false);

  /// Waits until everything that was put before has been written or has failed.
  void flush();

  /// As flush(), for at most this time; whether all was done.
  bool flush_within(std::chrono::duration<double> time);

  /// Drops what is waiting to be written, except what is being written.
  void drop_waiting();

  /// The record of `key` if there is one; its blocks are not checked. Looks on disk for one that another process wrote.
  RecordPtr find(const Digest& key);

  /// Whether a record of this key is there or waiting to be written, as far as this process knows: looks at no file.
  bool knows(const Digest& key) const;

  /// The records that follow `parent`, a chain key or a root, in no order. Lists the directory again if it changed.
  std::vector<RecordPtr> children(const Digest& parent);

  /// Of the prefix records that follow `parent`, the one that begins with the most whole blocks of `tokens`; at least
  /// one block.
  std::optional<Match> match(const Digest& parent, std::span<const TokenId> tokens);

  /// The same among the records that this process knows of: looks at no file.
  std::optional<Match> match_known(const Digest& parent, std::span<const TokenId> tokens) const;

  /// Reads a record whose tokens are `tokens`; of a prefix record also a leading part of whole blocks. Counts a hit or
  /// a miss, and marks the record as used. Gives up, and counts nothing, soon after `stop` has become true.
  std::optional<DiskRecord> open(const Digest& key, std::span<const TokenId> tokens,
                                 const std::atomic<bool>* stop = nullptr);

  /// The same into memory of the caller, a span of the record's block size for each block of `tokens`. After false its
  /// content is undefined.
  bool load(const Digest& key, std::span<const TokenId> tokens, std::span<const std::span<std::byte>> blocks,
            const std::atomic<bool>* stop = nullptr);

  /// Has the system begin to read the record, without waiting.
  void prefetch(const Digest& key);

  /// Removes the record, also one that is waiting to be written. False if there was none.
  bool erase(const Digest& key);

  /// Pinned records are never evicted, in any process, nor are those before them in their chain. A pin lasts until it
  /// is taken back. False if there is no such record, on disk or waiting.
  bool pin(const Digest& key, bool pinned);

  /// The records of one namespace, in no order.
  std::vector<RecordPtr> records(const Digest& root);

  DiskStoreStats stats() const;

  const std::string& path() const { return directory_.path(); }

 private:
  struct Job;
  struct Opened;

  bool is_own(const std::string& name) const { return name.ends_with(own_suffix_); }
  std::string name_of(const Digest& key) const { return record_file_name(key, fingerprint_); }

  void run_writer();
  void write(Job& job);
  void finish(const Job& job, bool is_pinned);
  bool make_room(const Digest& root, std::int64_t needed);
  bool evict(const Digest* root, std::int64_t needed, std::int64_t quota);
  void rescan(bool even_if_unchanged);
  void learn(const ListedFile& listed);
  Job* find_waiting(const Digest& key) const;
  std::optional<MissReason> read_head(Opened& opened) const;
  std::optional<Opened> open_verified(const Digest& key, std::span<const TokenId> tokens);
  bool read_blocks(Opened& opened, std::span<const std::span<std::byte>> blocks, const std::atomic<bool>* stop);
  MissReason why_absent(const Digest& key) const;
  void miss(MissReason reason, const std::string& name);
  void remove_damaged(const std::string& name);
  void count_failure(WriteFailure reason, const std::string& why);

  Digest fingerprint_;
  std::string own_suffix_;  // of file names: fingerprint and version
  DiskStoreOptions options_;
  StoreDirectory directory_;

  mutable std::mutex mutex_;  // guards what follows; never held while a file is read or written
  StoreIndex index_;
  DiskStoreStats stats_;
  std::deque<std::shared_ptr<Job>> queue_;  // the first is being written
  std::int64_t queued_bytes_ = 0;           // with those that are being copied
  std::uint64_t num_put_ = 0, num_done_ = 0;
  std::int64_t listed_at_ns_ = -1;  // the directory's time when it was last listed; -1: unknown
  bool stopping_ = false;
  std::condition_variable work_;
  std::condition_variable done_;
  std::thread writer_;  // last: starts when all the rest is there
};

}  // namespace nb::kv
