// Sealed keys on every backend, against softmax in double over what the format says that each row sees.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/code_of.h"
#include "base/error.h"
#include "base/ids.h"
#include "ops/sealed_fixture.h"

namespace nb::ops {
namespace {

using quant::KvFormat;

class Int4Kv : public EveryBackend {
 protected:
  double tolerance() const {
    return GetParam() == "reference" ? 2e-6 : attention_tolerance(GetParam(), KvFormat::int4);
  }
};

TEST_P(Int4Kv, AttentionFollowsTheDefinition) {
  Bench bench(GetParam(), 2);
  for (const auto& [heads, kv_heads, dim] :
       {std::tuple{2, 1, 16}, {3, 1, 32}, {6, 2, 48}, {9, 3, 64}, {1, 1, 80}, {7, 1, 96}, {4, 2, 128}}) {
    SealedSequence sequence(heads, kv_heads, dim, 150);
    expect_close(sequence.attend(bench, 150), sequence.expected(), tolerance(), concat(heads, " heads of ", dim));
  }
}

// Keys with positions of their own are rotated to these, and a bias is added before.
TEST_P(Int4Kv, PositionsAndBiasesAreThoseOfTheDefinition) {
  Bench bench(GetParam(), 2);
  SealedSequence sequence(4, 2, 64, 130);
  sequence.bias = Matrix::random(1, 128, 9, 5.0f).values;
  expect_close(sequence.attend(bench, 130), sequence.expected(), tolerance(), "bias");
  for (std::size_t i = 0; i < sequence.positions.size(); ++i) sequence.positions[i] = static_cast<int32_t>(3 * i);
  expect_close(sequence.attend(bench, 130), sequence.expected(), tolerance(), "bias and positions");
}

double distance(const Matrix& a, const Matrix& b) {
  double sum = 0.0;
  for (std::size_t i = 0; i < a.values.size(); ++i) {
    const double difference = static_cast<double>(a.values[i]) - static_cast<double>(b.values[i]);
    sum += difference * difference;
  }
  return std::sqrt(sum / static_cast<double>(a.values.size()));
}

// Of a large bias that is stored with the keys, little is left for what they differ by.
TEST_P(Int4Kv, AKnownBiasCostsNoPrecision) {
  Bench bench(GetParam(), 2);
  SealedSequence sequence(2, 1, 64, 130);
  for (float& value : sequence.q.values) value *= 0.3f;
  const double plain = distance(sequence.attend(bench, 130), sequence.expected(true));
  const std::vector<float> bias = Matrix::random(1, 64, 9, 300.0f).values;
  for (float& value : sequence.q.values) value *= 0.03f;
  sequence.bias = bias;
  const Matrix exact = sequence.expected(true);
  const double known = distance(sequence.attend(bench, 130), exact);
  for (std::size_t i = 0; i < sequence.k.values.size(); ++i) sequence.k.values[i] += bias[i % 64];
  sequence.bias.clear();
  const double unknown = distance(sequence.attend(bench, 130), exact);
  EXPECT_LT(known, plain);
  EXPECT_GT(unknown, 3 * known);
}

TEST_P(Int4Kv, SlicesAndThreadsChangeNoBit) {
  Bench one(GetParam(), 1), three(GetParam(), 3);
  for (const int count : {16, 75, 600}) {
    if (count > 100 && GetParam() == "reference") continue;  // slow on purpose
    SealedSequence sequence(4, 2, 32, count);
    const Matrix whole = sequence.attend(one, count);
    for (const int slice : {1, 7, 16, 23, 64}) {
      if (count > 100 && slice == 1) continue;
      EXPECT_TRUE(same_bits(sequence.attend(three, slice), whole)) << count << " in slices of " << slice;
    }
  }
}

// An infinity or a NaN is the token's own misfortune: who does not see it, before it or behind a window, has the same
// result as without it; its group has scales of its other tokens.
TEST_P(Int4Kv, WhatIsNotFiniteConcernsWhoSeesIt) {
  Bench bench(GetParam(), 2);
  constexpr int kBad = 37, kWindow = 7;
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const float bad : {infinity, -infinity, nan}) {
    SealedSequence sequence(2, 1, 64, 100);
    // So that leaving the token out of its group changes nothing for the others.
    for (int i = 0; i < 64; ++i) sequence.k.values[kBad * 64 + i] = sequence.k.values[(kBad - 1) * 64 + i];
    const Matrix good = sequence.attend(bench, 100, kWindow);
    sequence.k.values[kBad * 64 + 5] = bad;
    const Matrix out = sequence.attend(bench, 100, kWindow);
    for (int t = 0; t < 100; ++t) {
      const bool sees = t >= kBad && t < kBad + kWindow;
      for (int i = 0; i < 128 && !sees; ++i) ASSERT_EQ(out.at(t, i), good.at(t, i)) << t << ", " << i << ", " << bad;
    }
  }
}

// Ends of what a cell can say: a dimension far from zero, all the same, tiny beside another, all zero, or huge.
TEST_P(Int4Kv, SealedKeysAreThoseOfTheDefinition) {
  Bench bench(GetParam());
  constexpr int kDim = 16;
  const kv::KvShape shape{KvFormat::int4, 1, 1, kDim};
  for (const int tokens : {16, 9, 1}) {
    for (const float size : {1.0f, 1e-9f, 1e5f, 0.0f}) {
      kv::KvStorage a(shape, 1, nullptr, 2);
      Matrix k = Matrix::random(16, kDim, 4, size), v(16, kDim);
      for (std::size_t t = 0; t < 16; ++t) {
        float* key = k.values.data() + t * kDim;
        key[1] = key[1] * 0.01f + 100.0f * size;
        key[2] = -7.0f * size;
        key[3] *= 1e-6f;
        key[4] = 0.0f;
        key[5] = key[5] - 30.0f * size;
      }
      std::vector<int32_t> slots(16), sealed_cells(16, 0), probe_cells(16, 1);
      std::iota(slots.begin(), slots.end(), 0);
      OpenKeys open = a.open_layer(0);
      open.row_cells = sealed_cells.data();
      kv_write(a.layer(0), k.view(), v.view(), slots, bench.ctx, open);
      const std::vector<SealItem> items = {{0, 0, tokens}};
      kv_seal(a.layer(0), open, items, bench.ctx);
      std::vector<std::vector<float>> group;
      for (int t = 0; t < tokens; ++t)
        group.emplace_back(k.values.begin() + t * kDim, k.values.begin() + (t + 1) * kDim);
      const auto kept = naive_sealed(group);
      // A probe that is the expected key, to the float, deviates by nothing; the square of one step of a dimension is
      // far more than rounding.
      Matrix probe(16, kDim);
      for (int t = 0; t < tokens; ++t) {
        for (int d = 0; d < kDim; ++d) {
          probe.values[static_cast<std::size_t>(t * kDim + d)] =
              static_cast<float>(kept[static_cast<std::size_t>(t)][static_cast<std::size_t>(d)]);
        }
      }
      open.row_cells = probe_cells.data();
      kv_write(a.layer(0), probe.view(), v.view(), slots, bench.ctx, open);
      std::vector<float> deviations(static_cast<std::size_t>(tokens));
      const auto rows = std::span<const int32_t>(slots).first(static_cast<std::size_t>(tokens));
      key_deviation(deviations, a.layer(0), rows, a.layer(0), rows, bench.ctx, open);
      for (const float deviation : deviations) EXPECT_EQ(deviation, 0.0f) << tokens << " tokens of size " << size;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, Int4Kv, testing::ValuesIn(cpu_backends()), backend_test_name);

TEST(Int4Kv, NothingWorksWithoutOpenCells) {
  Bench bench("");
  kv::KvStorage storage({KvFormat::int4, 1, 1, 16}, 1);
  const std::vector<int32_t> slots = {0};
  const std::vector<SealItem> items = {{0, 0, 17}};
  Matrix k(1, 16), v(1, 16);
  EXPECT_EQ(code_of([&] { kv_write(storage.layer(0), k.view(), v.view(), slots, bench.ctx); }),
            ErrorCode::invalid_argument);
  OpenKeys open;
  open.row_cells = slots.data();
  EXPECT_EQ(code_of([&] { kv_seal(storage.layer(0), open, items, bench.ctx); }), ErrorCode::invalid_argument);
  EXPECT_EQ(code_of([&] { kv::KvStorage({KvFormat::bf16, 1, 1, 16}, 1, nullptr, 1); }), ErrorCode::unsupported);
}

}  // namespace
}  // namespace nb::ops
