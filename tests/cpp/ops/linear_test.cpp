#include <gtest/gtest.h>

#include "base/align.h"
#include "base/effort.h"
#include "base/error.h"
#include "ops/ops_fixture.h"

namespace nb::ops {
namespace {

std::vector<quant::Format> all_formats(bool quantized_only = false) {
  std::vector<quant::Format> formats;
  for (int i = 0; i < quant::kNumFormats; ++i) {
    const auto format = static_cast<quant::Format>(i);
    if (!quantized_only || quant::format_info(format).is_quantized()) formats.push_back(format);
  }
  return formats;
}

// The next number of columns that fills whole blocks.
int fit(quant::Format format, int cols) { return round_up(cols, quant::format_info(format).block_elements); }

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
  for (quant::Format format : all_formats(true)) {
    for (Shape shape : kShapes) {
      shape.cols = fit(format, shape.cols);
      const RandomWeights weights(format, shape.rows, shape.cols, 5);
      for (int rows : some_of<int>({1, 2, 3, 5, 12, 13, 100}, 3)) {
        Matrix x = Matrix::random(rows, shape.cols, static_cast<unsigned>(rows), 3.0f);
        Bench reference("reference"), bench(GetParam(), 2);
        EXPECT_TRUE(same_bits(run_linear(bench, weights, x, "int8"), run_linear(reference, weights, x, "int8")))
            << quant::to_string(format) << " " << shape.rows << "x" << shape.cols << ", " << rows << " rows";
      }
    }
  }
}

// The bytes of a block that hold codes, and zero points where a format has them.
int code_begin(quant::Format format) {
  switch (format) {
    case quant::Format::q6_k:
    case quant::Format::w8_channel:
      return 0;
    case quant::Format::q4_k:
    case quant::Format::q5_k:
      return 16;
    default:
      return quant::format_info(format).has_minimum ? 4 : 2;
  }
}
int code_end(quant::Format format) {
  return format == quant::Format::q6_k ? 192 : quant::format_info(format).block_bytes;
}

// Every code and every activation at its extreme: no intermediate may saturate or overflow.
TEST_P(Linear, Int8SurvivesExtremes) {
  for (quant::Format format : all_formats(true)) {
    for (int pattern = 0; pattern < 4; pattern += is_reduced() ? 3 : 1) {
      // A row made by pack_row has sensible scales; its codes then go to the ends of their range.
      RandomWeights weights(format, 16, 8960, 1);
      const quant::FormatInfo& info = quant::format_info(format);
      const auto row_bytes = static_cast<std::size_t>(quant::row_bytes(format, 8960));
      const bool is_8_bit = info.zero == 128;
      for (std::size_t i = 0; i < weights.bytes.size(); ++i) {
        const int in_row = static_cast<int>(i % row_bytes) - info.row_header_bytes;
        const int in_block = in_row < 0 ? -1 : in_row % info.block_bytes;
        const bool high = pattern % 2 == 0 || i % 2 == 0;
        if (in_block >= code_begin(format) && in_block < code_end(format)) {
          weights.bytes[i] = is_8_bit ? (high ? 0x80 : 0x7f) : (high ? 0xff : 0x00);
        }
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
  for (quant::Format format : all_formats()) {
    for (Shape shape : kShapes) {
      shape.cols = fit(format, shape.cols);
      if (format == quant::Format::f32 && shape.cols == 1536) continue;
      const RandomWeights weights(format, shape.rows, shape.cols, 11);
      for (const char* act : {"f32", "bf16"}) {
        Matrix x = Matrix::random(13, shape.cols, 3);
        Bench reference("reference"), bench(GetParam(), 2);
        expect_close(run_linear(bench, weights, x, act, true, true), run_linear(reference, weights, x, act, true, true),
                     4e-6, std::string(quant::to_string(format)) + " " + act);
      }
    }
  }
}

// Columns that fill no tile: unblocked formats allow any number of columns.
TEST_P(Linear, ColumnTails) {
  for (quant::Format format : {quant::Format::f32, quant::Format::bf16, quant::Format::f16, quant::Format::w8_channel,
                               quant::Format::fp8_e4m3}) {
    const RandomWeights weights(format, 20, 45, 8);
    Matrix x = Matrix::random(3, 45, 4);
    Bench reference("reference"), bench(GetParam());
    if (format == quant::Format::w8_channel) {
      EXPECT_TRUE(same_bits(run_linear(bench, weights, x, "int8"), run_linear(reference, weights, x, "int8")));
    }
    expect_close(run_linear(bench, weights, x, "f32"), run_linear(reference, weights, x, "f32"), 2e-6,
                 quant::to_string(format));
  }
}

// Promise 1: a row's result does not depend on how many rows there are, nor on the number of threads.
TEST_P(Linear, RowsDoNotDependOnEachOther) {
  for (quant::Format format : all_formats()) {
    const int cols = fit(format, 576);
    const RandomWeights weights(format, 80, cols, 21);
    Matrix x = Matrix::random(131, cols, 6);
    for (const char* act : {"auto", "bf16"}) {
      Bench bench(GetParam(), 2), single(GetParam(), 1);
      const Matrix all = run_linear(bench, weights, x, act);
      for (int row : {0, 11, 12, 95, 96, 130}) {
        Matrix one(1, cols);
        std::copy_n(x.values.begin() + row * cols, cols, one.values.begin());
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
  // 8-bit floats are no integer codes: they meet what f16 and bf16 weights meet.
  const RandomWeights floats(quant::Format::fp8_e4m3, 16, 32, 1), zeros(quant::Format::gptq_int4_g32, 16, 32, 1);
  EXPECT_EQ(choose({floats.source()}, "auto", tiles), ActType::bf16);
  EXPECT_EQ(choose({floats.source(), quantized.source()}, "int8", tiles), ActType::bf16);
  EXPECT_EQ(choose({zeros.source(), quantized.source()}, "auto", tiles), ActType::int8);
  EXPECT_EQ(choose({floats.source()}, "auto", WeightLayout::vectors), ActType::bf16);
}

}  // namespace
}  // namespace nb::ops
