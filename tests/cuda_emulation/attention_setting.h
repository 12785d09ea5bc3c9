// Problems of attention in device memory, and what the reference makes of them.
//
// For tests only.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "base/ids.h"
#include "cuda_emulation/device_cells.h"
#include "cuda_emulation/device_fixture.h"
#include "ops/ops.h"
#include "quant/kv_format.h"

namespace nb::cuda {

using ops::AttentionRun;
using ops::AttentionSegment;
using ops::Matrix;
using quant::KvFormat;

/// Sequences with contexts in shuffled blocks, and the rows that query them.
struct Problem {
  int num_heads, num_kv_heads, head_dim;
  KvFormat format;
  struct Sequence {
    int context;  // keys of the last run, of which the last `rows` belong to the query rows
    int rows;
    std::vector<int> earlier_runs = {};  // lengths of the runs before it, each at the offset where the one before ends
    std::optional<ops::KeyPolicy> policy = {};  // with summaries as a run before, if it has them
  };
  std::vector<Sequence> sequences;
  int window = 0;
  bool is_composed = false;  // runs begin late and have hidden keys, and the last one has positions with gaps
};

inline std::string name_of(const Problem& problem) {
  std::string name = std::to_string(problem.num_heads) + "/" + std::to_string(problem.num_kv_heads) + " heads of " +
                     std::to_string(problem.head_dim) + " " + quant::to_string(problem.format) + " window " +
                     std::to_string(problem.window) + (problem.is_composed ? " composed" : "");
  for (const Problem::Sequence& s : problem.sequences) {
    name += ", " + std::to_string(s.rows) + " rows of " + std::to_string(s.context);
    for (const int run : s.earlier_runs) name += " + " + std::to_string(run);
    if (s.policy) name += " by rule " + std::to_string(static_cast<int>(s.policy->rule));
  }
  return name;
}

/// Everything of a problem in host memory. The cells were written by the reference backend; those of the device have
/// the same numbers. Blocks that no run names are NaN, and those that a policy hides from all rows; unused cells of the
// others zero, as the engine leaves them.
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
      if (sequence.policy) num_blocks += (num_summaries(sequence) + 15) / 16;
    }
    std::vector<int32_t> order(static_cast<std::size_t>(num_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::mt19937 random(4);
    std::shuffle(order.begin(), order.end(), random);
    stride_ = layer_bytes(problem.format, problem.num_kv_heads, problem.head_dim);
    cells_.assign(static_cast<std::size_t>(num_blocks * stride_), 0xff);  // NaN, or scales of NaN
    for (const auto& sequence : problem.sequences) add(sequence, order);
    q_ = Matrix::random(static_cast<int>(positions.size()), problem.num_heads * problem.head_dim, 55, 1.5F);
  }

  ops::KvLayer layer(std::uint8_t* base) const {
    return layer_of(problem_.format, problem_.num_kv_heads, problem_.head_dim, base, stride_);
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
      if (only_row < s.row_begin || only_row >= s.row_begin + s.row_count) continue;
      asked = {s};
      asked[0].row_begin = 0;
      asked[0].row_count = 1;
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
      asked.push_back(s);
      if (!cut) continue;
      asked.back().row_count = first;
      asked.push_back(s);
      asked.back().row_begin += first;
      asked.back().row_count -= first;
    }
    return on_device(bench, asked, positions, q_);
  }

  std::vector<AttentionSegment> segments;
  std::vector<int32_t> positions;

 private:
  static constexpr int kPositions = 1300;

  Matrix on_device(DeviceBench& bench, const std::vector<AttentionSegment>& asked, const std::vector<int32_t>& at,
                   const Matrix& q) {
    const std::vector<std::uint8_t> stored = device_cells(cells_, layer(cells_.data()));
    const Buffer cells = copy_to(bench.memory, stored.data(), stored.size());
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
    if (sequence.policy) add_summaries(sequence, order);
    const int last = add_run(sequence.context, offset, true, order);
    segments.push_back({.row_begin = static_cast<int32_t>(positions.size()),
                        .row_count = sequence.rows,
                        .run_begin = run_begin,
                        .run_count = static_cast<int32_t>(runs_.size()) - run_begin});
    if (sequence.policy) {
      segments.back().policy = static_cast<int32_t>(policies_.size());
      policies_.push_back(*sequence.policy);
      for (int block = 0; 16 * block < sequence.context; ++block) {
        if (!ops::is_dead(*sequence.policy, sequence.context - sequence.rows, block)) continue;
        const int id = blocks_[static_cast<std::size_t>(runs_.back().block_begin + block)];
        std::fill_n(cells_.begin() + id * stride_, stride_, std::uint8_t{0xff});
      }
    }
    for (int i = 0; i < sequence.rows; ++i) positions.push_back(last + 1 - sequence.rows + i);
  }

  static int num_summaries(const Problem::Sequence& sequence) {
    return sequence.policy->rule == ops::KeyRule::summary ? sequence.context / sequence.policy->period : 0;
  }

  // One for each group, seen from where the group is not: a run before the sequence's own.
  void add_summaries(const Problem::Sequence& sequence, const std::vector<int32_t>& order) {
    const int count = num_summaries(sequence), period = sequence.policy->period;
    if (count == 0) return;
    add_run(count, 0, false, order);
    runs_.back().positions_begin = static_cast<int32_t>(key_positions_.size());
    runs_.back().score_bias = std::log(static_cast<float>(period));
    for (int g = 0; g < count; ++g) key_positions_.push_back((g + 1) * period - 1 + sequence.policy->window);
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
                   {at, asked, runs_, blocks_, key_positions_, hidden_, policies_}, ctx);
  }

  Problem problem_;
  ops::Bench reference_;
  std::vector<float> rotations_;
  std::vector<std::uint8_t> cells_;
  std::int64_t stride_ = 0;
  std::vector<AttentionRun> runs_;
  std::vector<int32_t> blocks_, key_positions_;
  std::vector<uint16_t> hidden_;
  std::vector<ops::KeyPolicy> policies_;
  std::mt19937 random_{5};
  unsigned seed_ = 100;
  Matrix q_;
};

}  // namespace nb::cuda
