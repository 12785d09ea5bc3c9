#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "base/effort.h"
#include "base/error.h"
#include "base/ids.h"
#include "kv/kv_storage.h"
#include "ops/ops_fixture.h"

namespace nb::ops {
namespace {

// One attention problem: sequences with contexts, stored in shuffled blocks, and the rows that query them.
struct Problem {
  int num_heads, num_kv_heads, head_dim;
  quant::KvFormat format;
  struct Sequence {
    int context;  // keys stored, the last `rows` of them belong to the query rows
    int rows;
    std::vector<int> earlier_runs = {};  // lengths of runs before the last one, at increasing offsets
  };
  std::vector<Sequence> sequences;
  int window = 0;
  bool is_composed = false;  // runs begin late and have hidden keys, and the last one has positions with gaps
};

struct Plan {
  std::vector<int32_t> positions, blocks, key_positions;
  std::vector<uint16_t> hidden;
  std::vector<AttentionSegment> segments;
  std::vector<AttentionRun> runs;
};

// Runs the problem on a backend: writes all keys and values through its own kv_write, then attends.
Matrix attend(Bench& bench, const Problem& problem, const std::vector<float>& cos_sin, int only_row = -1) {
  const int dim = problem.head_dim;
  const RopeTable rope_table{cos_sin.data(), dim, static_cast<int32_t>(cos_sin.size()) / dim};
  int total_blocks = 0, total_rows = 0;
  for (const auto& sequence : problem.sequences) {
    total_blocks += (sequence.context + 15) / 16 + 1;
    for (int length : sequence.earlier_runs) total_blocks += (length + 15) / 16;
    total_rows += sequence.rows;
  }
  kv::KvStorage storage({problem.format, 2, problem.num_kv_heads, dim}, total_blocks);
  std::vector<int32_t> order(static_cast<std::size_t>(total_blocks));
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(4);
  std::shuffle(order.begin(), order.end(), random);
  const KvLayer layer = storage.layer(1);

  Plan plan;
  std::size_t next_block = 0;
  unsigned seed = 100;
  // Returns the position of the last key.
  const auto add_run = [&](int keys, int offset, bool is_last) {
    AttentionRun run{static_cast<int32_t>(plan.blocks.size()), keys, offset};
    std::vector<int32_t> slots, local;
    for (int i = 0; i < keys; ++i) {
      if (i % 16 == 0) plan.blocks.push_back(order[next_block++]);
      slots.push_back(plan.blocks.back() * kBlockTokens + i % 16);
      local.push_back(i);
    }
    if (problem.is_composed) {
      run.first_key = keys % 21;
      run.hidden_begin = static_cast<int32_t>(plan.hidden.size());
      // All keys of the second tile of 64, none or some of other blocks; in the first ones keys can be seen, so that
      // it shows where a run begins.
      for (int block = 0; block < (keys + 15) / 16; ++block) {
        const auto some = static_cast<uint16_t>(random() | 1);
        plan.hidden.push_back(block % 14 / 4 == 1 ? uint16_t{0xffff} : block % 7 < 4 ? uint16_t{0} : some);
      }
    }
    if (problem.is_composed && is_last) {
      run.position_offset = 0;
      run.positions_begin = static_cast<int32_t>(plan.key_positions.size());
      for (int i = 0; i < keys; ++i) local[static_cast<std::size_t>(i)] = offset + i + i / 5 * 2;
      plan.key_positions.insert(plan.key_positions.end(), local.begin(), local.end());
    }
    plan.runs.push_back(run);
    Matrix k = Matrix::random(keys, problem.num_kv_heads * dim, seed++), v = Matrix::random(keys, k.num_cols, seed++);
    // By the reference for all, so that formats round the same numbers.
    Bench reference("reference");
    rope(k.view(), local, rope_table, reference.ctx);
    kv_write(layer, k.view(), v.view(), slots, bench.ctx);
    return run.positions_begin < 0 ? offset + local.back() : local.back();
  };
  for (const auto& sequence : problem.sequences) {
    const auto run_begin = static_cast<int32_t>(plan.runs.size());
    int offset = 0;
    for (int length : sequence.earlier_runs) {
      add_run(length, offset, false);
      offset += length;
    }
    const int last = add_run(sequence.context, offset, true);
    plan.segments.push_back({static_cast<int32_t>(plan.positions.size()), sequence.rows, run_begin,
                             static_cast<int32_t>(plan.runs.size()) - run_begin});
    for (int i = 0; i < sequence.rows; ++i) plan.positions.push_back(last + 1 - sequence.rows + i);
  }
  Matrix q = Matrix::random(total_rows, problem.num_heads * dim, 55, 1.5f);
  if (only_row >= 0) {  // the same row alone, as a decode would see it
    AttentionSegment segment{};
    for (const AttentionSegment& candidate : plan.segments) {
      if (only_row >= candidate.row_begin && only_row < candidate.row_begin + candidate.row_count) segment = candidate;
    }
    segment.row_begin = 0, segment.row_count = 1;
    plan.segments = {segment};
    plan.positions = {plan.positions[static_cast<std::size_t>(only_row)]};
    Matrix one(1, q.num_cols);
    std::copy_n(q.values.begin() + only_row * q.num_cols, q.num_cols, one.values.begin());
    q = one;
  }
  Matrix out(q.num_rows, q.num_cols, -3.0f);
  attention(out.view(), q.view(), problem.num_heads, 1.0f / std::sqrt(static_cast<float>(dim)), problem.window,
            rope_table, layer, {plan.positions, plan.segments, plan.runs, plan.blocks, plan.key_positions, plan.hidden},
            bench.ctx);
  return out;
}

const Problem kPlainProblems[] = {
    {1, 1, 16, quant::KvFormat::f32, {{1, 1}}},
    {4, 4, 16, quant::KvFormat::bf16, {{17, 17}}},
    {9, 3, 64, quant::KvFormat::bf16, {{65, 40}, {3, 1}, {300, 1}, {16, 16}}},
    {9, 3, 64, quant::KvFormat::f32, {{700, 20}, {257, 2}}},
    {14, 2, 64, quant::KvFormat::bf16, {{1025, 1}}},
    {32, 1, 80, quant::KvFormat::bf16, {{70, 5}, {600, 1}}},  // more heads per KV head than one tile holds
    {8, 2, 128, quant::KvFormat::bf16, {{256, 1}, {255, 8}, {513, 3}}},
    {6, 2, 32, quant::KvFormat::f32, {{40, 10, {20, 300}}, {5, 5, {16}}}},  // several runs at their own offsets
    {6, 2, 32, quant::KvFormat::bf16, {{290, 1, {530}}}},
    {3, 1, 48, quant::KvFormat::bf16, {{130, 1}, {70, 70}}},  // a last group of 16 dimensions behind one of 32
};

// The same in every format that is not plain, too.
std::vector<Problem> problems_of_formats() {
  std::vector<Problem> problems(std::begin(kPlainProblems), std::end(kPlainProblems));
  for (Problem problem : kPlainProblems) {
    for (const quant::KvFormat format : {quant::KvFormat::f16, quant::KvFormat::int8, quant::KvFormat::mixed}) {
      problem.format = format;
      problems.push_back(problem);
    }
  }
  return problems;
}

// Composed contexts: runs that begin late, hidden keys (all of a tile, too), positions with gaps; windows beside.
std::vector<Problem> composed_problems() {
  std::vector<Problem> problems;
  for (const int window : {0, 1, 40, 300}) {
    for (const quant::KvFormat format : kv_formats()) {
      problems.push_back({6, 2, 16, format, {{500, 3, {300, 17}}, {70, 70}, {200, 1, {33, 100, 64}}}, window, true});
      problems.push_back({5, 1, 32, format, {{40, 10, {20, 300}}, {20, 20, {257, 256, 64}}}, window, true});
    }
  }
  return problems;
}

// Windows around the edges of blocks (16), tiles (64) and splits (256), contexts of up to 1500 keys.
std::vector<Problem> windowed_problems() {
  std::vector<Problem> problems = composed_problems();
  for (const int window : {1, 2, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 511, 513, 1499, 1500, 4000}) {
    for (const quant::KvFormat format : kv_formats()) {
      problems.push_back({6, 2, 16, format, {{1500, 3}, {300, 60}, {70, 70}, {600, 1}}, window});
      problems.push_back({5, 1, 32, format, {{40, 10, {20, 300}}, {20, 20, {257, 256, 64}}}, window});
    }
  }
  return problems;
}

class Attention : public EveryBackend {};

TEST_P(Attention, MatchesReference) {
  for (const Problem& problem : some_of(problems_of_formats(), 2)) {
    const auto table = make_rotations(problem.head_dim, 1200);
    Bench reference("reference"), bench(GetParam(), 2);
    const double tolerance = attention_tolerance(GetParam(), problem.format);
    expect_close(attend(bench, problem, table), attend(reference, problem, table), tolerance,
                 concat(quant::to_string(problem.format), ", heads ", problem.num_heads, ", dim ", problem.head_dim));
  }
}

// The window against its definition in double, on the reference backend: softmax over keys p - W < s <= p.
TEST(AttentionTables, Avx2AndAvxVnniGiveTheSameBits) {
  if (!is_usable("avx2") || !is_usable("avxvnni")) GTEST_SKIP() << "this machine does not run both";
  for (const Problem& problem : problems_of_formats()) {
    const auto table = make_rotations(problem.head_dim, 1200);
    Bench avx2("avx2", 2), vnni("avxvnni", 2);
    EXPECT_TRUE(same_bits(attend(avx2, problem, table), attend(vnni, problem, table))) << problem.head_dim;
  }
}

TEST(AttentionWindow, ReferenceFollowsTheDefinition) {
  constexpr int kKeys = 400, kDim = 16;
  const auto table = make_rotations(kDim, kKeys);
  const RopeTable rope_table{table.data(), kDim, kKeys};
  Bench bench("reference");
  kv::KvStorage storage({quant::KvFormat::f32, 1, 1, kDim}, kKeys / 16);
  Matrix k = Matrix::random(kKeys, kDim, 1), v = Matrix::random(kKeys, kDim, 2), q = Matrix::random(kKeys, kDim, 3);
  std::vector<int32_t> positions(kKeys), blocks(kKeys / 16);
  std::iota(positions.begin(), positions.end(), 0);
  std::iota(blocks.begin(), blocks.end(), 0);
  Matrix keys = k, queries = q;
  rope(keys.view(), positions, rope_table, bench.ctx);
  rope(queries.view(), positions, rope_table, bench.ctx);
  kv_write(storage.layer(0), keys.view(), v.view(), positions, bench.ctx);
  const std::vector<AttentionRun> runs = {{0, kKeys, 0}};
  const std::vector<AttentionSegment> segments = {{0, kKeys, 0, 1}};
  for (const int window : {0, 1, 2, 16, 37, 64, 256, 399, 400, 401}) {
    Matrix out(kKeys, kDim), expected(kKeys, kDim);
    attention(out.view(), q.view(), 1, 0.3f, window, rope_table, storage.layer(0), {positions, segments, runs, blocks},
              bench.ctx);
    for (int p = 0; p < kKeys; ++p) {
      double total = 0.0;
      std::vector<double> sums(kDim, 0.0);
      for (int s = 0; s <= p; ++s) {
        if (window > 0 && s <= p - window) continue;
        double score = 0.0;
        for (int d = 0; d < kDim; ++d) score += static_cast<double>(queries.at(p, d)) * keys.at(s, d);
        const double weight = std::exp(score * 0.3);
        total += weight;
        for (int d = 0; d < kDim; ++d) sums[static_cast<std::size_t>(d)] += weight * v.at(s, d);
      }
      for (int d = 0; d < kDim; ++d) {
        expected.values[static_cast<std::size_t>(p * kDim + d)] =
            static_cast<float>(sums[static_cast<std::size_t>(d)] / total);
      }
    }
    expect_close(out, expected, 1e-6, "window " + std::to_string(window));
  }
}

// A context put together from a chunk that was stored at positions of its own, behind an anchor, and from single keys:
// against softmax over all visible keys at their places, in double. Some keys of the chunk are replaced by others.
TEST(AttentionRuns, ReferenceFollowsTheDefinition) {
  constexpr int kKeys = 220, kDim = 16, kBegin = 70, kEnd = 150, kAnchor = 5;
  const auto table = make_rotations(kDim, kKeys);
  const RopeTable rope_table{table.data(), kDim, kKeys};
  Bench bench("reference");
  Matrix k = Matrix::random(kKeys, kDim, 1), v = Matrix::random(kKeys, kDim, 2), q = Matrix::random(kKeys, kDim, 3);
  const auto is_replaced = [](int p) { return p == kBegin || p % 3 == 0 || (p >= 100 && p < 116); };
  std::vector<int32_t> chunk, own;  // positions
  for (int p = 0; p < kKeys; ++p) {
    if (p < kBegin || p >= kEnd || is_replaced(p)) own.push_back(p);
    if (p >= kBegin - kAnchor && p < kEnd) chunk.push_back(p);
  }
  kv::KvStorage storage({quant::KvFormat::f32, 1, 1, kDim}, 64);
  std::vector<int32_t> blocks(64);
  std::iota(blocks.begin(), blocks.end(), 0);
  const auto store = [&](const std::vector<int32_t>& from, int first_block, int shift, bool spoil) {
    Matrix keys(static_cast<int>(from.size()), kDim), values(static_cast<int>(from.size()), kDim);
    std::vector<int32_t> positions, slots;
    for (std::size_t i = 0; i < from.size(); ++i) {
      const int p = from[i];
      // What stands in the chunk for a key that is replaced, or for the anchor, must not be seen.
      const bool is_unseen = spoil && (p < kBegin || is_replaced(p));
      for (int d = 0; d < kDim; ++d) {
        keys.values[i * kDim + static_cast<std::size_t>(d)] = is_unseen ? 9.0f : static_cast<float>(k.at(p, d));
        values.values[i * kDim + static_cast<std::size_t>(d)] = is_unseen ? 1e3f : static_cast<float>(v.at(p, d));
      }
      positions.push_back(p - shift);
      slots.push_back(first_block * kBlockTokens + static_cast<int>(i));
    }
    rope(keys.view(), positions, rope_table, bench.ctx);
    kv_write(storage.layer(0), keys.view(), values.view(), slots, bench.ctx);
  };
  store(chunk, 0, kBegin - kAnchor, true);
  store(own, 32, 0, false);
  std::vector<uint16_t> hidden(6, 0);
  for (int i = kAnchor; i < kAnchor + kEnd - kBegin; ++i) {
    if (is_replaced(kBegin - kAnchor + i))
      hidden[static_cast<std::size_t>(i / 16)] |= static_cast<uint16_t>(1 << i % 16);
  }
  const std::vector<AttentionRun> runs = {
      {.block_begin = 0,
       .num_keys = kAnchor + kEnd - kBegin,
       .position_offset = kBegin - kAnchor,
       .first_key = kAnchor,
       .hidden_begin = 0},
      {.block_begin = 32, .num_keys = static_cast<int32_t>(own.size()), .position_offset = 0, .positions_begin = 0}};
  const std::vector<AttentionSegment> segments = {{0, kKeys, 0, 2}};
  std::vector<int32_t> positions(kKeys);
  std::iota(positions.begin(), positions.end(), 0);
  Matrix keys = k, queries = q;
  rope(keys.view(), positions, rope_table, bench.ctx);
  rope(queries.view(), positions, rope_table, bench.ctx);
  for (const int window : {0, 1, 17, 100}) {
    Matrix out(kKeys, kDim, -3.0f);
    attention(out.view(), q.view(), 1, 0.3f, window, rope_table, storage.layer(0),
              {positions, segments, runs, blocks, own, hidden}, bench.ctx);
    Matrix expected(kKeys, kDim);
    for (int p = 0; p < kKeys; ++p) {
      std::vector<double> sums(kDim, 0.0);
      double total = 0.0;
      for (int s = window == 0 ? 0 : std::max(0, p - window + 1); s <= p; ++s) {
        double score = 0.0;
        for (int d = 0; d < kDim; ++d) score += queries.at(p, d) * keys.at(s, d);
        total += std::exp(score * 0.3);
        for (int d = 0; d < kDim; ++d) sums[static_cast<std::size_t>(d)] += std::exp(score * 0.3) * v.at(s, d);
      }
      for (int d = 0; d < kDim; ++d) {
        expected.values[static_cast<std::size_t>(p * kDim + d)] =
            static_cast<float>(sums[static_cast<std::size_t>(d)] / total);
      }
    }
    expect_close(out, expected, 2e-6, "window " + std::to_string(window));
  }
}

TEST_P(Attention, WindowsMatchReference) {
  for (const Problem& problem : some_of(windowed_problems(), 7)) {
    const auto table = make_rotations(problem.head_dim, 1600);
    Bench reference("reference"), bench(GetParam(), 2);
    const double tolerance = attention_tolerance(GetParam(), problem.format);
    expect_close(attend(bench, problem, table), attend(reference, problem, table), tolerance,
                 concat(quant::to_string(problem.format), ", window ", problem.window, ", heads ", problem.num_heads));
  }
}

// Promise 1 with windows. A row alone skips every split, tile and block below its own window; in a batch the same keys
// are computed for the rows before it and masked for this one. Equal bits show that skipping is exact.
TEST_P(Attention, SkippingWhatIsBelowTheWindowChangesNoBit) {
  for (const Problem& problem : few_of(windowed_problems(), 3, 7)) {
    const auto table = make_rotations(problem.head_dim, 1600);
    Bench two(GetParam(), 2), one(GetParam(), 1), three(GetParam(), 3);
    const Matrix all = attend(two, problem, table);
    EXPECT_TRUE(same_bits(all, attend(one, problem, table)));
    for (int row = 0; row < all.num_rows; row += 1 + static_cast<int>(all.num_rows) / 4) {
      for (Bench* bench : {&one, &three}) {
        const Matrix alone = attend(*bench, problem, table, row);
        EXPECT_EQ(std::memcmp(alone.values.data(), all.values.data() + row * all.num_cols,
                              alone.values.size() * sizeof(float)),
                  0)
            << "row " << row << ", heads " << problem.num_heads << ", window " << problem.window;
      }
    }
  }
}

// Promise 1: each row alone (as a decode) gives the bits it has in the batch, whatever the number of threads and
// whether the splits of its context were shared between threads.
TEST_P(Attention, RowsDoNotDependOnThePlan) {
  for (const Problem& problem : some_of(problems_of_formats(), 2)) {
    const auto table = make_rotations(problem.head_dim, 1200);
    Bench two(GetParam(), 2), one(GetParam(), 1), three(GetParam(), 3);
    const Matrix all = attend(two, problem, table);
    EXPECT_TRUE(same_bits(all, attend(one, problem, table)));
    for (int row = 0; row < all.num_rows; row += 1 + static_cast<int>(all.num_rows) / (is_reduced() ? 2 : 7)) {
      for (Bench* bench : {&one, &three}) {
        const Matrix alone = attend(*bench, problem, table, row);
        EXPECT_EQ(std::memcmp(alone.values.data(), all.values.data() + row * all.num_cols,
                              alone.values.size() * sizeof(float)),
                  0)
            << "row " << row << ", heads " << problem.num_heads << ", dim " << problem.head_dim;
      }
    }
  }
}

// Sequences of which each shares a random number of leading blocks with the one before it, as the engine's cascade plan
// orders them, over KV of random values. Decodes and slices, lengths around the edges of blocks, tiles and splits.
struct SharedProblem {
  explicit SharedProblem(unsigned seed) {
    std::mt19937 random(seed);
    const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    const int edges[] = {16, 64, 128, 256, 512, 768};
    const int shapes[][3] = {{9, 3, 16}, {4, 4, 16}, {14, 2, 32}, {30, 1, 16}};
    const auto& shape = shapes[draw(0, 3)];
    num_heads = shape[0], num_kv_heads = shape[1], head_dim = shape[2];
    const auto formats = kv_formats();
    format = formats[static_cast<std::size_t>(draw(0, static_cast<int>(formats.size()) - 1))];
    const int windows[] = {0, 0, 0, 17, 100, 300};
    window = windows[draw(0, 5)];
    std::vector<int32_t> previous;
    int previous_keys = 0;
    for (int s = draw(2, 12); s > 0; --s) {
      const int keys = std::max(1, edges[draw(0, 5)] + draw(-17, 17));
      const int most = std::min(keys, previous_keys) / kBlockTokens;
      const int shared = draw(0, 4) == 0 ? 0 : std::min(most, draw(0, 1) == 0 ? most : draw(0, most));
      std::vector<int32_t> own(previous.begin(), previous.begin() + shared);
      while (static_cast<int>(own.size()) * kBlockTokens < keys) own.push_back(num_blocks++);
      const int rows = draw(0, 3) > 0 ? 1 : draw(1, std::min(keys, 60));
      plan.segments.push_back({static_cast<int32_t>(plan.positions.size()), rows,
                               static_cast<int32_t>(plan.runs.size()), 1, shared * kBlockTokens});
      plan.runs.push_back({static_cast<int32_t>(plan.blocks.size()), keys, 0});
      plan.blocks.insert(plan.blocks.end(), own.begin(), own.end());
      for (int i = keys - rows; i < keys; ++i) plan.positions.push_back(i);
      previous = own, previous_keys = keys;
    }
  }

  Matrix attend(Bench& bench, const std::vector<float>& cos_sin, bool grouped) const {
    const RopeTable rope_table{cos_sin.data(), head_dim, static_cast<int32_t>(cos_sin.size()) / head_dim};
    kv::KvStorage storage({format, 1, num_kv_heads, head_dim}, num_blocks);
    std::vector<int32_t> slots(static_cast<std::size_t>(num_blocks * kBlockTokens));
    std::iota(slots.begin(), slots.end(), 0);
    Matrix k = Matrix::random(num_blocks * kBlockTokens, num_kv_heads * head_dim, 1);
    Matrix v = Matrix::random(k.num_rows, k.num_cols, 2);
    kv_write(storage.layer(0), k.view(), v.view(), slots, bench.ctx);
    std::vector<AttentionSegment> segments = plan.segments;
    if (!grouped) {
      for (AttentionSegment& segment : segments) segment.shared_keys = segment.shared_runs = 0;
    }
    Matrix q = Matrix::random(static_cast<std::int64_t>(plan.positions.size()), num_heads * head_dim, 3, 1.5f);
    Matrix out(q.num_rows, q.num_cols, -3.0f);
    attention(out.view(), q.view(), num_heads, 0.25f, window, rope_table, storage.layer(0),
              {plan.positions, segments, plan.runs, plan.blocks, plan.key_positions, plan.hidden}, bench.ctx);
    return out;
  }

  int num_heads, num_kv_heads, head_dim, window, num_blocks = 0;
  quant::KvFormat format;
  Plan plan;
};

// The same with chunks: sequences that begin with chunks of the one before it, elsewhere, with other keys hidden, and
// perhaps with a longer one that begins like the next; then chunks and, most often, keys of their own with gaps.
struct SharedChunks : SharedProblem {
  explicit SharedChunks(unsigned seed) : SharedProblem(seed) {
    std::mt19937 random(seed + 1000);
    const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    plan = {};
    num_blocks = 0;
    struct Chunk {
      std::vector<int32_t> blocks;
      int keys;
    };
    std::vector<Chunk> previous;
    for (int s = draw(2, 9); s > 0; --s) {
      const bool has_own = draw(0, 4) > 0;
      const int count = draw(1, 5), most = std::min(count - (has_own ? 0 : 1), static_cast<int>(previous.size()));
      const int shared = draw(0, 4) == 0 ? 0 : draw(0, most);
      std::vector<Chunk> chunks(previous.begin(), previous.begin() + shared);
      int shared_keys = 0;
      while (static_cast<int>(chunks.size()) < count) {
        const std::size_t next = chunks.size();
        Chunk chunk{{}, draw(1, draw(0, 2) == 0 ? 300 : 90)};
        if (static_cast<int>(next) == shared && next < previous.size() && draw(0, 1) == 0) {
          const int full = std::min(chunk.keys, previous[next].keys) / kBlockTokens;
          const auto begin = previous[next].blocks.begin();
          chunk.blocks.assign(begin, begin + full);
          shared_keys = full * kBlockTokens;
        }
        while (static_cast<int>(chunk.blocks.size()) * kBlockTokens < chunk.keys) chunk.blocks.push_back(num_blocks++);
        chunks.push_back(std::move(chunk));
      }
      const int rows = draw(0, 3) > 0 ? 1 : draw(1, 20);
      plan.segments.push_back({.row_begin = static_cast<int32_t>(plan.positions.size()),
                               .row_count = rows,
                               .run_begin = static_cast<int32_t>(plan.runs.size()),
                               .run_count = count + (has_own ? 1 : 0),
                               .shared_keys = shared_keys,
                               .shared_runs = shared});
      int at = 0;
      std::vector<int32_t> own;
      for (const Chunk& chunk : chunks) {
        for (int gap = draw(0, 9); gap > 0; --gap) own.push_back(at++);
        const int anchor = draw(0, std::min(4, chunk.keys - 1));
        AttentionRun run{.block_begin = static_cast<int32_t>(plan.blocks.size()),
                         .num_keys = chunk.keys,
                         .position_offset = at - anchor,
                         .first_key = anchor};
        plan.blocks.insert(plan.blocks.end(), chunk.blocks.begin(), chunk.blocks.end());
        if (draw(0, 1) == 0) {
          run.hidden_begin = static_cast<int32_t>(plan.hidden.size());
          for (std::size_t i = 0; i < chunk.blocks.size(); ++i) {
            plan.hidden.push_back(static_cast<uint16_t>(draw(0, 2) == 0 ? draw(0, 0xffff) : 0));
          }
        }
        plan.runs.push_back(run);
        at += chunk.keys - anchor;
      }
      for (int i = 0; i < rows; ++i) own.push_back(at++);
      for (int i = at - rows; i < at; ++i) plan.positions.push_back(i);
      if (has_own) {
        plan.runs.push_back({.block_begin = static_cast<int32_t>(plan.blocks.size()),
                             .num_keys = static_cast<int32_t>(own.size()),
                             .position_offset = 0,
                             .positions_begin = static_cast<int32_t>(plan.key_positions.size())});
        for (std::size_t i = 0; i < own.size(); i += kBlockTokens) plan.blocks.push_back(num_blocks++);
        plan.key_positions.insert(plan.key_positions.end(), own.begin(), own.end());
      }
      previous = std::move(chunks);
    }
  }
};

// Promise 1 for shared prefixes: reading a block once for the rows of several sequences changes no bit of any.
TEST_P(Attention, SharedPrefixesChangeNoBit) {
  Bench two(GetParam(), 2), one(GetParam(), 1), three(GetParam(), 3);
  for (unsigned seed = 0; seed < 120; seed += step_of(11)) {
    const SharedProblem problem(seed);
    const auto table = make_rotations(problem.head_dim, 800);
    const Matrix alone = problem.attend(two, table, false);
    for (Bench* bench : {&one, &two, &three}) {
      EXPECT_TRUE(same_bits(problem.attend(*bench, table, true), alone))
          << "seed " << seed << ", " << bench->pool.num_threads() << " threads";
    }
  }
}

// And for chunks that several sequences have, each at a place of its own.
TEST_P(Attention, SharedChunksChangeNoBit) {
  Bench two(GetParam(), 2), one(GetParam(), 1), three(GetParam(), 3);
  int sharing = 0;
  for (unsigned seed = 0; seed < 60; seed += step_of(7)) {
    const SharedChunks problem(seed);
    const auto table = make_rotations(problem.head_dim, 1600);
    const Matrix alone = problem.attend(two, table, false);
    for (Bench* bench : {&one, &two, &three}) {
      EXPECT_TRUE(same_bits(problem.attend(*bench, table, true), alone))
          << "seed " << seed << ", " << bench->pool.num_threads() << " threads";
    }
    const auto& segments = problem.plan.segments;
    sharing += std::any_of(segments.begin(), segments.end(), [](const auto& s) { return s.shares(); }) ? 1 : 0;
  }
  EXPECT_GT(sharing, is_reduced() ? 3 : 40);
}

TEST(AttentionShared, ReferenceHonoursTheSameInputs) {
  Bench reference("reference");
  for (unsigned seed = 0; seed < 8; ++seed) {
    const SharedProblem problem(seed);
    const auto table = make_rotations(problem.head_dim, 800);
    EXPECT_TRUE(same_bits(problem.attend(reference, table, true), problem.attend(reference, table, false)));
  }
}

TEST(AttentionShared, AWrongClaimIsRefused) {
  Bench bench("");
  const auto table = make_rotations(16, 100);
  const RopeTable rope_table{table.data(), 16, 100};
  kv::KvStorage storage({quant::KvFormat::f32, 1, 1, 16}, 8);
  const auto attend = [&](std::vector<AttentionSegment> segments, std::vector<AttentionRun> runs) {
    const std::vector<int32_t> blocks = {0, 1, 2, 3, 0, 1, 2, 4}, positions = {60, 60};
    std::vector<int32_t> own(61);
    std::iota(own.begin(), own.end(), 0);
    Matrix q(2, 16), out(2, 16);
    attention(out.view(), q.view(), 1, 0.3f, 0, rope_table, storage.layer(0), {positions, segments, runs, blocks, own},
              bench.ctx);
  };
  const std::vector<AttentionRun> runs = {{0, 61, 0}, {4, 61, 0}};
  EXPECT_NO_THROW(attend({{0, 1, 0, 1}, {1, 1, 1, 1, 48}}, runs));
  EXPECT_THROW(attend({{0, 1, 0, 1, 16}, {1, 1, 1, 1}}, runs), Error);  // nothing before it
  EXPECT_THROW(attend({{0, 1, 0, 1}, {1, 1, 1, 1, 64}}, runs), Error);  // more than there are
  EXPECT_THROW(attend({{0, 1, 0, 1}, {1, 1, 1, 1, 40}}, runs), Error);  // not whole blocks
  EXPECT_THROW(attend({{0, 1, 0, 1}, {1, 1, 1, 1, -16}}, runs), Error);
  EXPECT_THROW(attend({{0, 1, 0, 1}, {1, 1, 1, 1, 64}}, {{0, 64, 0}, {4, 64, 0}}), Error);  // another fourth block
  EXPECT_NO_THROW(attend({{0, 1, 0, 1}, {1, 1, 1, 1, 16}}, {{0, 61, 0}, {4, 56, 5}}));      // another place
  EXPECT_THROW(attend({{0, 2, 0, 2}, {2, 0, 1, 1, 16}}, runs), Error);                      // no rows
  const AttentionRun own{.block_begin = 4, .num_keys = 61, .position_offset = 0, .positions_begin = 0};
  EXPECT_NO_THROW(attend({{0, 1, 0, 1}, {1, 1, 1, 1}}, {{0, 61, 0}, own}));
  EXPECT_THROW(attend({{0, 1, 0, 1}, {1, 1, 1, 1, 16}}, {{0, 61, 0}, own}), Error);  // positions of its own
  const std::vector<AttentionRun> pieces = {{0, 40, 0}, {3, 16, 40}, {4, 40, 3}, {7, 16, 43}};
  EXPECT_NO_THROW(attend({{0, 1, 0, 2}, {1, 1, 2, 2, 0, 1}}, pieces));
  EXPECT_THROW(attend({{0, 1, 0, 2}, {1, 1, 2, 2, 0, 2}}, pieces), Error);   // the second one is another
  EXPECT_THROW(attend({{0, 1, 0, 2}, {1, 1, 2, 2, 16, 1}}, pieces), Error);  // likewise
  EXPECT_THROW(attend({{0, 1, 0, 2}, {1, 1, 2, 2, 0, 3}}, pieces), Error);   // more than there are
  EXPECT_THROW(attend({{0, 1, 0, 2}, {1, 1, 2, 2, 0, -1}}, pieces), Error);
  EXPECT_THROW(attend({{0, 1, 0, 2}, {1, 1, 2, 2, 0, 1}}, {{0, 40, 0}, {3, 16, 40}, {4, 39, 3}, {7, 16, 42}}), Error);
}

// A run that begins before position 0 has its rows further away from its first key than from the beginning.
TEST(AttentionRuns, RowsBeyondTheRotationTableAreRefused) {
  Bench bench("");
  const auto table = make_rotations(16, 40);
  const RopeTable rope_table{table.data(), 16, 40};
  kv::KvStorage storage({quant::KvFormat::f32, 1, 1, 16}, 2);
  for (int i = 0; i < 2; ++i) storage.zero(i);
  const auto attend = [&](std::vector<int32_t> positions, int offset) {
    const auto rows = static_cast<int32_t>(positions.size());
    const std::vector<AttentionSegment> segments = {{0, 0, 0, 1}, {0, rows, 0, 2}};
    const std::vector<AttentionRun> runs = {{0, 16, 0}, {1, 16, offset}};
    const std::vector<int32_t> blocks = {0, 1};
    Matrix q(rows, 16), out(rows, 16);
    attention(out.view(), q.view(), 1, 0.3f, 0, rope_table, storage.layer(0), {positions, segments, runs, blocks},
              bench.ctx);
  };
  EXPECT_NO_THROW(attend({39, 4}, 0));
  EXPECT_NO_THROW(attend({34, 3}, -5));
  EXPECT_NO_THROW(attend({2, 3}, 30));  // in front of the run
  try {
    attend({35, 3}, -5);
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    EXPECT_STREQ(error.what(),
                 "attention: position 35 is 40 behind the beginning of a run at -5, outside the rotation table of 40");
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, Attention, testing::ValuesIn(fast_backends()), backend_test_name);

// The identity behind composing runs: rotating the query by p - o against keys stored at local positions equals one
// run whose keys were stored at their sequence positions.
TEST(AttentionIdentity, OffsetRunsEqualOneRun) {
  Bench bench("reference");
  const auto table = make_rotations(32, 400);
  const RopeTable rope_table{table.data(), 32, 400};
  Matrix k = Matrix::random(64, 32, 1), v = Matrix::random(64, 32, 2), q = Matrix::random(1, 32, 3);
  const auto run = [&](bool split) {
    kv::KvStorage storage({quant::KvFormat::f32, 1, 1, 32}, 4);
    std::vector<int32_t> slots(64), positions(64);
    for (int i = 0; i < 64; ++i) {
      slots[static_cast<std::size_t>(i)] = i;
      positions[static_cast<std::size_t>(i)] = split ? i % 32 : i;
    }
    Matrix keys = k;
    rope(keys.view(), positions, rope_table, bench.ctx);
    kv_write(storage.layer(0), keys.view(), v.view(), slots, bench.ctx);
    const std::vector<AttentionRun> runs =
        split ? std::vector<AttentionRun>{{0, 32, 0}, {2, 32, 32}} : std::vector<AttentionRun>{{0, 64, 0}};
    const std::vector<AttentionSegment> segments = {{0, 1, 0, static_cast<int32_t>(runs.size())}};
    const std::vector<int32_t> blocks = {0, 1, 2, 3}, at = {63};
    Matrix out(1, 32);
    attention(out.view(), q.view(), 1, 0.2f, 0, rope_table, storage.layer(0), {at, segments, runs, blocks}, bench.ctx);
    return out;
  };
  expect_close(run(true), run(false), 2e-6, "composed against contiguous");
}

}  // namespace
}  // namespace nb::ops
