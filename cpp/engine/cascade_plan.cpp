#include "engine/cascade_plan.h"

#include <algorithm>
#include <span>

#include "base/error.h"
#include "base/ids.h"

namespace nb::engine {

namespace {

using ops::AttentionSegment;

const ops::AttentionRun& run_of(const model::StepInputs& inputs, const AttentionSegment& segment) {
  return inputs.runs[static_cast<std::size_t>(segment.run_begin)];
}

/// Whether rows of other segments may read the segment's keys with its own: not where it is put together from chunks.
bool is_plain(const model::StepInputs& inputs, const AttentionSegment& segment) {
  return segment.run_count == 1 && run_of(inputs, segment).positions_begin < 0;
}

/// The blocks of a segment's run that are full of keys. The others are never shared.
std::span<const std::int32_t> full_blocks(const model::StepInputs& inputs, const AttentionSegment& segment) {
  const ops::AttentionRun& run = run_of(inputs, segment);
  return std::span(inputs.blocks)
      .subspan(static_cast<std::size_t>(run.block_begin), static_cast<std::size_t>(run.num_keys / kBlockTokens));
}

int common_keys(const model::StepInputs& inputs, const AttentionSegment& a, const AttentionSegment& b) {
  const auto blocks_a = full_blocks(inputs, a), blocks_b = full_blocks(inputs, b);
  const auto end = std::mismatch(blocks_a.begin(), blocks_a.end(), blocks_b.begin(), blocks_b.end()).first;
  return static_cast<int>(end - blocks_a.begin()) * kBlockTokens;
}

/// The first key that a row of the segment sees.
int first_visible(const model::StepInputs& inputs, const AttentionSegment& segment, int window) {
  if (window == 0) return 0;
  return std::max(0, inputs.positions[static_cast<std::size_t>(segment.row_begin)] - window + 1);
}

}  // namespace

std::int64_t plan_cascade(model::StepInputs& inputs, int window) {
  auto& segments = inputs.segments;
  if (segments.size() < 2) return 0;
  for (const AttentionSegment& segment : segments) NB_ASSERT(segment.shared_keys == 0);
  // Equal lists stay in the order of their rows, so the plan is a function of the step alone.
  std::sort(segments.begin(), segments.end(), [&](const AttentionSegment& a, const AttentionSegment& b) {
    const bool plain_a = is_plain(inputs, a), plain_b = is_plain(inputs, b);
    if (!plain_a || !plain_b) return plain_a != plain_b ? plain_a : a.row_begin < b.row_begin;
    const auto blocks_a = full_blocks(inputs, a), blocks_b = full_blocks(inputs, b);
    const auto [at, bt] = std::mismatch(blocks_a.begin(), blocks_a.end(), blocks_b.begin(), blocks_b.end());
    const bool ended_a = at == blocks_a.end(), ended_b = bt == blocks_b.end();
    if (ended_a || ended_b) return ended_a != ended_b ? ended_a : a.row_begin < b.row_begin;
    return *at < *bt;
  });
  std::int64_t saved = 0;
  for (std::size_t i = 1; i < segments.size() && is_plain(inputs, segments[i]); ++i) {
    const int common = common_keys(inputs, segments[i - 1], segments[i]);
    const int below =
        std::max(first_visible(inputs, segments[i - 1], window), first_visible(inputs, segments[i], window));
    const int own = std::max(run_of(inputs, segments[i - 1]).num_keys, run_of(inputs, segments[i]).num_keys) - common;
    const int seen = common - below;
    if (seen < kMinSharedKeys || own > kMaxOwnRatio * seen) continue;
    segments[i].shared_keys = common;
    saved += seen;
  }
  if (saved == 0) {
    std::sort(segments.begin(), segments.end(),
              [](const AttentionSegment& a, const AttentionSegment& b) { return a.row_begin < b.row_begin; });
  }
  return saved;
}

}  // namespace nb::engine
