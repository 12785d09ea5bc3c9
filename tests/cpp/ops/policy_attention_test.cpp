// Attention under key policies on every backend, against softmax in double over what the rules show.
#include <gtest/gtest.h>

#include <cstring>

#include "base/code_of.h"
#include "base/effort.h"
#include "base/error.h"
#include "ops/check_plan.h"
#include "ops/policy_fixture.h"

namespace nb::ops {
namespace {

std::string describe(const PolicyProblem& problem, unsigned seed) {
  return concat(quant::to_string(problem.format), ", seed ", seed, ", ", problem.num_heads, " heads, window ",
                problem.window);
}

class PolicyAttention : public EveryBackend {};

TEST_P(PolicyAttention, FollowsTheDefinition) {
  const auto table = make_rotations(32, 1100), narrow = make_rotations(16, 1100);
  Bench bench(GetParam(), 2);
  for (const quant::KvFormat format : kv_formats()) {
    for (unsigned seed = 0; seed < 12; seed += step_of(4)) {
      const PolicyProblem problem = random_policy_problem(seed, format, false);
      const auto& rotations = problem.head_dim == 32 ? table : narrow;
      const double tolerance = GetParam() == "reference" ? 1e-6 : attention_tolerance(GetParam(), format);
      expect_close(problem.attend(bench, rotations, Dead::replaced), problem.expected(rotations), tolerance,
                   describe(problem, seed));
    }
  }
}

// What lies in the place of blocks that nobody sees counts for nothing, and is not read where a tile has only such.
TEST_P(PolicyAttention, DeadBlocksMayBeReplaced) {
  Bench bench(GetParam(), 2);
  for (const quant::KvFormat format : kv_formats()) {
    for (unsigned seed = 20; seed < 30; seed += step_of(5)) {
      const PolicyProblem problem = random_policy_problem(seed, format, seed % 2 == 0);
      const auto table = make_rotations(problem.head_dim, 1100);
      EXPECT_TRUE(same_bits(problem.attend(bench, table, Dead::replaced), problem.attend(bench, table, Dead::kept)))
          << describe(problem, seed);
    }
  }
}

// Promise 1: a row alone has the bits that it has in the batch, for any number of threads.
TEST_P(PolicyAttention, RowsDoNotDependOnThePlan) {
  if (GetParam() == "reference") GTEST_SKIP() << "it computes row by row";
  Bench two(GetParam(), 2), one(GetParam(), 1), three(GetParam(), 3);
  for (const quant::KvFormat format : kv_formats()) {
    for (unsigned seed = 40; seed < 48; seed += step_of(4)) {
      const PolicyProblem problem = random_policy_problem(seed, format, false);
      const auto table = make_rotations(problem.head_dim, 1100);
      const Matrix all = problem.attend(two, table, Dead::replaced);
      EXPECT_TRUE(same_bits(all, problem.attend(one, table, Dead::replaced))) << describe(problem, seed);
      for (int row = 0; row < all.num_rows; row += 1 + static_cast<int>(all.num_rows) / (is_reduced() ? 3 : 7)) {
        for (Bench* bench : {&one, &three}) {
          const Matrix alone = problem.attend(*bench, table, Dead::replaced, true, row);
          EXPECT_EQ(std::memcmp(alone.values.data(), all.values.data() + row * all.num_cols,
                                alone.values.size() * sizeof(float)),
                    0)
              << describe(problem, seed) << ", row " << row;
        }
      }
    }
  }
}

// And reading shared blocks once changes no bit, whatever the policies of those who share them.
TEST_P(PolicyAttention, SharedPrefixesChangeNoBit) {
  if (GetParam() == "reference") GTEST_SKIP() << "it computes row by row";
  Bench two(GetParam(), 2), one(GetParam(), 1), three(GetParam(), 3);
  int sharing = 0;
  for (unsigned seed = 60; seed < 88; seed += step_of(5)) {
    const quant::KvFormat format = kv_formats()[seed % kv_formats().size()];
    const PolicyProblem problem = random_policy_problem(seed, format, true);
    const auto table = make_rotations(problem.head_dim, 1100);
    for (const Dead dead : {Dead::kept, Dead::replaced}) {
      const Matrix alone = problem.attend(two, table, dead, false);
      for (Bench* bench : {&one, &two, &three}) {
        EXPECT_TRUE(same_bits(problem.attend(*bench, table, dead, true), alone))
            << describe(problem, seed) << ", " << bench->pool.num_threads() << " threads";
      }
    }
    for (const auto& sequence : problem.sequences) sharing += sequence.shared_blocks > 0 ? 1 : 0;
  }
  EXPECT_GT(sharing, is_reduced() ? 8 : 50);
}

// Rows up to the number of exact tokens have the bits they have without a policy; a policy that hides nothing changes
// none at all.
TEST_P(PolicyAttention, WhatHidesNothingChangesNoBit) {
  Bench bench(GetParam(), 2);
  std::mt19937 random(5);
  for (const quant::KvFormat format : kv_formats()) {
    for (unsigned i = 0; i < 12; i += step_of(4)) {
      PolicyProblem problem{6, 2, 16, format, 0, {random_policy(random)}, {}};
      const int exact = std::min(exact_tokens(problem.policies[0]), 1024);
      problem.sequences = {{exact, std::min(exact, 20), 0}, {700, 3, 0}};
      const auto table = make_rotations(16, 1100);
      PolicyProblem plain = problem;
      for (auto& sequence : plain.sequences) sequence.policy = -1;
      const Matrix with = problem.attend(bench, table, Dead::replaced);
      const Matrix without = plain.attend(bench, table, Dead::kept);
      const auto count = static_cast<std::size_t>(problem.sequences[0].rows * with.num_cols);
      EXPECT_EQ(std::memcmp(with.values.data(), without.values.data(), count * sizeof(float)), 0) << i;
      problem.policies[0].window = 2000;
      EXPECT_TRUE(same_bits(problem.attend(bench, table, Dead::replaced), without)) << i;
      problem.policies[0] = {};
      EXPECT_TRUE(same_bits(problem.attend(bench, table, Dead::replaced), without)) << i;
    }
  }
}

// A sequence with summaries: each stands for a group that rows from its turn on see no more, with the weight of all of
// the group's tokens.
TEST_P(PolicyAttention, SummariesAreSeenInTheirTurn) {
  constexpr int kKeys = 420, kRows = 300, kPeriod = 40, kWindow = 50, kPrefix = 4, kDim = 16, kGroups = 9;
  const auto table = make_rotations(kDim, kKeys);
  const RopeTable rope_table{table.data(), kDim, kKeys};
  Bench bench(GetParam(), 2), reference("reference");
  const std::vector<KeyPolicy> policies = {{KeyRule::summary, kPrefix, kWindow, kPeriod, 0}};
  kv::KvStorage storage({quant::KvFormat::f32, 1, 1, kDim}, 28);
  Matrix k = Matrix::random(kKeys, kDim, 1), v = Matrix::random(kKeys, kDim, 2), q = Matrix::random(kRows, kDim, 3);
  Matrix means = Matrix::random(kGroups, kDim, 4), mean_values = Matrix::random(kGroups, kDim, 5);
  std::vector<int32_t> places(kKeys), slots(kKeys), turns, summary_slots, positions;
  std::iota(places.begin(), places.end(), 0);
  std::iota(slots.begin(), slots.end(), 16);
  for (int g = 0; g < kGroups; ++g) {
    turns.push_back((g + 1) * kPeriod - 1 + kWindow);
    summary_slots.push_back(g);
  }
  for (int p = kKeys - kRows; p < kKeys; ++p) positions.push_back(p);
  rope(k.view(), places, rope_table, reference.ctx);
  kv_write(storage.layer(0), k.view(), v.view(), slots, bench.ctx);
  kv_write(storage.layer(0), means.view(), mean_values.view(), summary_slots, bench.ctx);
  std::vector<int32_t> blocks(28);
  std::iota(blocks.begin(), blocks.end(), 0);
  const float bias = std::log(static_cast<float>(kPeriod));
  const std::vector<AttentionRun> runs = {
      {.block_begin = 0, .num_keys = kGroups, .position_offset = 0, .positions_begin = 0, .score_bias = bias},
      {.block_begin = 1, .num_keys = kKeys, .position_offset = 0}};
  const std::vector<AttentionSegment> segments = {
      {.row_begin = 0, .row_count = kRows, .run_begin = 0, .run_count = 2, .policy = 0}};
  Matrix out(kRows, kDim, -3.0f);
  attention(out.view(), q.view(), 1, 0.3f, 0, rope_table, storage.layer(0),
            {positions, segments, runs, blocks, turns, {}, policies}, bench.ctx);
  rope(q.view(), positions, rope_table, reference.ctx);
  Matrix expected(kRows, kDim);
  for (int row = 0; row < kRows; ++row) {
    const int p = positions[static_cast<std::size_t>(row)];
    std::vector<double> sums(kDim, 0.0);
    double total = 0.0;
    const auto add = [&](const Matrix& keys, const Matrix& values, int at, double times) {
      double score = 0.0;
      for (int d = 0; d < kDim; ++d) score += static_cast<double>(q.at(row, d)) * static_cast<double>(keys.at(at, d));
      const double weight = std::exp(score * 0.3) * times;
      total += weight;
      for (int d = 0; d < kDim; ++d)
        sums[static_cast<std::size_t>(d)] += weight * static_cast<double>(values.at(at, d));
    };
    for (int g = 0; g < kGroups; ++g) {
      if (p >= (g + 1) * kPeriod - 1 + kWindow) add(means, mean_values, g, kPeriod);
    }
    for (int s = 0; s <= p; ++s) {
      if (s < kPrefix || p < (s / kPeriod + 1) * kPeriod - 1 + kWindow) add(k, v, s, 1.0);
    }
    for (int d = 0; d < kDim; ++d) {
      expected.values[static_cast<std::size_t>(row * kDim + d)] =
          static_cast<float>(sums[static_cast<std::size_t>(d)] / total);
    }
  }
  expect_close(out, expected, GetParam() == "reference" ? 1e-6 : 5e-6, "summaries");
}

INSTANTIATE_TEST_SUITE_P(Backends, PolicyAttention, testing::ValuesIn(cpu_backends()), backend_test_name);

TEST(PolicyPlans, WhatAPolicyCannotTellIsRefused) {
  Bench bench("");
  const auto table = make_rotations(16, 100);
  const RopeTable rope_table{table.data(), 16, 100};
  kv::KvStorage storage({quant::KvFormat::f32, 1, 1, 16}, 8);
  for (int block = 0; block < 8; ++block) storage.zero(block);
  const std::vector<KeyPolicy> policies = {{KeyRule::window, 0, 5, 0, 0}, {KeyRule::summary, 0, 5, 16, 0}};
  const auto attend = [&](AttentionSegment segment, std::vector<AttentionRun> runs,
                          std::vector<int32_t> positions = {60, 61}) {
    const std::vector<int32_t> blocks = {0, 1, 2, 3, 4};
    std::vector<int32_t> own(61);
    std::iota(own.begin(), own.end(), 0);
    Matrix q(2, 16), out(2, 16);
    attention(out.view(), q.view(), 1, 0.3f, 0, rope_table, storage.layer(0),
              {positions, {&segment, 1}, runs, blocks, own, {}, policies}, bench.ctx);
  };
  const auto why = [&](auto&&... args) -> std::string {
    try {
      attend(args...);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      return error.what();
    }
    return "";
  };
  const AttentionSegment one{.row_begin = 0, .row_count = 2, .run_begin = 0, .run_count = 1, .policy = 0};
  AttentionSegment summarized = one, wrong = one, two = one;
  summarized.run_count = 2, summarized.policy = 1;
  two.run_count = 2;
  const AttentionRun plain{.block_begin = 0, .num_keys = 62, .position_offset = 0};
  const AttentionRun summaries{.block_begin = 4, .num_keys = 3, .position_offset = 0, .positions_begin = 0};
  EXPECT_EQ(why(one, std::vector{plain}), "");
  EXPECT_EQ(why(summarized, std::vector{summaries, plain}), "");
  wrong.policy = 2;
  EXPECT_EQ(why(wrong, std::vector{plain}), "attention: segment 0 has policy 2 of 2");
  wrong.policy = -2;
  EXPECT_EQ(why(wrong, std::vector{plain}), "attention: segment 0 has policy -2 of 2");
  EXPECT_EQ(why(two, std::vector{summaries, plain}), "attention: segment 0 has a policy and 2 runs");
  EXPECT_EQ(why(summarized, std::vector{plain, plain}),
            "attention: segment 0 has summaries without positions of their own");
  const char* elsewhere = "attention: segment 0 has a policy and keys that do not stand from position 0 on";
  EXPECT_EQ(why(one, std::vector{AttentionRun{0, 61, 1}}), elsewhere);
  EXPECT_EQ(
      why(one, std::vector{AttentionRun{.block_begin = 0, .num_keys = 61, .position_offset = 0, .positions_begin = 0}}),
      elsewhere);
  EXPECT_EQ(why(one, std::vector{plain}, std::vector<int32_t>{61, 60}),
            "attention: segment 0 has a policy and rows whose positions do not ascend");
  AttentionRun biased = plain;
  biased.score_bias = std::numeric_limits<float>::infinity();
  EXPECT_EQ(why(one, std::vector{biased}), "attention: a run has score bias inf");
}

TEST(PolicyPlans, FieldsOutOfRangeAreNamed) {
  const auto why = [](const KeyPolicy& policy) -> std::string {
    try {
      check_policy(policy);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(why({}), "");
  EXPECT_EQ(why({KeyRule::block, 3, 1, 32, 32}), "");
  EXPECT_EQ(why({KeyRule::budget, 0, 1, 0, 0}), "");
  EXPECT_EQ(why({static_cast<KeyRule>(6), 0, 1, 0, 0}), "key policy: there is no rule 6");
  EXPECT_EQ(why({KeyRule::window, -1, 1, 0, 0}), "key policy: prefix is -1, must be at least 0");
  EXPECT_EQ(why({KeyRule::window, 0, 0, 0, 0}), "key policy: window is 0, must be at least 1");
  EXPECT_EQ(why({KeyRule::strided, 0, 1, 0, 0}), "key policy: period is 0, must be at least 1");
  EXPECT_EQ(why({KeyRule::summary, 0, 1, -3, 0}), "key policy: period is -3, must be at least 1");
  EXPECT_EQ(why({KeyRule::block, 0, 1, 24, 16}), "key policy: period is 24, must be a multiple of 16");
  EXPECT_EQ(why({KeyRule::block, 0, 1, 0, 0}), "key policy: period is 0, must be a multiple of 16");
  const std::string keep = ", must be a multiple of 16 up to the period of 32";
  EXPECT_EQ(why({KeyRule::block, 0, 1, 32, 48}), "key policy: keep is 48" + keep);
  EXPECT_EQ(why({KeyRule::block, 0, 1, 32, 8}), "key policy: keep is 8" + keep);
  EXPECT_EQ(why({KeyRule::budget, 0, 1, 0, -1}), "key policy: keep is -1, must be at least 0");
}

TEST(PolicyPlans, ABackendWithoutThemRefusesPoliciesAndBiases) {
  Bench bench("");
  KernelTable plain = *bench.backend.kernels;
  plain.name = "plain";
  plain.key_policies = false;
  bench.ctx.kernels = &plain;
  const auto table = make_rotations(16, 10);
  kv::KvStorage storage({quant::KvFormat::f32, 1, 1, 16}, 1);
  storage.zero(0);
  const std::vector<KeyPolicy> policies = {{KeyRule::window, 0, 5, 0, 0}};
  const auto attend = [&](int policy, float bias) -> std::string {
    const std::vector<int32_t> blocks = {0}, positions = {9};
    const std::vector<AttentionSegment> segments = {
        {.row_begin = 0, .row_count = 1, .run_begin = 0, .run_count = 1, .policy = policy}};
    const std::vector<AttentionRun> runs = {
        {.block_begin = 0, .num_keys = 10, .position_offset = 0, .score_bias = bias}};
    Matrix q(1, 16), out(1, 16);
    try {
      attention(out.view(), q.view(), 1, 0.3f, 0, {table.data(), 16, 10}, storage.layer(0),
                {positions, segments, runs, blocks, {}, {}, policies}, bench.ctx);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::unsupported);
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(attend(-1, 0.0f), "");
  EXPECT_EQ(attend(0, 0.0f), "KV policies are not offered by backend plain");
  EXPECT_EQ(attend(-1, 0.5f), "KV policies are not offered by backend plain");
  bench.ctx.kernels = bench.backend.kernels;
  EXPECT_EQ(attend(0, 0.5f), "");
}

}  // namespace
}  // namespace nb::ops
