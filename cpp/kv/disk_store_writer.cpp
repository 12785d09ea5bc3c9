// The writing half of the disk store: its queue, its thread, eviction. See disk_store.h.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <new>
#include <system_error>
#include <utility>

#include "base/crc32c.h"
#include "base/error.h"
#include "base/log.h"
#include "base/wait.h"
#include "kv/disk_store.h"

namespace nb::kv {
namespace {

WriteFailure failure_of(int error) {
  switch (error) {
    case ENOSPC:
    case EDQUOT:
      return WriteFailure::no_space;
    case EIO:
      return WriteFailure::io;
    case EACCES:
    case EPERM:
    case EROFS:
      return WriteFailure::access;
    case ENOMEM:
      return WriteFailure::memory;
    default:
      return WriteFailure::other;
  }
}

}  // namespace

/// A record waiting to be written.
struct DiskStore::Job {
  RecordInfo info;
  StoreMemory blocks{};
  bool pinned = false;  // guarded by mutex_, as is the next
  bool cancelled = false;

  std::uint64_t payload_bytes() const { return info.num_blocks() * info.block_bytes; }
  std::span<const std::byte> block(std::size_t index) const {
    return {blocks.get() + index * info.block_bytes, info.block_bytes};
  }
};

DiskStore::PutResult DiskStore::put(const RecordInfo& info, std::span<const std::span<const std::byte>> blocks,
                                    bool pinned) {
  NB_CHECK(blocks.size() == info.num_blocks(), invalid_argument, blocks.size(), " blocks for a record of ",
           info.tokens.size(), " tokens");
  for (const std::span<const std::byte> block : blocks) {
    NB_CHECK(block.size() == info.block_bytes, invalid_argument, "a block of ", block.size(),
             " bytes for a record with blocks of ", info.block_bytes);
  }
  const auto copy = [&](std::size_t block, std::span<std::byte> out) {
    std::memcpy(out.data(), blocks[block].data(), out.size());
  };
  return put(info, copy, pinned);
}

DiskStore::PutResult DiskStore::put(const RecordInfo& info, const Filler& fill, bool pinned) {
  check_record(info);
  const auto file_bytes = static_cast<std::int64_t>(record_file_bytes(info));
  // What the index does not know is not looked for: that might wait for a folder that is being changed, and the writer
  // does it. Another process may have evicted what the index knows.
  const std::string name = name_of(info.key);
  bool known = false;
  {
    const std::lock_guard lock(mutex_);
    const StoreEntry* entry = index_.find(name);
    known = entry != nullptr && entry->record != nullptr;
  }
  if (known && directory_.exists(name)) {
    if (pinned) pin(info.key, true);
    return PutResult::present;
  }
  const bool too_large = file_bytes > options_.quota_bytes ||
                         (options_.namespace_quota_bytes > 0 && file_bytes > options_.namespace_quota_bytes);
  if (too_large) {
    count_failure(WriteFailure::quota, "it is larger than the quota");
    return PutResult::refused;
  }
  bool full = false;
  {
    const std::lock_guard lock(mutex_);
    if (Job* waiting = find_waiting(info.key); waiting != nullptr) {
      waiting->pinned |= pinned;
      return PutResult::present;
    }
    full = queued_bytes_ > 0 && queued_bytes_ + file_bytes > options_.queue_bytes;
    if (!full) queued_bytes_ += file_bytes;
  }
  if (full) {
    count_failure(WriteFailure::queue, "too many are waiting");
    return PutResult::refused;
  }
  std::shared_ptr<Job> job;
  const auto give_up = [&] {
    const std::lock_guard lock(mutex_);
    queued_bytes_ -= file_bytes;
  };
  try {
    job = std::make_shared<Job>(Job{.info = info, .blocks = {}, .pinned = pinned});
    job->blocks = allocate_store_memory(job->payload_bytes());
    if (job->blocks == nullptr) throw std::bad_alloc();
    for (std::size_t i = 0; i < info.num_blocks(); ++i) {
      fill(i, {job->blocks.get() + i * info.block_bytes, info.block_bytes});
    }
    const std::lock_guard lock(mutex_);
    queue_.push_back(job);
    ++num_put_;
  } catch (const std::bad_alloc&) {
    give_up();
    count_failure(WriteFailure::memory, "no memory for a copy");
    return PutResult::refused;
  } catch (...) {
    give_up();
    throw;
  }
  work_.notify_one();
  return PutResult::queued;
}

void DiskStore::flush() {
  std::unique_lock lock(mutex_);
  const std::uint64_t last = num_put_;
  done_.wait(lock, [&] { return num_done_ >= last; });
}

bool DiskStore::knows(const Digest& key) const {
  const std::lock_guard lock(mutex_);
  const StoreEntry* entry = index_.find(name_of(key));
  return (entry != nullptr && entry->record != nullptr) || find_waiting(key) != nullptr;
}

bool DiskStore::flush_within(std::chrono::duration<double> time) {
  std::unique_lock lock(mutex_);
  const std::uint64_t last = num_put_;
  return wait_at_most(done_, lock, time, [&] { return num_done_ >= last; });
}

void DiskStore::drop_waiting() {
  const std::lock_guard lock(mutex_);
  for (const std::shared_ptr<Job>& job : queue_) {
    if (job != queue_.front()) job->cancelled = true;
  }
}

/// The record that is waiting or being written; null if there is none.
DiskStore::Job* DiskStore::find_waiting(const Digest& key) const {
  for (const std::shared_ptr<Job>& job : queue_) {
    if (!job->cancelled && job->info.key == key) return job.get();
  }
  return nullptr;
}

void DiskStore::run_writer() {
  std::unique_lock lock(mutex_);
  while (true) {
    work_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const std::shared_ptr<Job> job = queue_.front();
    if (!job->cancelled) {
      lock.unlock();
      try {
        write(*job);
      } catch (const std::bad_alloc&) {
        count_failure(WriteFailure::memory, "no memory");
      } catch (const std::exception& error) {
        count_failure(WriteFailure::other, error.what());
      }
      lock.lock();
    }
    queue_.pop_front();
    queued_bytes_ -= static_cast<std::int64_t>(record_file_bytes(job->info));
    ++num_done_;
    done_.notify_all();
  }
}

void DiskStore::write(Job& job) {
  const std::string name = name_of(job.info.key);
  // Two puts at once, or another process.
  if (directory_.exists(name) && find(job.info.key) != nullptr) return finish(job, false);
  std::vector<std::uint32_t> checksums;
  for (std::size_t i = 0; i < job.info.num_blocks(); ++i) checksums.push_back(crc32c(job.block(i)));
  const std::vector<std::byte> head = encode_record_head(job.info, fingerprint_, checksums);
  const auto file_bytes = static_cast<std::int64_t>(record_file_bytes(job.info));
  if (!make_room(job.info.root, file_bytes)) {
    return count_failure(WriteFailure::quota, "pinned records take the quota");
  }
  const std::span<const std::byte> payload(job.blocks.get(), job.payload_bytes());
  bool pinned = false;
  {
    const std::lock_guard lock(mutex_);
    pinned = job.pinned;
  }
  const int error = directory_.create(name, std::array{std::span<const std::byte>(head), payload}, pinned);
  if (error != 0) return count_failure(failure_of(error), std::generic_category().message(error));
  int opening = 0;
  if (const std::optional<StoreFile> file = directory_.open(name, &opening)) learn(file->facts());
  {
    const std::lock_guard lock(mutex_);
    ++stats_.writes;
    stats_.bytes_written += file_bytes;
  }
  finish(job, pinned);
  make_room(job.info.root, 0);  // another process may have written meanwhile
}

/// Does to a record that is on disk now what was asked while it was waiting.
void DiskStore::finish(const Job& job, bool is_pinned) {
  const std::string name = name_of(job.info.key);
  std::unique_lock lock(mutex_);
  const bool wants_pin = job.pinned && !is_pinned, cancelled = job.cancelled;
  if (cancelled) index_.remove(name);
  lock.unlock();
  if (cancelled) {
    directory_.remove(name);
  } else if (wants_pin) {
    pin(job.info.key, true);
  }
}

/// Evicts until a record of `needed` bytes keeps both quotas. False if it cannot.
bool DiskStore::make_room(const Digest& root, std::int64_t needed) {
  rescan(false);
  if (options_.namespace_quota_bytes > 0 && !evict(&root, needed, options_.namespace_quota_bytes)) return false;
  return evict(nullptr, needed, options_.quota_bytes);
}

/// Evicts records of `root`, or of all with null, until they and `needed` more bytes are within `quota`.
bool DiskStore::evict(const Digest* root, std::int64_t needed, std::int64_t quota) {
  const auto excess = [&] {
    const std::lock_guard lock(mutex_);
    return (root == nullptr ? index_.bytes() : index_.bytes_of(*root)) + needed - quota;
  };
  if (excess() <= 0) return true;
  rescan(true);  // what other processes used
  std::int64_t left = excess();
  std::vector<std::string> order;
  {
    const std::lock_guard lock(mutex_);
    order = index_.eviction_order(root);
  }
  for (const std::string& name : order) {
    if (left <= 0) break;
    const bool removed = directory_.remove(name);
    if (!removed && directory_.exists(name)) continue;
    const std::lock_guard lock(mutex_);
    if (const StoreEntry* entry = index_.find(name); entry != nullptr) left -= entry->bytes;
    index_.remove(name);
    if (removed) ++stats_.evictions;
  }
  return left <= 0;
}

void DiskStore::count_failure(WriteFailure reason, const std::string& why) {
  bool first = false;
  {
    const std::lock_guard lock(mutex_);
    first = stats_.write_failures[static_cast<std::size_t>(reason)]++ == 0;
  }
  // Once per reason: a full disk stays full.
  if (first) log(LogLevel::warning, path(), ": a record was not written (", to_string(reason), "): ", why);
}

bool DiskStore::erase(const Digest& key) {
  const std::string name = name_of(key);
  bool found = false;
  {
    const std::lock_guard lock(mutex_);
    while (Job* waiting = find_waiting(key)) {
      waiting->cancelled = true;
      found = true;
    }
  }
  found = directory_.remove(name) || found;
  const std::lock_guard lock(mutex_);
  index_.remove(name);
  return found;
}

bool DiskStore::pin(const Digest& key, bool pinned) {
  const std::string name = name_of(key);
  bool found = false;
  {
    const std::lock_guard lock(mutex_);
    if (Job* waiting = find_waiting(key); waiting != nullptr) {
      waiting->pinned = pinned;
      found = true;
    }
  }
  // Only now: a writer that did not see it any more has written the file.
  if (!directory_.set_pinned(name, pinned)) return found;
  const std::lock_guard lock(mutex_);
  if (const StoreEntry* entry = index_.find(name)) index_.set_used(name, entry->used_at_ns, pinned);
  return true;
}

}  // namespace nb::kv
