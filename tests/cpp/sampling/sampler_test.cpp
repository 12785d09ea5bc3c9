#include "sampling/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>

#include "base/effort.h"
#include "base/error.h"
#include "base/rng.h"
#include "sampling/naive_sampler.h"

namespace nb::sampling {
namespace {

std::vector<float> random_row(unsigned seed, std::size_t size, float spread) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> row(size);
  for (float& logit : row) logit = normal(random);
  return row;
}

/// A sequence of `position` tokens, all 0.
std::vector<TokenId> zeros(std::size_t position) { return std::vector<TokenId>(position, 0); }

constexpr std::size_t kPrompt = 2;  // of the tokens in the chi-square tests

/// Chi-square statistic of 10^5 draws at consecutive seeds, and its degrees of freedom; cells below 5 are pooled.
std::pair<double, int> chi_square(std::span<const float> row, const SamplingParams& params,
                                  std::span<const TokenId> tokens) {
  constexpr int kDraws = 100'000;
  const auto p = naive::distribution(row, {params, tokens, kPrompt});
  std::vector<int> counts(row.size(), 0);
  Sampler sampler;
  for (int i = 0; i < kDraws; ++i) {
    const auto seed = static_cast<std::uint64_t>(i) * 0x9e3779b97f4a7c15u;
    ++counts[static_cast<std::size_t>(sampler.sample({row, params, seed, tokens, kPrompt}))];
  }
  double statistic = 0.0;
  double pooled_expected = 0.0;
  int pooled_count = 0;
  int cells = 0;
  const auto add = [&](double expected, int count) {
    statistic += (count - expected) * (count - expected) / expected;
    ++cells;
  };
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double expected = p[i] * kDraws;
    EXPECT_TRUE(p[i] > 0.0 || counts[i] == 0) << "token " << i << " cannot be drawn";
    if (expected >= 5.0) {
      add(expected, counts[i]);
    } else {
      pooled_expected += expected;
      pooled_count += counts[i];
    }
  }
  if (pooled_expected >= 5.0) add(pooled_expected, pooled_count);
  return {statistic, cells - 1};
}

TEST(Sampler, DrawsFollowTheExactDistribution) {
  std::vector<SamplingParams> cases(9);
  cases[1].temperature = 0.7;
  cases[1].top_k = 40;
  cases[1].top_p = 0.9;
  cases[2].top_p = 0.8;
  cases[3].min_p = 0.05;
  cases[3].temperature = 1.5;
  cases[4].repetition_penalty = 1.3;
  cases[4].logit_bias = {{2, 1.5}};
  cases[5].presence_penalty = 1.2;
  cases[5].frequency_penalty = 0.4;
  cases[6].bad_words_token_ids = {{11}, {5, 150, 3}, {150, 8}};
  cases[6].temperature = 0.9;
  cases[6].top_p = 0.95;
  cases[7].allowed_token_ids = {1, 5, 9, 14, 60, 61, 62, 63, 64, 65, 150, 199};
  cases[7].frequency_penalty = -0.5;
  cases[8].temperature = 0.8;  // everything at once
  cases[8].top_k = 60;
  cases[8].top_p = 0.92;
  cases[8].min_p = 0.01;
  cases[8].repetition_penalty = 1.2;
  cases[8].presence_penalty = 0.3;
  cases[8].bad_words_token_ids = {{9}};
  const std::vector<float> row = random_row(11, 200, 1.5f);
  const std::vector<TokenId> tokens{5, 6, 5, 150};
  for (std::size_t i = 0; i < cases.size(); i += is_reduced() ? 2 : 1) {
    const auto [statistic, freedom] = chi_square(row, cases[i], tokens);
    ASSERT_GE(freedom, 5);
    // Five standard deviations above the mean of the chi-square distribution.
    EXPECT_LT(statistic, freedom + 5.0 * std::sqrt(2.0 * freedom)) << "case " << i;
  }
}

/// Rows whose front is hard to find, of a size that fills neither blocks nor vectors.
std::vector<std::vector<float>> hard_rows(std::size_t size) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<float> usual = random_row(21, size, 2.0f);
  std::vector<std::vector<float>> rows(5, usual);
  std::fill(rows[0].begin(), rows[0].end(), 3.0f);         // all equal
  for (float& logit : rows[1]) logit = std::round(logit);  // ties at every place
  rows[2][size - 1] = 500.0f;                              // one takes everything
  for (std::size_t i = 0; i < size; ++i) {                 // masked and broken, few are left
    if (i % 97 != 0) rows[3][i] = i % 2 == 0 ? -kInfinity : std::numeric_limits<float>::quiet_NaN();
  }
  std::fill(rows[4].begin(), rows[4].end(), -kInfinity);  // one is left
  rows[4][size / 2] = -1e30f;
  return rows;
}

// The slow and obvious sampler: sort all, filter, add up in order of id until the random number is reached. A token is
// right if the number lies in its part of the sum, give or take what the float sums of the fast one may be off.
TEST(Sampler, HardRowsGiveTheTokenOfAFullSort) {
  std::vector<SamplingParams> cases(9);
  cases[1].top_k = 40;
  cases[2].top_k = 1'000'000;  // more than the vocabulary has
  cases[3].top_p = 1e-6;       // one token
  cases[4].top_p = 0.95;
  cases[4].temperature = 0.8;
  cases[5].min_p = 1.0;  // the most likely ones only
  cases[6].min_p = 0.1;
  cases[7].top_k = 40;
  cases[7].top_p = 0.51;
  cases[7].min_p = 0.01;
  cases[8].top_p = 0.999999;
  Sampler sampler;
  for (const std::size_t size : {1u, 17u, 65u, 1003u, 4999u}) {
    for (const std::vector<float>& row : hard_rows(size)) {
      for (std::size_t i = 0; i < cases.size(); ++i) {
        const auto p = naive::distribution(row, {cases[i], zeros(3), 0});
        for (std::uint64_t seed = 0; seed < 25; ++seed) {
          const double uniform = uniform_at(seed, 0, 3);
          const auto token = static_cast<std::size_t>(sampler.sample({row, cases[i], seed, zeros(3)}));
          const double before = std::accumulate(p.begin(), p.begin() + static_cast<std::ptrdiff_t>(token), 0.0);
          ASSERT_GT(p[token], 0.0) << "size " << size << " case " << i << " token " << token;
          ASSERT_LE(before, uniform + 1e-5) << "size " << size << " case " << i << " token " << token;
          ASSERT_GE(before + p[token], uniform - 1e-5) << "size " << size << " case " << i << " token " << token;
        }
      }
    }
  }
}

TEST(Sampler, DrawsAtConsecutivePositionsFollowTheDistributionToo) {
  const std::vector<float> row{std::log(0.1f), std::log(0.2f), std::log(0.3f), std::log(0.4f)};
  SamplingParams params;
  Sampler sampler;
  std::vector<int> counts(4, 0);
  const std::vector<TokenId> tokens = zeros(20'000);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    ++counts[static_cast<std::size_t>(sampler.sample({row, params, 42, std::span(tokens).first(i)}))];
  }
  double statistic = 0.0;
  for (std::size_t i = 0; i < 4; ++i) {
    const double expected = 2000.0 * static_cast<double>(i + 1);
    statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
  }
  EXPECT_LT(statistic, 20.0);  // 3 degrees of freedom
}

TEST(Sampler, ATokenDependsOnSeedChoiceAndPositionAlone) {
  const std::vector<float> row = random_row(12, 1000, 1.0f);
  const std::vector<float> other = random_row(13, 3000, 1.0f);
  SamplingParams params;
  params.top_p = 0.95;
  Sampler used;
  std::map<TokenId, int> seen;
  for (std::size_t position = 0; position < 50; ++position) {
    used.sample({other, {}, 99, zeros(position)});  // leaves other things in the scratch memory
    const TokenId token = used.sample({row, params, 5, zeros(position)});
    Sampler fresh;
    EXPECT_EQ(fresh.sample({row, params, 5, zeros(position)}), token);
    ++seen[token];
  }
  EXPECT_GT(seen.size(), 20u);  // the position matters
  std::map<TokenId, int> by_seed;
  std::map<TokenId, int> by_choice;
  for (std::uint32_t i = 0; i < 50; ++i) {
    ++by_seed[used.sample({row, params, i, zeros(3)})];
    SamplingParams choice = params;
    choice.choice_index = i;
    ++by_choice[used.sample({row, choice, 5, zeros(3)})];
  }
  EXPECT_GT(by_seed.size(), 20u);
  EXPECT_GT(by_choice.size(), 20u);
}

TEST(Sampler, FiltersThatKeepEverythingChangeNothing) {
  const std::vector<float> row = random_row(14, 500, 2.0f);
  SamplingParams all;
  all.top_k = 500;
  Sampler sampler;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    EXPECT_EQ(sampler.sample({row, all, seed, zeros(1)}), sampler.sample({row, {}, seed, zeros(1)}));
  }
}

TEST(Sampler, GreedyIsTheArgmaxAfterBiasAndPenalty) {
  SamplingParams params;
  params.temperature = 0.0;
  params.top_k = 2;
  params.top_p = 0.1;
  Sampler sampler;
  const std::vector<float> row{1.0f, 3.0f, 3.0f, 2.5f};
  EXPECT_EQ(sampler.sample({row, params, 0, {}}), 1);
  params.repetition_penalty = 1.1;
  EXPECT_EQ(sampler.sample({row, params, 0, std::vector<TokenId>{1}}), 2);
  params.repetition_penalty = 2.0;
  EXPECT_EQ(sampler.sample({row, params, 0, std::vector<TokenId>{1, 2, 2}}), 3);
  params.logit_bias = {{0, 10.0}};
  EXPECT_EQ(sampler.sample({row, params, 0, std::vector<TokenId>{1, 2, 2}}), 0);
}

TEST(Sampler, GreedyObeysMasksAndOutputPenalties) {
  const std::vector<float> row{1.0f, 3.0f, 2.9f, 2.5f};
  const std::vector<TokenId> tokens{0, 2, 2};
  Sampler sampler;
  SamplingParams params;
  params.temperature = 0.0;
  params.bad_words_token_ids = {{2, 1}};
  EXPECT_EQ(sampler.sample({row, params, 0, tokens, 1}), 2);
  params.frequency_penalty = 0.25;  // twice in the output
  EXPECT_EQ(sampler.sample({row, params, 0, tokens, 1}), 3);
  params.min_tokens = 3;
  EXPECT_EQ(sampler.sample({row, params, 0, tokens, 1, std::vector<TokenId>{3}}), 2);
  EXPECT_EQ(sampler.sample({row, params, 0, tokens, 0, std::vector<TokenId>{3}}), 3);
  const std::vector<std::uint32_t> bits{1};
  EXPECT_EQ(sampler.sample({row, params, 0, tokens, 1, {}, bits}), 0);
}

TEST(Sampler, ScoresTheRawRow) {
  const std::vector<float> row{1.0f, 3.0f, 2.0f};
  Sampler sampler;
  SamplingParams params;
  params.allowed_token_ids = {0};
  EXPECT_EQ(sampler.sample({row, params, 0, {}}), 0);
  std::vector<TokenLogprob> out(2);
  sampler.score(row, 0, out);
  EXPECT_EQ(out[0].rank, 3);
  EXPECT_NEAR(out[0].logprob, -2.4076, 1e-4);
  EXPECT_EQ(out[1].token, 1);
}

TEST(Sampler, NothingToDrawIsAnError) {
  Sampler sampler;
  const std::vector<float> row(4, -std::numeric_limits<float>::infinity());
  EXPECT_THROW(sampler.sample({row, {}, 0, {}}), Error);
}

}  // namespace
}  // namespace nb::sampling
