// quantize.cpp: the search against exhaustive and plain oracles, the layout against the table of formats.
#include "quant/quantize.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/code_of.h"
#include "base/dtype.h"

namespace nb::quant {
namespace {

std::vector<float> normal(std::size_t count, unsigned seed, float scale = 0.05f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> draw(0.0f, scale);
  std::vector<float> out(count);
  for (float& value : out) value = draw(engine);
  return out;
}

// Importances as activations have them: most alike, a few far above.
std::vector<float> skewed(std::size_t count, unsigned seed) {
  std::vector<float> out = normal(count, seed, 1.0f);
  for (float& value : out) value = std::exp(2.0f * value);
  return out;
}

double weighted_error(const std::vector<float>& weights, const std::vector<float>& importance,
                      const std::vector<float>& unpacked) {
  double sum = 0.0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const double off = static_cast<double>(weights[i]) - static_cast<double>(unpacked[i]);
    sum += static_cast<double>(importance[i]) * off * off;
  }
  return sum;
}

std::vector<float> unpack(Format format, const std::vector<std::uint8_t>& packed, std::size_t cols) {
  std::vector<float> out(cols);
  unpack_row(format, packed.data(), static_cast<std::int64_t>(cols), out.data());
  return out;
}

std::vector<std::uint8_t> packed_row(Format format, const std::vector<float>& row, const float* importance) {
  ThreadPool pool(1);
  const auto cols = static_cast<std::int64_t>(row.size());
  std::vector<std::uint8_t> out(static_cast<std::size_t>(row_bytes(format, cols)));
  quantize_rows(format, row.data(), 1, cols, importance, out.data(), pool);
  return out;
}

// The best line of a fine grid over scale and minimum, nearest codes: slow, and without least squares.
double grid_error(const std::vector<float>& weights, const std::vector<float>& importance) {
  const auto [low, high] = std::minmax_element(weights.begin(), weights.end());
  const double range = static_cast<double>(*high) - static_cast<double>(*low);
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i <= 40; ++i) {
    for (int j = 0; j <= 40; ++j) {
      const double from = static_cast<double>(*low) + range * 0.4 * i / 40;
      const double to = static_cast<double>(*high) - range * 0.4 * j / 40;
      if (to <= from) continue;
      const double d = static_cast<double>(f16_to_f32(f32_to_f16(static_cast<float>((to - from) / 15))));
      const double m = static_cast<double>(f16_to_f32(f32_to_f16(static_cast<float>(from))));
      double error = 0.0;
      for (std::size_t k = 0; k < weights.size(); ++k) {
        const double w = static_cast<double>(weights[k]);
        const double off = w - (d * std::clamp(std::round((w - m) / d), 0.0, 15.0) + m);
        error += static_cast<double>(importance[k]) * off * off;
      }
      best = std::min(best, error);
    }
  }
  return best;
}

TEST(QuantizeW4, IsAboutAsGoodAsAnExhaustiveGrid) {
  double ours = 0.0, grid = 0.0, plain = 0.0;
  for (unsigned seed = 0; seed < 40; ++seed) {
    const std::vector<float> weights = normal(64, seed), importance = skewed(64, seed + 1000);
    const std::vector<std::uint8_t> packed = packed_row(Format::w4, weights, importance.data());
    const double error = weighted_error(weights, importance, unpack(Format::w4, packed, 64));
    const double exhaustive = grid_error(weights, importance);
    EXPECT_LE(error, 1.5 * exhaustive) << seed;
    ours += error, grid += exhaustive;
    std::vector<std::uint8_t> rounded(36);
    pack_row(Format::w4, weights.data(), 64, rounded.data());
    plain += weighted_error(weights, importance, unpack(Format::w4, rounded, 64));
  }
  EXPECT_LE(ours, 1.05 * grid);
  EXPECT_LE(ours, 0.75 * plain);
}

TEST(QuantizeW4, ImportanceMovesTheErrorAway) {
  std::vector<float> weights = normal(64, 3), importance(64, 1.0f);
  for (std::size_t i = 0; i < 8; ++i) importance[i] = 1000.0f;
  const auto error_of_first = [&](const float* weighting) {
    const std::vector<float> unpacked = unpack(Format::w4, packed_row(Format::w4, weights, weighting), 64);
    double sum = 0.0;
    for (std::size_t i = 0; i < 8; ++i) sum += std::pow(static_cast<double>(weights[i] - unpacked[i]), 2);
    return sum;
  };
  EXPECT_LE(error_of_first(importance.data()), 0.6 * error_of_first(nullptr));
}

TEST(QuantizeW4, ValuesOnALineComeBackExactly) {
  std::vector<float> weights(64);
  for (std::size_t i = 0; i < 64; ++i) weights[i] = 0.25f * static_cast<float>(i * 7 % 16) - 1.5f;
  EXPECT_EQ(unpack(Format::w4, packed_row(Format::w4, weights, nullptr), 64), weights);
  const std::vector<float> constant(64, 0.5f), zero(64, 0.0f);
  EXPECT_EQ(unpack(Format::w4, packed_row(Format::w4, constant, nullptr), 64), constant);
  EXPECT_EQ(unpack(Format::w4, packed_row(Format::w4, zero, nullptr), 64), zero);
}

TEST(QuantizeW8, IsNoWorseThanTheLargestWeightSays) {
  for (const Format format : {Format::w8, Format::w8_channel}) {
    for (unsigned seed = 0; seed < 20; ++seed) {
      const std::vector<float> weights = normal(192, seed), importance = skewed(192, seed + 50);
      const std::vector<float> ours = unpack(format, packed_row(format, weights, importance.data()), 192);
      std::vector<std::uint8_t> rounded(static_cast<std::size_t>(row_bytes(format, 192)));
      pack_row(format, weights.data(), 192, rounded.data());
      EXPECT_LE(weighted_error(weights, importance, ours),
                1.0001 * weighted_error(weights, importance, unpack(format, rounded, 192)));
      for (std::size_t i = 0; i < 192; ++i) EXPECT_NEAR(ours[i], weights[i], 0.015) << i;
    }
  }
  const std::vector<float> odd = normal(19, 1);  // a channel of any length
  const std::vector<float> back = unpack(Format::w8_channel, packed_row(Format::w8_channel, odd, nullptr), 19);
  for (std::size_t i = 0; i < 19; ++i) EXPECT_NEAR(back[i], odd[i], 0.001) << i;
  const std::vector<float> zero(64, 0.0f);
  EXPECT_EQ(unpack(Format::w8, packed_row(Format::w8, zero, nullptr), 64), zero);
}

TEST(QuantizeRows, ThreadsChangeNoBit) {
  const std::vector<float> weights = normal(37 * 128, 9), importance = skewed(128, 10);
  for (const Format format : {Format::w4, Format::w8, Format::bf16}) {
    std::vector<std::vector<std::uint8_t>> results;
    std::vector<double> errors;
    for (const int threads : {1, 2, 5}) {
      ThreadPool pool(threads);
      results.emplace_back(static_cast<std::size_t>(37 * row_bytes(format, 128)));
      quantize_rows(format, weights.data(), 37, 128, importance.data(), results.back().data(), pool);
      const PackingError error = packing_error(format, weights.data(), results.back().data(), 37, 128, pool);
      errors.push_back(error.squared_error);
      EXPECT_GT(error.squared_norm, error.squared_error);
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
    EXPECT_EQ(errors[0], errors[1]);
    EXPECT_EQ(errors[0], errors[2]);
  }
}

TEST(QuantizeRows, ReportsTheErrorThereIs) {
  const std::vector<float> weights = {1.0f, 1.0f + 1.0f / 256, -2.0f, 0.0f};
  ThreadPool pool(1);
  std::vector<std::uint8_t> packed(8);
  quantize_rows(Format::bf16, weights.data(), 2, 2, nullptr, packed.data(), pool);
  const PackingError error = packing_error(Format::bf16, weights.data(), packed.data(), 2, 2, pool);
  EXPECT_DOUBLE_EQ(error.squared_error, 1.0 / 65536);  // 1 + 1/256 is halfway; even is 1
  EXPECT_NEAR(error.squared_norm, 6.0078277587890625, 1e-12);
}

TEST(QuantizeRows, RefusesWhatAFormatCannotHold) {
  ThreadPool pool(2);
  std::vector<float> rows = normal(3 * 64, 2);
  std::vector<std::uint8_t> out(4096);
  const auto pack = [&](Format format, std::int64_t cols) {
    quantize_rows(format, rows.data(), 3, cols, nullptr, out.data(), pool);
  };
  EXPECT_EQ(code_of([&] { pack(Format::w4, 63); }), ErrorCode::invalid_argument);
  EXPECT_EQ(code_of([&] { pack(Format::q4_0, 64); }), ErrorCode::unsupported);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 70000.0f}) {
    rows[130] = bad;
    for (const Format format : {Format::w4, Format::f16}) {
      EXPECT_EQ(code_of([&] { pack(format, 64); }), ErrorCode::invalid_argument);
    }
  }
  pack(Format::f32, 64);  // 70000 is fine here
  try {
    pack(Format::w4, 64);
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("row 2"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace nb::quant
