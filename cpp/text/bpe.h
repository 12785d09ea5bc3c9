// Byte-pair merging: the table of merges and the loop that applies them to the symbols of one piece.
//
// Works on token ids only; what they spell is the vocabulary's business, and where pieces begin pretokenize.h's.
// Immutable after construction; safe to use from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "base/ids.h"

namespace nb::text {

/// Two neighbouring symbols and the symbol that replaces them.
struct Merge {
  TokenId left;
  TokenId right;
  TokenId merged;
};

/// Ranked merges by pair. Open addressing, 16 bytes a slot, at most 4/7 full.
class MergeTable {
 public:
  static constexpr std::int32_t kNoRank = std::numeric_limits<std::int32_t>::max();

  /// What a pair of symbols becomes; `rank` is kNoRank if the pair is never merged.
  struct Found {
    std::int32_t rank;
    TokenId merged;
  };

  MergeTable() : MergeTable(std::span<const Merge>()) {}

  /// The rank of a merge is its index. Entries with a negative `merged` are skipped; of equal pairs the first counts.
  explicit MergeTable(std::span<const Merge> merges) : MergeTable(merges, {}) {}

  /// The same with a rank for each merge, at least 0; equal ranks are allowed and the leftmost pair goes first. Of
  /// equal pairs the first counts. No ranks: the index.
  MergeTable(std::span<const Merge> merges, std::span<const std::int32_t> ranks);

  /// The merge of two symbols. Any values may be asked for.
  Found find(TokenId left, TokenId right) const {
    std::size_t slot = slot_of(left, right);
    while (slots_[slot].rank != kNoRank && (slots_[slot].left != left || slots_[slot].right != right)) {
      slot = (slot + 1) & mask_;
    }
    return {slots_[slot].rank, slots_[slot].merged};
  }

  std::size_t memory_bytes() const { return slots_.capacity() * sizeof(Slot); }

 private:
  struct Slot {
    TokenId left = -1;
    TokenId right = -1;
    std::int32_t rank = kNoRank;
    TokenId merged = -1;
  };

  std::size_t slot_of(TokenId left, TokenId right) const {
    std::uint64_t key =
        (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) | static_cast<std::uint32_t>(right);
    key = (key ^ seed_) * 0x9E3779B97F4A7C15u;
    key = (key ^ (key >> 32)) * 0xD6E8FEB86659FD93u;
    return static_cast<std::size_t>(key >> 32) & mask_;
  }

  std::vector<Slot> slots_;
  std::size_t mask_ = 0;
  std::uint64_t seed_ = 0;
};

/// Applies merges to symbols[first..) in place, shortening the vector: as long as any two neighbours can be merged,
/// the pair of the lowest rank is, the leftmost first. Stops early when only `min_left` symbols are left. O(n log n)
/// time and O(n) memory for n symbols.
void merge_symbols(const MergeTable& merges, std::vector<TokenId>& symbols, std::size_t first = 0,
                   std::size_t min_left = 1);

}  // namespace nb::text
