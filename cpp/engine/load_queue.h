// Records of a store being read into memory on threads of their own, while steps go on.
//
// A load is the records of one sequence, in order; those behind one that cannot be had are worth nothing. The memory
// they go to belongs to the load until it was taken or stopped. Records of loads begun first are read first. Not for
// choosing records (disk_tier.h). Everything is called by the thread that runs steps; readers touch nothing but the
// memory of their record.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "base/ids.h"
#include "base/sha256.h"
#include "engine/block_archive.h"
#include "kv/disk_store.h"

namespace nb::engine {

/// A record of a load, or its beginning.
struct LoadPart {
  Digest key;
  std::vector<TokenId> tokens;
  std::vector<std::span<std::byte>> memory;  ///< for each block; none: into memory of the load's own
  std::uint64_t own_bytes = 0;               ///< of that
};

/// A part that was read into memory of its own.
struct ReadPart {
  LoadId load;
  std::size_t index;  ///< of the part in its load
  kv::DiskRecord record;
};

class LoadQueue {
 public:
  /// Parts that were read into memory of their own and not collected take at most so much, but one always may.
  static constexpr std::uint64_t kMostOwnBytes = std::uint64_t{128} << 20;

  /// `store` must outlive the queue. `wake`, if any, is called by the readers after every progress().
  LoadQueue(kv::DiskStore& store, int num_threads, std::function<void()> wake);
  /// Stops all loads.
  ~LoadQueue();
  LoadQueue(const LoadQueue&) = delete;
  LoadQueue& operator=(const LoadQueue&) = delete;

  /// Begins a load. `scratch`: memory of it beside that of the blocks, kept as long. Throws bad_alloc, and nothing has
  /// begun.
  LoadId add(std::vector<LoadPart> parts, kv::StoreMemory scratch = nullptr);

  /// Parts, of any load, that were read into memory of their own since the last call.
  std::vector<ReadPart> collect();

  /// How many leading parts of a load were read, once it has ended and all was collected; it is forgotten then.
  std::optional<std::size_t> take(LoadId load);

  /// Forgets a load. Waits for what is being read of it, which ends with its block.
  void stop(LoadId load);

  /// Changes whenever take() or collect() may have something new.
  std::uint64_t progress() const { return progress_; }

  /// Waits until that is no longer `seen`, or until a time.
  void wait(std::uint64_t seen, std::chrono::steady_clock::time_point until);

 private:
  struct Load {
    LoadId id = 0;
    std::vector<LoadPart> parts;
    kv::StoreMemory scratch;
    std::atomic<bool> stopped{false};
    // Guarded by mutex_.
    std::size_t num_left = 0;      // parts neither read nor failed
    std::size_t num_reading = 0;   // parts in the hands of readers
    std::size_t first_failed = 0;  // parts before it were read or are left
  };
  struct Task {
    std::shared_ptr<Load> load;
    std::size_t index;
  };

  void run_reader();
  bool may_start() const;
  bool read(Load& load, const LoadPart& part, std::optional<kv::DiskRecord>& record) noexcept;

  kv::DiskStore& store_;
  std::function<void()> wake_;
  std::atomic<std::uint64_t> progress_{0};
  std::mutex mutex_;  // guards what follows; never held while a record is read
  std::map<LoadId, std::shared_ptr<Load>> loads_;
  std::deque<Task> tasks_;
  std::vector<ReadPart> read_;
  std::uint64_t own_bytes_ = 0;  // of what is being read or in read_
  LoadId next_id_ = 1;
  bool closing_ = false;
  std::condition_variable work_;
  std::condition_variable changed_;
  std::vector<std::thread> threads_;  // last: start when all the rest is there
};

}  // namespace nb::engine
