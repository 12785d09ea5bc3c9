// Shared by the operator tests: a context for a backend, random tensors, packed random weights.
//
// For tests only.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "ops/backends.h"
#include "ops/ops.h"
#include "quant/format.h"
#include "quant/kv_format.h"

namespace nb::ops {

/// Everything needed to run operators of one backend on `num_threads` threads.
struct Bench {
  explicit Bench(const std::string& name, int num_threads = 1)
      : backend(find_backend(name)),
        pool(num_threads),
        workspace(CachingPool::create()),
        arena(HostArena::create()),
        ctx{backend.kernels, &pool, &workspace} {}

  const Backend& backend;
  ThreadPool pool;
  Workspace workspace;
  std::shared_ptr<HostArena> arena;
  ExecContext ctx;
};

/// A matrix of values that owns its memory.
struct Matrix {
  Matrix(std::int64_t rows, std::int64_t cols, float fill = 0.0f)
      : values(static_cast<std::size_t>(rows * cols), fill), num_rows(rows), num_cols(cols) {}

  static Matrix random(std::int64_t rows, std::int64_t cols, unsigned seed, float scale = 1.0f) {
    Matrix matrix(rows, cols);
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal(0.0f, scale);
    for (float& value : matrix.values) value = normal(engine);
    return matrix;
  }

  Tensor view() { return Tensor(values.data(), DType::f32, {num_rows, num_cols}); }
  Tensor vector() { return Tensor(values.data(), DType::f32, {num_rows * num_cols}); }
  float at(std::int64_t row, std::int64_t col) const { return values[static_cast<std::size_t>(row * num_cols + col)]; }

  std::vector<float> values;
  std::int64_t num_rows, num_cols;
};

/// Random weights in file layout, and sources over them for pack_linear.
struct RandomWeights {
  RandomWeights(quant::Format weight_format, int num_rows, int num_cols, unsigned seed)
      : format(weight_format), rows(num_rows), cols(num_cols) {
    const Matrix values = Matrix::random(rows, cols, seed, 0.3f);
    const std::int64_t row_bytes = quant::row_bytes(format, cols);
    bytes.resize(static_cast<std::size_t>(row_bytes * rows));
    for (int r = 0; r < rows; ++r) {
      quant::pack_row(format, values.values.data() + static_cast<std::ptrdiff_t>(r) * cols, cols,
                      bytes.data() + r * row_bytes);
    }
  }

  MatrixSource source() const {
    const std::int64_t row_bytes = quant::row_bytes(format, cols);
    return {"random",
            format,
            rows,
            cols,
            [this, row_bytes](std::int32_t begin, std::int32_t count, std::byte* out) {
              std::memcpy(out, bytes.data() + begin * row_bytes, static_cast<std::size_t>(count * row_bytes));
            },
            {}};
  }

  quant::Format format;
  int rows, cols;
  std::vector<std::uint8_t> bytes;
};

inline LinearWeight pack(Bench& bench, std::vector<MatrixSource> group, const std::string& act,
                         Grouping grouping = Grouping::stacked) {
  return pack_linear(group, grouping, act, bench.backend.kernels->layout, *bench.arena, bench.pool);
}

/// A rotation table of `positions` rows for heads of `dim`: see RopeTable.
inline std::vector<float> make_rotations(int dim, int positions) {
  std::vector<float> table(static_cast<std::size_t>(dim * positions));
  for (int p = 0; p < positions; ++p) {
    for (int i = 0; i < dim / 2; ++i) {
      const double angle = p * std::pow(10000.0, -2.0 * i / dim);
      table[static_cast<std::size_t>(p * dim + i)] = static_cast<float>(std::cos(angle));
      table[static_cast<std::size_t>(p * dim + dim / 2 + i)] = static_cast<float>(std::sin(angle));
    }
  }
  return table;
}

/// Names of usable backends of the CPU except the reference. A Bench has host memory only.
inline std::vector<std::string> fast_backends() {
  std::vector<std::string> names;
  for (const Backend& backend : compiled_backends()) {
    if (backend.usable() && backend.device.kind == DeviceKind::cpu && backend.name != "reference") {
      names.push_back(backend.name);
    }
  }
  return names;
}

/// The same and the reference: all but devices.
inline std::vector<std::string> cpu_backends() {
  std::vector<std::string> names = fast_backends();
  names.push_back("reference");
  return names;
}

/// Whether this build has the backend and this machine can run it.
inline bool is_usable(const std::string& name) {
  const auto names = available_backends();
  return std::find(names.begin(), names.end(), name) != names.end();
}

/// Formats of keys and values that store a token by itself. (Those that do not: int4_kv_test.cpp.)
inline std::vector<quant::KvFormat> kv_formats() {
  return {quant::KvFormat::f32, quant::KvFormat::bf16, quant::KvFormat::f16, quant::KvFormat::int8,
          quant::KvFormat::mixed};
}

/// How far attention may be off the reference, relative to the largest output. A table that multiplies bf16 pairs
/// rounds queries and weights to bf16 where keys and values are: 2^-8 each, and little more in a sum. What meets codes
/// is rounded to 2^-15 of its peak; and codes and minima are larger than what is left of them in a sum.
inline double attention_tolerance(const std::string& backend, quant::KvFormat format) {
  if (format == quant::KvFormat::f32) return 5e-6;
  if (format == quant::KvFormat::f16) return 3e-5;
  if (format != quant::KvFormat::bf16) return 4e-4;
  return find_backend(backend).kernels->packs_bf16 ? 6e-3 : 3e-5;
}

inline void expect_close(const Matrix& actual, const Matrix& expected, double tolerance, const std::string& what) {
  double scale = 1e-6;
  for (float value : expected.values) scale = std::max(scale, static_cast<double>(std::fabs(value)));
  double worst = 0.0;
  for (std::size_t i = 0; i < expected.values.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(actual.values[i]) - expected.values[i]);
    worst = std::isnan(difference) ? 1e30 : std::max(worst, difference / scale);
  }
  EXPECT_LE(worst, tolerance) << what;
}

inline bool same_bits(const Matrix& a, const Matrix& b) {
  return a.values.size() == b.values.size() &&
         std::memcmp(a.values.data(), b.values.data(), a.values.size() * sizeof(float)) == 0;
}

class EveryBackend : public testing::TestWithParam<std::string> {};

inline std::string backend_test_name(const testing::TestParamInfo<std::string>& info) { return info.param; }

}  // namespace nb::ops
