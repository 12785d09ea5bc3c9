// Products of few rows: against the reference, bit for bit over the number of rows, and fused against its parts.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "cuda/operators.h"
#include "cuda_emulation/device_cells.h"
#include "cuda_emulation/device_fixture.h"
#include "quant/kv_format.h"

namespace nb::cuda {
namespace {

using ops::Matrix;
using quant::Format;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr Format kFormats[] = {Format::f32, Format::bf16, Format::f16,
                               Format::w8_channel};  // with any number of columns
constexpr const char* kActs[] = {"f32", "bf16"};

// A bench whose fused operators are composed of small ones.
struct ComposedBench : DeviceBench {
  ComposedBench() : table(ops::with_fused(*backend.kernels, {})) { ctx.kernels = &table; }
  ops::KernelTable table;
};

// Rows in memory that is wider than they are; what lies between them must stay as it is.
struct GuardedRows {
  static constexpr int kGap = 3;
  GuardedRows(const DeviceBench& bench, int rows, int cols, float fill)
      : num_rows(rows), num_cols(cols), start(rows + 1, cols + kGap, fill), memory(bench, start) {}

  Tensor view() const {
    Tensor tensor(memory.view().data, DType::f32, {num_rows, num_cols});
    tensor.row_stride = num_cols + kGap;
    return tensor;
  }
  // The rows; tells of writes beside them.
  Matrix host() const {
    const Matrix all = memory.host();
    Matrix rows(num_rows, num_cols);
    for (int r = 0; r <= num_rows; ++r) {
      for (int c = 0; c < num_cols + kGap; ++c) {
        const float value = all.at(r, c);
        if (r < num_rows && c < num_cols) {
          rows.values[static_cast<std::size_t>(r * num_cols + c)] = value;
        } else {
          EXPECT_EQ(std::memcmp(&value, start.values.data(), sizeof(value)), 0) << "written at " << r << ", " << c;
        }
      }
    }
    return rows;
  }

  int num_rows, num_cols;
  Matrix start;
  DeviceMatrix memory;
};

Matrix first_rows(const Matrix& all, int rows) {
  Matrix some(rows, all.num_cols);
  std::copy_n(all.values.begin(), some.values.size(), some.values.begin());
  return some;
}

struct LinearCase {
  Format format;
  const char* act;
  int rows, cols;  // of the weight
  bool with_bias, accumulate;
};

std::string name_of(const LinearCase& c) {
  return std::string(quant::to_string(c.format)) + " x " + c.act + ", " + std::to_string(c.rows) + " x " +
         std::to_string(c.cols);
}

constexpr int kMostRows = 17;

Matrix reference_linear(const LinearCase& c, const ops::RandomWeights& weights, Matrix& x, Matrix& bias) {
  ops::Bench reference("reference");
  const ops::LinearWeight packed = ops::pack(reference, {weights.source()}, c.act);
  Matrix out(x.num_rows, c.rows, c.accumulate ? 0.25F : 0.0F);
  ops::linear(out.view(), ops::prepare(x.view(), packed.act_type, reference.ctx), packed.segments[0],
              c.with_bias ? bias.vector() : Tensor(), c.accumulate, reference.ctx);
  return out;
}

// All of kMostRows rows against the reference, then each smaller number of rows against those bits.
void check_linear(const LinearCase& c, std::initializer_list<int> counts) {
  const ops::RandomWeights weights(c.format, c.rows, c.cols, 5);
  Matrix x = Matrix::random(kMostRows, c.cols, 6, 2.0F), bias = Matrix::random(1, c.rows, 7);
  const Matrix expected = reference_linear(c, weights, x, bias);
  Matrix most(kMostRows, c.rows);
  for (const int rows : counts) {
    in_both_orders([&] {
      DeviceBench bench;
      bench.ctx.kernels = bench.backend.deterministic;  // the others take another kernel above 8 rows
      const ops::LinearWeight packed = bench.pack({weights.source()}, c.act);
      const DeviceMatrix on_device(bench, first_rows(x, rows)), biases(bench, bias);
      const GuardedRows out(bench, rows, c.rows, c.accumulate ? 0.25F : kNan);
      ops::linear(out.view(), ops::prepare(on_device.view(), packed.act_type, bench.ctx), packed.segments[0],
                  c.with_bias ? biases.vector() : Tensor(), c.accumulate, bench.ctx);
      const Matrix got = out.host();
      if (rows == kMostRows) {
        ops::expect_close(got, expected, 2e-6, name_of(c));
        most = got;
      } else {
        EXPECT_TRUE(ops::same_bits(got, first_rows(most, rows))) << name_of(c) << ", " << rows << " rows";
      }
    });
  }
}

TEST(Gemv, LinearMatchesReferenceAndRowsAreIndependent) {
  bool flag = false;
  for (const Format format : kFormats) {
    for (const char* act : kActs) {
      for (const int cols : {1, 7, 8, 33, 64, 576, 1000}) {
        flag = !flag;
        check_linear({format, act, cols % 2 == 0 ? 7 : 5, cols, flag, cols % 3 == 1}, {kMostRows, 1, 2, 3, 5, 8, 9});
      }
    }
  }
}

TEST(Gemv, CodesHaveAScaleFor32Columns) {
  for (const Format format : {Format::q8_0, Format::w8}) {
    for (const char* act : kActs) {
      for (const int cols : {64, 320, 2112}) check_linear({format, act, 7, cols, true, false}, {kMostRows, 1, 3, 8});
    }
  }
  check_linear({Format::q8_0, "f32", 6, 32, false, false}, {kMostRows, 1, 2});
}

TEST(Gemv, EveryNumberOfRowsAndOfOutputs) {
  for (const int rows : {1, 2, 3, 4, 6, 9}) {
    check_linear({Format::bf16, "bf16", rows, 72, true, true}, {kMostRows, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16});
  }
}

TEST(Gemv, LongRowsTakeSeveralTurns) {
  check_linear({Format::f32, "f32", 5, 2100, false, false}, {kMostRows, 1, 2, 4, 8});
  check_linear({Format::bf16, "bf16", 3, 4200, true, false}, {kMostRows, 1, 2, 4, 8});
}

TEST(Gemv, DeterministicProductHasTheSameBits) {
  DeviceBench bench;
  const ops::RandomWeights weights(Format::bf16, 9, 100, 5);
  const ops::LinearWeight packed = bench.pack({weights.source()}, "bf16");
  const DeviceMatrix x(bench, Matrix::random(kMostRows, 100, 6));
  const ops::Activation act = ops::prepare(x.view(), packed.act_type, bench.ctx);
  const DeviceMatrix all(bench, Matrix(kMostRows, 9, kNan)), one(bench, Matrix(1, 9, kNan));
  bench.backend.deterministic->linear({packed.segments[0], act, nullptr, false, all.view().as<float>(), 9}, {});
  ops::Activation last = act;
  last.rows = 1;
  last.values = reinterpret_cast<float*>(reinterpret_cast<std::uint16_t*>(act.values) + (kMostRows - 1) * act.cols);
  bench.backend.deterministic->linear({packed.segments[0], last, nullptr, false, one.view().as<float>(), 9}, {});
  const Matrix whole = all.host(), single = one.host();
  for (int i = 0; i < 9; ++i) EXPECT_EQ(whole.at(kMostRows - 1, i), single.at(0, i));
}

// A product with a matrix whose rows take turns with another's, as the composed gate and up have it.
TEST(Gemv, RowsInTurn) {
  for (const int rows : {1, 6, 35}) {
    const ops::RandomWeights gate(Format::bf16, rows, 40, 1), up(Format::bf16, rows, 40, 2);
    Matrix x = Matrix::random(3, 40, 3), none(1, 1);
    DeviceBench bench;
    const ops::LinearWeight packed = bench.pack({gate.source(), up.source()}, "bf16", ops::Grouping::interleaved32);
    const DeviceMatrix on_device(bench, x);
    const ops::Activation act = ops::prepare(on_device.view(), packed.act_type, bench.ctx);
    for (const bool second : {false, true}) {
      const GuardedRows out(bench, 3, rows, kNan);
      ops::linear(out.view(), act, packed.segments[second ? 1 : 0], Tensor(), false, bench.ctx);
      const LinearCase c{Format::bf16, "bf16", rows, 40, false, false};
      ops::expect_close(out.host(), reference_linear(c, second ? up : gate, x, none), 2e-6, "rows in turn");
    }
  }
}

// ---- output projection ----

void check_linear_residual(const LinearCase& c, int rows) {
  const ops::RandomWeights weights(c.format, c.rows, c.cols, 5);
  Matrix x = Matrix::random(kMostRows, c.cols, 6, 2.0F), bias = Matrix::random(1, c.rows, 7);
  const auto run = [&](DeviceBench& bench) {
    const ops::LinearWeight packed = bench.pack({weights.source()}, c.act);
    const DeviceMatrix on_device(bench, first_rows(x, rows)), biases(bench, bias);
    const GuardedRows residual(bench, rows, c.rows, 0.25F);
    ops::linear_residual(residual.view(), on_device.view(), packed, c.with_bias ? biases.vector() : Tensor(),
                         bench.ctx);
    return residual.host();
  };
  ComposedBench composed;
  const Matrix parts = run(composed);
  ops::expect_close(parts, first_rows(reference_linear(c, weights, x, bias), rows), 2e-6, name_of(c));
  in_both_orders([&] {
    DeviceBench bench;
    EXPECT_TRUE(ops::same_bits(run(bench), parts)) << name_of(c) << ", " << rows << " rows";
  });
}

TEST(Gemv, LinearResidualEqualsItsParts) {
  for (const Format format : kFormats) {
    for (const char* act : kActs) {
      for (int rows = 1; rows <= 8; ++rows) {
        check_linear_residual({format, act, 7, rows % 2 == 0 ? 33 : 136, rows % 3 != 0, true}, rows);
      }
    }
  }
  check_linear_residual({Format::bf16, "bf16", 2115, 7, false, true}, 3);  // several units a block
  check_linear_residual({Format::f32, "f32", 3, 3100, true, true}, 7);     // more rows than can be staged at once
  EXPECT_TRUE(emulation::has_run("linear_residual_kernel"));
}

// ---- q, k, v ----

struct QkvCase {
  Format format = Format::bf16;
  const char* act = "bf16";
  int hidden = 40, heads = 2, kv_heads = 1, dim = 16;
  bool with_bias = false, with_norms = false;
  quant::KvFormat kv_format = quant::KvFormat::bf16;
};

struct QkvResult {
  Matrix q;
  std::vector<std::uint8_t> cells;
};

constexpr int kBlocks = 4;
constexpr int kPositions = 50;
const std::vector<std::int32_t> kSlots = {63, 0, 17, 18, 5, 40, 33, 62};
const std::vector<std::int32_t> kKeyPositions = {0, 49, 3, 3, 17, 8, 21, 48};

struct QkvInputs {
  explicit QkvInputs(const QkvCase& c)
      : q(c.format, c.heads * c.dim, c.hidden, 1),
        k(c.format, c.kv_heads * c.dim, c.hidden, 2),
        v(c.format, c.kv_heads * c.dim, c.hidden, 3),
        x(Matrix::random(8, c.hidden, 4, 3.0F)),
        gain(Matrix::random(1, c.hidden, 5)),
        q_bias(Matrix::random(1, q.rows, 6)),
        k_bias(Matrix::random(1, k.rows, 7)),
        v_bias(Matrix::random(1, k.rows, 8)),
        q_norm(Matrix::random(1, c.dim, 9)),
        k_norm(Matrix::random(1, c.dim, 10)),
        angles(Matrix::random(kPositions, c.dim, 11)) {}

  ops::RandomWeights q, k, v;
  Matrix x, gain, q_bias, k_bias, v_bias, q_norm, k_norm, angles;
};

QkvResult run_on_device(const QkvCase& c, const QkvInputs& in, int rows, DeviceBench& bench) {
  const ops::LinearWeight packed = bench.pack({in.q.source(), in.k.source(), in.v.source()}, c.act);
  const DeviceMatrix x(bench, first_rows(in.x, rows)), gain(bench, in.gain), angles(bench, in.angles);
  const DeviceMatrix q_bias(bench, in.q_bias), k_bias(bench, in.k_bias), v_bias(bench, in.v_bias);
  const DeviceMatrix q_norm(bench, in.q_norm), k_norm(bench, in.k_norm);
  ops::QkvExtras extras;
  if (c.with_bias) extras.q_bias = q_bias.vector(), extras.k_bias = k_bias.vector(), extras.v_bias = v_bias.vector();
  if (c.with_norms) extras.q_norm = q_norm.vector(), extras.k_norm = k_norm.vector();
  const std::int64_t stride = layer_bytes(c.kv_format, c.kv_heads, c.dim) + 64;
  QkvResult result{Matrix(1, 1), std::vector<std::uint8_t>(static_cast<std::size_t>(kBlocks * stride), 0xa5)};
  const Buffer cells = copy_to(bench.memory, result.cells.data(), result.cells.size());
  const ops::KvLayer kv = layer_of(c.kv_format, c.kv_heads, c.dim, cells.as<std::uint8_t>(), stride);
  const DeviceMatrix q_out(bench, Matrix(rows, in.q.rows, kNan));  // norms of heads want rows without gaps
  ops::norm_qkv(q_out.view(), kv, x.view(), {gain.vector(), 1e-5F}, packed, extras,
                std::span(kKeyPositions).first(static_cast<std::size_t>(rows)),
                std::span(kSlots).first(static_cast<std::size_t>(rows)), {angles.view().as<float>(), c.dim, kPositions},
                bench.ctx);
  result.q = q_out.host();
  bench.memory.copy_out(result.cells.data(), cells.data(), result.cells.size());
  return result;
}

QkvResult run_on_reference(const QkvCase& c, QkvInputs& in, int rows) {
  ops::Bench bench("reference");
  const ops::LinearWeight packed = ops::pack(bench, {in.q.source(), in.k.source(), in.v.source()}, c.act);
  ops::QkvExtras extras;
  if (c.with_bias) {
    extras.q_bias = in.q_bias.vector(), extras.k_bias = in.k_bias.vector(), extras.v_bias = in.v_bias.vector();
  }
  if (c.with_norms) extras.q_norm = in.q_norm.vector(), extras.k_norm = in.k_norm.vector();
  const std::int64_t stride = layer_bytes(c.kv_format, c.kv_heads, c.dim) + 64;
  QkvResult result{Matrix(rows, in.q.rows),
                   std::vector<std::uint8_t>(static_cast<std::size_t>(kBlocks * stride), 0xa5)};
  Matrix x = first_rows(in.x, rows);
  ops::norm_qkv(
      result.q.view(), layer_of(c.kv_format, c.kv_heads, c.dim, result.cells.data(), stride), x.view(),
      {in.gain.vector(), 1e-5F}, packed, extras, std::span(kKeyPositions).first(static_cast<std::size_t>(rows)),
      std::span(kSlots).first(static_cast<std::size_t>(rows)), {in.angles.values.data(), c.dim, kPositions}, bench.ctx);
  return result;
}

// The cells as numbers; f32 cells only.
Matrix numbers(const std::vector<std::uint8_t>& cells) {
  Matrix values(1, static_cast<std::int64_t>(cells.size() / sizeof(float)));
  std::memcpy(values.values.data(), cells.data(), cells.size());
  return values;
}

void check_qkv(const QkvCase& c, std::initializer_list<int> counts) {
  const std::string name = std::string(quant::to_string(c.format)) + " x " + c.act + ", heads of " +
                           std::to_string(c.dim) + ", KV " + quant::to_string(c.kv_format) +
                           (c.with_bias ? ", bias" : "") + (c.with_norms ? ", norms" : "");
  QkvInputs in(c);
  for (const int rows : counts) {
    ComposedBench composed;
    const QkvResult parts = run_on_device(c, in, rows, composed);
    const QkvResult expected = run_on_reference(c, in, rows);
    const double tolerance = std::string(c.act) == "f32" ? 2e-6 : 4e-3;  // a norm may round to another bf16
    ops::expect_close(parts.q, expected.q, tolerance, name + ": q");
    if (c.kv_format == quant::KvFormat::f32) {
      ops::expect_close(numbers(parts.cells), numbers(expected.cells), tolerance, name + ": cells");
    }
    in_both_orders([&] {
      DeviceBench bench;
      const QkvResult got = run_on_device(c, in, rows, bench);
      EXPECT_TRUE(ops::same_bits(got.q, parts.q)) << name << ", " << rows << " rows";
      EXPECT_EQ(got.cells, parts.cells) << name << ", " << rows << " rows";
    });
  }
}

TEST(Gemv, NormQkvEqualsItsParts) {
  for (const Format format : kFormats) {
    for (const char* act : kActs) {
      check_qkv({.format = format, .act = act, .with_bias = true, .kv_format = quant::KvFormat::f32}, {1, 2, 3, 8});
    }
  }
  for (int rows = 1; rows <= 8; ++rows) check_qkv({.hidden = 33, .with_bias = rows % 2 == 0}, {rows});
}

TEST(Gemv, NormQkvOfEveryHeadSize) {
  for (const int dim : {2, 10, 16, 64, 96, 128}) {
    for (const bool with_norms : {false, true}) {
      check_qkv({.heads = dim > 64 ? 2 : 3, .dim = dim, .with_bias = dim == 64, .with_norms = with_norms}, {1, 5});
      check_qkv({.act = "f32",
                 .heads = 2,
                 .kv_heads = 2,
                 .dim = dim,
                 .with_bias = dim == 96,
                 .with_norms = with_norms,
                 .kv_format = quant::KvFormat::f32},
                {2});
    }
  }
  for (const auto format : {quant::KvFormat::f16, quant::KvFormat::int8, quant::KvFormat::mixed}) {
    for (const bool with_norms : {false, true}) {
      QkvCase c{.heads = 2, .kv_heads = 2, .dim = 80, .with_bias = true, .with_norms = with_norms, .kv_format = format};
      check_qkv(c, {1, 7});
    }
  }
  EXPECT_TRUE(emulation::has_run("norm_qkv_kernel"));
  EXPECT_TRUE(emulation::has_run("finish_heads_kernel"));
}

TEST(Gemv, NormQkvOfManyRowsOrLongOnes) {
  check_qkv({.hidden = 9, .heads = 31, .kv_heads = 2, .dim = 64}, {2});  // several units a block
  check_qkv({.format = Format::f32, .act = "f32", .hidden = 3100, .heads = 1, .dim = 4}, {7});
}

// ---- gate and up ----

struct GateUpCase {
  Format format = Format::bf16;
  const char* act = "bf16";
  int hidden = 40, inner = 35;
  ops::ActType down = ops::ActType::bf16;
};

void check_gate_up(const GateUpCase& c, int rows) {
  const std::string name = std::string(quant::to_string(c.format)) + " x " + c.act + ", inner " +
                           std::to_string(c.inner) + ", " + std::to_string(rows) + " rows";
  const ops::RandomWeights gate(c.format, c.inner, c.hidden, 1), up(c.format, c.inner, c.hidden, 2);
  Matrix x = Matrix::random(rows, c.hidden, 3, 2.0F), gain = Matrix::random(1, c.hidden, 4);
  const auto run = [&](DeviceBench& bench) {
    const ops::LinearWeight packed = bench.pack({gate.source(), up.source()}, c.act, ops::Grouping::interleaved32);
    const DeviceMatrix on_device(bench, x), gains(bench, gain);
    const ops::Activation out = ops::norm_gate_up(on_device.view(), {gains.vector(), 1e-5F}, packed, c.down, bench.ctx);
    EXPECT_EQ(out.cols % 32, 0);
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(rows * out.cols) *
                                    (c.down == ops::ActType::bf16 ? 2U : 4U));
    bench.memory.copy_out(bytes.data(), out.values, bytes.size());
    return bytes;
  };
  ComposedBench composed;
  const std::vector<std::uint8_t> parts = run(composed);
  if (c.down == ops::ActType::f32) {
    ops::Bench reference("reference");
    const ops::LinearWeight packed =
        ops::pack(reference, {gate.source(), up.source()}, c.act, ops::Grouping::interleaved32);
    const ops::Activation out = ops::norm_gate_up(x.view(), {gain.vector(), 1e-5F}, packed, c.down, reference.ctx);
    Matrix expected(rows, out.cols);
    std::copy_n(out.values, expected.values.size(), expected.values.begin());
    Matrix got = expected;
    std::memcpy(got.values.data(), parts.data(), parts.size());
    ops::expect_close(got, expected, std::string(c.act) == "f32" ? 2e-6 : 4e-3, name);
  }
  in_both_orders([&] {
    DeviceBench bench;
    EXPECT_EQ(run(bench), parts) << name;
  });
}

TEST(Gemv, NormGateUpEqualsItsParts) {
  for (const Format format : kFormats) {
    for (const char* act : kActs) {
      for (int rows = 1; rows <= 8; ++rows) {
        check_gate_up(
            {format, act, rows % 2 == 0 ? 40 : 33, 20 + rows, rows % 3 == 0 ? ops::ActType::bf16 : ops::ActType::f32},
            rows);
      }
    }
  }
  for (const int inner : {1, 31, 32, 33, 64}) check_gate_up({.inner = inner}, 2);
  check_gate_up({.hidden = 5, .inner = 1100}, 3);  // several units a block
  check_gate_up({.format = Format::f32, .act = "f32", .hidden = 3100, .inner = 3}, 7);
  EXPECT_TRUE(emulation::has_run("norm_gate_up_kernel"));
}

// ---- the head ----

struct HeadResult {
  Matrix logits;
  std::vector<std::int32_t> best;
};

HeadResult run_head(DeviceBench& bench, const ops::RandomWeights& weights, const char* act, const Matrix& x,
                    const std::vector<std::int32_t>& row_ids, const Matrix& gain, bool with_logits) {
  const ops::LinearWeight packed = bench.pack({weights.source()}, act);
  const DeviceMatrix on_device(bench, x), gains(bench, gain);
  const GuardedRows logits(bench, static_cast<int>(row_ids.size()), weights.rows, 7.0F);
  std::vector<std::int32_t> best(row_ids.size(), -1);
  ops::head(with_logits ? logits.view() : Tensor(), best, on_device.view(), row_ids, {gains.vector(), 1e-5F}, packed,
            bench.ctx);
  return {logits.host(), best};
}

void check_head(Format format, const char* act, int vocab, int hidden, int rows) {
  const ops::RandomWeights weights(format, vocab, hidden, 1);
  Matrix x = Matrix::random(9, hidden, 2, 2.0F), gain = Matrix::random(1, hidden, 3);
  const std::vector<std::int32_t> all = {8, 0, 3, 3, 1, 7, 2, 5};
  const std::vector<std::int32_t> row_ids(all.begin(), all.begin() + rows);
  ComposedBench composed;
  const HeadResult parts = run_head(composed, weights, act, x, row_ids, gain, true);
  ops::Bench reference("reference");
  Matrix expected(rows, vocab);
  std::vector<std::int32_t> best(row_ids.size());
  ops::head(expected.view(), best, x.view(), row_ids, {gain.vector(), 1e-5F},
            ops::pack(reference, {weights.source()}, act), reference.ctx);
  ops::expect_close(parts.logits, expected, std::string(act) == "f32" ? 2e-6 : 4e-3, "head");
  in_both_orders([&] {
    DeviceBench bench, another;
    const HeadResult got = run_head(bench, weights, act, x, row_ids, gain, true);
    EXPECT_TRUE(ops::same_bits(got.logits, parts.logits)) << vocab << " x " << hidden << ", " << rows << " rows";
    EXPECT_EQ(got.best, parts.best) << vocab << " x " << hidden << ", " << rows << " rows";
    EXPECT_EQ(run_head(another, weights, act, x, row_ids, gain, false).best, parts.best);
  });
}

TEST(Gemv, HeadEqualsItsParts) {
  for (const Format format : kFormats) {
    for (const char* act : kActs) {
      for (int rows = 1; rows <= 8; ++rows) check_head(format, act, 19 + rows, rows % 2 == 0 ? 40 : 33, rows);
    }
  }
  for (const int vocab : {1, 2, 3, 5}) check_head(Format::bf16, "bf16", vocab, 8, 2);
  check_head(Format::bf16, "bf16", 4999, 8, 3);  // several units a block, more blocks than threads
  check_head(Format::f32, "f32", 5, 3100, 7);    // more rows than can be staged at once
  EXPECT_TRUE(emulation::has_run("head_kernel"));
  EXPECT_TRUE(emulation::has_run("head_argmax_kernel"));
}

// With one column, logit v of a row is weight v with the sign of the row.
TEST(Gemv, HeadTakesTheLowerIdAndNeverNan) {
  constexpr int kVocab = 4500;
  const auto with = [](std::initializer_list<std::pair<int, float>> values, float rest) {
    ops::RandomWeights weights(Format::f32, kVocab, 1, 1);
    std::vector<float> column(kVocab, rest);
    for (const auto& [id, value] : values) column[static_cast<std::size_t>(id)] = value;
    std::memcpy(weights.bytes.data(), column.data(), weights.bytes.size());
    return weights;
  };
  Matrix x(3, 1), gain(1, 1, 1.0F);
  x.values = {1.0F, -1.0F, 0.0F};
  const std::vector<std::int32_t> row_ids = {0, 1, 2};
  const auto expect_best = [&](const ops::RandomWeights& weights, const std::vector<std::int32_t>& expected) {
    in_both_orders([&] {
      DeviceBench bench;
      ComposedBench composed;
      EXPECT_EQ(run_head(bench, weights, "f32", x, row_ids, gain, false).best, expected);
      EXPECT_EQ(run_head(composed, weights, "f32", x, row_ids, gain, true).best, expected);
    });
  };
  // Equals in one unit, in units of one block, in blocks that one thread sees, and in others.
  expect_best(with({{9, 5.0F}, {10, 5.0F}, {4400, -5.0F}, {3, -4.0F}}, 0.5F), {9, 4400, 0});
  expect_best(with({{4499, 5.0F}, {2001, 5.0F}, {600, -5.0F}, {603, -5.0F}, {0, kNan}}, 0.5F), {2001, 600, 1});
  expect_best(with({{1111, 5.0F}, {2612, 5.0F}, {700, -5.0F}, {601, -5.0F}, {5, kNan}}, 0.5F), {1111, 601, 0});
  expect_best(with({{77, -3.0F}}, kNan), {77, 77, 77});
  expect_best(with({}, kNan), {0, 0, 0});
  expect_best(with({}, -kInf), {0, 0, 0});  // minus infinity, plus infinity, NaN
}

}  // namespace
}  // namespace nb::cuda
