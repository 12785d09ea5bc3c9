// Quantized keys and values, and those of fp16, on every backend, against softmax in double over what the formats say
// is kept.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/code_of.h"
#include "base/effort.h"
#include "base/error.h"
#include "base/ids.h"
#include "kv/kv_storage.h"
#include "ops/naive_kv.h"
#include "ops/ops_fixture.h"

namespace nb::ops {
namespace {

using quant::KvFormat;

// One sequence: keys that are stored as they are, in blocks in reversed order, and queries that are not rotated either.
struct Sequence {
  Sequence(KvFormat kv_format, int heads, int kv_heads, int dim, int count)
      : format(kv_format),
        num_heads(heads),
        num_kv_heads(kv_heads),
        head_dim(dim),
        k(Matrix::random(count, kv_heads * dim, 1)),
        v(Matrix::random(count, kv_heads * dim, 2)),
        q(Matrix::random(count, heads * dim, 3, 1.5f)) {}

  // Tokens, and dimensions of keys, of very different size: a scale of another token or along another axis shows.
  void spread() {
    for (std::int64_t t = 0; t < k.num_rows; ++t) {
      for (std::int64_t i = 0; i < k.num_cols; ++i) {
        const auto at = static_cast<std::size_t>(t * k.num_cols + i);
        k.values[at] *= 0.25f * static_cast<float>(1 + t * 7 % 5) * (i % 16 == 3 ? 4.0f : 1.0f);
        v.values[at] = v.values[at] * static_cast<float>(1 + t * 5 % 7) + static_cast<float>(i / 16 % 3) - 1.0f;
      }
    }
  }

  int num_keys() const { return static_cast<int>(k.num_rows); }
  int num_blocks() const { return (num_keys() + kBlockTokens - 1) / kBlockTokens; }
  int slot_of(int token) const {
    return (num_blocks() - 1 - token / kBlockTokens) * kBlockTokens + token % kBlockTokens;
  }

  Matrix attend(Bench& bench, int window = 0) {
    kv::KvStorage storage({format, 2, num_kv_heads, head_dim}, num_blocks());
    for (int block = 0; block < num_blocks(); ++block) storage.zero(block);
    std::vector<int32_t> slots, blocks, positions(static_cast<std::size_t>(num_keys()));
    for (int t = 0; t < num_keys(); ++t) slots.push_back(slot_of(t));
    for (int b = 0; b < num_blocks(); ++b) blocks.push_back(slot_of(b * kBlockTokens) / kBlockTokens);
    std::iota(positions.begin(), positions.end(), 0);
    kv_write(storage.layer(1), k.view(), v.view(), slots, bench.ctx);
    std::vector<float> still(static_cast<std::size_t>(num_keys() * head_dim), 0.0f);
    for (std::size_t i = 0; i < still.size(); ++i)
      still[i] = static_cast<int>(i) % head_dim < head_dim / 2 ? 1.0f : 0.0f;
    const RopeTable rope_table{still.data(), head_dim, num_keys()};
    const std::vector<AttentionSegment> segments = {{0, num_keys(), 0, 1}};
    const std::vector<AttentionRun> runs = {{0, num_keys(), 0}};
    Matrix out(num_keys(), num_heads * head_dim, -3.0f);
    attention(out.view(), q.view(), num_heads, scale(), window, rope_table, storage.layer(1),
              {positions, segments, runs, blocks}, bench.ctx);
    return out;
  }

  std::vector<double> stored(const Matrix& values, bool is_key, int token, int kv_head) const {
    const auto first = values.values.begin() + token * values.num_cols + kv_head * head_dim;
    return naive_stored(format, is_key, {first, first + head_dim});
  }

  Matrix expected() const {
    Matrix out(num_keys(), num_heads * head_dim);
    for (int h = 0; h < num_heads; ++h) {
      std::vector<std::vector<double>> keys, values;
      for (int t = 0; t < num_keys(); ++t) {
        keys.push_back(stored(k, true, t, h / (num_heads / num_kv_heads)));
        values.push_back(stored(v, false, t, h / (num_heads / num_kv_heads)));
      }
      for (int row = 0; row < num_keys(); ++row) {
        std::vector<double> scores;
        for (std::size_t t = 0; t <= static_cast<std::size_t>(row); ++t) {
          double score = 0.0;
          for (int d = 0; d < head_dim; ++d) {
            score += static_cast<double>(q.at(row, h * head_dim + d)) * keys[t][static_cast<std::size_t>(d)];
          }
          scores.push_back(score * static_cast<double>(scale()));
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

  KvFormat format;
  int num_heads, num_kv_heads, head_dim;
  Matrix k, v, q;
};

class QuantizedKv : public EveryBackend {};

TEST_P(QuantizedKv, AttentionFollowsTheDefinition) {
  Bench bench(GetParam(), 2);
  for (const KvFormat format : {KvFormat::f16, KvFormat::int8, KvFormat::mixed}) {
    for (const auto& [heads, kv_heads, dim] : some_of<std::tuple<int, int, int>>(
             {{2, 1, 16}, {3, 1, 32}, {6, 2, 48}, {9, 3, 64}, {1, 1, 80}, {7, 1, 96}, {4, 2, 128}}, 2)) {
      Sequence sequence(format, heads, kv_heads, dim, 150);
      sequence.spread();
      const double tolerance = GetParam() == "reference" ? 1e-6 : attention_tolerance(GetParam(), format);
      expect_close(sequence.attend(bench), sequence.expected(), tolerance,
                   concat(quant::to_string(format), ", ", heads, " heads of ", dim));
    }
  }
}

// Who sees one key gets its value: every code, scale and minimum, at the ends of what halves hold too.
TEST_P(QuantizedKv, ARowThatSeesOneKeyGetsItsStoredValue) {
  Bench bench(GetParam(), 2);
  for (const KvFormat format : {KvFormat::f16, KvFormat::int8, KvFormat::mixed}) {
    for (const int dim : {16, 48, 64, 80, 128}) {
      Sequence sequence(format, 4, 2, dim, 100);
      const float sizes[] = {1.0f, 1e-3f, 6e4f, 1e-6f, 3e-7f, 1e3f, 1e-8f, 5e5f, 3e9f, 1e-40f, 1e37f};
      for (std::int64_t t = 0; t < sequence.v.num_rows; ++t) {
        for (std::int64_t i = 0; i < sequence.v.num_cols; ++i) {
          float& value = sequence.v.values[static_cast<std::size_t>(t * sequence.v.num_cols + i)];
          if (t % 13 == 11) value = 0.0f;
          if (t % 13 == 12) value = -1.7f;  // a range of zero
          if (t % 13 == 10) value = std::fabs(value) + 40.0f;
          value *= t < 60 ? 1.0f : sizes[t % 11];
        }
      }
      const Matrix out = sequence.attend(bench, 1);
      for (int t = 0; t < sequence.num_keys(); ++t) {
        for (int h = 0; h < 4; ++h) {
          const std::vector<double> kept = sequence.stored(sequence.v, false, t, h / 2);
          double peak = 0.0;
          for (const double value : kept) peak = std::max(peak, std::fabs(value));
          for (int d = 0; d < dim; ++d) {
            const double expected = kept[static_cast<std::size_t>(d)];
            ASSERT_NEAR(out.at(t, h * dim + d), expected, 1e-6 * peak)
                << quant::to_string(format) << ", token " << t << ", head " << h << ", dimension " << d << " of "
                << dim;
          }
        }
      }
    }
  }
}

// An infinity or a NaN is the token's own misfortune: who does not see it, before it or behind a window, has the same
// bits as without it, and who sees it gets NaN.
TEST_P(QuantizedKv, WhatIsNotFiniteConcernsWhoSeesIt) {
  Bench bench(GetParam(), 2);
  constexpr int kBad = 37, kWindow = 20;
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const KvFormat format : {KvFormat::f16, KvFormat::int8, KvFormat::mixed}) {
    for (const float bad : {infinity, -infinity, nan}) {
      for (const bool in_keys : {false, true}) {
        Sequence sequence(format, 2, 1, 64, 100);
        const Matrix good = sequence.attend(bench, kWindow);
        (in_keys ? sequence.k : sequence.v).values[kBad * 64 + 5] = bad;
        const Matrix out = sequence.attend(bench, kWindow);
        for (int t = 0; t < 100; ++t) {
          if (t < kBad || t >= kBad + kWindow) {
            for (int i = 0; i < 128; ++i) ASSERT_EQ(out.at(t, i), good.at(t, i)) << t << ", " << i << ", " << bad;
          } else if (!in_keys || format == KvFormat::f16) {
            EXPECT_TRUE(std::isnan(out.at(t, 5)) && std::isnan(out.at(t, 64 + 5))) << t << ", " << bad;
          }
        }
      }
    }
  }
}

// Tokens of one cell are stored by several threads at a time, so no two may share a byte.
TEST_P(QuantizedKv, TokensOfACellAreStoredOneByOne) {
  Bench one(GetParam(), 1), three(GetParam(), 3);
  for (const KvFormat format : kv_formats()) {
    const kv::KvShape shape{format, 1, 2, 80};
    const auto store = [&](Bench& bench, const std::vector<int32_t>& order) {
      kv::KvStorage storage(shape, 3);
      const KvLayer layer = storage.layer(0);
      std::fill_n(layer.base, storage.bytes(), std::uint8_t{0xff});
      for (std::size_t i = 0; i < order.size(); i += 16) {
        Matrix k(16, 160), v(16, 160);
        for (std::size_t t = 0; t < 16; ++t) {
          const auto token = static_cast<unsigned>(order[i + t]);
          const Matrix key = Matrix::random(1, 160, 2 * token), value = Matrix::random(1, 160, 2 * token + 1);
          std::copy(key.values.begin(), key.values.end(), k.values.begin() + static_cast<std::ptrdiff_t>(t * 160));
          std::copy(value.values.begin(), value.values.end(), v.values.begin() + static_cast<std::ptrdiff_t>(t * 160));
        }
        kv_write(layer, k.view(), v.view(), std::span(order).subspan(i, 16), bench.ctx);
      }
      return std::vector<std::uint8_t>(layer.base, layer.base + storage.bytes());
    };
    std::vector<int32_t> order(48);
    std::iota(order.begin(), order.end(), 0);
    const auto expected = store(one, order);
    EXPECT_EQ(store(three, order), expected) << quant::to_string(format);
    std::mt19937 random(3);
    std::shuffle(order.begin(), order.end(), random);
    EXPECT_EQ(store(three, order), expected) << quant::to_string(format);
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, QuantizedKv, testing::ValuesIn(cpu_backends()), backend_test_name);

TEST(KvFormats, ABackendRefusesThoseItDoesNotHave) {
  Bench bench("");
  KernelTable plain = *bench.backend.kernels;
  plain.name = "plain";
  plain.kv_formats = kPlainKvFormats;
  EXPECT_NO_THROW(require_kv_format(*bench.backend.kernels, KvFormat::mixed));
  EXPECT_NO_THROW(require_kv_format(plain, KvFormat::bf16));
  try {
    require_kv_format(plain, KvFormat::mixed);
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_STREQ(error.what(), "KV format mixed is not offered by backend plain, which has: f32, bf16");
  }
  bench.ctx.kernels = &plain;
  kv::KvStorage storage({KvFormat::int8, 1, 1, 16}, 1);
  const std::vector<int32_t> slots = {0};
  Matrix k(1, 16), v(1, 16);
  EXPECT_EQ(code_of([&] { kv_write(storage.layer(0), k.view(), v.view(), slots, bench.ctx); }), ErrorCode::unsupported);
  std::vector<float> out(1);
  EXPECT_EQ(code_of([&] { key_deviation(out, storage.layer(0), slots, storage.layer(0), slots, bench.ctx); }),
            ErrorCode::unsupported);
  const auto table = make_rotations(16, 1);
  const std::vector<AttentionSegment> segments = {{0, 1, 0, 1}};
  const std::vector<AttentionRun> runs = {{0, 1, 0}};
  EXPECT_EQ(code_of([&] {
              attention(v.view(), k.view(), 1, 1.0f, 0, {table.data(), 16, 1}, storage.layer(0),
                        {slots, segments, runs, slots}, bench.ctx);
            }),
            ErrorCode::unsupported);
}

}  // namespace
}  // namespace nb::ops
