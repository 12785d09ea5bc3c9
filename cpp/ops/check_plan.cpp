#include "ops/check_plan.h"

#include <algorithm>
#include <cmath>

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
    NB_CHECK(std::isfinite(run.score_bias), invalid_argument, "attention: a run has score bias ", run.score_bias);
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

// A policy goes by the index of a key, which must be its position.
void check_policies(const AttentionPlan& plan) {
  for (const KeyPolicy& policy : plan.policies) check_policy(policy);
  for (std::size_t i = 0; i < plan.segments.size(); ++i) {
    const AttentionSegment& segment = plan.segments[i];
    if (segment.policy == -1) continue;
    const auto count = static_cast<int32_t>(plan.policies.size());
    NB_CHECK(segment.policy >= 0 && segment.policy < count, invalid_argument, "attention: segment ", i, " has policy ",
             segment.policy, " of ", count);
    const bool summarized = plan.policies[static_cast<std::size_t>(segment.policy)].rule == KeyRule::summary;
    NB_CHECK(segment.run_count == 1 || (summarized && segment.run_count == 2), invalid_argument, "attention: segment ",
             i, " has a policy and ", segment.run_count, " runs");
    const AttentionRun* runs = plan.runs.data() + segment.run_begin;
    const AttentionRun& own = runs[segment.run_count - 1];
    NB_CHECK(own.position_offset == 0 && own.positions_begin < 0, invalid_argument, "attention: segment ", i,
             " has a policy and keys that do not stand from position 0 on");
    NB_CHECK(segment.run_count == 1 || runs[0].positions_begin >= 0, invalid_argument, "attention: segment ", i,
             " has summaries without positions of their own");
    const auto rows = plan.positions.begin() + segment.row_begin;
    NB_CHECK(std::is_sorted(rows, rows + segment.row_count), invalid_argument, "attention: segment ", i,
             " has a policy and rows whose positions do not ascend");
  }
}

}  // namespace

void check_positions(std::span<const int32_t> positions, const RopeTable& table) {
  for (int32_t position : positions) {
    NB_CHECK(position >= 0 && position < table.num_positions, invalid_argument, "position ", position,
             " is outside the rotation table of ", table.num_positions);
  }
}

void check_policy(const KeyPolicy& policy) {
  NB_CHECK(policy.rule <= KeyRule::summary, invalid_argument, "key policy: there is no rule ",
           static_cast<int>(policy.rule));
  if (policy.rule == KeyRule::full) return;
  NB_CHECK(policy.prefix >= 0, invalid_argument, "key policy: prefix is ", policy.prefix, ", must be at least 0");
  NB_CHECK(policy.window >= 1, invalid_argument, "key policy: window is ", policy.window, ", must be at least 1");
  if (policy.rule == KeyRule::strided || policy.rule == KeyRule::summary) {
    NB_CHECK(policy.period >= 1, invalid_argument, "key policy: period is ", policy.period, ", must be at least 1");
  } else if (policy.rule == KeyRule::block) {
    NB_CHECK(policy.period >= kBlockTokens && policy.period % kBlockTokens == 0, invalid_argument,
             "key policy: period is ", policy.period, ", must be a multiple of ", kBlockTokens);
    NB_CHECK(policy.keep >= 0 && policy.keep <= policy.period && policy.keep % kBlockTokens == 0, invalid_argument,
             "key policy: keep is ", policy.keep, ", must be a multiple of ", kBlockTokens, " up to the period of ",
             policy.period);
  } else if (policy.rule == KeyRule::budget) {
    NB_CHECK(policy.keep >= 0, invalid_argument, "key policy: keep is ", policy.keep, ", must be at least 0");
  }
}

void check_summaries(std::span<const KvSummary> summaries, std::span<const int32_t> blocks, const RopeTable& table) {
  for (std::size_t i = 0; i < summaries.size(); ++i) {
    const KvSummary& summary = summaries[i];
    NB_CHECK(summary.num_tokens >= 1 && summary.first_key >= 0 && summary.block_begin >= 0, invalid_argument,
             "summary ", i, " is of ", summary.num_tokens, " tokens from key ", summary.first_key, " of block ",
             summary.block_begin, " on");
    const std::int64_t keys = std::int64_t{summary.first_key} + summary.num_tokens;
    NB_CHECK(summary.block_begin + ceil_div<std::int64_t>(keys, kBlockTokens) <= std::int64_t(blocks.size()),
             invalid_argument, "summary ", i, ": its tokens are not all in the ", blocks.size(), " blocks");
    NB_CHECK(summary.position >= 0 && std::int64_t{summary.position} + summary.num_tokens <= table.num_positions,
             invalid_argument, "summary ", i, ": positions from ", summary.position, " on are outside the rotation ",
             "table of ", table.num_positions);
    NB_CHECK(summary.slot_position >= 0 && summary.slot_position < table.num_positions, invalid_argument, "summary ", i,
             ": position ", summary.slot_position, " is outside the rotation table of ", table.num_positions);
    const auto first = blocks.begin() + summary.block_begin + summary.first_key / kBlockTokens;
    const auto last =
        blocks.begin() + summary.block_begin + (summary.first_key + summary.num_tokens - 1) / kBlockTokens;
    NB_CHECK(summary.slot >= 0 && std::find(first, last + 1, summary.slot / kBlockTokens) == last + 1, invalid_argument,
             "summary ", i, ": slot ", summary.slot, " is in a block of its own tokens");
  }
}

bool uses_policies(const AttentionPlan& plan) {
  return std::any_of(plan.segments.begin(), plan.segments.end(), [](const auto& s) { return s.policy >= 0; }) ||
         std::any_of(plan.runs.begin(), plan.runs.end(), [](const auto& run) { return run.score_bias != 0.0f; });
}

void check_plan(const AttentionPlan& plan, const RopeTable& table) {
  check_runs(plan);
  check_distances(plan, table);
  check_shared_keys(plan);
  check_policies(plan);
}

}  // namespace nb::ops
