// What is to be kept in the store and has not been copied yet, with a reference of every block.
//
//   sequence:  [b0 .. b15][b16 .. b31][b32 .. b37]     one record each, in this order
//   chunk:     [b0 .................... b20]           one record
//
// A reference keeps the content of a block: it is full and nobody writes it. An item holds its chain from the first
// block on, so that none of them is evicted before what follows it, and gives all back after its last record. Whoever
// needs the blocks may have them at any time: then the item is not kept. Not for copying (disk_tier.h). Used by the
// thread that runs steps.
#pragma once

#include <deque>
#include <span>
#include <vector>

#include "base/ids.h"
#include "base/sha256.h"
#include "kv/block_pool.h"
#include "kv/chunk_store.h"
#include "kv/prefix_cache.h"
#include "kv/store_record.h"

namespace nb::engine {

/// One record to be written. Valid until the queue changes.
struct SaveRecord {
  kv::RecordKind kind;
  Digest root;
  Digest parent;
  Digest key;
  int position;  ///< of its first token
  std::span<const TokenId> tokens;
  std::span<const BlockId> blocks;
};

class SaveQueue {
 public:
  /// `pool` must outlive the queue.
  explicit SaveQueue(kv::BlockPool& pool) : pool_(pool) {}

  /// The leading `blocks` of a sequence, full of the first of `tokens`, whose keys are in `keys`.
  void add_prefix(const kv::PrefixKeys& keys, std::span<const TokenId> tokens, std::span<const BlockId> blocks);

  /// A chunk that is ready.
  void add_chunk(const kv::Chunk& chunk);

  bool empty() const { return items_.empty(); }

  /// The next record; the queue must not be empty.
  SaveRecord front() const;

  /// That record is done. Blocks that become free are appended to `freed`, here and below.
  void pop(std::vector<BlockId>& freed);

  /// Gives up the item that came last; false if there is none.
  bool drop_one(std::vector<BlockId>& freed);

  /// Gives up the chunk with this key, if it is waiting.
  void drop_chunk(const Digest& key, std::vector<BlockId>& freed);

  std::int64_t num_dropped() const { return num_dropped_; }

  /// Appends every block once for each reference that is held.
  void append_owners(std::vector<BlockId>& owners) const;

 private:
  struct Item {
    kv::RecordKind kind;
    Digest root;
    std::vector<Digest> keys;  // of each block; of a chunk its only one
    std::vector<TokenId> tokens;
    std::vector<BlockId> blocks;
    std::size_t num_done = 0;  // blocks
  };

  static std::size_t end_of(const Item& item);
  void release(const Item& item, std::vector<BlockId>& freed);

  kv::BlockPool& pool_;
  std::deque<Item> items_;
  std::int64_t num_dropped_ = 0;
};

}  // namespace nb::engine
