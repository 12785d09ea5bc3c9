#include <gtest/gtest.h>

#include <algorithm>

#include "base/error.h"
#include "cuda/operators.h"
#include "cuda_emulation/attention_setting.h"

namespace nb::cuda {
namespace {

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

// Has room for four times the splits that there are, of which three in four are empty.
struct RoomyBench : OtherBench {
  RoomyBench() {
    real = backend.kernels;
    table.attention = [](const ops::AttentionArgs& a, const Part& part) { real->attention(roomy(a), part); };
    table.attention_scratch_bytes = [](const ops::AttentionArgs& a, int threads) {
      return real->attention_scratch_bytes(roomy(a), threads);
    };
  }
  static inline const ops::KernelTable* real = nullptr;  // kernels are functions without state
  static ops::AttentionArgs roomy(ops::AttentionArgs a) {
    a.max_splits *= 4;
    a.max_decode_splits *= 4;
    return a;
  }
};

bool is_row_of(const Matrix& all, int row, const Matrix& alone) {
  return std::memcmp(alone.values.data(), all.values.data() + row * all.num_cols,
                     alone.values.size() * sizeof(float)) == 0;
}

// The kernel of single rows is f32 throughout. What the kernel on tensor cores rounds to bf16 (8 significant bits, so
// by up to 2^-9): a rotated query, which moves a score by a sum of D such errors, of a standard deviation of about
// 0.001 with the scores here (their own is 1.5), and a weight by that factor; and the weight itself. Four deviations
// and 2^-9 together are 0.6 %; the largest error of these cases is 0.4 %. Where values are codes, these times their
// scales are rounded too, by 2^-9. fp16 has 3 bits more.
constexpr double kExact = 1e-5;
constexpr double kRounded = 1e-2;

double tolerance_of(const Problem& problem) {
  const bool is_long = std::any_of(problem.sequences.begin(), problem.sequences.end(),
                                   [](const auto& s) { return s.rows > ops::kDecodeRows; });
  const bool on_tensor_cores = is_long && problem.head_dim >= 64 && problem.head_dim != 80;
  if (!on_tensor_cores || problem.format == KvFormat::f32) return kExact;
  return problem.format == KvFormat::f16 ? kRounded / 8 : kRounded;
}

// The formats whose cells are not plain in memory, or are read by kernels of their own.
constexpr KvFormat kOtherFormats[] = {KvFormat::f16, KvFormat::int8, KvFormat::mixed};

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

std::vector<Problem> other_decode_problems() {
  std::vector<Problem> problems;
  for (const KvFormat format : kOtherFormats) {
    problems.push_back({3, 1, 64, format, {{1, 1}, {17, 1}, {257, 1}, {600, 1}}});
    problems.push_back({8, 1, 64, format, {{300, 2, {20}}}, 100});
    problems.push_back({2, 2, 24, format, {{40, 3, {70}}}, 0, true});
    problems.push_back({6, 1, 128, format, {{70, 1, {20, 300}}}, 0, true});
    problems.push_back({2, 1, 96, format, {{33, 2}}});
    problems.push_back({5, 1, 200, format, {{40, 1}}});
  }
  return problems;
}

std::vector<Problem> other_prefill_problems() {
  std::vector<Problem> problems;
  for (const KvFormat format : kOtherFormats) {
    problems.push_back({3, 1, 64, format, {{300, 17, {20}}, {16, 16}, {40, 1}}});
    problems.push_back({2, 2, 96, format, {{40, 12}, {130, 9}}, 37});
    problems.push_back({2, 1, 128, format, {{70, 14, {17, 48}}}, 40, true});
    problems.push_back({1, 1, 80, format, {{40, 12}}});  // no kernel on tensor cores
  }
  return problems;
}

// Policies of every rule, whose edges lie within blocks, tiles and splits and at their borders, beside sequences
// without.
constexpr ops::KeyPolicy kSinks{ops::KeyRule::window, 4, 40, 0, 0};
constexpr ops::KeyPolicy kStrided{ops::KeyRule::strided, 16, 64, 7, 0};
constexpr ops::KeyPolicy kBlocks{ops::KeyRule::block, 0, 17, 96, 32};
constexpr ops::KeyPolicy kBudget{ops::KeyRule::budget, 33, 100, 0, 5};
constexpr ops::KeyPolicy kSummaries{ops::KeyRule::summary, 4, 50, 48, 0};

std::vector<Problem> policy_decode_problems() {
  std::vector<Problem> problems = {
      {3, 1, 64, KvFormat::bf16, {{900, 2, {}, kSinks}, {600, 3, {}, kBudget}, {270, 1}, {300, 1, {20}}}},
      {5, 1, 16, KvFormat::f32, {{820, 8, {}, kStrided}, {513, 1, {}, kBlocks}, {600, 2, {}, kSummaries}}},
      {5, 1, 128, KvFormat::f32, {{600, 1, {}, kSinks}}, 300},
      {8, 1, 64, KvFormat::bf16, {{600, 2, {}, kSummaries}, {300, 1, {}, kBudget}}, 250},
      {2, 1, 200, KvFormat::bf16, {{560, 1, {}, kStrided}}},
  };
  for (const KvFormat format : kOtherFormats) {
    problems.push_back({2, 1, 64, format, {{600, 1, {}, kBlocks}, {330, 2, {}, kSummaries}}});
    problems.push_back({6, 1, 128, format, {{540, 1, {}, kSinks}, {400, 1, {}, kBudget}}});
    problems.push_back({2, 2, 24, format, {{530, 3, {}, kStrided}}});
  }
  return problems;
}

std::vector<Problem> policy_prefill_problems() {
  std::vector<Problem> problems = {
      {3, 1, 64, KvFormat::bf16, {{600, 30, {}, kSinks}, {130, 70, {}, kBudget}, {40, 12}, {33, 1, {}, kSinks}}},
      {1, 1, 64, KvFormat::bf16, {{700, 40, {}, kStrided}}, 400},
      {2, 1, 96, KvFormat::bf16, {{420, 20, {}, kSummaries}, {400, 9, {}, kBlocks}}},
      {3, 1, 128, KvFormat::bf16, {{600, 12, {}, kBudget}, {300, 14, {}, kSinks}}},
      {2, 1, 32, KvFormat::f32, {{300, 14, {}, kBlocks}}},
  };
  for (const KvFormat format : kOtherFormats) {
    problems.push_back({2, 1, 64, format, {{330, 12, {}, kSummaries}, {270, 10, {}, kStrided}}});
    problems.push_back({1, 1, 128, format, {{300, 10, {}, kSinks}}});
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
  static const std::vector<Problem> problems =
      with(with(with(plain, other_decode_problems()), composed_decode_problems()), policy_decode_problems());
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
  static const std::vector<Problem> problems =
      with(with(with(plain, other_prefill_problems()), composed_prefill_problems()), policy_prefill_problems());
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
    RoomyBench roomy;
    const Matrix all = setting.on_device(bench);
    EXPECT_TRUE(ops::same_bits(all, setting.on_device(uncut))) << name_of(problem);
    EXPECT_TRUE(ops::same_bits(all, setting.on_device(roomy))) << name_of(problem);
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

TEST(CudaAttention, RoomForSplitsIsAPowerOfTwo) {
  const auto room = [](std::vector<int32_t> keys, int rows) {
    std::vector<ops::AttentionRun> runs;
    for (const int32_t count : keys) runs.push_back({.block_begin = 0, .num_keys = count, .position_offset = 0});
    const ops::AttentionSegment segments[] = {
        {.row_begin = 0, .row_count = rows, .run_begin = 0, .run_count = static_cast<int32_t>(runs.size())},
        {.row_begin = rows, .row_count = 1, .run_begin = 0, .run_count = 1}};
    const ops::SplitCounts counts =
        ops::count_splits({.positions = {}, .segments = segments, .runs = runs, .blocks = {}});
    return std::pair(counts.of_all, counts.of_few_rows);
  };
  using Room = std::pair<int32_t, int32_t>;
  EXPECT_EQ(room({256}, 1), Room(1, 1));
  EXPECT_EQ(room({257}, 1), Room(2, 2));
  EXPECT_EQ(room({1, 600}, 1), Room(4, 4));
  EXPECT_EQ(room({1, 1100}, 8), Room(8, 8));  // 6 splits
  EXPECT_EQ(room({1, 1100}, 9), Room(8, 1)) << "the long segment does not count";
  EXPECT_EQ(room({0}, 1), Room(0, 0));
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

}  // namespace
}  // namespace nb::cuda
