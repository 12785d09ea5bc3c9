#include "engine/cascade_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "base/ids.h"

namespace nb::engine {
namespace {

using model::StepInputs;
using Blocks = std::vector<std::int32_t>;

/// A sequence as the batch builder writes it: its last `rows` keys belong to its rows.
void add_sequence(StepInputs& inputs, const Blocks& blocks, int num_keys, int rows) {
  inputs.segments.push_back({.row_begin = inputs.num_tokens(),
                             .row_count = rows,
                             .run_begin = static_cast<std::int32_t>(inputs.runs.size()),
                             .run_count = 1});
  inputs.runs.push_back({static_cast<std::int32_t>(inputs.blocks.size()), num_keys, 0});
  inputs.blocks.insert(inputs.blocks.end(), blocks.begin(), blocks.end());
  for (int i = num_keys - rows; i < num_keys; ++i) {
    inputs.token_ids.push_back(0);
    inputs.positions.push_back(i);
  }
}

/// Sequences that fork off a random earlier one at a random block, or begin anew.
StepInputs random_trie(std::mt19937& random) {
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  StepInputs inputs;
  std::vector<Blocks> lists;
  std::vector<int> lengths;
  std::int32_t next_block = 0;
  const int count = draw(1, 20), longest = draw(1, 600);
  const bool descending = draw(0, 1) == 1;  // ids need not grow with time
  for (int s = 0; s < count; ++s) {
    const int num_keys = draw(1, longest);
    Blocks blocks;
    if (s > 0 && draw(0, 3) > 0) {
      const auto parent = static_cast<std::size_t>(draw(0, s - 1));
      const int full = std::min(lengths[parent], num_keys) / kBlockTokens;
      blocks.assign(lists[parent].begin(), lists[parent].begin() + draw(0, full));
    }
    while (static_cast<int>(blocks.size()) * kBlockTokens < num_keys) {
      blocks.push_back(descending ? 100'000 - next_block++ : next_block++);
    }
    lists.push_back(blocks);
    lengths.push_back(num_keys);
  }
  std::vector<std::size_t> order(lists.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (const std::size_t i : order) {
    add_sequence(inputs, lists[i], lengths[i], draw(1, std::min(lengths[i], draw(0, 1) == 0 ? 1 : 40)));
  }
  return inputs;
}

Blocks blocks_of(const StepInputs& inputs, const ops::AttentionSegment& segment) {
  const auto& run = inputs.runs[static_cast<std::size_t>(segment.run_begin)];
  const auto begin = inputs.blocks.begin() + run.block_begin;
  return {begin, begin + (run.num_keys + kBlockTokens - 1) / kBlockTokens};
}

/// Keys two sequences have in common, one block after the other.
int naive_common_keys(const StepInputs& inputs, const ops::AttentionSegment& a, const ops::AttentionSegment& b) {
  const Blocks blocks_a = blocks_of(inputs, a), blocks_b = blocks_of(inputs, b);
  int keys = 0;
  for (std::size_t i = 0; i < blocks_a.size() && i < blocks_b.size() && blocks_a[i] == blocks_b[i]; ++i) keys += 16;
  return keys;
}

bool worth_joining(const StepInputs& inputs, const ops::AttentionSegment& a, const ops::AttentionSegment& b) {
  const int common = naive_common_keys(inputs, a, b);
  for (const auto* segment : {&a, &b}) {
    const int own = inputs.runs[static_cast<std::size_t>(segment->run_begin)].num_keys - common;
    if (own > kMaxOwnRatio * common) return false;
  }
  return common >= kMinSharedKeys;
}

// Every row keeps its blocks in position order, the sequences stand in trie order (what any two have in common, all
// between them have), neighbours are joined over all they have in common wherever it is worth it, so that no group
// could be larger, and the saved keys are those of an account that marks every block that is read.
TEST(CascadePlan, RandomTriesAreJoinedAsFarAsTheyGo) {
  std::mt19937 random(3);
  int joined = 0;
  for (int round = 0; round < 500; ++round) {
    const StepInputs before = random_trie(random);
    StepInputs after = before;
    const std::int64_t saved = plan_cascade(after, 0);
    EXPECT_EQ(after.blocks, before.blocks);
    ASSERT_EQ(after.segments.size(), before.segments.size());
    std::vector<int> seen(before.token_ids.size());
    for (const auto& segment : after.segments) {
      const auto same = std::find_if(before.segments.begin(), before.segments.end(),
                                     [&](const auto& other) { return other.row_begin == segment.row_begin; });
      ASSERT_NE(same, before.segments.end());
      EXPECT_EQ(segment.row_count, same->row_count);
      EXPECT_EQ(segment.run_begin, same->run_begin);
      EXPECT_EQ(segment.run_count, 1);
      for (int i = 0; i < segment.row_count; ++i) ++seen[static_cast<std::size_t>(segment.row_begin + i)];
    }
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), static_cast<std::ptrdiff_t>(seen.size()));

    const auto& segments = after.segments;
    if (saved == 0) {
      for (std::size_t i = 0; i < segments.size(); ++i) {
        EXPECT_EQ(segments[i].row_begin, before.segments[i].row_begin) << "the order has changed for nothing";
        EXPECT_EQ(segments[i].shared_keys, 0);
      }
      continue;
    }
    ++joined;
    for (std::size_t i = 0; i < segments.size(); ++i) {
      int least = std::numeric_limits<int>::max();
      for (std::size_t j = i + 1; j < segments.size(); ++j) {
        least = std::min(least, naive_common_keys(after, segments[j - 1], segments[j]));
        EXPECT_EQ(naive_common_keys(after, segments[i], segments[j]), least) << "round " << round;
      }
      const bool joins = i > 0 && worth_joining(after, segments[i - 1], segments[i]);
      EXPECT_EQ(segments[i].shared_keys, joins ? naive_common_keys(after, segments[i - 1], segments[i]) : 0);
    }
    // What all that are joined read of common blocks, less each of those blocks once.
    std::vector<std::pair<int, std::int32_t>> read;  // (group, block), once for each sequence
    int group = 0;
    for (std::size_t i = 0; i < segments.size(); ++i) {
      if (segments[i].shared_keys == 0) ++group;
      const int next = i + 1 < segments.size() ? segments[i + 1].shared_keys : 0;
      const Blocks blocks = blocks_of(after, segments[i]);
      for (int b = 0; b < std::max(segments[i].shared_keys, next) / kBlockTokens; ++b) {
        read.emplace_back(group, blocks[static_cast<std::size_t>(b)]);
      }
    }
    const auto copies = static_cast<std::int64_t>(read.size());
    std::sort(read.begin(), read.end());
    EXPECT_EQ(saved, (copies - (std::unique(read.begin(), read.end()) - read.begin())) * kBlockTokens);
  }
  EXPECT_GT(joined, 100);
}

TEST(CascadePlan, ASystemPromptAndAConversationAreTwoLevels) {
  StepInputs inputs;
  Blocks system;
  for (int i = 0; i < 16; ++i) system.push_back(i);
  Blocks conversation = system;
  for (int i = 16; i < 28; ++i) conversation.push_back(i);
  const auto with = [](Blocks blocks, int last) {
    blocks.push_back(last);
    return blocks;
  };
  add_sequence(inputs, with(conversation, 50), 28 * 16 + 3, 1);
  add_sequence(inputs, with(system, 51), 16 * 16 + 9, 1);
  add_sequence(inputs, {60, 61}, 30, 2);
  add_sequence(inputs, with(conversation, 52), 28 * 16 + 5, 1);
  EXPECT_EQ(plan_cascade(inputs, 0), 28 * 16 + 16 * 16);
  std::vector<int> rows, shared;
  for (const auto& segment : inputs.segments) {
    rows.push_back(segment.row_begin);
    shared.push_back(segment.shared_keys);
  }
  EXPECT_EQ(rows, (std::vector<int>{1, 0, 4, 2}));
  EXPECT_EQ(shared, (std::vector<int>{0, 16 * 16, 28 * 16, 0}));
}

// A partly filled block is never shared, nor is a prefix shorter than a tile; what a window hides is not saved.
TEST(CascadePlan, OnlyWhatIsFullLongEnoughAndSeenCounts) {
  const auto saved = [](int first, int second, int window) {
    StepInputs inputs;
    const Blocks blocks = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
    add_sequence(inputs, blocks, first, 1);
    add_sequence(inputs, blocks, second, 1);
    const std::int64_t keys = plan_cascade(inputs, window);
    EXPECT_EQ(inputs.segments[1].shared_keys > 0, keys > 0);
    return keys;
  };
  EXPECT_EQ(saved(160, 160, 0), 160);
  EXPECT_EQ(saved(159, 160, 0), 144);
  EXPECT_EQ(saved(64, 64 + 128, 0), 64);
  EXPECT_EQ(saved(64, 64 + 129, 0), 0);  // too much of its own
  EXPECT_EQ(saved(63, 160, 0), 0);
  EXPECT_EQ(saved(160, 160, 160), 160);
  EXPECT_EQ(saved(160, 160, 100), 100);  // keys 60 to 159
  EXPECT_EQ(saved(140, 160, 100), 68);   // keys 60 to 127
  EXPECT_EQ(saved(140, 160, 90), 0);     // keys 70 to 127 are too few
  StepInputs empty;
  EXPECT_EQ(plan_cascade(empty, 0), 0);
}

// ---- chunks ----

/// A chunk of the pool as a run sees it.
struct Chunk {
  Blocks blocks;
  int keys;
};

/// A composed sequence: chunks, each at a place and with an anchor of its own, then a run with positions of its own
/// unless it ends with a chunk.
void add_composed(StepInputs& inputs, const std::vector<Chunk>& chunks, std::mt19937& random, bool has_own) {
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  inputs.segments.push_back({.row_begin = inputs.num_tokens(),
                             .row_count = 1,
                             .run_begin = static_cast<std::int32_t>(inputs.runs.size()),
                             .run_count = static_cast<std::int32_t>(chunks.size()) + (has_own ? 1 : 0)});
  int at = 0;
  for (const Chunk& chunk : chunks) {
    at += draw(0, 5);
    inputs.runs.push_back({.block_begin = static_cast<std::int32_t>(inputs.blocks.size()),
                           .num_keys = chunk.keys,
                           .position_offset = at,
                           .first_key = draw(0, std::min(3, chunk.keys))});
    inputs.blocks.insert(inputs.blocks.end(), chunk.blocks.begin(), chunk.blocks.end());
    at += chunk.keys;
  }
  if (has_own) {
    inputs.runs.push_back({.block_begin = static_cast<std::int32_t>(inputs.blocks.size()),
                           .num_keys = 16,
                           .position_offset = 0,
                           .positions_begin = static_cast<std::int32_t>(inputs.run_positions.size())});
    inputs.blocks.push_back(1'000'000);  // the same one: still nobody's but the sequence's
    for (int i = 0; i < 16; ++i) inputs.run_positions.push_back(at + i);
  }
  inputs.token_ids.push_back(0);
  inputs.positions.push_back(at + 20);
}

/// Blocks in order; behind a run that is not the last one how many keys it has, which no block is called.
std::vector<std::int32_t> letters(const StepInputs& inputs, const ops::AttentionSegment& segment) {
  std::vector<std::int32_t> word;
  for (int r = segment.run_begin; r < segment.run_begin + segment.run_count; ++r) {
    const auto& run = inputs.runs[static_cast<std::size_t>(r)];
    if (run.positions_begin >= 0) break;
    const bool is_last = r + 1 == segment.run_begin + segment.run_count;
    const int blocks = is_last ? run.num_keys / 16 : (run.num_keys + 15) / 16;
    for (int b = 0; b < blocks; ++b) word.push_back(inputs.blocks[static_cast<std::size_t>(run.block_begin + b)]);
    if (!is_last) word.push_back(-run.num_keys);
  }
  return word;
}

/// Runs and keys that two sequences have in common, letter by letter.
std::pair<int, int> naive_common(const StepInputs& inputs, const ops::AttentionSegment& a,
                                 const ops::AttentionSegment& b) {
  const auto x = letters(inputs, a), y = letters(inputs, b);
  int runs = 0, keys = 0;
  for (std::size_t i = 0; i < x.size() && i < y.size() && x[i] == y[i]; ++i) {
    keys = x[i] < 0 ? 0 : keys + 16;
    runs += x[i] < 0 ? 1 : 0;
  }
  // A block that is the last of one run and partly filled is not common by itself.
  const auto last_keys = [&](const ops::AttentionSegment& s) {
    return inputs.runs[static_cast<std::size_t>(s.run_begin + runs)].num_keys / 16 * 16;
  };
  if (keys > 0) keys = std::min({keys, last_keys(a), last_keys(b)});
  return {runs, keys};
}

// Chunks are joined as far as sequences have the same ones in the same order, wherever they stand; a run of their own
// ends it, and the order is that of a trie again.
TEST(CascadePlan, RandomChunksAreJoinedAsFarAsTheyGo) {
  std::mt19937 random(5);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  int joined = 0, whole_runs = 0;
  for (int round = 0; round < 300; ++round) {
    std::vector<Chunk> pool;
    std::int32_t next_block = 0;
    for (int i = draw(1, 4); i > 0; --i) {
      Chunk chunk{{}, draw(1, 200)};
      if (!pool.empty() && draw(0, 3) == 0) {  // begins like the one before it
        const auto& other = pool.back();
        chunk.blocks.assign(other.blocks.begin(), other.blocks.begin() + std::min(other.keys, chunk.keys) / 16);
      }
      while (static_cast<int>(chunk.blocks.size()) * 16 < chunk.keys) chunk.blocks.push_back(next_block++);
      pool.push_back(std::move(chunk));
    }
    StepInputs inputs;
    for (int s = draw(1, 10); s > 0; --s) {
      std::vector<Chunk> chunks;
      for (int i = draw(1, 4); i > 0; --i)
        chunks.push_back(pool[static_cast<std::size_t>(draw(0, static_cast<int>(pool.size()) - 1))]);
      add_composed(inputs, chunks, random, draw(0, 3) > 0);
    }
    const std::int64_t saved = plan_cascade(inputs, 0);
    const auto& segments = inputs.segments;
    std::int64_t account = 0;
    for (std::size_t i = 0; i < segments.size(); ++i) {
      std::pair<int, int> least{std::numeric_limits<int>::max(), 0};
      for (std::size_t j = i + 1; saved > 0 && j < segments.size(); ++j) {
        least = std::min(least, naive_common(inputs, segments[j - 1], segments[j]));
        EXPECT_EQ(naive_common(inputs, segments[i], segments[j]), least) << "round " << round;
      }
      if (!segments[i].shares()) continue;
      ASSERT_GT(i, 0U);
      const auto [runs, keys] = naive_common(inputs, segments[i - 1], segments[i]);
      EXPECT_EQ(segments[i].shared_runs, runs);
      EXPECT_EQ(segments[i].shared_keys, keys);
      for (int r = 0; r <= runs; ++r) {
        const auto run_of = [&](std::size_t s) {
          return inputs.runs[static_cast<std::size_t>(segments[s].run_begin + r)];
        };
        if (r == runs && keys == 0) break;
        const int end = r < runs ? run_of(i).num_keys : keys;
        account += std::max(0, end - std::max(run_of(i).first_key, run_of(i - 1).first_key));
      }
      whole_runs += runs;
    }
    EXPECT_EQ(saved, account);
    joined += saved > 0 ? 1 : 0;
  }
  EXPECT_GT(joined, 50);
  EXPECT_GT(whole_runs, 100);
}

}  // namespace
}  // namespace nb::engine
