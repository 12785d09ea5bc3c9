// What the scheduler asks of KV that is kept elsewhere: to have blocks filled instead of computed.
//
// Filling takes time, in which others are computed: it is begun, and taken when it has ended. An archive may fail at
// any time and says so; what it fills is exactly what computing would have stored. Not for keeping (disk_tier.h does
// both). Used by the thread that runs steps.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "base/ids.h"
#include "base/sha256.h"
#include "kv/prefix_cache.h"

namespace nb::engine {

/// Names a load of an archive; 0 is none.
using LoadId = std::uint64_t;

class BlockArchive {
 public:
  virtual ~BlockArchive() = default;

  /// Begins to fill blocks from `first` on of a sequence that begins with `blocks`, which are full of `tokens` and have
  /// the chain keys `keys`. 0 if there is nothing to fill them with. Until the load was taken or stopped, nobody else
  /// may touch those blocks; what is in those that it does not fill is undefined.
  virtual LoadId begin_prefix(const kv::PrefixKeys& keys, std::span<const TokenId> tokens,
                              std::span<const BlockId> blocks, int first) noexcept = 0;

  /// The same for the blocks from `first` on of a chunk with this key (ChunkStore::key), whose anchor and tokens are
  /// `tokens`.
  virtual LoadId begin_chunk(const Digest& key, std::span<const TokenId> tokens, std::span<const BlockId> blocks,
                             int first) noexcept = 0;

  /// Once a load has ended: how many blocks hold their KV now, from `first` on. It is forgotten then.
  virtual std::optional<int> take(LoadId load) noexcept = 0;

  /// Forgets a load. When this returns, which is soon, nothing writes to its blocks any more.
  virtual void stop(LoadId load) noexcept = 0;
};

}  // namespace nb::engine
