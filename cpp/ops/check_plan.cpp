#include "ops/check_plan.h"

#include <algorithm>

#include "base/align.h"
#include "base/error.h"
#include "base/ids.h"

namespace nb::ops {
namespace {

// Keys of their own positions are found by halving, so these must ascend.
void check_runs(const AttentionPlan& plan) {
  for (const AttentionRun& run : plan.runs) {
    NB_CHECK(run.first_key >= 0 && run.first_key <= run.num_keys, invalid_argument, "attention: a run of ",
             run.num_keys, " keys begins at key ", run.first_key);
    if (run.hidden_begin >= 0) {
      NB_CHECK(run.hidden_begin + ceil_div(run.num_keys, kBlockTokens) <= static_cast<int>(plan.hidden.size()),
               invalid_argument, "attention: hidden keys of a run of ", run.num_keys, " keys are not all given");
    }
    if (run.positions_begin < 0) continue;
    NB_CHECK(run.position_offset == 0, invalid_argument, "attention: a run with positions of its own has offset ",
             run.position_offset);
    NB_CHECK(run.positions_begin + run.num_keys <= static_cast<int>(plan.key_positions.size()), invalid_argument,
             "attention: positions of a run of ", run.num_keys, " keys are not all given");
    const auto begin = plan.key_positions.begin() + run.positions_begin;
    NB_CHECK(std::is_sorted(begin, begin + run.num_keys), invalid_argument,
             "attention: the positions of a run do not ascend");
  }
}

// For each run a query is rotated to its distance from the run's first key, which may lie before position 0. Rows
// before that key see nothing of the run and are not rotated.
void check_distances(const AttentionPlan& plan, const RopeTable& table) {
  for (const AttentionSegment& segment : plan.segments) {
    if (segment.row_count == 0) continue;
    const auto rows = plan.positions.subspan(static_cast<std::size_t>(segment.row_begin),
                                             static_cast<std::size_t>(segment.row_count));
    const std::int64_t last = *std::max_element(rows.begin(), rows.end());
    for (int32_t r = segment.run_begin; r < segment.run_begin + segment.run_count; ++r) {
      const std::int64_t offset = plan.runs[static_cast<std::size_t>(r)].position_offset;
      NB_CHECK(last - offset < table.num_positions, invalid_argument, "attention: position ", last, " is ",
               last - offset, " behind the beginning of a run at ", offset, ", outside the rotation table of ",
               table.num_positions);
    }
  }
}

// Whether two runs have their first `num_keys` keys in the same blocks.
bool same_blocks(const AttentionPlan& plan, const AttentionRun& a, const AttentionRun& b, int32_t num_keys) {
  const int32_t* blocks = plan.blocks.data() + a.block_begin;
  return a.positions_begin < 0 && b.positions_begin < 0 && num_keys <= std::min(a.num_keys, b.num_keys) &&
         std::equal(blocks, blocks + ceil_div(num_keys, kBlockTokens), plan.blocks.data() + b.block_begin);
}

// A wrong claim of equal blocks would be a wrong answer, and to compare a few hundred ids costs nothing.
void check_shared_keys(const AttentionPlan& plan) {
  for (std::size_t i = 0; i < plan.segments.size(); ++i) {
    const AttentionSegment& segment = plan.segments[i];
    if (segment.shared_runs == 0 && segment.shared_keys == 0) continue;
    NB_CHECK(i > 0, invalid_argument, "attention: segment 0 shares keys with none before it");
    const AttentionSegment& before = plan.segments[i - 1];
    const int32_t runs = std::min(segment.run_count, before.run_count);
    NB_CHECK(segment.row_count > 0 && before.row_count > 0, invalid_argument, "attention: segment ", i, " lacks rows");
    NB_CHECK(segment.shared_runs >= 0 && segment.shared_keys >= 0 && segment.shared_keys % kBlockTokens == 0 &&
                 segment.shared_runs + (segment.shared_keys > 0 ? 1 : 0) <= runs,
             invalid_argument, "attention: segment ", i, " cannot share ", segment.shared_runs, " runs and ",
             segment.shared_keys, " keys");
    const AttentionRun* own = plan.runs.data() + segment.run_begin;
    const AttentionRun* other = plan.runs.data() + before.run_begin;
    for (int32_t r = 0; r < segment.shared_runs; ++r) {
      NB_CHECK(own[r].num_keys == other[r].num_keys && same_blocks(plan, own[r], other[r], own[r].num_keys),
               invalid_argument, "attention: segments ", i - 1, " and ", i, " do not share run ", r);
    }
    if (segment.shared_keys == 0) continue;
    NB_CHECK(same_blocks(plan, own[segment.shared_runs], other[segment.shared_runs], segment.shared_keys),
             invalid_argument, "attention: segments ", i - 1, " and ", i, " do not share the first ",
             segment.shared_keys, " keys of run ", segment.shared_runs);
  }
}

}  // namespace

void check_plan(const AttentionPlan& plan, const RopeTable& table) {
  check_runs(plan);
  check_distances(plan, table);
  check_shared_keys(plan);
}

}  // namespace nb::ops
