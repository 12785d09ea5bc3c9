#include <gtest/gtest.h>

#include "base/error.h"
#include "ops/ops_fixture.h"

namespace nb::ops {
namespace {

constexpr quant::Format kFormats[] = {quant::Format::f32,  quant::Format::bf16, quant::Format::f16,
                                      quant::Format::q4_0, quant::Format::q4_1, quant::Format::q8_0};

struct Shape {
  int rows, cols;
};
constexpr Shape kShapes[] = {{16, 32}, {48, 64}, {192, 576}, {33, 96}, {1, 1536}};

Matrix run_linear(Bench& bench, const RandomWeights& weights, Matrix& x, const std::string& act, bool with_bias = false,
                  bool accumulate = false) {
  const LinearWeight packed = pack(bench, {weights.source()}, act);
  Matrix out(x.num_rows, weights.rows, accumulate ? 0.25f : 7.0f);
  Matrix bias = Matrix::random(1, weights.rows, 99);
  linear(out.view(), prepare(x.view(), packed.act_type, bench.ctx), packed.segments[0],
         with_bias ? bias.vector() : Tensor(), accumulate, bench.ctx);
  return out;
}

class Linear : public EveryBackend {};

// The contract of the int8 product (reference.cpp): same integer sums, same order of f32 operations, so same bits.
TEST_P(Linear, Int8EqualsReferenceBitForBit) {
  for (quant::Format format : {quant::Format::q4_0, quant::Format::q4_1, quant::Format::q8_0}) {
    for (const Shape& shape : kShapes) {
      const RandomWeights weights(format, shape.rows, shape.cols, 5);
      for (int rows : {1, 2, 3, 5, 12, 13, 100}) {
        Matrix x = Matrix::random(rows, shape.cols, static_cast<unsigned>(rows), 3.0f);
        Bench reference("reference"), bench(GetParam(), 2);
        EXPECT_TRUE(same_bits(run_linear(bench, weights, x, "int8"), run_linear(reference, weights, x, "int8")))
            << quant::to_string(format) << " " << shape.rows << "x" << shape.cols << ", " << rows << " rows";
      }
    }
  }
}

// Every code and every activation at its extreme: no intermediate may saturate or overflow.
TEST_P(Linear, Int8SurvivesExtremes) {
  for (quant::Format format : {quant::Format::q4_0, quant::Format::q4_1, quant::Format::q8_0}) {
    for (int pattern = 0; pattern < 4; ++pattern) {
      RandomWeights weights(format, 16, 8960, 1);
      const int block_bytes = quant::format_info(format).block_bytes;
      const int header = format == quant::Format::q4_1 ? 4 : 2;
      for (std::size_t i = 0; i < weights.bytes.size(); ++i) {
        const int within = static_cast<int>(i) % block_bytes;
        if (within < header) continue;
        const bool high = pattern % 2 == 0 || i % 2 == 0;
        weights.bytes[i] = format == quant::Format::q8_0 ? (high ? 0x80 : 0x7f) : (high ? 0xff : 0x00);
      }
      Matrix x(2, 8960);
      for (std::size_t i = 0; i < x.values.size(); ++i) x.values[i] = pattern < 2 || i % 3 == 0 ? -50.0f : 50.0f;
      Bench reference("reference"), bench(GetParam());
      EXPECT_TRUE(same_bits(run_linear(bench, weights, x, "int8"), run_linear(reference, weights, x, "int8")))
          << quant::to_string(format) << " pattern " << pattern;
    }
  }
}

TEST_P(Linear, FloatActivationsMatchReference) {
  for (quant::Format format : kFormats) {
    for (const Shape& shape : kShapes) {
      if (format == quant::Format::f32 && shape.cols == 1536) continue;
      const RandomWeights weights(format, shape.rows, shape.cols, 11);
      for (const char* act : {"f32", "bf16"}) {
        Matrix x = Matrix::random(13, shape.cols, 3);
        Bench reference("reference"), bench(GetParam(), 2);
        expect_close(run_linear(bench, weights, x, act, true, true), run_linear(reference, weights, x, act, true, true),
                     2e-6, std::string(quant::to_string(format)) + " " + act);
      }
    }
  }
}

// Columns that fill no tile: unblocked formats allow any number of columns.
TEST_P(Linear, ColumnTails) {
  for (quant::Format format : {quant::Format::f32, quant::Format::bf16, quant::Format::f16}) {
    const RandomWeights weights(format, 20, 45, 8);
    Matrix x = Matrix::random(3, 45, 4);
    Bench reference("reference"), bench(GetParam());
    expect_close(run_linear(bench, weights, x, "f32"), run_linear(reference, weights, x, "f32"), 2e-6,
                 quant::to_string(format));
  }
}

// Promise 1: a row's result does not depend on how many rows there are, nor on the number of threads.
TEST_P(Linear, RowsDoNotDependOnEachOther) {
  for (quant::Format format : kFormats) {
    const RandomWeights weights(format, 80, 576, 21);
    Matrix x = Matrix::random(131, 576, 6);
    for (const char* act : {"auto", "bf16"}) {
      Bench bench(GetParam(), 2), single(GetParam(), 1);
      const Matrix all = run_linear(bench, weights, x, act);
      for (int row : {0, 11, 12, 95, 96, 130}) {
        Matrix one(1, 576);
        std::copy_n(x.values.begin() + row * 576, 576, one.values.begin());
        const Matrix alone = run_linear(single, weights, one, act);
        EXPECT_EQ(std::memcmp(alone.values.data(), all.values.data() + row * 80, 80 * sizeof(float)), 0)
            << quant::to_string(format) << " " << act << " row " << row;
      }
    }
  }
}

TEST_P(Linear, RefusesWrongShapes) {
  Bench bench(GetParam());
  const RandomWeights weights(quant::Format::q8_0, 16, 64, 1);
  const LinearWeight packed = pack(bench, {weights.source()}, "auto");
  Matrix x(2, 96), out(2, 16), wide(2, 64), small(2, 15);
  EXPECT_THROW(
      linear(out.view(), prepare(x.view(), packed.act_type, bench.ctx), packed.segments[0], Tensor(), false, bench.ctx),
      Error);
  EXPECT_THROW(linear(small.view(), prepare(wide.view(), packed.act_type, bench.ctx), packed.segments[0], Tensor(),
                      false, bench.ctx),
               Error);
}

INSTANTIATE_TEST_SUITE_P(Backends, Linear, testing::ValuesIn(fast_backends()), backend_test_name);

TEST(ChooseActType, FollowsFormatsAndRequest) {
  const RandomWeights quantized(quant::Format::q4_0, 16, 32, 1), half(quant::Format::f16, 16, 32, 1),
      full(quant::Format::f32, 16, 32, 1);
  const auto choose = [](std::vector<MatrixSource> group, const char* requested, WeightLayout layout) {
    return choose_act_type(group, requested, layout);
  };
  const WeightLayout tiles = WeightLayout::tile16, rows = WeightLayout::rows;
  EXPECT_EQ(choose({quantized.source()}, "auto", tiles), ActType::int8);
  EXPECT_EQ(choose({quantized.source(), half.source()}, "auto", tiles), ActType::bf16);
  EXPECT_EQ(choose({full.source(), half.source()}, "auto", tiles), ActType::f32);
  EXPECT_EQ(choose({quantized.source()}, "auto", rows), ActType::f32);
  EXPECT_EQ(choose({quantized.source()}, "int8", rows), ActType::int8);
  EXPECT_EQ(choose({half.source()}, "int8", tiles), ActType::bf16);
  EXPECT_THROW(choose({half.source()}, "fp8", tiles), Error);
}

}  // namespace
}  // namespace nb::ops
