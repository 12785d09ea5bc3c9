#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "base/ids.h"
#include "cuda/operators.h"
#include "cuda_emulation/device_fixture.h"
#include "ops/ops.h"
#include "quant/kv_format.h"

namespace nb::cuda {
namespace {

using ops::AttentionRun;
using ops::AttentionSegment;
using ops::Matrix;
using quant::KvFormat;

// Sequences with contexts in shuffled blocks, and the rows that query them.
struct Problem {
  int num_heads, num_kv_heads, head_dim;
  KvFormat format;
  struct Sequence {
    int context;  // keys of the last run, of which the last `rows` belong to the query rows
    int rows;
    std::vector<int> earlier_runs = {};  // lengths of the runs before it, each at the offset where the one before ends
  };
  std::vector<Sequence> sequences;
  int window = 0;
  bool is_composed = false;  // runs begin late and have hidden keys, and the last one has positions with gaps
};

std::string name_of(const Problem& problem) {
  std::string name = std::to_string(problem.num_heads) + "/" + std::to_string(problem.num_kv_heads) + " heads of " +
                     std::to_string(problem.head_dim) + (problem.format == KvFormat::f32 ? " f32" : " bf16") +
                     " window " + std::to_string(problem.window) + (problem.is_composed ? " composed" : "");
  for (const Problem::Sequence& s : problem.sequences) {
    name += ", " + std::to_string(s.rows) + " rows of " + std::to_string(s.context);
    for (const int run : s.earlier_runs) name += " + " + std::to_string(run);
  }
  return name;
}

// Everything of a problem in host memory. The cells were written by the reference backend; those of the device are the
// same. Blocks that no run names are NaN, unused cells of the others zero, as the engine leaves them.
class Setting {
 public:
  explicit Setting(const Problem& problem)
      : problem_(problem),
        reference_("reference"),
        rotations_(ops::make_rotations(problem.head_dim, kPositions)),
        q_(0, 0) {
    int num_blocks = 0;
    for (const auto& sequence : problem.sequences) {
      num_blocks += (sequence.context + 15) / 16 + 1;
      for (const int length : sequence.earlier_runs) num_blocks += (length + 15) / 16;
    }
    std::vector<int32_t> order(static_cast<std::size_t>(num_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::mt19937 random(4);
    std::shuffle(order.begin(), order.end(), random);
    cell_bytes_ = quant::kv_format_info(problem.format).key_cell_bytes(problem.head_dim);
    stride_ = 2 * problem.num_kv_heads * cell_bytes_;
    cells_.assign(static_cast<std::size_t>(num_blocks * stride_), 0xff);  // NaN in both formats
    for (const auto& sequence : problem.sequences) add(sequence, order);
    q_ = Matrix::random(static_cast<int>(positions.size()), problem.num_heads * problem.head_dim, 55, 1.5F);
  }

  ops::KvLayer layer(std::uint8_t* base) const {
    return {base, stride_, cell_bytes_, cell_bytes_, problem_.num_kv_heads, problem_.head_dim, problem_.format};
  }

  Matrix expected() {
    Matrix out(q_.num_rows, q_.num_cols, -3.0F);
    attend(out.view(), q_.view(), rotations_.data(), cells_.data(), segments, positions, reference_.ctx);
    return out;
  }

  // All rows, or one of them alone with all its runs.
  Matrix on_device(DeviceBench& bench, int only_row = -1) {
    if (only_row < 0) return on_device(bench, segments, positions, q_);
    std::vector<AttentionSegment> asked;
    for (const AttentionSegment& s : segments) {
      if (only_row >= s.row_begin && only_row < s.row_begin + s.row_count) asked = {{0, 1, s.run_begin, s.run_count}};
    }
    Matrix q(1, q_.num_cols);
    std::copy_n(q_.values.begin() + only_row * q_.num_cols, q_.num_cols, q.values.begin());
    return on_device(bench, asked, {positions[static_cast<std::size_t>(only_row)]}, q);
  }

  // All rows, where segments that are long enough come as two long ones, the first of which has `first` rows.
  Matrix in_slices(DeviceBench& bench, int first) {
    std::vector<AttentionSegment> asked;
    for (const AttentionSegment& s : segments) {
      const bool cut = s.row_count - first > ops::kDecodeRows;
      asked.push_back({s.row_begin, cut ? first : s.row_count, s.run_begin, s.run_count});
      if (cut) asked.push_back({s.row_begin + first, s.row_count - first, s.run_begin, s.run_count});
    }
    return on_device(bench, asked, positions, q_);
  }

  std::vector<AttentionSegment> segments;
  std::vector<int32_t> positions;

 private:
  static constexpr int kPositions = 1300;

  Matrix on_device(DeviceBench& bench, const std::vector<AttentionSegment>& asked, const std::vector<int32_t>& at,
                   const Matrix& q) {
    const Buffer cells = copy_to(bench.memory, cells_.data(), cells_.size());
    const Buffer rotations = copy_to(bench.memory, rotations_.data(), rotations_.size() * sizeof(float));
    const DeviceMatrix queries(bench, q);
    const DeviceMatrix out(bench, Matrix(q.num_rows, q.num_cols, std::numeric_limits<float>::quiet_NaN()));
    attend(out.view(), queries.view(), rotations.as<float>(), cells.as<std::uint8_t>(), asked, at, bench.ctx);
    bench.workspace.reset();  // its copies of the arrays above are those of this step
    return out.host();
  }

  void add(const Problem::Sequence& sequence, const std::vector<int32_t>& order) {
    const auto run_begin = static_cast<int32_t>(runs_.size());
    int offset = 0;
    for (const int length : sequence.earlier_runs) {
      add_run(length, offset, false, order);
      offset += length;
    }
    const int last = add_run(sequence.context, offset, true, order);
    segments.push_back({static_cast<int32_t>(positions.size()), sequence.rows, run_begin,
                        static_cast<int32_t>(runs_.size()) - run_begin});
    for (int i = 0; i < sequence.rows; ++i) positions.push_back(last + 1 - sequence.rows + i);
  }

  // Returns the position of the last key.
  int add_run(int keys, int offset, bool is_last, const std::vector<int32_t>& order) {
    AttentionRun run{static_cast<int32_t>(blocks_.size()), keys, offset};
    std::vector<int32_t> slots, local;
    for (int i = 0; i < keys; ++i) {
      if (i % kBlockTokens == 0) {
        blocks_.push_back(order[blocks_.size()]);
        std::fill_n(cells_.begin() + blocks_.back() * stride_, stride_, std::uint8_t{0});
      }
      slots.push_back(blocks_.back() * kBlockTokens + i % kBlockTokens);
      local.push_back(i);
    }
    if (problem_.is_composed) {
      run.first_key = std::min(keys, keys % 21);
      hide_keys(run);
    }
    if (problem_.is_composed && is_last) {
      run.position_offset = 0;
      run.positions_begin = static_cast<int32_t>(key_positions_.size());
      for (int i = 0; i < keys; ++i) local[static_cast<std::size_t>(i)] = offset + i + i / 5 * 2;
      key_positions_.insert(key_positions_.end(), local.begin(), local.end());
    }
    runs_.push_back(run);
    if (keys == 0) return offset - 1;
    const int cols = problem_.num_kv_heads * problem_.head_dim;
    Matrix k = Matrix::random(keys, cols, seed_++), v = Matrix::random(keys, cols, seed_++);
    ops::rope(k.view(), local, {rotations_.data(), problem_.head_dim, kPositions}, reference_.ctx);
    ops::kv_write(layer(cells_.data()), k.view(), v.view(), slots, reference_.ctx);
    return run.positions_begin < 0 ? offset + local.back() : local.back();
  }

  // All keys of a run of 48, of the second split and of some tiles; none or some of other blocks.
  void hide_keys(AttentionRun& run) {
    run.hidden_begin = static_cast<int32_t>(hidden_.size());
    for (int block = 0; block < (run.num_keys + 15) / 16; ++block) {
      const bool all = run.num_keys == 48 || block / 16 == 1 || block % 14 / 4 == 1;
      const auto some = static_cast<uint16_t>(random_() | 1U);
      hidden_.push_back(all ? uint16_t{0xffff} : block % 7 < 4 ? uint16_t{0} : some);
    }
  }

  void attend(Tensor out, Tensor q, const float* rotations, std::uint8_t* cells,
              const std::vector<AttentionSegment>& asked, const std::vector<int32_t>& at, ops::ExecContext& ctx) {
    ops::attention(out, q, problem_.num_heads, 1.0F / std::sqrt(static_cast<float>(problem_.head_dim)), problem_.window,
                   {rotations, problem_.head_dim, kPositions}, layer(cells),
                   {at, asked, runs_, blocks_, key_positions_, hidden_}, ctx);
  }

  Problem problem_;
  ops::Bench reference_;
  std::vector<float> rotations_;
  std::vector<std::uint8_t> cells_;
  std::int64_t cell_bytes_ = 0, stride_ = 0;
  std::vector<AttentionRun> runs_;
  std::vector<int32_t> blocks_, key_positions_;
  std::vector<uint16_t> hidden_;
  std::mt19937 random_{5};
  unsigned seed_ = 100;
  Matrix q_;
};

// A bench whose table attends in another way.
struct OtherBench : DeviceBench {
  OtherBench() : table(*backend.kernels) { ctx.kernels = &table; }
  ops::KernelTable table;
};

struct DeterministicBench : OtherBench {
  DeterministicBench() { table.attention = backend.deterministic->attention; }
};

// Never has a block for every split: gets no room for their states.
struct UncutBench : OtherBench {
  UncutBench() {
    table.attention_scratch_bytes = [](const ops::AttentionArgs&, int) -> std::int64_t { return 0; };
  }
};

// Has room for the splits of two rows only.
struct NarrowBench : OtherBench {
  NarrowBench() {
    table.attention_scratch_bytes = [](const ops::AttentionArgs& a, int) {
      return std::int64_t{2} * a.num_heads * a.max_splits * (a.kv.head_dim + 2) * 4 + 100;
    };
  }
};

bool is_row_of(const Matrix& all, int row, const Matrix& alone) {
  return std::memcmp(alone.values.data(), all.values.data() + row * all.num_cols,
                     alone.values.size() * sizeof(float)) == 0;
}

// The kernel of single rows is f32 throughout. What the kernel on tensor cores rounds to bf16 (8 significant bits, so
// by up to 2^-9): a rotated query, which moves a score by a sum of D such errors, of a standard deviation of about
// 0.001 with the scores here (their own is 1.5), and a weight by that factor; and the weight itself. Four deviations
// and 2^-9 together are 0.6 %; the largest error of these cases is 0.4 %.
constexpr double kExact = 1e-5;
constexpr double kRounded = 1e-2;

double tolerance_of(const Problem& problem) {
  const bool is_long = std::any_of(problem.sequences.begin(), problem.sequences.end(),
                                   [](const auto& s) { return s.rows > ops::kDecodeRows; });
  return is_long && problem.format == KvFormat::bf16 && problem.head_dim >= 64 ? kRounded : kExact;
}

// Composed contexts, with windows beside; a row each that sees nothing at all.
std::vector<Problem> composed_decode_problems() {
  std::vector<Problem> problems;
  for (const int window : {0, 1, 40, 300}) {
    for (const KvFormat format : {KvFormat::f32, KvFormat::bf16}) {
      problems.push_back({3, 1, 16, format, {{270, 3, {300, 17}}, {70, 8}, {20, 1, {33, 48, 64}}}, window, true});
      problems.push_back({5, 1, 64, format, {{40, 2, {20, 600}}, {20, 3, {257, 16}}}, window, true});
    }
  }
  return problems;
}

std::vector<Problem> composed_prefill_problems() {
  std::vector<Problem> problems;
  for (const int window : {0, 1, 40, 300}) {
    problems.push_back({3, 1, 64, KvFormat::bf16, {{270, 14, {300, 17}}, {70, 70}}, window, true});
    problems.push_back({1, 1, 128, KvFormat::bf16, {{40, 10, {20, 560}}, {20, 20, {48, 64}}}, window, true});
    problems.push_back({2, 1, 32, KvFormat::f32, {{290, 12, {33, 48, 70}}}, window, true});
  }
  return problems;
}

std::vector<Problem> with(std::vector<Problem> problems, const std::vector<Problem>& more) {
  problems.insert(problems.end(), more.begin(), more.end());
  return problems;
}

const std::vector<Problem>& decode_problems() {
  static const std::vector<Problem> plain = {
      {1, 1, 16, KvFormat::f32, {{1, 1}}},
      {4, 4, 8, KvFormat::bf16, {{17, 2}, {15, 1}, {0, 0}, {16, 3}}},
      {3, 1, 64, KvFormat::bf16, {{1, 1}, {15, 1}, {16, 1}, {17, 1}, {255, 1}, {256, 1}, {257, 1}, {511, 1}, {600, 1}}},
      {6, 2, 64, KvFormat::f32, {{600, 3}, {257, 1}}},
      {8, 1, 64, KvFormat::bf16, {{300, 2}, {5, 5}}},
      {4, 1, 96, KvFormat::bf16, {{257, 1}, {511, 1}, {40, 8}}},
      {8, 1, 96, KvFormat::f32, {{300, 1}}},
      {4, 1, 128, KvFormat::bf16, {{600, 1}, {17, 1}}},
      {8, 1, 128, KvFormat::bf16, {{257, 1}}},
      {2, 1, 128, KvFormat::f32, {{300, 1}}},
      {7, 1, 128, KvFormat::f32, {{100, 1}}},
      {11, 1, 24, KvFormat::bf16, {{70, 1}}},  // more heads per KV head than one block takes
      {5, 1, 200, KvFormat::bf16, {{270, 1}}},
      {5, 1, 256, KvFormat::f32, {{20, 1}}},
      {6, 2, 32, KvFormat::f32, {{290, 2, {20, 300}}, {5, 5, {16}}}},
      {3, 1, 64, KvFormat::bf16, {{290, 1, {530}}, {1, 1, {16, 1, 255}}}},
      {3, 1, 64, KvFormat::bf16, {{40, 4, {20, 300}}, {600, 3}, {70, 1}}, 17},
      {2, 2, 64, KvFormat::bf16, {{600, 3}, {300, 1, {256}}}, 256},
  };
  static const std::vector<Problem> problems = with(plain, composed_decode_problems());
  return problems;
}

const std::vector<Problem>& prefill_problems() {
  Problem many = {2, 1, 64, KvFormat::bf16, std::vector<Problem::Sequence>(37, {5, 1})};  // more than a warp looks at
  many.sequences.insert(many.sequences.end(), {{20, 20}, {300, 2}, {33, 33}});
  static const std::vector<Problem> plain = {
      many,
      {1, 1, 64, KvFormat::bf16, {{9, 9}}},
      {3, 1, 64, KvFormat::bf16, {{65, 40}, {3, 1}, {300, 1}, {0, 0}, {16, 16}}},
      {4, 1, 64, KvFormat::bf16, {{600, 17}, {257, 9}, {255, 10}}},
      {2, 2, 64, KvFormat::bf16, {{256, 70}, {511, 9}}},
      {8, 1, 64, KvFormat::bf16, {{15, 15}, {17, 12}}},
      {4, 1, 96, KvFormat::bf16, {{130, 20}, {257, 9}}},
      {3, 1, 128, KvFormat::bf16, {{258, 30}, {600, 1}}},
      {3, 1, 64, KvFormat::bf16, {{40, 12, {20, 300}}, {5, 5, {16}}, {30, 30, {7}}}},
      {2, 1, 64, KvFormat::bf16, {{600, 20}, {70, 70}}, 37},
      {2, 1, 64, KvFormat::bf16, {{20, 20, {257, 64}}, {300, 11}}, 64},
      {1, 1, 64, KvFormat::bf16, {{700, 40}}, 230},  // its slices begin at different tiles of a split
      {3, 1, 80, KvFormat::bf16, {{40, 12}}},        // no kernel on tensor cores
      {3, 1, 64, KvFormat::f32, {{270, 12}}},
  };
  static const std::vector<Problem> problems = with(plain, composed_prefill_problems());
  return problems;
}

TEST(CudaAttention, DecodeMatchesReference) {
  for (const Problem& problem : decode_problems()) {
    Setting setting(problem);
    const Matrix expected = setting.expected();
    in_both_orders([&] {
      DeviceBench bench;
      ops::expect_close(setting.on_device(bench), expected, kExact, name_of(problem));
    });
  }
}

TEST(CudaAttention, PrefillMatchesReference) {
  for (const Problem& problem : prefill_problems()) {
    Setting setting(problem);
    const Matrix expected = setting.expected();
    in_both_orders([&] {
      DeviceBench bench;
      ops::expect_close(setting.on_device(bench), expected, tolerance_of(problem), name_of(problem));
    });
  }
}

// Promise 1: a row of a decode alone, beside others, and with its splits computed by one block or by many.
TEST(CudaAttention, DecodedRowsDoNotDependOnThePlan) {
  for (const Problem& problem : some_of(decode_problems(), 4)) {
    Setting setting(problem);
    DeviceBench bench;
    UncutBench uncut;
    NarrowBench narrow;
    const Matrix all = setting.on_device(bench);
    EXPECT_TRUE(ops::same_bits(all, setting.on_device(uncut))) << name_of(problem);
    EXPECT_TRUE(ops::same_bits(all, setting.on_device(narrow))) << name_of(problem);
    for (int row = 0; row < all.num_rows; row += is_reduced() ? 5 : 2) {
      EXPECT_TRUE(is_row_of(all, row, setting.on_device(bench, row))) << "row " << row << ", " << name_of(problem);
    }
  }
}

// The same for long segments where one kernel serves every length.
TEST(CudaAttention, DeterministicRowsDoNotDependOnTheSlicing) {
  for (const Problem& problem : some_of(prefill_problems(), 4)) {
    Setting setting(problem);
    DeviceBench bench;
    DeterministicBench deterministic;
    const Matrix all = setting.on_device(deterministic);
    ops::expect_close(all, setting.expected(), kExact, name_of(problem));
    const int rows = static_cast<int>(all.num_rows);
    for (int row = 0; row < rows; row += 1 + rows / (is_reduced() ? 2 : 4)) {
      EXPECT_TRUE(is_row_of(all, row, setting.on_device(bench, row))) << "row " << row << ", " << name_of(problem);
    }
  }
}

// Long segments: the bits of a row do not depend on where its prompt was cut, nor on the rows beside it in a tile.
TEST(CudaAttention, PrefilledRowsDoNotDependOnTheSlicing) {
  for (const Problem& problem : some_of(prefill_problems(), 4)) {
    Setting setting(problem);
    DeviceBench bench;
    const Matrix all = setting.on_device(bench);
    for (const int first : some_of<int>({13, 9, 31}, 3)) {
      EXPECT_TRUE(ops::same_bits(all, setting.in_slices(bench, first))) << first << " rows, " << name_of(problem);
    }
  }
}

TEST(CudaAttention, AsksForScratchWhereSplitsAreComputedApart) {
  ops::AttentionArgs a{};
  a.num_heads = 8;
  a.kv = {nullptr, 0, 0, 0, 2, 64, KvFormat::bf16};
  a.rows = a.num_segments = 3;
  a.max_segment_rows = 1;
  a.max_decode_splits = a.max_splits = 1;
  EXPECT_EQ(attention_scratch_bytes(a, 1), 0);
  a.max_decode_splits = a.max_splits = 5;
  EXPECT_EQ(attention_scratch_bytes(a, 1), 3 * 8 * 5 * (64 + 2) * 4);
  a.max_decode_splits = a.max_splits = 100000;
  EXPECT_EQ(attention_scratch_bytes(a, 1), std::int64_t{8} * 100000 * (64 + 2) * 4);  // one row is above the bound
  a.max_decode_splits = a.max_splits = 5000;
  EXPECT_LE(attention_scratch_bytes(a, 1), 64 << 20);
  a.rows = a.num_segments = 128;  // enough blocks without
  EXPECT_EQ(attention_scratch_bytes(a, 1), 0);
}

TEST(CudaAttention, RefusesHeadsItHasNoKernelFor) {
  ops::AttentionArgs a{};
  a.num_heads = 1;
  for (const int dim : {12, 264}) {
    a.kv = {nullptr, 0, 0, 0, 1, dim, KvFormat::bf16};
    try {
      attention_scratch_bytes(a, 1);
      FAIL() << dim;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::unsupported);
    }
  }
}

// Not offered yet: whoever asks is told so, and gets no attention without them.
TEST(CudaAttention, RefusesKeyPoliciesBiasesAndSummaries) {
  DeviceBench bench;
  const DeviceMatrix table(bench, Matrix(10, 64)), q(bench, Matrix(1, 64)), out(bench, Matrix(1, 64));
  const ops::RopeTable rope{table.view().as<const float>(), 64, 10};
  const Buffer cells = allocate_on(bench.memory, 2 * 16 * 64 * sizeof(float) * 2);
  const ops::KvLayer layer{cells.as<std::uint8_t>(), 2 * 16 * 64 * 4, 16 * 64 * 4, 16 * 64 * 4, 1, 64, KvFormat::f32};
  const std::vector<ops::KeyPolicy> policies = {{ops::KeyRule::window, 0, 5, 0, 0}};
  const std::vector<int32_t> blocks = {0}, positions = {9};
  const auto refusal = [&](int policy, float bias, bool summarize) -> std::string {
    const std::vector<AttentionSegment> segments = {
        {.row_begin = 0, .row_count = 1, .run_begin = 0, .run_count = 1, .policy = policy}};
    const std::vector<AttentionRun> runs = {
        {.block_begin = 0, .num_keys = 10, .position_offset = 0, .score_bias = bias}};
    const std::vector<ops::KvSummary> summaries = {
        {.block_begin = 0, .first_key = 0, .num_tokens = 4, .position = 0, .slot = 16, .slot_position = 0}};
    try {
      if (summarize) ops::summarize_kv(layer, summaries, blocks, rope, bench.ctx);
      ops::attention(out.view(), q.view(), 1, 1.0F, 0, rope, layer,
                     {positions, segments, runs, blocks, {}, {}, policies}, bench.ctx);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::unsupported);
      return error.what();
    }
    return "";
  };
  const std::string name = bench.backend.kernels->name;
  EXPECT_EQ(refusal(0, 0.0F, false), "KV policies are not offered by backend " + name);
  EXPECT_EQ(refusal(-1, 0.5F, false), "KV policies are not offered by backend " + name);
  EXPECT_EQ(refusal(-1, 0.0F, true), "operator summarize_kv has no kernel in backend " + name);
}

}  // namespace
}  // namespace nb::cuda
