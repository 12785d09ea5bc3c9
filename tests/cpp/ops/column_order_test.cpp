// column_order.cpp: matrices in an order of their own give what the same matrices give in the order of their input.
#include "ops/column_order.h"

#include <gtest/gtest.h>

#include <numeric>

#include "base/error.h"
#include "ops/ops_fixture.h"

namespace nb::ops {
namespace {

ColumnOrder shuffled(int cols, unsigned seed) {
  std::vector<std::int32_t> order(static_cast<std::size_t>(cols));
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(seed);
  std::shuffle(order.begin(), order.end(), random);
  return std::make_shared<const std::vector<std::int32_t>>(order);
}

// Rows of weights in `order`; as they are in the order of the input.
struct OrderedWeights {
  OrderedWeights(quant::Format format, int rows, int cols, ColumnOrder columns, unsigned seed)
      : packed(format, rows, cols, seed), natural(rows, cols), order(std::move(columns)) {
    std::vector<float> row(static_cast<std::size_t>(cols));
    const std::int64_t bytes = quant::row_bytes(format, cols);
    for (int r = 0; r < rows; ++r) {
      quant::unpack_row(format, packed.bytes.data() + r * bytes, cols, row.data());
      if (order != nullptr) restore_order(*order, row);
      std::copy(row.begin(), row.end(), natural.values.begin() + r * cols);
    }
  }

  MatrixSource source() const {
    MatrixSource out = packed.source();
    out.order = order;
    return out;
  }

  Matrix product(const Matrix& x) const {
    Matrix out(x.num_rows, natural.num_rows);
    for (std::int64_t t = 0; t < x.num_rows; ++t) {
      for (std::int64_t r = 0; r < natural.num_rows; ++r) {
        double sum = 0.0;
        for (std::int64_t k = 0; k < x.num_cols; ++k) sum += static_cast<double>(x.at(t, k)) * natural.at(r, k);
        out.values[static_cast<std::size_t>(t * natural.num_rows + r)] = static_cast<float>(sum);
      }
    }
    return out;
  }

  RandomWeights packed;
  Matrix natural;
  ColumnOrder order;
};

class ColumnOrderOps : public EveryBackend {};

TEST_P(ColumnOrderOps, EachSegmentMeetsItsOwnOrder) {
  const ColumnOrder a = shuffled(128, 1), b = shuffled(128, 2);
  const OrderedWeights q(quant::Format::gptq_int4_g64, 48, 128, a, 3), k(quant::Format::gptq_int4_g32, 32, 128, b, 4),
      v(quant::Format::f32, 40, 128, nullptr, 5);
  Bench bench(GetParam(), 2);
  const LinearWeight weight = pack(bench, {q.source(), k.source(), v.source()}, "f32");
  EXPECT_TRUE(weight.is_ordered());
  Matrix x = Matrix::random(5, 128, 6);
  const std::array<Activation, 3> acts = prepare_each(x.view(), weight, bench.ctx);
  const OrderedWeights* matrices[] = {&q, &k, &v};
  for (std::size_t i = 0; i < 3; ++i) {
    Matrix out(5, matrices[i]->natural.num_rows);
    linear(out.view(), acts[i], weight.segments[i], Tensor(), false, bench.ctx);
    expect_close(out, matrices[i]->product(x), 2e-6, "segment " + std::to_string(i));
  }
}

TEST_P(ColumnOrderOps, OperatorsAreComposed) {
  const OrderedWeights weights(quant::Format::gptq_int4, 48, 256, shuffled(256, 7), 8);
  Bench bench(GetParam(), 2);
  FusionCounts counts;
  bench.ctx.counts = &counts;
  const LinearWeight weight = pack(bench, {weights.source()}, "f32");
  Matrix x = Matrix::random(3, 256, 9), out(3, 48);
  linear_residual(out.view(), x.view(), weight, Tensor(), bench.ctx);
  expect_close(out, weights.product(x), 2e-6, "linear_residual");
  EXPECT_EQ(counts.composed[FusedOp::linear_residual], 1);
}

INSTANTIATE_TEST_SUITE_P(Backends, ColumnOrderOps, testing::ValuesIn(cpu_backends()), backend_test_name);

TEST(ColumnOrder, EqualOrdersShareRows) {
  const ColumnOrder a = shuffled(64, 1), same = std::make_shared<const std::vector<std::int32_t>>(*a);
  const OrderedWeights gate(quant::Format::q4_0, 32, 64, a, 1), up(quant::Format::q4_0, 32, 64, same, 2);
  Bench bench("reference");
  const LinearWeight weight = pack(bench, {gate.source(), up.source()}, "f32");
  Matrix x = Matrix::random(2, 64, 3);
  const std::array<Activation, 3> acts = prepare_each(x.view(), weight, bench.ctx);
  EXPECT_EQ(acts[0].values, acts[1].values);
  const LinearWeight natural = pack(bench, {gate.packed.source(), up.packed.source()}, "f32");
  EXPECT_FALSE(natural.is_ordered());
}

// A device's layout has its columns in the order of the input.
TEST(ColumnOrder, IsUndoneWhereDevicesGetTheirWeights) {
  const OrderedWeights weights(quant::Format::gptq_int4_g32, 4, 64, shuffled(64, 4), 5);
  ThreadPool pool(1);
  const auto arena = HostArena::create();
  const MatrixSource source = weights.source();
  const LinearWeight packed = pack_linear({&source, 1}, Grouping::stacked, "auto", WeightLayout::vectors, *arena, pool);
  EXPECT_FALSE(packed.is_ordered());
  const LinearSegment& segment = packed.segments[0];
  ASSERT_EQ(segment.format, quant::Format::bf16);
  for (int r = 0; r < 4; ++r) {
    for (int k = 0; k < 64; ++k) {
      const std::uint8_t* at =
          segment.data + r / 2 * segment.pair_stride + r % 2 * segment.strip_bytes + k / 8 * 32 + k % 8 * 2;
      std::uint16_t bits;
      std::memcpy(&bits, at, 2);
      ASSERT_EQ(bits, f32_to_bf16(weights.natural.at(r, k))) << r << ", " << k;
    }
  }
}

TEST(ColumnOrder, RefusesWhatIsNoPermutation) {
  const auto refused = [](std::vector<std::int32_t> order, const char* says) {
    try {
      check_order("blk.0.attn_q.weight", order, 4);
      ADD_FAILURE() << says;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::format);
      EXPECT_NE(std::string(error.what()).find("blk.0.attn_q.weight"), std::string::npos);
      EXPECT_NE(std::string(error.what()).find(says), std::string::npos) << error.what();
    }
  };
  check_order("x", {3, 1, 0, 2}, 4);
  refused({3, 1, 0}, "3 entries");
  refused({3, 1, 0, 3}, "3 twice");
  refused({3, 1, 0, 4}, "column 4, of 4");
  refused({3, -1, 0, 2}, "column -1");
}

}  // namespace
}  // namespace nb::ops
