#include "text/bpe.h"

#include <algorithm>
#include <bit>
#include <functional>

#include "base/error.h"
#include "base/rng.h"

namespace nb::text {

namespace {

using Found = MergeTable::Found;

constexpr std::size_t kMaxShort = 48;  // symbols; above this the heap is faster (measured on English and CJK)

/// Scans all pairs for the best before every merge; quadratic, but without allocation.
void merge_short(const MergeTable& merges, std::vector<TokenId>& symbols, std::size_t first, std::size_t min_left) {
  TokenId* const symbol = symbols.data() + first;
  std::size_t num_symbols = symbols.size() - first;
  Found pairs[kMaxShort];  // pairs[i] is what symbol[i] and symbol[i + 1] become
  for (std::size_t i = 0; i + 1 < num_symbols; ++i) pairs[i] = merges.find(symbol[i], symbol[i + 1]);
  while (num_symbols > min_left) {
    std::size_t best = 0;
    for (std::size_t i = 1; i + 1 < num_symbols; ++i) {
      if (pairs[i].rank < pairs[best].rank) best = i;
    }
    if (pairs[best].rank == MergeTable::kNoRank) break;
    symbol[best] = pairs[best].merged;
    std::copy(symbol + best + 2, symbol + num_symbols, symbol + best + 1);
    if (best + 2 < num_symbols) std::copy(pairs + best + 2, pairs + num_symbols - 1, pairs + best + 1);
    --num_symbols;
    if (best + 1 < num_symbols) pairs[best] = merges.find(symbol[best], symbol[best + 1]);
    if (best > 0) pairs[best - 1] = merges.find(symbol[best - 1], symbol[best]);
  }
  symbols.resize(first + num_symbols);
}

/// The symbols as a linked list, and a heap of (rank, position) in which outdated entries are skipped when they
/// surface: an entry counts only while the pair at its position still has its rank.
class LongMerger {
 public:
  LongMerger(const MergeTable& merges, std::span<TokenId> symbols)
      : merges_(merges), symbols_(symbols), links_(symbols.size()), pairs_(symbols.size()) {
    const std::uint32_t size = static_cast<std::uint32_t>(symbols.size());
    for (std::uint32_t i = 0; i < size; ++i) {
      links_[i] = {i - 1, i + 1};  // the first `previous` wraps to kNone; the last `next` is mended below
      pairs_[i] = {MergeTable::kNoRank, -1};
    }
    links_.back().next = kNone;
    for (std::uint32_t i = 0; i + 1 < size; ++i) {
      pairs_[i] = merges_.find(symbols_[i], symbols_[i + 1]);
      if (pairs_[i].rank != MergeTable::kNoRank) heap_.push_back(entry(pairs_[i].rank, i));
    }
    std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
  }

  /// Merges until nothing can be or `min_left` are left; returns how many symbols are left at the front of the span.
  std::size_t run(std::size_t min_left) {
    std::size_t num_left = symbols_.size();
    while (!heap_.empty() && num_left > min_left) {
      std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
      const std::uint64_t top = heap_.back();
      heap_.pop_back();
      const std::uint32_t left = static_cast<std::uint32_t>(top);
      if (pairs_[left].rank != static_cast<std::int32_t>(top >> 32)) continue;
      merge_at(left);
      --num_left;
    }
    std::size_t count = 0;
    for (std::uint32_t i = 0; i != kNone; i = links_[i].next) symbols_[count++] = symbols_[i];
    return count;
  }

 private:
  static constexpr std::uint32_t kNone = 0xFFFFFFFFu;

  struct Link {
    std::uint32_t previous;
    std::uint32_t next;
  };

  static std::uint64_t entry(std::int32_t rank, std::uint32_t position) {
    return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(rank)) << 32) | position;
  }

  void merge_at(std::uint32_t left) {
    const std::uint32_t right = links_[left].next;
    symbols_[left] = pairs_[left].merged;
    links_[left].next = links_[right].next;
    if (links_[left].next != kNone) links_[links_[left].next].previous = left;
    pairs_[right].rank = MergeTable::kNoRank;  // no entry for the removed symbol counts any more
    update_pair(left);
    if (links_[left].previous != kNone) update_pair(links_[left].previous);
  }

  void update_pair(std::uint32_t left) {
    const std::uint32_t right = links_[left].next;
    pairs_[left] = right == kNone ? Found{MergeTable::kNoRank, -1} : merges_.find(symbols_[left], symbols_[right]);
    if (pairs_[left].rank == MergeTable::kNoRank) return;
    heap_.push_back(entry(pairs_[left].rank, left));
    std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
  }

  const MergeTable& merges_;
  std::span<TokenId> symbols_;
  std::vector<Link> links_;
  std::vector<Found> pairs_;
  std::vector<std::uint64_t> heap_;
};

}  // namespace

MergeTable::MergeTable(std::span<const Merge> merges, std::span<const std::int32_t> ranks) {
  NB_CHECK(merges.size() < static_cast<std::size_t>(kNoRank), format, "too many merges: ", merges.size());
  // A seed of its own for each table, so that no file can be made whose pairs all fall into one slot. Results do not
  // depend on it.
  seed_ = random_seed();
  slots_.resize(std::bit_ceil(merges.size() + merges.size() * 3 / 4 + 2));
  mask_ = slots_.size() - 1;
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const Merge& merge = merges[i];
    const std::int32_t rank = ranks.empty() ? static_cast<std::int32_t>(i) : ranks[i];
    if (merge.merged < 0) continue;
    std::size_t slot = slot_of(merge.left, merge.right);
    while (slots_[slot].rank != kNoRank && (slots_[slot].left != merge.left || slots_[slot].right != merge.right)) {
      slot = (slot + 1) & mask_;
    }
    if (slots_[slot].rank != kNoRank) continue;
    slots_[slot] = {merge.left, merge.right, rank, merge.merged};
  }
}

void merge_symbols(const MergeTable& merges, std::vector<TokenId>& symbols, std::size_t first, std::size_t min_left) {
  const std::size_t num_symbols = symbols.size() - first;
  if (num_symbols < 2) return;
  if (num_symbols <= kMaxShort) {
    merge_short(merges, symbols, first, std::max<std::size_t>(min_left, 1));
    return;
  }
  NB_CHECK(num_symbols < 0xFFFFFFFFu, invalid_argument, "piece of ", num_symbols, " bytes is too long to tokenize");
  const std::size_t count = LongMerger(merges, std::span(symbols).subspan(first)).run(min_left);
  symbols.resize(first + count);
}

}  // namespace nb::text
