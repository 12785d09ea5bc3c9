#include "text/bpe.h"

#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace nb::text {
namespace {

using Symbols = std::vector<TokenId>;

/// The definition: the leftmost pair of the lowest rank is merged until none is left.
Symbols merge_naively(const std::vector<Merge>& merges, Symbols symbols, std::size_t min_left = 1) {
  while (symbols.size() > min_left) {
    std::size_t best_rank = merges.size();
    std::size_t best_position = 0;
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      for (std::size_t rank = 0; rank < best_rank; ++rank) {
        if (merges[rank].left != symbols[i] || merges[rank].right != symbols[i + 1]) continue;
        best_rank = rank;
        best_position = i;
      }
    }
    if (best_rank == merges.size()) return symbols;
    symbols[best_position] = merges[best_rank].merged;
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best_position) + 1);
  }
  return symbols;
}

/// Merges over the letters 0..num_letters-1, each of two symbols that exist, in random order of ranks.
std::vector<Merge> random_merges(std::mt19937& random, int num_letters, int count) {
  std::vector<Merge> merges;
  std::set<std::pair<TokenId, TokenId>> seen;
  TokenId num_symbols = num_letters;
  for (int i = 0; i < count; ++i) {
    std::uniform_int_distribution<TokenId> any(0, num_symbols - 1);
    const Merge merge{any(random), any(random), num_symbols};
    if (!seen.emplace(merge.left, merge.right).second) continue;
    merges.push_back(merge);
    ++num_symbols;
  }
  // Half of the tables have ranks in any order: a merge may then rank before those that make its parts.
  if (random() % 2 == 0) std::shuffle(merges.begin(), merges.end(), random);
  return merges;
}

Symbols random_symbols(std::mt19937& random, int num_letters, std::size_t length) {
  Symbols symbols(length);
  for (TokenId& symbol : symbols) symbol = static_cast<TokenId>(random() % static_cast<unsigned>(num_letters));
  return symbols;
}

TEST(Bpe, TableFindsWhatWasPutIn) {
  std::mt19937 random(1);
  const std::vector<Merge> merges = random_merges(random, 50, 3000);
  const MergeTable table(merges);
  std::set<std::pair<TokenId, TokenId>> known;
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const MergeTable::Found found = table.find(merges[i].left, merges[i].right);
    ASSERT_EQ(found.rank, static_cast<int>(i));
    ASSERT_EQ(found.merged, merges[i].merged);
    known.emplace(merges[i].left, merges[i].right);
  }
  for (TokenId left = -1; left < 100; ++left) {
    for (TokenId right = -1; right < 100; ++right) {
      const bool found = table.find(left, right).rank != MergeTable::kNoRank;
      ASSERT_EQ(found, known.count({left, right}) == 1) << left << ' ' << right;
    }
  }
}

TEST(Bpe, FirstOfEqualPairsCountsAndNegativeResultsAreSkipped) {
  const std::vector<Merge> merges = {{1, 2, -1}, {3, 4, 10}, {3, 4, 11}, {1, 2, 12}};
  const MergeTable table(merges);
  EXPECT_EQ(table.find(3, 4).rank, 1);
  EXPECT_EQ(table.find(3, 4).merged, 10);
  EXPECT_EQ(table.find(1, 2).rank, 3);
  EXPECT_EQ(table.find(1, 2).merged, 12);
}

TEST(Bpe, EmptyTableMergesNothing) {
  const MergeTable table;
  Symbols symbols = {1, 1, 1};
  merge_symbols(table, symbols);
  EXPECT_EQ(symbols, (Symbols{1, 1, 1}));
}

TEST(Bpe, LowestRankFirstThenLeftmost) {
  // "aaa": the left pair is merged. "abc": bc ranks before ab.
  const std::vector<Merge> merges = {{1, 2, 5}, {0, 1, 4}, {0, 0, 3}};
  const MergeTable table(merges);
  Symbols symbols = {0, 0, 0};
  merge_symbols(table, symbols);
  EXPECT_EQ(symbols, (Symbols{3, 0}));
  symbols = {0, 1, 2};
  merge_symbols(table, symbols);
  EXPECT_EQ(symbols, (Symbols{0, 5}));
}

TEST(Bpe, LeavesWhatIsBeforeFirst) {
  const std::vector<Merge> merges = {{0, 0, 1}};
  const MergeTable table(merges);
  for (const std::size_t length : {2u, 100u}) {
    Symbols symbols(3 + length, 0);
    merge_symbols(table, symbols, 3);
    Symbols expected(3, 0);
    expected.insert(expected.end(), length / 2, 1);
    EXPECT_EQ(symbols, expected);
    merge_symbols(table, symbols, symbols.size());
    EXPECT_EQ(symbols, expected);
  }
}

// Lengths on both sides of the change from scanning to the heap.
TEST(Bpe, AgreesWithTheDefinitionOnRandomVocabularies) {
  std::mt19937 random(7);
  int num_merged = 0;
  for (int round = 0; round < 300; ++round) {
    const int num_letters = 1 + static_cast<int>(random() % 4);
    const std::vector<Merge> merges = random_merges(random, num_letters, 1 + static_cast<int>(random() % 60));
    const MergeTable table(merges);
    for (const std::size_t length : {0u, 1u, 2u, 3u, 7u, 20u, 47u, 48u, 49u, 50u, 90u}) {
      const Symbols text = random_symbols(random, num_letters, length);
      Symbols symbols = text;
      merge_symbols(table, symbols);
      ASSERT_EQ(symbols, merge_naively(merges, text)) << "round " << round << " length " << length;
      num_merged += symbols.size() < length;
    }
  }
  EXPECT_GT(num_merged, 2000);
}

TEST(Bpe, StopsWhereItIsTold) {
  std::mt19937 random(8);
  int num_stopped = 0;
  for (int round = 0; round < 200; ++round) {
    const std::vector<Merge> merges = random_merges(random, 2, 40);
    const MergeTable table(merges);
    for (const std::size_t length : {0u, 1u, 2u, 5u, 20u, 48u, 49u, 80u}) {
      for (const std::size_t min_left : {0u, 1u, 2u, 4u, 30u, 60u}) {
        const Symbols text = random_symbols(random, 2, length);
        Symbols symbols = text;
        merge_symbols(table, symbols, 0, min_left);
        ASSERT_EQ(symbols, merge_naively(merges, text, min_left)) << "length " << length << " stop " << min_left;
        num_stopped += symbols.size() == min_left && merge_naively(merges, text).size() < min_left;
      }
    }
  }
  EXPECT_GT(num_stopped, 100);
}

// Quadratic work on a million symbols would take hours.
TEST(Bpe, AMillionEqualSymbolsTakeSeconds) {
  std::vector<Merge> merges;
  for (TokenId i = 0; i < 10; ++i) merges.push_back({i, i, i + 1});
  const MergeTable table(merges);
  Symbols symbols(1'000'000, 0);
  const auto start = std::chrono::steady_clock::now();
  merge_symbols(table, symbols);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
  ASSERT_EQ(symbols.size(), 976u + 2u);  // 976 x 1024, then 576 = 512 + 64
  EXPECT_EQ(symbols.front(), 10);
  EXPECT_EQ(symbols[976], 9);
  EXPECT_EQ(symbols[977], 6);
}

}  // namespace
}  // namespace nb::text
