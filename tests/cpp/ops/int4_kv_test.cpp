// Sealed keys on every backend, against softmax in double over what the format says that each row sees.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/code_of.h"
#include "base/error.h"
#include "base/ids.h"
#include "kv/kv_storage.h"
#include "ops/naive_kv.h"
#include "ops/ops_fixture.h"

namespace nb::ops {
namespace {

using quant::KvFormat;

// One sequence whose keys are stored before rotation, in blocks in reversed order, group by group in slices.
struct SealedSequence {
  SealedSequence(int heads, int kv_heads, int dim, int count)
      : num_heads(heads),
        num_kv_heads(kv_heads),
        head_dim(dim),
        k(Matrix::random(count, kv_heads * dim, 1)),
        v(Matrix::random(count, kv_heads * dim, 2)),
        q(Matrix::random(count, heads * dim, 3, 1.5f)),
        table(make_rotations(dim, 4 * count)) {
    // Dimensions and groups of very different sizes and means: a scale along another axis or of another group shows.
    for (std::int64_t t = 0; t < count; ++t) {
      for (std::int64_t i = 0; i < k.num_cols; ++i) {
        float& key = k.values[static_cast<std::size_t>(t * k.num_cols + i)];
        const float size = (i % 16 == 3 ? 4.0f : i % 5 == 0 ? 0.1f : 0.5f) * (t / 16 % 2 == 0 ? 1.0f : 0.5f);
        key = size * (key + (i % 7 == 2 ? 3.0f : 0.0f));
      }
    }
    positions.resize(static_cast<std::size_t>(count));
    std::iota(positions.begin(), positions.end(), 0);
  }

  int num_keys() const { return static_cast<int>(k.num_rows); }
  int num_blocks() const { return (num_keys() + kBlockTokens - 1) / kBlockTokens; }
  int block_of(int group) const { return num_blocks() - 1 - group; }

  // Rows in slices of `slice`; each with the cells and groups that an engine gives them: two cells that outlive a step,
  // and others that do not.
  Matrix attend(Bench& bench, int slice, int window = 0) {
    const kv::KvShape shape{KvFormat::int4, 2, num_kv_heads, head_dim};
    kv::KvStorage storage(shape, num_blocks(), nullptr, 2);
    for (int block = 0; block < num_blocks(); ++block) storage.zero(block);
    const KvLayer layer = storage.layer(1);
    std::vector<int32_t> blocks;
    for (int g = 0; g < num_blocks(); ++g) blocks.push_back(block_of(g));
    Matrix out(num_keys(), num_heads * head_dim, -3.0f);
    int current = 0;
    for (int begin = 0; begin < num_keys(); begin += slice) {
      const int end = std::min(num_keys(), begin + slice), count = end - begin;
      std::vector<int32_t> slots, cells, groups;
      std::vector<SealItem> items;
      for (int t = begin; t < end; ++t) {
        const int group = t / 16;
        const bool continues = group == begin / 16 && begin % 16 != 0, stays = group == end / 16 && end % 16 != 0;
        slots.push_back(block_of(group) * 16 + t % 16);
        groups.push_back(group);
        cells.push_back(continues ? current : stays ? 1 - current : ~(group - begin / 16));
        if (t % 16 == 15) items.push_back({block_of(group), cells.back(), 16});
      }
      if (end % 16 != 0 && cells.back() >= 0) current = cells.back();
      std::vector<float> step_cells(static_cast<std::size_t>((count / 16 + 2) * 16 * num_kv_heads * head_dim), NAN);
      OpenKeys open = storage.open_layer(1);
      open.step_cells = step_cells.data();
      open.row_cells = cells.data();
      open.row_groups = groups.data();
      open.bias = bias.empty() ? nullptr : bias.data();
      const auto rows = [&](Matrix& m) {
        return Tensor(m.values.data() + begin * m.num_cols, DType::f32, {count, m.num_cols});
      };
      kv_write(layer, rows(k), rows(v), slots, bench.ctx, open);
      kv_seal(layer, open, items, bench.ctx);
      const std::vector<AttentionSegment> segments = {{0, count, 0, 1}};
      AttentionRun run{0, end, 0};
      const bool scattered = positions.back() >= num_keys();
      if (scattered) run.positions_begin = 0;
      attention(
          rows(out), rows(q), num_heads, scale(), window, {table.data(), head_dim, 4 * num_keys()}, layer,
          {.positions = std::span(positions).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count)),
           .segments = segments,
           .runs = std::span(&run, 1),
           .blocks = blocks,
           .key_positions = scattered ? std::span<const int32_t>(positions) : std::span<const int32_t>{}},
          bench.ctx, open);
    }
    return out;
  }

  void rotate(std::vector<double>& x, int position) const {
    const std::size_t half = static_cast<std::size_t>(head_dim / 2);
    for (std::size_t i = 0; i < half; ++i) {
      const auto at = static_cast<std::size_t>(position * head_dim);
      const double cos = static_cast<double>(table[at + i]), sin = static_cast<double>(table[at + half + i]);
      const double a = x[i], b = x[i + half];
      x[i] = a * cos - b * sin;
      x[i + half] = b * cos + a * sin;
    }
  }

  std::vector<float> head_of(const Matrix& m, int token, int head) const {
    const auto first = m.values.begin() + token * m.num_cols + head * head_dim;
    return {first, first + head_dim};
  }

  // `exact`: as if nothing were quantized but values.
  Matrix expected(bool exact = false) const {
    Matrix out(num_keys(), num_heads * head_dim);
    for (int h = 0; h < num_heads; ++h) {
      const int kv_head = h / (num_heads / num_kv_heads);
      std::vector<std::vector<double>> open, sealed, values;
      for (int first = 0; first < num_keys(); first += 16) {
        std::vector<std::vector<float>> group;
        for (int t = first; t < std::min(first + 16, num_keys()); ++t) group.push_back(head_of(k, t, kv_head));
        for (auto& key : naive_sealed(group)) sealed.push_back(key);
        for (const auto& key : group) open.emplace_back(key.begin(), key.end());
      }
      for (int t = 0; t < num_keys(); ++t) {
        const auto at = static_cast<std::size_t>(t);
        for (auto* key : {&open[at], &sealed[at]}) {
          for (std::size_t d = 0; d < key->size() && !bias.empty(); ++d) {
            (*key)[d] += static_cast<double>(bias[static_cast<std::size_t>(kv_head * head_dim) + d]);
          }
          rotate(*key, positions[at]);
        }
        values.push_back(naive_stored(KvFormat::int4, false, head_of(v, t, kv_head)));
      }
      for (int row = 0; row < num_keys(); ++row) {
        const std::vector<float> own = head_of(q, row, h);
        std::vector<double> query(own.begin(), own.end()), scores;
        rotate(query, positions[static_cast<std::size_t>(row)]);
        for (int t = 0; t <= row; ++t) {
          const auto& key =
              exact || t / 16 == row / 16 ? open[static_cast<std::size_t>(t)] : sealed[static_cast<std::size_t>(t)];
          scores.push_back(std::inner_product(query.begin(), query.end(), key.begin(), 0.0) *
                           static_cast<double>(scale()));
        }
        const std::vector<double> mean = naive_attended(scores, values);
        for (std::size_t d = 0; d < mean.size(); ++d) {
          out.values[static_cast<std::size_t>(row * out.num_cols + h * head_dim) + d] = static_cast<float>(mean[d]);
        }
      }
    }
    return out;
  }

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }

  int num_heads, num_kv_heads, head_dim;
  Matrix k, v, q;
  std::vector<float> table, bias;
  std::vector<int32_t> positions;
};

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

INSTANTIATE_TEST_SUITE_P(Backends, Int4Kv, testing::ValuesIn([] {
                           std::vector<std::string> names = fast_backends();
                           names.push_back("reference");
                           return names;
                         }()),
                         backend_test_name);

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
