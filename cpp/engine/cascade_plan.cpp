#include "engine/cascade_plan.h"

#include <algorithm>
#include <span>

#include "base/align.h"
#include "base/error.h"
#include "base/ids.h"

namespace nb::engine {

namespace {

using ops::AttentionRun;
using ops::AttentionSegment;

const AttentionRun& run_of(const model::StepInputs& inputs, const AttentionSegment& segment, int index) {
  return inputs.runs[static_cast<std::size_t>(segment.run_begin + index)];
}

/// Whether the segment has such a run, and rows of other segments may read it with its own.
bool has_shareable(const model::StepInputs& inputs, const AttentionSegment& segment, int index) {
  return index < segment.run_count && run_of(inputs, segment, index).positions_begin < 0;
}

std::span<const std::int32_t> blocks_of(const model::StepInputs& inputs, const AttentionRun& run) {
  return std::span(inputs.blocks)
      .subspan(static_cast<std::size_t>(run.block_begin),
               static_cast<std::size_t>(ceil_div(run.num_keys, kBlockTokens)));
}

/// What two segments have in common at their beginning, and which of them stands first.
struct Common {
  int runs = 0;   ///< that are the same from end to end, and have others behind them
  int keys = 0;   ///< of the runs behind them, in full blocks
  int order = 0;  ///< negative: a stands before b
};

Common compare(const model::StepInputs& inputs, const AttentionSegment& a, const AttentionSegment& b) {
  for (int r = 0;; ++r) {
    const bool has_a = has_shareable(inputs, a, r), has_b = has_shareable(inputs, b, r);
    if (!has_a || !has_b) return {.runs = r, .order = has_a || has_b ? has_a - has_b : a.row_begin - b.row_begin};
    const AttentionRun &run_a = run_of(inputs, a, r), &run_b = run_of(inputs, b, r);
    const auto blocks_a = blocks_of(inputs, run_a), blocks_b = blocks_of(inputs, run_b);
    // A partly filled block is common only as the end of a run that is the same altogether.
    const int full = std::min(run_a.num_keys, run_b.num_keys) / kBlockTokens;
    const auto [at, bt] = std::mismatch(blocks_a.begin(), blocks_a.begin() + full, blocks_b.begin());
    Common common = {.runs = r, .keys = static_cast<int>(at - blocks_a.begin()) * kBlockTokens};
    if (common.keys < full * kBlockTokens) {
      common.order = *at - *bt;
      return common;
    }
    if (run_a.num_keys != run_b.num_keys) {
      common.order = run_a.num_keys - run_b.num_keys;
      return common;
    }
    if (run_a.num_keys % kBlockTokens != 0 && blocks_a.back() != blocks_b.back()) {
      common.order = blocks_a.back() - blocks_b.back();
      return common;
    }
    if (r + 1 < a.run_count && r + 1 < b.run_count) continue;
    common.order = a.run_count != b.run_count ? a.run_count - b.run_count : a.row_begin - b.row_begin;
    return common;
  }
}

/// The first key of a run that the first row of the segment sees, at most its number of keys.
int first_visible(const model::StepInputs& inputs, const AttentionSegment& segment, const AttentionRun& run,
                  int window) {
  if (window == 0) return run.first_key;
  const int first = inputs.positions[static_cast<std::size_t>(segment.row_begin)] - window + 1 - run.position_offset;
  return std::clamp(first, run.first_key, run.num_keys);
}

/// Keys that both have in common and see.
int visible_keys(const model::StepInputs& inputs, const AttentionSegment& a, const AttentionSegment& b,
                 const Common& common, int window) {
  int seen = 0;
  for (int r = 0; r < common.runs + (common.keys > 0 ? 1 : 0); ++r) {
    const AttentionRun &run_a = run_of(inputs, a, r), &run_b = run_of(inputs, b, r);
    const int end = r < common.runs ? run_a.num_keys : common.keys;
    seen +=
        std::max(0, end - std::max(first_visible(inputs, a, run_a, window), first_visible(inputs, b, run_b, window)));
  }
  return seen;
}

int keys_of(const model::StepInputs& inputs, const AttentionSegment& segment, int num_runs) {
  int keys = 0;
  for (int r = 0; r < num_runs; ++r) keys += run_of(inputs, segment, r).num_keys;
  return keys;
}

}  // namespace

std::int64_t plan_cascade(model::StepInputs& inputs, int window) {
  auto& segments = inputs.segments;
  if (segments.size() < 2) return 0;
  for (const AttentionSegment& segment : segments) NB_ASSERT(!segment.shares());
  // Equal lists stay in the order of their rows, so the plan is a function of the step alone.
  std::sort(segments.begin(), segments.end(),
            [&](const AttentionSegment& a, const AttentionSegment& b) { return compare(inputs, a, b).order < 0; });
  std::int64_t saved = 0;
  for (std::size_t i = 1; i < segments.size(); ++i) {
    const AttentionSegment& before = segments[i - 1];
    AttentionSegment& segment = segments[i];
    const Common common = compare(inputs, before, segment);
    const int seen = visible_keys(inputs, before, segment, common, window);
    const int own = std::max(keys_of(inputs, before, before.run_count), keys_of(inputs, segment, segment.run_count)) -
                    keys_of(inputs, segment, common.runs) - common.keys;
    if (seen < kMinSharedKeys || own > kMaxOwnRatio * seen) continue;
    segment.shared_runs = common.runs;
    segment.shared_keys = common.keys;
    saved += seen;
  }
  if (saved == 0) {
    std::sort(segments.begin(), segments.end(),
              [](const AttentionSegment& a, const AttentionSegment& b) { return a.row_begin < b.row_begin; });
  }
  return saved;
}

}  // namespace nb::engine
