// int4 keys by the kernels of cuda/: what is sealed, bit for bit, and attention against softmax in double.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "base/error.h"
#include "cuda_emulation/device_cells.h"
#include "cuda_emulation/device_fixture.h"
#include "cuda_emulation/on_host.h"
#include "ops/sealed_fixture.h"

namespace nb::cuda {
namespace {

using ops::Matrix;
using ops::SealedSequence;
using quant::KvFormat;

constexpr double kExact = 1e-5;
constexpr double kRounded = 2e-2;  // keys, queries, weights and values to bf16: see attention_test.cpp; larger keys

/// Of a sealed cell of the reference, [16 tokens][dim] of codes; scales, bases.
std::vector<std::uint8_t> device_key_cell(const std::uint8_t* from, int dim) {
  std::vector<std::uint8_t> to(static_cast<std::size_t>(10 * dim + 16), 0);
  const int half = dim / 2;
  for (int d = 0; d < dim; ++d) {
    const int eighth = d % half / 4, slot = d / half * 4 + d % 4;
    for (int token = 0; token < kBlockTokens; ++token) {
      const int code = from[(token * dim + d) / 2] >> d % 2 * 4 & 15;
      auto& byte = to[static_cast<std::size_t>((token * (dim / 8) + eighth) * 4 + slot / 2)];
      byte = static_cast<std::uint8_t>(byte | code << slot % 2 * 4);
    }
    to[static_cast<std::size_t>(8 * dim + 16 * eighth + slot)] = from[8 * dim + d];
    to[static_cast<std::size_t>(8 * dim + 16 * eighth + 8 + slot)] = static_cast<std::uint8_t>(from[9 * dim + d] + 128);
  }
  std::memcpy(to.data() + 10 * dim, from + 10 * dim, 4);
  return to;
}

/// Keys of every size; dimensions far from zero, without range, zero, tiny beside another.
Matrix keys_of_every_size(int cols, unsigned seed, float size) {
  Matrix k = Matrix::random(kBlockTokens, cols, seed, size);
  for (int t = 0; t < kBlockTokens; ++t) {
    for (int d = 0; d < cols; ++d) {
      float& key = k.values[static_cast<std::size_t>(t * cols + d)];
      if (d % 11 == 1) key = key * 0.01F + 100.0F * size;
      if (d % 11 == 4) key = -7.0F * size;
      if (d % 11 == 6) key *= 1e-6F;
      if (d % 11 == 8) key = 0.0F;
      if (d % 11 == 9) key -= 30.0F * size;
    }
  }
  return k;
}

TEST(SealedKeys, AreThoseOfTheReferenceBitForBit) {
  constexpr int kHeads = 2;
  for (const int dim : some_of<int>({8, 16, 64, 80, 200, 256}, 2)) {
    for (const auto& [tokens, size, bad_token] :
         {std::tuple{16, 1.0F, -1}, {16, 1e-9F, 3}, {9, 1e5F, 0}, {1, 1.0F, -1}, {1, 1.0F, 0}, {16, 0.0F, -1}}) {
      const std::int64_t stride = layer_bytes(KvFormat::int4, kHeads, dim);
      const auto layer = [&](std::uint8_t* base) { return layer_of(KvFormat::int4, kHeads, dim, base, stride); };
      Matrix k = keys_of_every_size(kHeads * dim, 7, size), v = Matrix::random(kBlockTokens, kHeads * dim, 8);
      if (bad_token >= 0) {
        k.values[static_cast<std::size_t>(bad_token * kHeads * dim + dim - 1)] = std::numeric_limits<float>::infinity();
      }
      std::vector<std::int32_t> slots(kBlockTokens), cells(kBlockTokens, ~1);
      std::iota(slots.begin(), slots.end(), 0);
      const std::vector<ops::SealItem> items = {{0, ~1, tokens}};
      const std::size_t cell_floats = static_cast<std::size_t>(kHeads * dim * kBlockTokens);
      std::vector<std::uint8_t> stored(static_cast<std::size_t>(stride), 0), got(stored.size());
      std::vector<float> open_floats(2 * cell_floats, 0.0F), got_floats(open_floats.size());
      ops::OpenKeys open;
      open.step_cells = open_floats.data();
      open.row_cells = cells.data();
      ops::Bench reference("reference");
      ops::kv_write(layer(stored.data()), k.view(), v.view(), slots, reference.ctx, open);
      ops::kv_seal(layer(stored.data()), open, items, reference.ctx);
      std::vector<std::uint8_t> expected;
      for (int head = 0; head < kHeads; ++head) {
        const auto cell = device_key_cell(stored.data() + head * (10 * dim + 16), dim);
        expected.insert(expected.end(), cell.begin(), cell.end());
      }
      in_both_orders([&] {
        DeviceBench bench;
        const std::vector<std::uint8_t> zeros(stored.size(), 0);
        const Buffer blocks = copy_to(bench.memory, zeros.data(), zeros.size());
        const Buffer floats = copy_to(bench.memory, got_floats.data(), got_floats.size() * sizeof(float));
        const DeviceMatrix keys(bench, k), values(bench, v);
        ops::OpenKeys there = open;
        there.step_cells = floats.as<float>();
        ops::kv_write(layer(blocks.as<std::uint8_t>()), keys.view(), values.view(), slots, bench.ctx, there);
        ops::kv_seal(layer(blocks.as<std::uint8_t>()), there, items, bench.ctx);
        bench.memory.copy_out(got.data(), blocks.data(), got.size());
        std::vector<float> copied(open_floats.size());
        bench.memory.copy_out(copied.data(), floats.data(), copied.size() * sizeof(float));
        const std::string name = concat("heads of ", dim, ", ", tokens, " tokens of size ", size, ", bad ", bad_token);
        EXPECT_EQ(std::memcmp(copied.data(), open_floats.data(), copied.size() * sizeof(float)), 0) << name;
        EXPECT_TRUE(std::equal(expected.begin(), expected.end(), got.begin())) << name;
      });
    }
  }
}

TEST(SealedKeys, OddHeadsAreRefused) {
  for (const int dim : {12, 264}) {
    ops::KvSealArgs a{};
    a.kv = layer_of(KvFormat::int4, 1, dim, nullptr, 0);
    try {
      tested_backend().kernels->kv_seal(a, Part{});
      ADD_FAILURE() << dim;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::unsupported);
    }
  }
}

class SealedAttention : public testing::Test {
 protected:
  void SetUp() override {
    if (environment("NANOBRAID_TEST_DEVICE")) GTEST_SKIP() << "these run on host memory";
  }

  // By the kernel of single rows, which rounds nothing, and where it is another one by that for long segments.
  void expect_defined(SealedSequence& sequence, const std::string& what, int window = 0) {
    const Matrix expected = sequence.expected();
    ops::expect_close(sequence.attend(deterministic_, sequence.num_keys(), window), expected, kExact, what);
    ops::expect_close(sequence.attend(bench_, sequence.num_keys(), window), expected, kRounded, what);
  }

  OnHostBench bench_, deterministic_{true};
};

TEST_F(SealedAttention, FollowsTheDefinition) {
  for (const auto& [heads, kv_heads, dim, count] : {std::tuple{2, 1, 16, 75},
                                                    {6, 2, 48, 40},
                                                    {3, 1, 64, 150},
                                                    {1, 1, 64, 290},
                                                    {1, 1, 80, 40},
                                                    {7, 1, 96, 60},
                                                    {2, 2, 128, 75},
                                                    {1, 1, 256, 20}}) {
    SealedSequence sequence(heads, kv_heads, dim, count);
    expect_defined(sequence, concat(heads, " heads of ", dim, ", ", count, " tokens"));
  }
}

// Keys with positions of their own are rotated to these, and a bias is added before.
TEST_F(SealedAttention, PositionsAndBiasesAreThoseOfTheDefinition) {
  SealedSequence sequence(4, 2, 64, 75);
  sequence.bias = Matrix::random(1, 128, 9, 1.0F).values;
  expect_defined(sequence, "bias");
  for (std::size_t i = 0; i < sequence.positions.size(); ++i) sequence.positions[i] = static_cast<std::int32_t>(3 * i);
  expect_defined(sequence, "bias and positions");
}

TEST_F(SealedAttention, PoliciesHideOpenKeysToo) {
  for (const ops::KeyPolicy& policy :
       {ops::KeyPolicy{ops::KeyRule::window, 4, 10, 0, 0}, ops::KeyPolicy{ops::KeyRule::budget, 3, 20, 0, 1},
        ops::KeyPolicy{ops::KeyRule::strided, 0, 1, 3, 0}}) {
    SealedSequence sequence(3, 1, 64, 150);
    sequence.policies = {policy};
    expect_defined(sequence, concat("rule ", static_cast<int>(policy.rule)));
  }
}

// Whoever a policy hides nothing from has the bits of the kernels that know none.
TEST_F(SealedAttention, APolicyThatHidesNothingChangesNoBit) {
  SealedSequence sequence(3, 1, 64, 60), shown = sequence;
  shown.policies = {{ops::KeyRule::window, 0, 1000, 0, 0}};
  for (OnHostBench* bench : {&bench_, &deterministic_}) {
    EXPECT_TRUE(ops::same_bits(shown.attend(*bench, 60), sequence.attend(*bench, 60)));
  }
}

// Cells that stay over steps and cells of a step, groups that are sealed late, early or never: the same bits. Slices of
// more than 8 rows go to one kernel, and all rows to the other where it is told to be deterministic.
TEST_F(SealedAttention, SlicesChangeNoBit) {
  SealedSequence sequence(2, 1, 64, 75);
  const Matrix whole = sequence.attend(bench_, 75), single = sequence.attend(deterministic_, 75);
  for (const int slice : {15, 25, 38}) {
    EXPECT_TRUE(ops::same_bits(sequence.attend(bench_, slice), whole)) << slice;
  }
  for (const int slice : {1, 7, 16, 23}) {
    EXPECT_TRUE(ops::same_bits(sequence.attend(deterministic_, slice), single)) << slice;
  }
  SealedSequence longer(1, 1, 64, 290);  // over the border of a split
  EXPECT_TRUE(ops::same_bits(longer.attend(bench_, 145), longer.attend(bench_, 290)));
}

// An infinity or a NaN is the token's own misfortune: who does not see it, before it or behind a window, has the bits
// as without it. Who sees it gets NaN, but for an infinity in the own group, which is what it is.
TEST_F(SealedAttention, WhatIsNotFiniteConcernsWhoSeesIt) {
  constexpr int kBad = 37, kWindow = 20;
  for (OnHostBench* bench : {&bench_, &deterministic_}) {
    for (const float bad : {-std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      SealedSequence sequence(2, 1, 64, 80);
      for (int i = 0; i < 64; ++i) sequence.k.values[kBad * 64 + i] = sequence.k.values[(kBad - 1) * 64 + i];
      const Matrix good = sequence.attend(*bench, 80, kWindow);
      sequence.k.values[kBad * 64 + 5] = bad;
      const Matrix out = sequence.attend(*bench, 80, kWindow);
      for (int t = 0; t < 80; ++t) {
        const bool sees = t >= kBad && t < kBad + kWindow;
        for (int i = 0; i < 128; ++i) {
          if (sees && std::isinf(bad) && t / kBlockTokens == kBad / kBlockTokens) continue;
          if (sees) {
            ASSERT_TRUE(std::isnan(out.at(t, i))) << t << ", " << i << ", " << bad;
          } else {
            ASSERT_EQ(out.at(t, i), good.at(t, i)) << t << ", " << i << ", " << bad;
          }
        }
      }
    }
  }
}

// How far a key in an open cell is from a sealed one, before rotation: nothing, where it is what was kept.
TEST_F(SealedAttention, DeviationIsThatOfUnrotatedKeys) {
  constexpr int kDim = 48;
  kv::KvStorage storage({KvFormat::int4, 1, 1, kDim}, 1, nullptr, 2);
  storage.zero(0);
  Matrix k = keys_of_every_size(kDim, 4, 1.0F), v(kBlockTokens, kDim);
  std::vector<std::int32_t> slots(kBlockTokens), cells(kBlockTokens, 0);
  std::iota(slots.begin(), slots.end(), 0);
  ops::OpenKeys open = storage.open_layer(0);
  open.row_cells = cells.data();
  ops::kv_write(storage.layer(0), k.view(), v.view(), slots, bench_.ctx, open);
  const std::vector<ops::SealItem> items = {{0, 0, kBlockTokens}};
  ops::kv_seal(storage.layer(0), open, items, bench_.ctx);
  std::vector<std::vector<float>> group;
  for (int t = 0; t < kBlockTokens; ++t) {
    group.emplace_back(k.values.begin() + t * kDim, k.values.begin() + (t + 1) * kDim);
  }
  const auto kept = ops::naive_sealed(group);
  for (const float off : {0.0F, 3.0F}) {
    for (int t = 0; t < kBlockTokens; ++t) {
      for (int d = 0; d < kDim; ++d) {
        k.values[static_cast<std::size_t>(t * kDim + d)] =
            static_cast<float>(kept[static_cast<std::size_t>(t)][static_cast<std::size_t>(d)]) +
            (d == 8 ? off : 0.0F);  // of a dimension that is zero
      }
    }
    cells.assign(kBlockTokens, 1);
    ops::kv_write(storage.layer(0), k.view(), v.view(), slots, bench_.ctx, open);
    std::vector<float> deviations(kBlockTokens);
    ops::key_deviation(deviations, storage.layer(0), slots, storage.layer(0), slots, bench_.ctx, open);
    for (const float deviation : deviations) EXPECT_EQ(deviation, off * off);
  }
}

}  // namespace
}  // namespace nb::cuda
