#include "engine/step_shapes.h"

#include <gtest/gtest.h>

namespace nb::engine {
namespace {

/// One segment of `rows` rows that sees `keys` keys, with `logit_rows` rows for the head.
StepBatch make_batch(int rows, int keys, int logit_rows) {
  StepBatch batch;
  batch.inputs.token_ids.assign(static_cast<std::size_t>(rows), 0);
  batch.inputs.segments.push_back({.row_begin = 0, .row_count = rows, .run_begin = 0, .run_count = 1});
  batch.inputs.runs.push_back({.block_begin = 0, .num_keys = keys, .position_offset = 0});
  batch.inputs.logit_rows.assign(static_cast<std::size_t>(logit_rows), 0);
  return batch;
}

TEST(StepShapes, OnlyAStepSmallerInEveryRespectIsCovered) {
  StepShapes shapes;
  EXPECT_FALSE(shapes.seen_at_least(make_batch(100, 300, 1), 0));
  EXPECT_TRUE(shapes.seen_at_least(make_batch(100, 300, 1), 0));
  EXPECT_TRUE(shapes.seen_at_least(make_batch(99, 120, 1), 0));
  EXPECT_FALSE(shapes.seen_at_least(make_batch(101, 300, 1), 0));
  EXPECT_FALSE(shapes.seen_at_least(make_batch(100, 301, 1), 0));
  EXPECT_FALSE(shapes.seen_at_least(make_batch(100, 300, 2), 0));
  EXPECT_FALSE(shapes.seen_at_least(make_batch(100, 300, 1), 1));  // the logits of a row
  EXPECT_FALSE(shapes.seen_at_least(make_batch(8, 300, 1), 0));    // few rows are prepared once per thread
  shapes.forget();
  EXPECT_FALSE(shapes.seen_at_least(make_batch(99, 120, 1), 0));
}

// Two steps, each larger in one respect, do not make room for a step as large as both.
TEST(StepShapes, StepsAreNotMixed) {
  StepShapes shapes;
  EXPECT_FALSE(shapes.seen_at_least(make_batch(100, 100, 1), 0));
  EXPECT_FALSE(shapes.seen_at_least(make_batch(50, 500, 1), 0));
  EXPECT_FALSE(shapes.seen_at_least(make_batch(100, 500, 1), 0));
}

// Rows that share keys are computed together, and fewer tiles of columns may need partial states where more did not.
TEST(StepShapes, SharingIsCoveredByTheSameSharingOnly) {
  const auto make = [](std::vector<int> shared_keys) {
    StepBatch batch;
    for (const int shared : shared_keys) {
      const auto row = static_cast<std::int32_t>(batch.inputs.segments.size());
      batch.inputs.segments.push_back(
          {.row_begin = row, .row_count = 1, .run_begin = row, .run_count = 1, .shared_keys = shared});
      batch.inputs.runs.push_back({.block_begin = 0, .num_keys = 300, .position_offset = 0});
      batch.inputs.token_ids.push_back(0);
    }
    return batch;
  };
  StepShapes shapes;
  EXPECT_FALSE(shapes.seen_at_least(make({0, 0, 0, 0}), 0));
  EXPECT_FALSE(shapes.seen_at_least(make({0, 64, 0, 64}), 0));
  EXPECT_TRUE(shapes.seen_at_least(make({0, 128, 0, 64}), 0));
  EXPECT_FALSE(shapes.seen_at_least(make({0, 64, 64, 0}), 0));
  EXPECT_TRUE(shapes.seen_at_least(make({0, 0, 0}), 0));
}

// Rows of one tile go through the longest run that any of their sequences has there.
TEST(StepShapes, RunsOfUnequalLengthAddUp) {
  const auto make = [](std::vector<int> first, std::vector<int> second) {
    StepBatch batch;
    for (const auto& lengths : {first, second}) {
      const auto row = static_cast<std::int32_t>(batch.inputs.segments.size());
      batch.inputs.segments.push_back({.row_begin = row,
                                       .row_count = 1,
                                       .run_begin = static_cast<std::int32_t>(batch.inputs.runs.size()),
                                       .run_count = static_cast<std::int32_t>(lengths.size()),
                                       .shared_runs = row});
      for (const int keys : lengths)
        batch.inputs.runs.push_back({.block_begin = 0, .num_keys = keys, .position_offset = 0});
      batch.inputs.token_ids.push_back(0);
    }
    return batch;
  };
  StepShapes shapes;
  EXPECT_FALSE(shapes.seen_at_least(make({256, 9 * 256}, {256, 3 * 256}), 0));        // 2 rows of 1 + 9 splits
  EXPECT_TRUE(shapes.seen_at_least(make({256, 3 * 256}, {256, 8 * 256}), 0));         // 1 + 8
  EXPECT_FALSE(shapes.seen_at_least(make({256, 8 * 256, 256}, {256, 256, 512}), 0));  // 1 + 8 + 2
}

// What a policy shows, summaries and cells of keys that do not outlive a step take memory too.
TEST(StepShapes, PoliciesAndOpenCellsCount) {
  const auto make = [](int window, int num_step_cells, int num_summaries) {
    StepBatch batch = make_batch(1, 2000, 1);
    batch.inputs.positions = {1999};
    batch.inputs.policies = {{.rule = ops::KeyRule::window, .window = window}};
    batch.inputs.segments[0].policy = 0;
    batch.inputs.num_step_cells = num_step_cells;
    batch.inputs.summaries.resize(static_cast<std::size_t>(num_summaries));
    return batch;
  };
  StepShapes shapes;
  EXPECT_FALSE(shapes.seen_at_least(make(300, 2, 0), 0));
  EXPECT_TRUE(shapes.seen_at_least(make(200, 1, 0), 0));
  EXPECT_FALSE(shapes.seen_at_least(make(600, 2, 0), 0));
  EXPECT_FALSE(shapes.seen_at_least(make(200, 3, 0), 0));
  EXPECT_FALSE(shapes.seen_at_least(make(200, 1, 1), 0));
}

}  // namespace
}  // namespace nb::engine
