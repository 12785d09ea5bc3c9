#include "ops/ops.h"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>
#include <utility>

#include "base/align.h"
#include "base/dtype.h"
#include "base/effort.h"
#include "base/error.h"
#include "base/ids.h"
#include "kv/kv_storage.h"
#include "ops/naive_kv.h"
#include "ops/ops_fixture.h"

namespace nb::ops {
namespace {

class Ops : public EveryBackend {};

TEST_P(Ops, EmbedGivesBackRows) {
  for (int i = 0; i < quant::kNumFormats; ++i) {
    const auto format = static_cast<quant::Format>(i);
    const int cols = round_up(96, quant::format_info(format).block_elements);
    const RandomWeights weights(format, 50, cols, 2);
    Bench reference("reference"), bench(GetParam(), 2);
    const std::vector<int32_t> ids = {0, 49, 17, 17, 31, 32};
    Matrix expected(6, cols), out(6, cols);
    embed(expected.view(), pack(reference, {weights.source()}, "auto"), ids, reference.ctx);
    embed(out.view(), pack(bench, {weights.source()}, "auto"), ids, bench.ctx);
    EXPECT_TRUE(same_bits(out, expected)) << quant::to_string(format);
  }
}

TEST_P(Ops, EmbedRefusesIdsOutsideTheVocabulary) {
  const RandomWeights weights(quant::Format::q8_0, 50, 96, 2);
  Bench bench(GetParam());
  const LinearWeight table = pack(bench, {weights.source()}, "auto");
  Matrix out(1, 96);
  for (int32_t id : {-1, 50}) EXPECT_THROW(embed(out.view(), table, std::vector<int32_t>{id}, bench.ctx), Error);
}

TEST_P(Ops, RmsNormMatchesReference) {
  for (int cols : {1, 16, 45, 576}) {
    Matrix x = Matrix::random(5, cols, 3, 4.0f), weight = Matrix::random(1, cols, 4);
    Bench reference("reference"), bench(GetParam(), 2);
    Matrix expected(5, cols), out(5, cols);
    rms_norm(expected.view(), x.view(), {weight.vector(), 1e-5f}, reference.ctx);
    rms_norm(out.view(), x.view(), {weight.vector(), 1e-5f}, bench.ctx);
    expect_close(out, expected, 1e-6, "cols " + std::to_string(cols));
  }
}

// The groups of 32 columns of prepared rows, row after row, from an array with `per_group` elements for each.
template <class T>
std::vector<T> row_after_row(const T* data, const Activation& act, int per_group, WeightLayout layout) {
  const int groups = act.cols / 32, panel = layout == WeightLayout::tile16 ? 4 : 1;
  std::vector<T> out;
  for (int t = 0; t < act.rows; ++t) {
    const int first = t / panel * panel, count = std::min(panel, act.rows - first);
    for (int g = 0; g < groups; ++g) {
      const T* begin = data + (first * groups + g * count + t - first) * per_group;
      out.insert(out.end(), begin, begin + per_group);
    }
  }
  return out;
}

TEST_P(Ops, PrepareInt8EqualsReferenceBitForBit) {
  Matrix x = Matrix::random(7, 100, 5, 2.0f);
  for (int i = 0; i < 32; ++i) x.values[static_cast<std::size_t>(i)] = 0.0f;  // a group of zeros
  x.values[40] = 1e30f;
  Bench reference("reference"), bench(GetParam(), 2);
  for (ActType type : {ActType::int8, ActType::bf16, ActType::f32}) {
    const Activation a = prepare(x.view(), type, reference.ctx), b = prepare(x.view(), type, bench.ctx);
    ASSERT_EQ(a.cols, 128);
    ASSERT_EQ(b.cols, 128);
    if (type == ActType::int8) {
      const auto expect_same = [&](const auto* expected, const auto* actual, int per_group) {
        EXPECT_EQ(row_after_row(expected, a, per_group, WeightLayout::rows),
                  row_after_row(actual, b, per_group, bench.ctx.kernels->layout));
      };
      expect_same(a.codes, b.codes, 32);
      expect_same(a.scales, b.scales, 1);
      expect_same(a.shifts, b.shifts, 1);
      expect_same(a.minus_sums, b.minus_sums, 1);
      expect_same(a.minus_half_sums, b.minus_half_sums, 1);
    } else {
      EXPECT_EQ(row_after_row(a.values, a, 32, WeightLayout::rows),
                row_after_row(b.values, b, 32, bench.ctx.kernels->layout));
    }
  }
}

TEST_P(Ops, SiluMulMatchesReference) {
  Matrix gate = Matrix::random(3, 45, 6, 8.0f), up = Matrix::random(3, 45, 7);
  gate.values[0] = 300.0f, gate.values[1] = -300.0f, gate.values[2] = 0.0f;
  Bench reference("reference"), bench(GetParam(), 2);
  Matrix expected(3, 45), out(3, 45);
  silu_mul(expected.view(), gate.view(), up.view(), reference.ctx);
  silu_mul(out.view(), gate.view(), up.view(), bench.ctx);
  for (std::size_t i = 0; i < out.values.size(); ++i) {
    EXPECT_NEAR(out.values[i], expected.values[i], 2e-6 * std::max(1.0f, std::fabs(expected.values[i]))) << i;
  }
}

// Slots of both sides repeat; the layers are of different storages, so a block is as long as its own storage says.
TEST_P(Ops, KeyDeviationFollowsTheDefinition) {
  constexpr int kBlocksA = 3, kBlocksB = 5;
  for (const quant::KvFormat format : kv_formats()) {
    for (const auto& [heads, dim] : {std::pair{1, 16}, {2, 24}, {3, 64}, {1, 80}, {2, 128}}) {
      // Tiled backends quantize vectors of up to 16 dimensions; the model refuses other heads.
      const bool quantized = format == quant::KvFormat::int8 || format == quant::KvFormat::mixed;
      if (dim % 16 != 0 && quantized) continue;
      Bench one(GetParam(), 1), two(GetParam(), 2);
      kv::KvStorage stored_a({format, 2, heads, dim}, kBlocksA), stored_b({format, 3, heads, dim}, kBlocksB);
      Matrix a = Matrix::random(kBlocksA * kBlockTokens, heads * dim, 1);
      Matrix b = Matrix::random(kBlocksB * kBlockTokens, heads * dim, 2);
      const auto fill = [&](kv::KvStorage& storage, Matrix& keys) {
        std::vector<int32_t> slots(static_cast<std::size_t>(keys.num_rows));
        std::iota(slots.begin(), slots.end(), 0);
        Matrix values = Matrix::random(keys.num_rows, keys.num_cols, 3);
        for (int layer = 0; layer < storage.shape().num_layers; ++layer) {
          Matrix others = Matrix::random(keys.num_rows, keys.num_cols, 10 + static_cast<unsigned>(layer));
          kv_write(storage.layer(layer), (layer == 1 ? keys : others).view(), values.view(), slots, one.ctx);
        }
      };
      fill(stored_a, a);
      fill(stored_b, b);
      const auto stored = [&, dim = dim](const Matrix& keys, int slot, int head) {
        const auto first = keys.values.begin() + slot * keys.num_cols + head * dim;
        return naive_stored(format, true, {first, first + dim});
      };
      for (const int rows : {1, 2, 7, 40}) {
        std::vector<int32_t> slots_a, slots_b;
        for (int t = 0; t < rows; ++t) {
          slots_a.push_back(t * 29 % (t % 5 == 4 ? 1 : kBlocksA * kBlockTokens));
          slots_b.push_back(t * 37 % (t % 4 == 3 ? 17 : kBlocksB * kBlockTokens));
        }
        std::vector<float> out(static_cast<std::size_t>(rows), -1.0f), again(out);
        key_deviation(out, stored_a.layer(1), slots_a, stored_b.layer(1), slots_b, one.ctx);
        key_deviation(again, stored_a.layer(1), slots_a, stored_b.layer(1), slots_b, two.ctx);
        EXPECT_EQ(again, out) << "two threads";
        for (std::size_t t = 0; t < out.size(); ++t) {
          double expected = 0.0;
          for (int h = 0; h < heads; ++h) {
            const auto x = stored(a, slots_a[t], h), y = stored(b, slots_b[t], h);
            for (std::size_t d = 0; d < x.size(); ++d) expected += (x[d] - y[d]) * (x[d] - y[d]);
          }
          EXPECT_NEAR(out[t], expected, 2e-6 * expected) << heads << " heads of " << dim << ", row " << t;
        }
        key_deviation(out, stored_a.layer(1), slots_a, stored_a.layer(1), slots_a, two.ctx);
        EXPECT_EQ(out, std::vector<float>(static_cast<std::size_t>(rows), 0.0f)) << "a key and itself";
      }
    }
  }
}

TEST_P(Ops, KeyDeviationRefusesLayersThatDiffer) {
  Bench bench(GetParam());
  const kv::KvStorage storage({quant::KvFormat::f32, 1, 2, 16}, 1);
  const KvLayer layer = storage.layer(0);
  const std::vector<int32_t> slots = {0, 1};
  std::vector<float> out(2);
  const auto refused = [&](const KvLayer& other, std::span<const int32_t> other_slots) {
    EXPECT_THROW(key_deviation(out, layer, slots, other, other_slots, bench.ctx), Error);
    EXPECT_THROW(key_deviation(out, other, other_slots, layer, slots, bench.ctx), Error);
  };
  KvLayer other = layer;
  other.format = quant::KvFormat::bf16;
  refused(other, slots);
  other = layer, other.head_dim = 8;
  refused(other, slots);
  other = layer, other.num_kv_heads = 1;
  refused(other, slots);
  refused(layer, std::span(slots).first(1));
  key_deviation(out, layer, slots, layer, slots, bench.ctx);
}

TEST_P(Ops, ArgmaxTakesTheLowerIdAndNeverNan) {
  Matrix x(4, 100, -1.0f);
  x.values[37] = x.values[62] = 5.0f;
  x.values[100 + 3] = std::numeric_limits<float>::quiet_NaN();
  x.values[100 + 90] = 0.0f;
  for (int i = 0; i < 100; ++i) x.values[static_cast<std::size_t>(200 + i)] = -std::numeric_limits<float>::infinity();
  x.values[399] = 2.0f;
  Bench bench(GetParam(), 2);
  std::vector<int32_t> best(4);
  argmax(best, x.view(), bench.ctx);
  EXPECT_EQ(best, (std::vector<int32_t>{37, 90, 0, 99}));
}

struct LayerResult {
  Matrix q, residual, logits;
  std::vector<std::uint8_t> kv;
  std::vector<int32_t> best;
};

// norm_qkv, linear_residual, norm_gate_up, linear_residual and head in sequence, on `rows` rows.
LayerResult run_layer(Bench& bench, int rows, quant::Format format, bool extras) {
  // Every number of columns fills whole blocks of the format.
  const int block = quant::format_info(format).block_elements;
  const int hidden = round_up(96, block), dim = block > 64 ? block / 4 : 16, heads = 4, kv_heads = 2,
            inner = round_up(160, block == 1 ? 32 : block), vocab = 70;
  const RandomWeights wq(format, heads * dim, hidden, 1), wk(format, kv_heads * dim, hidden, 2),
      wv(quant::Format::q8_0, kv_heads * dim, hidden, 3), wo(format, hidden, heads * dim, 4),
      wg(format, inner, hidden, 5), wu(format, inner, hidden, 6), wd(format, hidden, inner, 7),
      wh(format, vocab, hidden, 8);
  const LinearWeight qkv = pack(bench, {wq.source(), wk.source(), wv.source()}, "int8"),
                     out_weight = pack(bench, {wo.source()}, "int8"),
                     gate_up = pack(bench, {wg.source(), wu.source()}, "int8", Grouping::interleaved32),
                     down = pack(bench, {wd.source()}, "int8"), head_weight = pack(bench, {wh.source()}, "int8");
  Matrix norm_weight = Matrix::random(1, hidden, 9), x = Matrix::random(rows, hidden, 10);
  Matrix q_bias = Matrix::random(1, heads * dim, 11), k_bias = Matrix::random(1, kv_heads * dim, 12),
         v_bias = Matrix::random(1, kv_heads * dim, 13), q_norm = Matrix::random(1, dim, 14),
         k_norm = Matrix::random(1, dim, 15);
  std::vector<float> table(static_cast<std::size_t>(dim * 400));
  std::mt19937 random(3);
  for (float& value : table) value = std::cos(static_cast<float>(random() % 100));
  const RopeTable rope_table{table.data(), dim, 400};
  kv::KvStorage storage({quant::KvFormat::bf16, 1, kv_heads, dim}, 30);
  std::vector<int32_t> slots, positions, row_ids;
  for (int i = 0; i < rows; ++i) {
    slots.push_back((i * 7) % 480);
    positions.push_back(i);
    if (i % 3 == 0) row_ids.push_back(i);
  }
  LayerResult result{Matrix(rows, heads * dim), x, Matrix(static_cast<std::int64_t>(row_ids.size()), vocab), {}, {}};
  QkvExtras qkv_extras;
  if (extras) {
    qkv_extras = {q_bias.vector(), k_bias.vector(), v_bias.vector(), q_norm.vector(), k_norm.vector()};
  }
  const Norm norm{norm_weight.vector(), 1e-5f};
  norm_qkv(result.q.view(), storage.layer(0), x.view(), norm, qkv, qkv_extras, positions, slots, rope_table, bench.ctx);
  linear_residual(result.residual.view(), result.q.view(), out_weight, Tensor(), bench.ctx);
  const Activation gated = norm_gate_up(result.residual.view(), norm, gate_up, down.act_type, bench.ctx);
  linear_residual(result.residual.view(), gated, down, bench.ctx);
  result.best.resize(row_ids.size());
  head(result.logits.view(), result.best, result.residual.view(), row_ids, norm, head_weight, bench.ctx);
  std::vector<int32_t> without_logits(row_ids.size());
  head(Tensor(), without_logits, result.residual.view(), row_ids, norm, head_weight, bench.ctx);
  EXPECT_EQ(without_logits, result.best);
  const KvLayer layer = storage.layer(0);
  result.kv.assign(layer.base, layer.base + storage.bytes());
  return result;
}

void expect_same_layer(const LayerResult& a, const LayerResult& b, quant::Format format, int rows) {
  const std::string what = std::string(quant::to_string(format)) + " rows " + std::to_string(rows);
  EXPECT_TRUE(same_bits(a.q, b.q)) << what;
  EXPECT_EQ(a.kv, b.kv) << what;
  EXPECT_TRUE(same_bits(a.residual, b.residual)) << what;
  EXPECT_TRUE(same_bits(a.logits, b.logits)) << what;
  EXPECT_EQ(a.best, b.best) << what;
}

TEST_P(Ops, FusedOperatorsEqualTheirParts) {
  for (int id = 0; id < quant::kNumFormats; ++id) {
    const auto format = static_cast<quant::Format>(id);
    for (int rows : some_of<int>({17, 1, 5, 120, 16}, 3)) {
      for (bool extras : {false, true}) {
        if (is_reduced() && extras == (id % 2 == 0)) continue;
        Bench fused(GetParam(), 2), small(GetParam(), 2);
        const KernelTable table = with_fused(*small.backend.kernels, {});
        small.ctx.kernels = &table;
        const LayerResult a = run_layer(fused, rows, format, extras), b = run_layer(small, rows, format, extras);
        expect_same_layer(a, b, format, rows);
      }
    }
  }
}

TEST_P(Ops, WholeLayerMatchesReference) {
  for (quant::Format format : {quant::Format::f16, quant::Format::q4_1, quant::Format::q6_k, quant::Format::w4,
                               quant::Format::awq_int4, quant::Format::fp8_e4m3}) {
    Bench reference("reference"), bench(GetParam(), 2);
    // Both round to int8 where they can; a value next to a rounding edge may fall to either side.
    const LayerResult a = run_layer(bench, 20, format, true), b = run_layer(reference, 20, format, true);
    expect_close(a.logits, b.logits, 1e-2, quant::to_string(format));
    expect_close(a.residual, b.residual, 1e-2, quant::to_string(format));
  }
}

TEST_P(Ops, MissingKernelNamesItself) {
  Bench bench(GetParam());
  KernelTable table = *bench.backend.kernels;
  table.silu_mul = nullptr;
  bench.ctx.kernels = &table;
  Matrix x(1, 16);
  try {
    silu_mul(x.view(), x.view(), x.view(), bench.ctx);
    FAIL() << "a null kernel ran";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_NE(std::string(error.what()).find("silu_mul"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find(GetParam()), std::string::npos);
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, Ops, testing::ValuesIn(fast_backends()), backend_test_name);

// One order of lanes, and integer sums that do not depend on the instruction: every bit is the same.
TEST(Backends, Avx2AndAvxVnniGiveTheSameBits) {
  if (!is_usable("avx2") || !is_usable("avxvnni")) GTEST_SKIP() << "this machine does not run both";
  for (int id = 0; id < quant::kNumFormats; ++id) {
    const auto format = static_cast<quant::Format>(id);
    for (int rows : {1, 20}) {
      Bench avx2("avx2", 2), vnni("avxvnni", 2);
      const LayerResult a = run_layer(avx2, rows, format, true), b = run_layer(vnni, rows, format, true);
      expect_same_layer(a, b, format, rows);
    }
  }
}

TEST(Backends, AreListedAndForced) {
  const auto names = available_backends();
  ASSERT_GE(names.size(), 2u);
  EXPECT_EQ(names[0], "reference");
  EXPECT_EQ(names[1], "scalar");
  EXPECT_STREQ(find_backend("scalar").kernels->name, "scalar");
  EXPECT_EQ(find_backend("").name, names.back());
  EXPECT_EQ(find_backend("cpu").name, fast_backends().back());
  EXPECT_THROW(find_backend("riscv"), Error);
  for (const Backend& backend : compiled_backends()) {
    EXPECT_EQ(std::find(names.begin(), names.end(), backend.name) != names.end(), backend.usable()) << backend.name;
    if (backend.kernels != nullptr) {
      EXPECT_EQ(backend.kernels->name, backend.name);
    }
    if (!backend.usable()) {
      EXPECT_THROW(find_backend(backend.name), Error) << backend.name;
    }
  }
  EXPECT_EQ(compiled_backends().back().name, "cuda:0");
}

}  // namespace
}  // namespace nb::ops
