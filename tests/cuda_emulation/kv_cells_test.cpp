// Keys and values in every format on the device: the codes and scales of the reference, and what attention reads.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "base/ids.h"
#include "cuda_emulation/device_cells.h"
#include "cuda_emulation/device_fixture.h"
#include "ops/naive_kv.h"

namespace nb::cuda {
namespace {

using ops::Matrix;
using quant::KvFormat;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr KvFormat kTokenFormats[] = {KvFormat::f16, KvFormat::int8, KvFormat::mixed};

/// Tokens of sizes from the smallest numbers to beyond what halves hold, zeros, ranges of zero, and a few that are not
/// finite in one dimension.
Matrix of_every_size(int tokens, int cols, unsigned seed, bool all_finite) {
  Matrix x = Matrix::random(tokens, cols, seed);
  const float sizes[] = {1.0F, 1e-3F, 6e4F, 1e-6F, 3e-7F, 1e3F, 1e-8F, 5e5F, 3e9F, 1e-40F, 1e37F};
  for (int t = 0; t < tokens; ++t) {
    for (int i = 0; i < cols; ++i) {
      float& value = x.values[static_cast<std::size_t>(t * cols + i)];
      if (t % 13 == 11) value = 0.0F;
      if (t % 13 == 12) value = -1.7F;
      if (t % 13 == 10) value = std::fabs(value) + 40.0F;
      value *= sizes[(t + static_cast<int>(seed)) % 11];
    }
    if (all_finite || t % 9 != 4) continue;
    x.values[static_cast<std::size_t>(t * cols + t * 5 % cols)] = t % 2 == 0   ? kNan
                                                                  : t % 4 == 1 ? kInfinity
                                                                               : -kInfinity;
  }
  return x;
}

TEST(KvCells, ATokenHasTheCodesAndScalesOfTheReference) {
  constexpr int kBlocks = 4, kHeads = 2, kTokens = 40;
  for (const KvFormat format : kTokenFormats) {
    for (const int dim : {8, 16, 24, 64, 80, 128, 200, 256}) {
      const std::int64_t stride = layer_bytes(format, kHeads, dim) + 64;
      const auto layer = [&](std::uint8_t* base) { return layer_of(format, kHeads, dim, base, stride); };
      Matrix k = of_every_size(kTokens, kHeads * dim, 7, false), v = of_every_size(kTokens, kHeads * dim, 8, false);
      std::vector<std::int32_t> slots;
      for (int t = 0; t < kTokens; ++t) slots.push_back(t * 23 % (kBlocks * kBlockTokens));
      std::vector<std::uint8_t> stored(static_cast<std::size_t>(kBlocks * stride), 0);
      ops::Bench reference("reference");
      ops::kv_write(layer(stored.data()), k.view(), v.view(), slots, reference.ctx);
      std::vector<std::uint8_t> nothing(stored.size(), 0), got(stored.size());
      nothing = device_cells(nothing, layer(nothing.data()));
      in_both_orders([&] {
        DeviceBench bench;
        const Buffer cells = copy_to(bench.memory, nothing.data(), nothing.size());
        const DeviceMatrix keys(bench, k), values(bench, v);
        ops::kv_write(layer(cells.as<std::uint8_t>()), keys.view(), values.view(), slots, bench.ctx);
        bench.memory.copy_out(got.data(), cells.data(), got.size());
        EXPECT_EQ(got, device_cells(stored, layer(stored.data()))) << quant::to_string(format) << ", heads of " << dim;
      });
    }
  }
}

TEST(KvCells, OddHeadsAreRefused) {
  DeviceBench bench;
  const DeviceMatrix k(bench, Matrix(1, 12)), v(bench, Matrix(1, 12));
  const std::vector<std::int32_t> slots = {0};
  const Buffer cells = copy_to(bench.memory, std::vector<std::uint8_t>(8192).data(), 8192);
  for (const KvFormat format : kTokenFormats) {
    try {
      ops::kv_write(layer_of(format, 1, 12, cells.as<std::uint8_t>(), 8192), k.view(), v.view(), slots, bench.ctx);
      ADD_FAILURE() << quant::to_string(format);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::unsupported);
    }
  }
}

/// One sequence of two heads that share keys and values, stored and attended to on the device; nothing is rotated.
struct Sequence {
  Sequence(KvFormat kv_format, int head_dim, int tokens)
      : format(kv_format),
        dim(head_dim),
        k(Matrix::random(tokens, head_dim, 1)),
        v(Matrix::random(tokens, head_dim, 2)),
        q(Matrix::random(tokens, 2 * head_dim, 3, 1.5F)) {}

  int tokens() const { return static_cast<int>(k.num_rows); }

  Matrix attend(int window, int hidden_token = -1, bool deterministic = false) {
    DeviceBench bench;
    ops::KernelTable table = *bench.backend.kernels;
    if (deterministic) table.attention = bench.backend.deterministic->attention;
    bench.ctx.kernels = &table;
    const int num_blocks = (tokens() + kBlockTokens - 1) / kBlockTokens;
    const std::int64_t stride = layer_bytes(format, 1, dim);
    const std::vector<std::uint8_t> zeros(static_cast<std::size_t>(num_blocks * stride), 0);
    const Buffer cells = copy_to(bench.memory, zeros.data(), zeros.size());
    const ops::KvLayer layer = layer_of(format, 1, dim, cells.as<std::uint8_t>(), stride);
    std::vector<std::int32_t> positions(static_cast<std::size_t>(tokens())), blocks, slots;
    std::iota(positions.begin(), positions.end(), 0);
    for (int b = 0; b < num_blocks; ++b) blocks.push_back(num_blocks - 1 - b);
    for (int t = 0; t < tokens(); ++t) {
      slots.push_back(blocks[static_cast<std::size_t>(t / kBlockTokens)] * kBlockTokens + t % kBlockTokens);
    }
    Matrix still(tokens(), dim);
    for (std::size_t i = 0; i < still.values.size(); ++i) {
      still.values[i] = static_cast<int>(i) % dim < dim / 2 ? 1.0F : 0.0F;
    }
    const DeviceMatrix keys(bench, k), values(bench, v), queries(bench, q), angles(bench, still);
    ops::kv_write(layer, keys.view(), values.view(), slots, bench.ctx);
    std::vector<ops::AttentionRun> runs = {{0, tokens(), 0}};
    std::vector<std::uint16_t> hidden(static_cast<std::size_t>(num_blocks), 0);
    if (hidden_token >= 0) {
      hidden[static_cast<std::size_t>(hidden_token / kBlockTokens)] =
          static_cast<std::uint16_t>(1U << hidden_token % kBlockTokens);
      runs[0].hidden_begin = 0;
    }
    const std::vector<ops::AttentionSegment> segments = {{0, tokens(), 0, 1}};
    const DeviceMatrix out(bench, Matrix(tokens(), 2 * dim, -3.0F));
    ops::attention(out.view(), queries.view(), 2, 1.0F / std::sqrt(static_cast<float>(dim)), window,
                   {angles.view().as<float>(), dim, tokens()}, layer, {positions, segments, runs, blocks, {}, hidden},
                   bench.ctx);
    return out.host();
  }

  KvFormat format;
  int dim;
  Matrix k, v, q;
};

// Who sees one key gets its value, as the definition says it is kept.
TEST(KvCells, ARowThatSeesOneKeyGetsItsStoredValue) {
  for (const KvFormat format : kTokenFormats) {
    for (const int dim : {24, 64, 96}) {
      Sequence sequence(format, dim, 44);
      sequence.v = of_every_size(44, dim, 8, true);
      const Matrix out = sequence.attend(1, -1, true);  // by the kernel of single rows, which rounds nothing
      for (int t = 0; t < 44; ++t) {
        const auto first = sequence.v.values.begin() + t * dim;
        const std::vector<double> kept = ops::naive_stored(format, false, {first, first + dim});
        double peak = 0.0;
        for (const double value : kept) peak = std::max(peak, std::fabs(value));
        for (int i = 0; i < 2 * dim; ++i) {
          ASSERT_NEAR(out.at(t, i), kept[static_cast<std::size_t>(i % dim)], 1e-6 * peak)
              << quant::to_string(format) << ", token " << t << ", dimension " << i << " of " << dim;
        }
      }
    }
  }
}

// An infinity or a NaN is the token's own misfortune: who does not see it, before it, behind a window or because it is
// hidden, has the bits as without it, and who sees it gets NaN. Heads of 64 take the kernel on tensor cores.
TEST(KvCells, WhatIsNotFiniteConcernsWhoSeesIt) {
  constexpr int kTokens = 90, kBad = 37, kWindow = 20;
  for (const KvFormat format : kTokenFormats) {
    for (const int dim : {32, 64}) {
      Sequence sequence(format, dim, kTokens);
      const Matrix good = sequence.attend(kWindow), without = sequence.attend(kWindow, kBad);
      for (const bool in_keys : {false, true}) {
        Sequence bad = sequence;
        (in_keys ? bad.k : bad.v).values[static_cast<std::size_t>(kBad * dim + 5)] = in_keys ? kNan : -kInfinity;
        const Matrix out = bad.attend(kWindow);
        for (int t = 0; t < kTokens; ++t) {
          for (int i = 0; i < 2 * dim; ++i) {
            if (t < kBad || t >= kBad + kWindow) {
              ASSERT_EQ(out.at(t, i), good.at(t, i)) << quant::to_string(format) << ", " << t << ", " << i;
            } else if (i % dim == 5) {
              ASSERT_TRUE(std::isnan(out.at(t, i))) << quant::to_string(format) << ", " << t << ", " << i;
            }
          }
        }
        EXPECT_TRUE(ops::same_bits(bad.attend(kWindow, kBad), without)) << quant::to_string(format) << ", " << dim;
      }
    }
  }
}

}  // namespace
}  // namespace nb::cuda
