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
    shares = shares || segment.shared_keys > 0;
    hash = (hash * 31 + static_cast<std::uint32_t>(segment.row_count)) * 2 + (segment.shared_keys > 0 ? 1 : 0);
  }
  return shares ? static_cast<int>(hash % 0x3fffffff) + 1 : 0;
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
  int splits = 0;      // of all sequences
  int row_splits = 0;  // of all rows
  for (const auto& segment : inputs.segments) {
    for (int run = segment.run_begin; run < segment.run_begin + segment.run_count; ++run) {
      const int keys = inputs.runs[static_cast<std::size_t>(run)].num_keys;
      longest = std::max(longest, keys);
      splits += ceil_div(keys, kSplitTokens);
      row_splits += segment.row_count * ceil_div(keys, kSplitTokens);
    }
  }
  const int arranged = arrangement(inputs);  // both signs: covered by the same arrangement only
  const int head_rows = static_cast<int>(inputs.logit_rows.size());
  const int last_group = head_rows % HeadRunner::kGroupRows;  // the only one that may be small
  return {rows,
          private_rows(rows),
          static_cast<int>(inputs.segments.size()),
          longest,
          splits,
          row_splits,
          std::min(head_rows, HeadRunner::kGroupRows),
          private_rows(last_group),
          logits_rows,
          arranged,
          -arranged};
}

}  // namespace nb::engine
