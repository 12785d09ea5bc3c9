// The KV of an engine on disk: prefix blocks and chunks go from its memory into a store and come back after a restart.
//
// A record is served only to an engine whose fingerprint is that of the one that wrote it; see kv_fingerprint(). What
// fails is a miss and a counter, never an error, and the tokens are computed. Records are read on other threads
// (load_queue.h), into blocks where those are host memory; to a device they are copied when they are there. Not for the
// files (kv/disk_store.h) nor for when to keep what (scheduler.h). Used by the thread that runs steps, but for stats().
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/block_archive.h"
#include "engine/load_queue.h"
#include "engine/save_queue.h"
#include "kv/disk_store.h"
#include "kv/kv_storage.h"
#include "model/model.h"

namespace nb::engine {

/// Raised with every change after which the same model and options give other bits in a block.
inline constexpr int kKvNumericsVersion = 3;

/// SHA-256 of everything but tokens and namespace that the content of a block of this model depends on, each field with
/// its name and its length. `content` is the identity of the model's files.
Digest kv_fingerprint(const model::Model& model, quant::KvFormat format, const Digest& content);

/// Counters since the engine was made.
struct DiskTierStats {
  kv::DiskStoreStats store{};  ///< misses: with those that no file was opened for
  double load_seconds = 0.0;   ///< from the beginning of a load to its end, of all that were not stopped
};

class DiskTier : public BlockArchive {
 public:
  /// What the tier is made of. `settle` does what is still to be done with the memory of `storage`.
  struct Parts {
    kv::KvStorage& storage;
    int num_readers;  ///< threads that read
    std::function<void()> settle;
    std::function<void()> wake{};  ///< see LoadQueue
  };

  /// Opens or makes the directory. Throws io naming it, or invalid_argument.
  DiskTier(const std::string& directory, std::int64_t quota_bytes, const Digest& fingerprint, Parts parts);

  LoadId begin_prefix(const kv::PrefixKeys& keys, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                      int first) noexcept override;
  LoadId begin_chunk(const Digest& key, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                     int first) noexcept override;
  std::optional<int> take(LoadId load) noexcept override;
  void stop(LoadId load) noexcept override;

  /// Changes whenever take() may have something new.
  std::uint64_t progress() const { return queue_.progress(); }

  /// Waits until that is no longer `seen`, or until a time.
  void wait(std::uint64_t seen, std::chrono::steady_clock::time_point until) { queue_.wait(seen, until); }

  /// Whether the store has all of the record, as far as is known without looking.
  bool has(const SaveRecord& record) const noexcept;

  /// Copies the record, to be written soon. What fails is counted.
  void save(const SaveRecord& record) noexcept;

  /// Whether so much waits to be written that no more should be copied.
  bool is_busy() const { return store_.stats().waiting_bytes > kBusyBytes; }

  /// Waits until what was saved is written, at most `time`, and gives up the rest but for the record in hand.
  void finish(std::chrono::duration<double> time);

  /// Removes the record of a chunk, also one that waits to be written.
  void erase_chunk(const Digest& key) noexcept;

  /// Any thread may ask.
  DiskTierStats stats() const;

 private:
  /// The leading blocks of a record, and where they go.
  struct Piece {
    Digest key;
    std::size_t first_block;  ///< of the sequence
    std::size_t num_blocks;
  };

  /// What is to be done when a load has ended.
  struct Begun {
    std::vector<Piece> pieces;
    std::vector<BlockId> blocks;
    std::size_t first;
    std::size_t num_good;  ///< leading pieces that nothing was wrong with when they were copied
    std::chrono::steady_clock::time_point since;
  };

  static constexpr std::int64_t kBusyBytes = 64 << 20;

  std::vector<Piece> find_pieces(const kv::PrefixKeys& keys, std::span<const TokenId> tokens, std::size_t num_blocks,
                                 std::size_t first);
  LoadId begin(std::vector<Piece> pieces, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
               std::size_t first);
  void copy_to_device() noexcept;
  static std::span<const TokenId> tokens_of(const Piece& piece, std::span<const TokenId> tokens);
  bool may_list();

  kv::DiskStore store_;
  Parts parts_;
  std::chrono::steady_clock::time_point listed_;
  std::atomic<std::int64_t> num_absent_{0};
  std::atomic<double> load_seconds_{0.0};
  std::map<LoadId, Begun> begun_;
  LoadQueue queue_;  // last: its threads use the store and the memory of blocks
};

}  // namespace nb::engine
