#include "sampling/logprobs.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "sampling/naive_sampler.h"

namespace nb::sampling {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(Logprobs, AgreeWithASortedSoftmax) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal(3.0f, 4.0f);
  Candidates scratch;
  for (const std::size_t size : {1u, 7u, 64u, 500u, 30000u}) {
    std::vector<float> row(size);
    for (float& logit : row) logit = std::round(normal(random) * 16.0f) / 16.0f;  // so that ties happen
    std::vector<double> values(row.begin(), row.end());
    const auto order = naive::order_of(values);
    long double total = 0.0L;
    for (const double value : values) total += std::exp(static_cast<long double>(value));
    const auto expected = [&](std::size_t id) { return values[id] - static_cast<double>(std::log(total)); };
    for (const std::size_t count : {0u, 1u, 5u, 20u}) {
      for (std::size_t place = 0; place < size; place += 1 + size / 5) {
        std::vector<TokenLogprob> out(1 + count, TokenLogprob{77, 77, 77.0f});
        score_token(row, static_cast<TokenId>(order[place]), out, scratch);
        EXPECT_EQ(out[0].token, static_cast<TokenId>(order[place]));
        EXPECT_EQ(out[0].rank, static_cast<std::int32_t>(place) + 1);
        EXPECT_NEAR(out[0].logprob, expected(order[place]), 5e-6);
        for (std::size_t i = 0; i < count; ++i) {
          if (i >= size) {
            EXPECT_EQ(out[1 + i].token, TokenLogprob::kNone);
            continue;
          }
          EXPECT_EQ(out[1 + i].token, static_cast<TokenId>(order[i]));
          EXPECT_EQ(out[1 + i].rank, static_cast<std::int32_t>(i) + 1);
          EXPECT_NEAR(out[1 + i].logprob, expected(order[i]), 5e-6);
        }
      }
    }
  }
}

// The rank skips blocks; here it is counted token by token, as the definition reads.
TEST(Logprobs, RanksOfHardRows) {
  std::mt19937 random(6);
  Candidates scratch;
  for (const std::size_t size : {1u, 15u, 64u, 65u, 129u, 700u}) {
    for (int kind = 0; kind < 5; ++kind) {
      std::vector<float> row(size, 2.5f);  // all equal
      for (std::size_t i = 0; i < size; ++i) {
        if (kind == 1) row[i] = static_cast<float>(i / 64);   // ascending by block
        if (kind == 2) row[i] = -static_cast<float>(i / 64);  // descending by block
        if (kind == 3) row[i] = std::array{kNan, -kInfinity, kInfinity, 1.0f, 1.0f}[random() % 5];
        if (kind == 4) row[i] = i < size / 2 ? -kInfinity : kNan;
      }
      for (std::size_t token = 0; token < size; token += 1 + size / 40) {
        std::int32_t before = 0;
        for (std::size_t i = 0; i < size; ++i) {
          const float own = std::isnan(row[token]) ? -kInfinity : row[token];
          before += row[i] > own || (row[i] == own && i < token) ? 1 : 0;
        }
        std::vector<TokenLogprob> out(1);
        score_token(row, static_cast<TokenId>(token), out, scratch);
        ASSERT_EQ(out[0].rank, before + 1) << "size " << size << " kind " << kind << " token " << token;
      }
    }
  }
}

TEST(Logprobs, OfBrokenRows) {
  Candidates scratch;
  std::vector<TokenLogprob> out(4);
  score_token(std::vector<float>{0.0f, kNan, -kInfinity, 0.0f}, 1, out, scratch);
  EXPECT_EQ(out[0].rank, 3);
  EXPECT_EQ(out[0].logprob, -kInfinity);
  EXPECT_EQ(out[1].token, 0);
  EXPECT_EQ(out[2].token, 3);
  EXPECT_EQ(out[3].token, TokenLogprob::kNone);
  score_token(std::vector<float>{kNan, kNan}, 1, out, scratch);
  EXPECT_TRUE(std::isnan(out[0].logprob));
  EXPECT_EQ(out[1].token, TokenLogprob::kNone);
}

}  // namespace
}  // namespace nb::sampling
