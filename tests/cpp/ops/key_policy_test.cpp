#include "ops/key_policy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "ops/naive_policy.h"

namespace nb::ops {
namespace {

std::string to_string(const KeyPolicy& policy) {
  return concat("rule ", static_cast<int>(policy.rule), ", prefix ", policy.prefix, ", window ", policy.window,
                ", period ", policy.period, ", keep ", policy.keep);
}

// All rules with random fields, small enough that much is hidden within kRows rows.
constexpr int kRows = 500;
std::vector<KeyPolicy> policies() {
  std::vector<KeyPolicy> all = {{}};
  std::mt19937 random(7);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  for (int i = 0; i < 300; ++i) {
    KeyPolicy policy;
    policy.rule = static_cast<KeyRule>(1 + i % 5);
    policy.prefix = draw(0, 2) == 0 ? 0 : draw(0, 2) == 0 ? draw(0, 5) * 16 : draw(0, 90);
    policy.window = draw(0, 3) == 0 ? 1 : draw(1, 150);
    if (policy.rule == KeyRule::strided) policy.period = draw(1, 7);
    if (policy.rule == KeyRule::block) {
      policy.period = draw(1, 8) * 16;
      policy.keep = draw(0, policy.period / 16) * 16;
    }
    if (policy.rule == KeyRule::budget) policy.keep = draw(0, 12);
    if (policy.rule == KeyRule::summary) policy.period = draw(0, 1) == 0 ? draw(1, 70) : draw(1, 5) * 16;
    all.push_back(policy);
  }
  return all;
}

// What the naive rule shows: seen[p][s].
std::vector<std::vector<bool>> naive_rows(const KeyPolicy& policy) {
  std::vector<std::vector<bool>> seen;
  for (int p = 0; p < kRows; ++p) {
    const NaiveRow row(policy, p);
    seen.emplace_back();
    for (int s = 0; s < kRows; ++s) seen.back().push_back(row.shows(s));
  }
  return seen;
}

TEST(KeyPolicy, BitsNextBlocksAndDeadBlocksFollowTheDefinition) {
  for (const KeyPolicy& policy : policies()) {
    const auto seen = naive_rows(policy);
    const auto shows_any = [&](int p, int block) {
      for (int s = 16 * block; s < std::min(16 * block + 16, kRows); ++s) {
        if (s > p || seen[static_cast<std::size_t>(p)][static_cast<std::size_t>(s)]) return true;
      }
      return false;
    };
    for (int p = 0; p < kRows; ++p) {
      for (int block = 0; block < kRows / 16; ++block) {
        const uint16_t bits = hidden_bits(policy, p, block);
        for (int i = 0; i < 16; ++i) {
          const int s = 16 * block + i;
          const bool shown = s > p || seen[static_cast<std::size_t>(p)][static_cast<std::size_t>(s)];
          ASSERT_EQ((bits >> i & 1) == 0, shown) << to_string(policy) << ", row " << p << ", key " << s;
        }
        int next = block;
        while (!shows_any(p, next)) ++next;
        ASSERT_EQ(next_seen_block(policy, p, block), next) << to_string(policy) << ", row " << p << ", block " << block;
      }
    }
  }
}

// By looking at all later rows; the rules' own word for it is not used.
TEST(KeyPolicy, DeadIsWhatNoLaterRowSees) {
  for (const KeyPolicy& policy : policies()) {
    const auto seen = naive_rows(policy);
    for (int block = 0; block < kRows / 16; ++block) {
      int last = -1;  // row that sees something of the block
      for (int p = 0; p < kRows; ++p) {
        for (int s = 16 * block; s < std::min(16 * block + 16, p + 1); ++s) {
          if (seen[static_cast<std::size_t>(p)][static_cast<std::size_t>(s)]) last = p;
        }
      }
      // Of the last rows it is not known whether a later one sees it.
      for (int p = 0; p < kRows - 1; ++p) {
        if (last == kRows - 1) {
          ASSERT_FALSE(is_dead(policy, p, block)) << to_string(policy) << ", row " << p << ", block " << block;
        } else {
          ASSERT_EQ(is_dead(policy, p, block), p > last) << to_string(policy) << ", row " << p << ", block " << block;
        }
      }
    }
  }
}

TEST(KeyPolicy, AKeyOnceUnseenIsNeverSeenAgain) {
  for (const KeyPolicy& policy : policies()) {
    for (int block = 0; block < kRows / 16; ++block) {
      uint16_t before = 0;
      for (int p = 0; p < kRows; ++p) {
        const uint16_t bits = hidden_bits(policy, p, block);
        ASSERT_EQ(before & ~bits, 0) << to_string(policy) << ", row " << p << ", block " << block;
        before = bits;
      }
    }
  }
}

TEST(KeyPolicy, ExactTokensEndWithTheFirstRowThatMissesAKey) {
  int ending = 0;
  for (const KeyPolicy& policy : policies()) {
    int exact = 0;
    for (; exact < kRows; ++exact) {
      const NaiveRow row(policy, exact);
      bool misses = false;
      for (int s = 0; s <= exact; ++s) misses = misses || !row.shows(s);
      if (misses) break;
    }
    if (exact < kRows) {
      ASSERT_EQ(exact_tokens(policy), exact) << to_string(policy);
      ++ending;
    } else {
      ASSERT_GE(exact_tokens(policy), kRows) << to_string(policy);
    }
  }
  EXPECT_GT(ending, 200);
}

// What is kept is what the definition of each rule says in numbers, beside the oracle.
TEST(KeyPolicy, ExamplesOfEveryRule) {
  const auto blocks = [](const KeyPolicy& policy, int position) {
    std::vector<int> seen;
    for (int block = 0; 16 * block <= position; ++block) {
      if (hidden_bits(policy, position, block) != 0xffff) seen.push_back(block);
    }
    return seen;
  };
  const KeyPolicy window{KeyRule::window, 4, 20, 0, 0};
  EXPECT_EQ(hidden_bits(window, 99, 0), 0xfff0);  // the first four stay
  EXPECT_EQ(hidden_bits(window, 99, 5), 0);       // keys 80 to 99 are the last 20
  EXPECT_EQ(hidden_bits(window, 98, 4), 0x7fff);  // key 79 is the first of 79 to 98
  EXPECT_EQ(hidden_bits(window, 99, 4), 0xffff);
  EXPECT_EQ(exact_tokens(window), 24);
  EXPECT_EQ(blocks({KeyRule::strided, 0, 16, 3, 0}, 159), (std::vector<int>{0, 3, 6, 9}));
  EXPECT_EQ(blocks({KeyRule::strided, 0, 17, 3, 0}, 159), (std::vector<int>{0, 3, 6, 8, 9}));
  EXPECT_EQ(blocks({KeyRule::block, 16, 16, 64, 32}, 191), (std::vector<int>{0, 2, 3, 6, 7, 10, 11}));
  // Numbers 8, 4, 12; then the younger ones of 2, 6, 10, 14.
  EXPECT_EQ(blocks({KeyRule::budget, 0, 16, 0, 5}, 239), (std::vector<int>{3, 7, 9, 11, 13, 14}));
  EXPECT_EQ(blocks({KeyRule::summary, 0, 16, 64, 0}, 142), (std::vector<int>{4, 5, 6, 7, 8}));
  EXPECT_EQ(blocks({KeyRule::summary, 0, 16, 64, 0}, 143), (std::vector<int>{8}));
}

TEST(KeyPolicy, FieldsAndPositionsMayBeLarge) {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  EXPECT_EQ(exact_tokens({KeyRule::window, kMost, kMost, 0, 0}), kMost);
  EXPECT_EQ(exact_tokens({KeyRule::budget, 16, 16, 0, kMost}), kMost);
  EXPECT_EQ(hidden_bits({KeyRule::window, 0, kMost, 0, 0}, kMost - 1, 0), 0);
  EXPECT_EQ(hidden_bits({KeyRule::budget, 0, 16, 0, kMost}, kMost - 16, 5), 0);
  EXPECT_EQ(hidden_bits({KeyRule::summary, 0, 1, kMost, 0}, kMost - 1, 0), 0);
  const KeyPolicy budget{KeyRule::budget, 64, 256, 0, 3};
  const int32_t last = kMost - 16, tail = (last - 255) / 16;
  EXPECT_EQ(hidden_bits(budget, last, (1 << 26) - 1), 0);  // divided by 2 more often than any other
  EXPECT_EQ(hidden_bits(budget, last, 5), 0xffff);
  EXPECT_EQ(next_seen_block(budget, last, (1 << 26) + (1 << 25)), tail);
}

}  // namespace
}  // namespace nb::ops
