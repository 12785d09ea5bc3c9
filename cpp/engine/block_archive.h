// What the scheduler asks of KV that is kept elsewhere: to have blocks filled instead of computed.
//
// An archive may fail at any time and says so; what it fills is exactly what computing would have stored. Not for
// keeping (disk_tier.h does both). Used by the thread that runs steps.
#pragma once

#include <span>

#include "base/ids.h"
#include "base/sha256.h"
#include "kv/prefix_cache.h"

namespace nb::engine {

class BlockArchive {
 public:
  virtual ~BlockArchive() = default;

  /// Fills blocks from `first` on of a sequence that begins with `blocks`, which are full of `tokens` and have the
  /// chain keys `keys`. Returns how many hold their KV now, from `first` on; what is in those behind them is undefined.
  virtual int load_prefix(const kv::PrefixKeys& keys, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                          int first) noexcept = 0;

  /// Fills the blocks from `first` on of a chunk with this key (ChunkStore::key), whose anchor and tokens are `tokens`.
  /// False if it cannot; their content is undefined then.
  virtual bool load_chunk(const Digest& key, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                          int first) noexcept = 0;
};

}  // namespace nb::engine
