#include "engine/step_shapes.h"

#include <algorithm>

#include "base/align.h"
#include "engine/head_runner.h"

namespace nb::engine {

namespace {

/// How rows share tiles of columns, as a number for comparing: 0 where no segment shares keys.
int arrangement(const model::StepInputs& inputs) {
  std::uint32_t hash = 0;
  bool shares = false;
  for (const auto& segment : inputs.segments) {
    shares = shares || segment.shares();
    hash = (hash * 31 + static_cast<std::uint32_t>(segment.row_count)) * 2 + (segment.shares() ? 1 : 0);
  }
  return shares ? static_cast<int>(hash % 0x3fffffff) + 1 : 0;
}

/// Splits of a run, 0 where the segment has no such run.
int splits_of(const model::StepInputs& inputs, const ops::AttentionSegment& segment, int run) {
  if (run >= segment.run_count) return 0;
  return ceil_div(inputs.runs[static_cast<std::size_t>(segment.run_begin + run)].num_keys, kSplitTokens);
}

/// Splits of all rows at most: rows that share keys with others may go through the longest run among them.
int splits_of_rows(const model::StepInputs& inputs) {
  int splits = 0;
  for (std::size_t begin = 0, end = 0; begin < inputs.segments.size(); begin = end) {
    int rows = 0, runs = 0;
    do {
      rows += inputs.segments[end].row_count;
      runs = std::max(runs, inputs.segments[end].run_count);
    } while (++end < inputs.segments.size() && inputs.segments[end].shares());
    for (int run = 0; run < runs; ++run) {
      int most = 0;
      for (std::size_t i = begin; i < end; ++i) most = std::max(most, splits_of(inputs, inputs.segments[i], run));
      splits += rows * most;
    }
  }
  return splits;
}

/// Splits of which policies show their rows anything, times rows.
int splits_by_policy(const model::StepInputs& inputs) {
  int splits = 0;
  for (const auto& segment : inputs.segments) {
    if (segment.policy < 0) continue;
    const ops::KeyPolicy& policy = inputs.policies[static_cast<std::size_t>(segment.policy)];
    const int row = inputs.positions[static_cast<std::size_t>(segment.row_begin)];
    const int blocks = ceil_div(
        inputs.runs[static_cast<std::size_t>(segment.run_begin + segment.run_count - 1)].num_keys, kBlockTokens);
    int seen = -1;  // split
    for (int block = 0; block < blocks; ++block) {
      if (block * kBlockTokens / kSplitTokens == seen || ops::is_dead(policy, row, block)) continue;
      seen = block * kBlockTokens / kSplitTokens;
      splits += segment.row_count;
    }
  }
  return splits;
}

/// Few rows are prepared once per thread, many rows once: so fewer rows can take more memory.
int private_rows(int rows) { return rows <= ops::kPrivateRows ? rows : 0; }

}  // namespace

bool StepShapes::seen_at_least(const StepBatch& batch, int logits_rows) {
  const Shape shape = shape_of(batch, logits_rows);
  const auto covers = [&](const Shape& past) {
    return std::equal(shape.begin(), shape.end(), past.begin(), [](int now, int then) { return now <= then; });
  };
  if (std::any_of(past_.begin(), past_.end(), covers)) return true;
  past_[next_++ % past_.size()] = shape;
  return false;
}

StepShapes::Shape StepShapes::shape_of(const StepBatch& batch, int logits_rows) {
  const model::StepInputs& inputs = batch.inputs;
  const int rows = inputs.num_tokens();
  int longest = 0;
  int splits = 0;  // of all sequences
  for (const auto& segment : inputs.segments) {
    for (int run = segment.run_begin; run < segment.run_begin + segment.run_count; ++run) {
      longest = std::max(longest, inputs.runs[static_cast<std::size_t>(run)].num_keys);
    }
    for (int run = 0; run < segment.run_count; ++run) splits += splits_of(inputs, segment, run);
  }
  const int arranged = arrangement(inputs);  // both signs: covered by the same arrangement only
  const int head_rows = static_cast<int>(inputs.logit_rows.size());
  const int last_group = head_rows % HeadRunner::kGroupRows;  // the only one that may be small
  return {rows,
          private_rows(rows),
          static_cast<int>(inputs.segments.size()),
          longest,
          splits,
          splits_of_rows(inputs),
          splits_by_policy(inputs),
          inputs.num_step_cells,
          inputs.summaries.empty() ? 0 : 1,
          std::min(head_rows, HeadRunner::kGroupRows),
          private_rows(last_group),
          logits_rows,
          arranged,
          -arranged};
}

}  // namespace nb::engine
