// Key policies and summaries by the kernels of cuda/, against the oracles that the tables of the CPU have.
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "base/error.h"
#include "cuda_emulation/device_fixture.h"
#include "cuda_emulation/on_host.h"
#include "ops/policy_fixture.h"
#include "ops/summary_fixture.h"

namespace nb::cuda {
namespace {

using ops::Dead;
using ops::Matrix;
using ops::PolicyProblem;

// In small problems, so that an emulator ends: some rows to decode and some for tensor cores, at edges of splits.
PolicyProblem random_problem(unsigned seed, quant::KvFormat format, int head_dim) {
  std::mt19937 random(seed);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  PolicyProblem problem{3, 1, head_dim, format, draw(0, 4) == 0 ? draw(30, 400) : 0, {}, {}};
  for (int i = 0; i < 3; ++i) {
    problem.policies.push_back(ops::random_policy(random));
    const int keys = 256 * draw(1, 2) + draw(-60, 17);
    problem.sequences.push_back({keys, i == 0 ? draw(9, 14) : draw(1, 3), i, 0});
  }
  problem.sequences.push_back({70, 2, -1, 0});
  return problem;
}

std::vector<float> rotations_for(int head_dim) { return ops::make_rotations(head_dim, 700); }

class CudaPolicies : public testing::Test {
 protected:
  void SetUp() override {
    if (environment("NANOBRAID_TEST_DEVICE")) GTEST_SKIP() << "these run on host memory";
  }
};

TEST_F(CudaPolicies, FollowTheDefinition) {
  OnHostBench bench, deterministic(true);
  unsigned seed = 0;
  for (const quant::KvFormat format : ops::kv_formats()) {
    for (const int dim : {16, 64, 64}) {
      const PolicyProblem problem = random_problem(++seed, format, dim);
      const auto table = rotations_for(dim);
      const Matrix expected = problem.expected(table);
      const std::string name = concat(quant::to_string(format), ", heads of ", dim, ", seed ", seed);
      ops::expect_close(problem.attend(deterministic, table, Dead::replaced), expected, 2e-5, name);
      ops::expect_close(problem.attend(bench, table, Dead::replaced), expected, 1e-2, name);  // rounds to bf16
    }
  }
}

// A policy that hides nothing changes no bit, and neither do those of other rows: kernels that know policies compute
// what the others do.
TEST_F(CudaPolicies, WhatHidesNothingChangesNoBit) {
  std::mt19937 random(5);
  for (const bool deterministic : {false, true}) {
    OnHostBench bench(deterministic);
    for (const quant::KvFormat format : some_of(ops::kv_formats(), 2)) {
      PolicyProblem problem{3, 1, 64, format, 0, {ops::random_policy(random), {ops::KeyRule::window, 3, 20, 0, 0}}, {}};
      problem.policies[0].window = 700;
      problem.sequences = {{600, 3, 0, 0}, {300, 10, 0, 0}, {270, 10, 1, 0}, {290, 1, -1, 0}};
      const auto table = rotations_for(64);
      const Matrix with = problem.attend(bench, table, Dead::kept);
      for (auto& sequence : problem.sequences) sequence.policy = -1;
      const Matrix without = problem.attend(bench, table, Dead::kept);
      for (int row = 0; row < 24; ++row) {
        const bool same =
            std::memcmp(with.values.data() + row * with.num_cols, without.values.data() + row * with.num_cols,
                        static_cast<std::size_t>(with.num_cols) * sizeof(float)) == 0;
        EXPECT_EQ(same, row < 13 || row == 23) << quant::to_string(format) << ", row " << row;
      }
    }
  }
}

TEST_F(CudaPolicies, SummariesAreMeansOfWhatIsStored) {
  OnHostBench bench;
  for (const quant::KvFormat format : ops::kv_formats()) ops::expect_means_of_what_is_stored(bench, format);
}

// A magnitude in the rotation table, heads that are not a power of two; and no byte but those of the slots.
TEST_F(CudaPolicies, OnlyTheSlotOfASummaryIsWritten) {
  OnHostBench bench;
  for (const quant::KvFormat format : ops::kv_formats()) {
    ops::Stored a(bench, format, 48, 1.0F), b(bench, format, 48, 1.0F);
    const auto bytes = [](const ops::Stored& stored) {
      const std::uint8_t* base = stored.storage.layer(0).base;
      return std::vector<std::uint8_t>(base, base + stored.storage.bytes());
    };
    ops::summarize_kv(a.layer(), ops::kSummaries, a.blocks, a.rotations(), bench.ctx);
    EXPECT_NE(bytes(a), bytes(b)) << quant::to_string(format);
    Matrix zero(4, ops::kHeads * 48);
    std::vector<std::int32_t> slots;
    for (const ops::KvSummary& summary : ops::kSummaries) slots.push_back(summary.slot);
    for (ops::Stored* stored : {&a, &b}) {
      ops::kv_write(stored->layer(), zero.view(), zero.view(), slots, bench.ctx);
    }
    EXPECT_EQ(bytes(a), bytes(b)) << quant::to_string(format);
  }
}

TEST_F(CudaPolicies, SummariesOfHeadsThatNoKernelServesAreRefused) {
  OnHostBench bench;
  const auto table = ops::make_rotations(264, 4);
  std::vector<std::uint8_t> cells(4 * 16 * 264 * 4);
  const ops::KvLayer layer{cells.data(), 2 * 16 * 264 * 4, 16 * 264 * 4, 16 * 264 * 4, 1, 264, quant::KvFormat::f32};
  const std::vector<ops::KvSummary> summaries = {
      {.block_begin = 0, .first_key = 0, .num_tokens = 1, .position = 0, .slot = 16, .slot_position = 0}};
  const std::vector<std::int32_t> blocks = {0};
  try {
    ops::summarize_kv(layer, summaries, blocks, {table.data(), 264, 4}, bench.ctx);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_STREQ(error.what(), "summaries on a GPU with head_dim 264: it must be a multiple of 8 up to 256");
  }
}

}  // namespace
}  // namespace nb::cuda
