#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <utility>

#include "base/dtype.h"
#include "base/ids.h"
#include "cuda_emulation/device_cells.h"
#include "cuda_emulation/device_fixture.h"
#include "quant/kv_format.h"

namespace nb::cuda {
namespace {

using ops::Matrix;

TEST(Elementwise, EmbedGivesBackRowsOfEveryFormat) {
  for (const quant::Format format :
       {quant::Format::f32, quant::Format::bf16, quant::Format::f16, quant::Format::w8_channel}) {
    for (const int cols : {1, 8, 40, 130}) {
      DeviceBench bench;
      const ops::RandomWeights weights(format, 7, cols, 1);
      const ops::LinearWeight table = bench.pack({weights.source()}, "auto");
      const std::vector<std::int32_t> ids = {6, 0, 3, 3};
      in_both_orders([&] {
        DeviceMatrix out(bench, Matrix(4, cols, -1.0F));
        ops::embed(out.view(), table, ids, bench.ctx);
        const Matrix got = out.host();
        Matrix row(1, cols);
        for (int t = 0; t < 4; ++t) {
          quant::unpack_row(format,
                            weights.bytes.data() + ids[static_cast<std::size_t>(t)] * quant::row_bytes(format, cols),
                            cols, row.values.data());
          for (int i = 0; i < cols; ++i) EXPECT_EQ(got.at(t, i), row.at(0, i));
        }
      });
    }
  }
}

TEST(Elementwise, QuantizedTablesAreSignedBytesOrBecomeBf16) {
  using quant::Format;
  const std::pair<Format, Format> expected[] = {{Format::q8_0, Format::q8_0},
                                                {Format::w8, Format::q8_0},
                                                {Format::w8_channel, Format::q8_0},
                                                {Format::q4_0, Format::bf16},
                                                {Format::fp8_e4m3, Format::bf16}};
  for (const auto& [format, on_device] : expected) {
    DeviceBench bench;
    const ops::RandomWeights weights(format, 5, 64, 1);
    const ops::LinearWeight table = bench.pack({weights.source()}, "auto");
    EXPECT_EQ(table.segments[0].format, on_device) << quant::to_string(format);
    EXPECT_EQ(table.act_type, ops::ActType::bf16);
  }
}

TEST(Elementwise, GroupsOfSeveralFormatsBecomeOne) {
  using quant::Format;
  const auto format_of = [](Format first, Format second) {
    DeviceBench bench;
    const ops::RandomWeights one(first, 5, 64, 1), other(second, 5, 64, 2);
    const ops::LinearWeight both = bench.pack({one.source(), other.source()}, "auto");
    EXPECT_EQ(both.segments[0].format, both.segments[1].format);
    return both.segments[0].format;
  };
  EXPECT_EQ(format_of(Format::q8_0, Format::w8), Format::q8_0);
  EXPECT_EQ(format_of(Format::q8_0, Format::q4_0), Format::bf16);
  EXPECT_EQ(format_of(Format::bf16, Format::q8_0), Format::bf16);
  EXPECT_EQ(format_of(Format::q8_0, Format::f16), Format::f32);
}

TEST(Elementwise, RmsNormMatchesReference) {
  for (const int cols : {1, 31, 128, 129, 576}) {
    DeviceBench bench;
    ops::Bench reference("reference");
    Matrix x = Matrix::random(3, cols, 1, 4.0F), weight = Matrix::random(1, cols, 2), expected(3, cols);
    ops::rms_norm(expected.view(), x.view(), {weight.vector(), 1e-5F}, reference.ctx);
    const DeviceMatrix on_device(bench, x), gains(bench, weight);
    in_both_orders([&] {
      const DeviceMatrix out(bench, Matrix(3, cols));
      ops::rms_norm(out.view(), on_device.view(), {gains.vector(), 1e-5F}, bench.ctx);
      ops::expect_close(out.host(), expected, 1e-6, "rms_norm");
    });
  }
}

TEST(Elementwise, PrepareRoundsAndPadsRows) {
  for (const int cols : {1, 32, 33, 200}) {
    DeviceBench bench;
    Matrix x = Matrix::random(3, cols, 10);
    x.values[0] = std::bit_cast<float>(0x3f808000u);  // halfway between two numbers of bf16, the lower one is even
    x.values[1] = std::bit_cast<float>(0x3f818000u);  // the same, the upper one is even
    const DeviceMatrix on_device(bench, x);
    in_both_orders([&] {
      for (const ops::ActType type : {ops::ActType::f32, ops::ActType::bf16}) {
        const ops::Activation act = ops::prepare(on_device.view(), type, bench.ctx);
        ASSERT_EQ(act.cols, (cols + 31) / 32 * 32);
        const std::size_t count = static_cast<std::size_t>(act.rows * act.cols);
        std::vector<float> got(count);
        if (type == ops::ActType::bf16) {
          std::vector<std::uint16_t> bits(count);
          bench.memory.copy_out(bits.data(), act.values, 2 * count);
          std::transform(bits.begin(), bits.end(), got.begin(), bf16_to_f32);
        } else {
          bench.memory.copy_out(got.data(), act.values, 4 * count);
        }
        for (int row = 0; row < 3; ++row) {
          for (int col = 0; col < act.cols; ++col) {
            float expected = col < cols ? x.at(row, col) : 0.0F;
            if (type == ops::ActType::bf16) expected = bf16_to_f32(f32_to_bf16(expected));
            ASSERT_EQ(got[static_cast<std::size_t>(row * act.cols + col)], expected) << row << ", " << col;
          }
        }
      }
    });
  }
}

TEST(Elementwise, RopeMatchesReference) {
  for (const int dim : {2, 64, 96, 128}) {
    DeviceBench bench;
    ops::Bench reference("reference");
    Matrix table = Matrix::random(9, dim, 3), x = Matrix::random(4, 3 * dim, 4);
    const std::vector<std::int32_t> positions = {0, 8, 3, 3};
    const DeviceMatrix on_device(bench, x), angles(bench, table);
    ops::rope(x.view(), positions, {table.values.data(), dim, 9}, reference.ctx);
    ops::rope(on_device.view(), positions, {angles.view().as<float>(), dim, 9}, bench.ctx);
    ops::expect_close(on_device.host(), x, 1e-6, "rope");
  }
}

TEST(Elementwise, SiluMulMatchesReference) {
  DeviceBench bench;
  ops::Bench reference("reference");
  Matrix gate = Matrix::random(3, 130, 5, 20.0F), up = Matrix::random(3, 130, 6), expected(3, 130);
  ops::silu_mul(expected.view(), gate.view(), up.view(), reference.ctx);
  const DeviceMatrix gates(bench, gate), ups(bench, up);
  ops::silu_mul(gates.view(), gates.view(), ups.view(), bench.ctx);
  ops::expect_close(gates.host(), expected, 1e-6, "silu_mul");
}

TEST(Elementwise, KvWriteStoresCellsAsTheReferenceDoes) {
  for (const quant::KvFormat format : {quant::KvFormat::f32, quant::KvFormat::bf16}) {
    DeviceBench bench;
    ops::Bench reference("reference");
    constexpr int kHeads = 2, kDim = 24, kBlocks = 3;
    const std::int64_t cell = quant::kv_format_info(format).key_cell_bytes(kDim), stride = 2 * kHeads * cell;
    Matrix k = Matrix::random(3, kHeads * kDim, 7), v = Matrix::random(3, kHeads * kDim, 8);
    const std::vector<std::int32_t> slots = {47, 0, 17};
    std::vector<std::uint8_t> expected(static_cast<std::size_t>(kBlocks * stride), 0), got(expected.size());
    const Buffer cells = copy_to(bench.memory, expected.data(), expected.size());
    ops::kv_write({expected.data(), stride, cell, cell, kHeads, kDim, format}, k.view(), v.view(), slots,
                  reference.ctx);
    const DeviceMatrix keys(bench, k), values(bench, v);
    ops::kv_write({cells.as<std::uint8_t>(), stride, cell, cell, kHeads, kDim, format}, keys.view(), values.view(),
                  slots, bench.ctx);
    bench.memory.copy_out(got.data(), cells.data(), got.size());
    EXPECT_EQ(got, expected);
  }
}

// Rows around the number of warps of a block, heads around a warp; slots repeat, and blocks of the sides differ in
// size.
TEST(Elementwise, KeyDeviationMatchesReference) {
  constexpr int kBlocks = 3;
  for (const quant::KvFormat format : ops::kv_formats()) {
    for (const auto& [heads, dim] : {std::pair{1, 8}, {2, 24}, {3, 64}, {2, 96}, {1, 136}}) {
      DeviceBench bench;
      ops::Bench reference("reference");
      struct Side {
        std::int64_t stride;
        std::vector<std::uint8_t> bytes;
        Buffer copy;
      };
      const auto make = [&](int layers, unsigned seed) {
        Side side{layer_bytes(format, heads, dim) * layers, {}, {}};
        side.bytes.resize(static_cast<std::size_t>(kBlocks * side.stride));
        Matrix k = Matrix::random(kBlocks * kBlockTokens, heads * dim, seed),
               v = Matrix::random(k.num_rows, k.num_cols, 9);
        std::vector<std::int32_t> slots(static_cast<std::size_t>(k.num_rows));
        std::iota(slots.begin(), slots.end(), 0);
        const ops::KvLayer layer = layer_of(format, heads, dim, side.bytes.data(), side.stride);
        ops::kv_write(layer, k.view(), v.view(), slots, reference.ctx);
        const std::vector<std::uint8_t> stored = device_cells(side.bytes, layer);
        side.copy = copy_to(bench.memory, stored.data(), stored.size());
        return side;
      };
      Side a = make(1, 1), b = make(2, 2);
      const auto host = [&](Side& side) { return layer_of(format, heads, dim, side.bytes.data(), side.stride); };
      const auto device = [&](Side& side) {
        return layer_of(format, heads, dim, side.copy.as<std::uint8_t>(), side.stride);
      };
      for (const int rows : {1, 4, 5, 35}) {
        std::vector<std::int32_t> slots_a, slots_b;
        for (int t = 0; t < rows; ++t) {
          slots_a.push_back(t * 29 % (t % 5 == 4 ? 1 : kBlocks * kBlockTokens));
          slots_b.push_back(t * 37 % (t % 4 == 3 ? 17 : kBlocks * kBlockTokens));
        }
        std::vector<float> expected(static_cast<std::size_t>(rows)), got(expected.size(), -1.0F), first;
        ops::key_deviation(expected, host(a), slots_a, host(b), slots_b, reference.ctx);
        in_both_orders([&] {
          bench.workspace.reset();
          ops::key_deviation(got, device(a), slots_a, device(b), slots_b, bench.ctx);
          for (std::size_t t = 0; t < got.size(); ++t) {
            ASSERT_NEAR(got[t], expected[t], 1e-6 * expected[t]) << heads << " heads of " << dim << ", row " << t;
            float alone = -1.0F;
            ops::key_deviation({&alone, 1}, device(a), std::span(slots_a).subspan(t, 1), device(b),
                               std::span(slots_b).subspan(t, 1), bench.ctx);
            EXPECT_EQ(alone, got[t]) << "the bits of a row depend on its neighbours";
          }
          if (first.empty()) first = got;
          EXPECT_EQ(got, first);
        });
      }
    }
  }
}

TEST(Elementwise, ArgmaxTakesTheLowerIdAndNeverNan) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();
  for (const int cols : {1, 31, 256, 257, 1000}) {
    DeviceBench bench;
    ops::Bench reference("reference");
    Matrix x = Matrix::random(5, cols, 9);
    const auto set = [&](int row, int col, float value) {
      x.values[static_cast<std::size_t>(row * cols + col % cols)] = value;
    };
    set(0, cols - 1, 50.0F);
    set(1, 300, 50.0F);
    set(1, 5, 50.0F);
    set(2, 7, kNan);
    for (int i = 0; i < cols; ++i) set(3, i, kNan);
    for (int i = 0; i < cols; ++i) set(4, i, -kInf);
    std::vector<std::int32_t> expected(5), got(5);
    ops::argmax(expected, x.view(), reference.ctx);
    const DeviceMatrix on_device(bench, x);
    in_both_orders([&] {
      ops::argmax(got, on_device.view(), bench.ctx);
      EXPECT_EQ(got, expected) << cols;
    });
  }
}

}  // namespace
}  // namespace nb::cuda
