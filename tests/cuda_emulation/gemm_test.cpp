// The matrix product of many rows: values against the reference, bits against every other shape of the same kernel.
#include "cuda/gemm.h"

#include <gtest/gtest.h>

#include <set>

#include "cuda/gemm.cuh"
#include "cuda_emulation/device_fixture.h"

namespace nb::cuda {
namespace {

using ops::Matrix;

constexpr GemmTile kTiles[] = {GemmTile::large, GemmTile::medium, GemmTile::wide, GemmTile::narrow};
constexpr float kUntouched = 7.0F;

struct Options {
  bool bias = false;
  bool accumulate = false;
  int more_stride = 3;  // columns of the output that belong to nobody
};

Matrix first_rows(const Matrix& x, int rows) {
  Matrix out(rows, x.num_cols);
  std::copy_n(x.values.begin(), rows * x.num_cols, out.values.begin());
  return out;
}

Matrix bias_of(std::int32_t cols) { return Matrix::random(1, cols, 99); }
Matrix before_of(std::int64_t rows, std::int32_t cols) { return Matrix::random(rows, cols, 98); }

// The product on the device. The output has a row and some columns more than are written, which stay as they are.
Matrix run_gemm(DeviceBench& bench, const ops::LinearSegment& weight, ops::ActType act, const Matrix& x, GemmTile tile,
                const Options& options = {}) {
  const Workspace::Scope scope(bench.workspace);
  const int rows = static_cast<int>(x.num_rows), cols = weight.rows;
  Matrix outs(rows + 1, cols + options.more_stride, kUntouched);
  if (options.accumulate) {
    const Matrix before = before_of(rows, cols);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < cols; ++c) outs.values[static_cast<std::size_t>(r * outs.num_cols + c)] = before.at(r, c);
    }
  }
  const DeviceMatrix on_device(bench, x), bias(bench, bias_of(cols)), out(bench, outs);
  ops::LinearArgs args{};
  args.weight = weight;
  args.x = ops::prepare(on_device.view(), act, bench.ctx);
  args.bias = options.bias ? bias.view().as<float>() : nullptr;
  args.accumulate = options.accumulate;
  args.out = out.view().as<float>();
  args.out_stride = outs.num_cols;
  gemm(args, tile);
  const Matrix got = out.host();
  Matrix result(rows, cols);
  for (int r = 0; r <= rows; ++r) {
    for (int c = 0; c < outs.num_cols; ++c) {
      if (r < rows && c < cols) {
        result.values[static_cast<std::size_t>(r * cols + c)] = got.at(r, c);
      } else {
        EXPECT_EQ(got.at(r, c), kUntouched) << "row " << r << ", column " << c;
      }
    }
  }
  return result;
}

Matrix expected_of(const ops::RandomWeights& weights, const std::string& act, const Matrix& x,
                   const Options& options = {}) {
  ops::Bench reference("reference");
  const ops::LinearWeight packed = ops::pack(reference, {weights.source()}, act);
  Matrix inputs = x, bias = bias_of(weights.rows);
  Matrix out = options.accumulate ? before_of(x.num_rows, weights.rows) : Matrix(x.num_rows, weights.rows);
  ops::linear(out.view(), ops::prepare(inputs.view(), packed.act_type, reference.ctx), packed.segments[0],
              options.bias ? bias.vector() : Tensor(), options.accumulate, reference.ctx);
  return out;
}

// Values of the most rows against the reference; all fewer rows and other tiles against these, bit for bit.
void check_all_shapes(quant::Format format, const std::string& act, int cols, int k, std::initializer_list<int> rows) {
  DeviceBench bench;
  const ops::RandomWeights weights(format, cols, k, 5);
  const ops::LinearWeight packed = bench.pack({weights.source()}, act);
  const Matrix x = Matrix::random(*std::prev(rows.end()), k, 6);
  const std::string what =
      std::string(quant::to_string(format)) + " x " + act + ", N " + std::to_string(cols) + ", K " + std::to_string(k);
  const Matrix all = run_gemm(bench, packed.segments[0], packed.act_type, x, GemmTile::large);
  ops::expect_close(all, expected_of(weights, act, x), 3e-6, what);
  for (const int count : some_of<int>(rows, 2)) {
    for (const GemmTile tile : kTiles) {
      const Matrix some = run_gemm(bench, packed.segments[0], packed.act_type, first_rows(x, count), tile);
      EXPECT_TRUE(ops::same_bits(some, first_rows(all, count)))
          << what << ", M " << count << ", tile " << static_cast<int>(tile);
    }
  }
}

TEST(Gemm, Bf16MatchesReferenceInEveryShape) {
  for (const int k : {1, 32, 33, 64, 576}) {
    check_all_shapes(quant::Format::bf16, "bf16", k == 576 ? 67 : 35, k, {1, 9, 16, 31, 64, 65, 130});
  }
  check_all_shapes(quant::Format::bf16, "bf16", 1, 160, {1, 9});
  check_all_shapes(quant::Format::bf16, "bf16", 130, 32, {1, 33});
  check_all_shapes(quant::Format::bf16, "bf16", 37, 40, {300});  // several bands of tiles
}

TEST(Gemm, OtherTypesMatchReferenceInEveryShape) {
  for (const quant::Format format :
       {quant::Format::f32, quant::Format::bf16, quant::Format::f16, quant::Format::w8_channel}) {
    for (const char* act : {"f32", "bf16"}) {
      const bool on_tensor_cores = format == quant::Format::bf16 || format == quant::Format::w8_channel;
      if (on_tensor_cores && std::string(act) == "bf16") continue;
      check_all_shapes(format, act, 35, 1, {1, 9});
      check_all_shapes(format, act, 67, 33, {1, 16, 31, 65});
      check_all_shapes(format, act, 66, 160, {9, 64, 130});
    }
  }
}

// The same weights, each rounded to bf16 before.
ops::RandomWeights as_bf16(const ops::RandomWeights& weights) {
  ops::RandomWeights out(quant::Format::bf16, weights.rows, weights.cols, 1);
  std::vector<float> row(static_cast<std::size_t>(weights.cols));
  for (int r = 0; r < weights.rows; ++r) {
    quant::unpack_row(weights.format, weights.bytes.data() + r * quant::row_bytes(weights.format, weights.cols),
                      weights.cols, row.data());
    quant::pack_row(out.format, row.data(), weights.cols,
                    out.bytes.data() + r * quant::row_bytes(out.format, weights.cols));
  }
  return out;
}

TEST(Gemm, CodesAreMultipliedAsBf16) {
  struct Shape {
    quant::Format format;
    int cols, k;
  };
  for (const Shape shape : {Shape{quant::Format::q8_0, 67, 32}, Shape{quant::Format::q8_0, 35, 352},
                            Shape{quant::Format::w8, 130, 128}, Shape{quant::Format::w8_channel, 33, 45}}) {
    DeviceBench bench;
    const ops::RandomWeights codes(shape.format, shape.cols, shape.k, 5), numbers = as_bf16(codes);
    const ops::LinearWeight packed = bench.pack({codes.source()}, "bf16"),
                            plain = bench.pack({numbers.source()}, "bf16");
    ASSERT_EQ(packed.segments[0].format, quant::Format::q8_0);
    ASSERT_EQ(plain.segments[0].format, quant::Format::bf16);
    for (const int rows : {9, 33, 130}) {
      const Matrix x = Matrix::random(rows, shape.k, 6);
      for (const GemmTile tile : kTiles) {
        EXPECT_TRUE(ops::same_bits(run_gemm(bench, packed.segments[0], packed.act_type, x, tile),
                                   run_gemm(bench, plain.segments[0], plain.act_type, x, tile)))
            << quant::to_string(shape.format) << ", M " << rows << ", tile " << static_cast<int>(tile);
      }
    }
  }
}

TEST(Gemm, AnyOrderOfThreads) {
  for (const char* act : {"bf16", "f32"}) {
    DeviceBench bench;
    const ops::RandomWeights weights(quant::Format::bf16, 70, 200, 5);
    const ops::LinearWeight packed = bench.pack({weights.source()}, act);
    const Matrix x = Matrix::random(70, 200, 6), expected = expected_of(weights, act, x);
    in_both_orders([&] {
      for (const GemmTile tile : kTiles) {
        ops::expect_close(run_gemm(bench, packed.segments[0], packed.act_type, x, tile), expected, 3e-6, act);
      }
    });
  }
}

TEST(Gemm, BiasAndAccumulation) {
  for (const char* act : {"bf16", "f32"}) {
    for (const int cols : {34, 35}) {
      DeviceBench bench;
      const ops::RandomWeights weights(quant::Format::bf16, cols, 40, 5);
      const ops::LinearWeight packed = bench.pack({weights.source()}, act);
      const Matrix x = Matrix::random(21, 40, 6);
      for (const bool bias : {false, true}) {
        for (const bool accumulate : {false, true}) {
          const Matrix expected = expected_of(weights, act, x, {bias, accumulate, 0});
          for (const int more : {0, 1, 2}) {  // outputs in pairs, and one by one
            for (const GemmTile tile : {GemmTile::medium, GemmTile::narrow}) {
              ops::expect_close(run_gemm(bench, packed.segments[0], packed.act_type, x, tile, {bias, accumulate, more}),
                                expected, 3e-6, act);
            }
          }
        }
      }
    }
  }
}

TEST(Gemm, RowsOfTwoMatricesInTurn) {
  for (const quant::Format format : {quant::Format::bf16, quant::Format::f16, quant::Format::w8_channel}) {
    for (const char* act : {"bf16", "f32"}) {
      const double tolerance = format == quant::Format::w8_channel && std::string(act) == "bf16" ? 4e-3 : 3e-6;
      DeviceBench bench;
      const ops::RandomWeights gate(format, 67, 100, 5), up(format, 67, 100, 8);
      const ops::LinearWeight packed = bench.pack({gate.source(), up.source()}, act, ops::Grouping::interleaved32);
      ASSERT_EQ(packed.segments[0].strip_bytes, 0);
      const ops::LinearWeight alone = bench.pack({up.source()}, act);
      const Matrix x = Matrix::random(33, 100, 6);
      for (const GemmTile tile : kTiles) {
        ops::expect_close(run_gemm(bench, packed.segments[0], packed.act_type, x, tile), expected_of(gate, act, x),
                          tolerance, "gate");
        EXPECT_TRUE(ops::same_bits(run_gemm(bench, packed.segments[1], packed.act_type, x, tile),
                                   run_gemm(bench, alone.segments[0], alone.act_type, x, tile)));
      }
    }
  }
}

// Which of the 8 banks of 16 bytes vector `vector` of a row is in.
template <int kVectors>
int bank_of(int row, int vector) {
  return (row * kVectors + (vector ^ turn<kVectors>(row))) % 8;
}

template <int kVectors>
void expect_all_banks() {
  for (int row = 0; row < 32; row += 8) {
    for (int vector = 0; vector < kVectors; ++vector) {
      std::set<int> banks;
      for (int i = 0; i < 8; ++i) banks.insert(bank_of<kVectors>(row + i, vector));
      EXPECT_EQ(banks.size(), 8U) << "ldmatrix, " << kVectors << " vectors";
    }
  }
  for (int lane = 0; lane < 64 * kVectors; lane += 8) {
    std::set<int> of_weight, of_x;
    for (int i = lane; i < lane + 8; ++i) {
      of_weight.insert(bank_of<kVectors>(i / (2 * kVectors) * 2 + i % 2, i / 2 % kVectors));
      of_x.insert(bank_of<kVectors>(i / kVectors, i % kVectors));
    }
    EXPECT_EQ(of_weight.size(), 8U) << "copy of W, " << kVectors << " vectors";
    EXPECT_EQ(of_x.size(), 8U) << "copy of x, " << kVectors << " vectors";
  }
}

TEST(Gemm, SharedMemoryHasNoBankConflicts) {
  expect_all_banks<LargeTile::kVectors>();
  expect_all_banks<MediumTile::kVectors>();
  expect_all_banks<NarrowTile::kVectors>();
}

TEST(Gemm, NoRowsAreNoWork) {
  DeviceBench bench;
  const ops::RandomWeights weights(quant::Format::bf16, 35, 64, 5);
  const ops::LinearWeight packed = bench.pack({weights.source()}, "bf16");
  ops::LinearArgs args{};
  args.weight = packed.segments[0];
  args.x.type = ops::ActType::bf16;
  args.x.cols = 64;
  gemm(args);
}

TEST(Gemm, TilesFillTheDevice) {
  EXPECT_EQ(choose_gemm_tile(9, 2048), GemmTile::narrow);
  EXPECT_EQ(choose_gemm_tile(16, 8192), GemmTile::wide);
  EXPECT_EQ(choose_gemm_tile(32, 128256), GemmTile::wide);  // not half a tile of 128 or 64 rows
  EXPECT_EQ(choose_gemm_tile(64, 8192), GemmTile::medium);
  EXPECT_EQ(choose_gemm_tile(512, 2048), GemmTile::medium);
  EXPECT_EQ(choose_gemm_tile(2048, 2048), GemmTile::large);
}

// Through the table of the backend, as the engine has it: on a GPU the only way there is.
TEST(ManyRows, LinearMatchesReference) {
  for (const quant::Format format : {quant::Format::f32, quant::Format::bf16, quant::Format::f16}) {
    for (const char* act : {"f32", "bf16"}) {
      for (const int rows : {9, 65}) {
        DeviceBench bench;
        const ops::RandomWeights weights(format, 33, 72, 5);
        const ops::LinearWeight packed = bench.pack({weights.source()}, act);
        const Matrix x = Matrix::random(rows, 72, 6);
        const DeviceMatrix on_device(bench, x), out(bench, Matrix(rows, 33, kUntouched));
        ops::linear(out.view(), ops::prepare(on_device.view(), packed.act_type, bench.ctx), packed.segments[0],
                    Tensor(), false, bench.ctx);
        ops::expect_close(out.host(), expected_of(weights, act, x), 3e-6, act);
      }
    }
  }
}

}  // namespace
}  // namespace nb::cuda
