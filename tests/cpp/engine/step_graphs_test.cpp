#include "engine/step_graphs.h"

#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <stdexcept>
#include <vector>

#include "engine/step_arrays.h"

namespace nb::engine {
namespace {

/// A device that records nothing but the fact.
struct Recorder {
  bool begins = true, ends = true;
  bool recording = false;
  std::set<void*> alive;
  std::vector<void*> replayed;
};
Recorder recorder;

const DeviceMemory& memory() {
  static const DeviceMemory table = [] {
    DeviceMemory memory{};
    memory.name = "recorder:0";
    memory.begin_recording = [] { return recorder.recording = recorder.begins; };
    memory.end_recording = []() -> void* {
      recorder.recording = false;
      return recorder.ends ? *recorder.alive.insert(new char).first : nullptr;
    };
    memory.replay = [](void* graph) { recorder.replayed.push_back(graph); };
    memory.delete_graph = [](void* graph) {
      EXPECT_EQ(recorder.alive.erase(graph), 1U);
      delete static_cast<char*>(graph);
    };
    return memory;
  }();
  return table;
}

class StepGraphsTest : public testing::Test {
 protected:
  StepGraphsTest() { recorder = {}; }

  /// One step; counts a fused head like work of operators.
  bool run(const StepGraphs::Shape& shape) {
    return graphs_->run(
        shape,
        [&] {
          (recorder.recording ? times_recorded_ : times_run_)++;
          ++counts_.fused[ops::FusedOp::head];
          if (throws_ > 0 && --throws_ == 0) throw std::runtime_error("no");
        },
        counts_);
  }

  std::unique_ptr<StepGraphs> graphs_ = std::make_unique<StepGraphs>(&memory());
  ops::FusionCounts counts_{};
  int times_run_ = 0, times_recorded_ = 0, throws_ = 0;
};

TEST_F(StepGraphsTest, AShapeIsRecordedTheSecondTimeAndReplayedFromThenOn) {
  EXPECT_FALSE(run({.rows = 2}));
  EXPECT_TRUE(recorder.alive.empty());
  for (int step = 0; step < 3; ++step) EXPECT_TRUE(run({.rows = 2}));
  EXPECT_EQ(times_run_, 1);
  EXPECT_EQ(times_recorded_, 1);
  EXPECT_EQ(graphs_->recorded(), 1);
  EXPECT_EQ(graphs_->replayed(), 3);
  EXPECT_EQ(recorder.replayed, (std::vector<void*>(3, *recorder.alive.begin())));
  EXPECT_EQ(counts_.fused[ops::FusedOp::head], 4) << "operators of replayed steps count";
}

TEST_F(StepGraphsTest, EveryFieldOfAShapeCounts) {
  const StepGraphs::Shape shapes[] = {
      {}, {.rows = 1}, {.run_room = 1}, {.splits = 1}, {.has_logits = true}, {.rows = 1, .splits = 1}};
  for (int round = 0; round < 2; ++round) {
    for (const StepGraphs::Shape& shape : shapes) run(shape);
  }
  EXPECT_EQ(recorder.alive.size(), std::size(shapes));
}

TEST_F(StepGraphsTest, TheShapeThatWasUsedLongestAgoGoes) {
  const auto most = static_cast<int>(StepGraphs::kMostShapes);
  for (int round = 0; round < 2; ++round) {
    for (int rows = 1; rows <= most; ++rows) run({.rows = rows});
  }
  run({.rows = 1});
  for (int rows = most + 1; rows < 2 * most; ++rows) run({.rows = rows});  // all others
  EXPECT_EQ(graphs_->num_shapes(), StepGraphs::kMostShapes);
  EXPECT_EQ(recorder.alive.size(), 1U);
  EXPECT_TRUE(run({.rows = 1}));
  EXPECT_FALSE(run({.rows = 2}));
}

TEST_F(StepGraphsTest, DroppedGraphsAreGivenBackAndRecordedAgain) {
  run({.rows = 1}), run({.rows = 1});
  graphs_->drop();
  EXPECT_TRUE(recorder.alive.empty());
  EXPECT_FALSE(run({.rows = 1}));
  EXPECT_TRUE(run({.rows = 1}));
  graphs_.reset();
  EXPECT_TRUE(recorder.alive.empty());
}

TEST_F(StepGraphsTest, WhatCannotBeRecordedRunsAndIsNotTriedAgain) {
  for (const bool begins : {false, true}) {
    recorder.begins = begins;
    recorder.ends = false;
    graphs_->drop();
    counts_ = {};
    times_run_ = times_recorded_ = 0;
    for (int step = 0; step < 4; ++step) EXPECT_FALSE(run({.rows = 1}));
    EXPECT_EQ(times_run_, 4);
    EXPECT_EQ(times_recorded_, begins ? 1 : 0);
    EXPECT_EQ(counts_.fused[ops::FusedOp::head], 4);
  }
  EXPECT_EQ(graphs_->recorded(), 0);
}

TEST_F(StepGraphsTest, WorkThatThrowsWhileItIsRecordedIsRunInstead) {
  run({.rows = 1});
  throws_ = 1;
  EXPECT_FALSE(run({.rows = 1}));
  EXPECT_FALSE(recorder.recording);
  EXPECT_TRUE(recorder.alive.empty());
  EXPECT_EQ(times_run_, 2);
  throws_ = 1;
  EXPECT_THROW(run({.rows = 1}), std::runtime_error) << "and throws what it throws";
}

/// Two sequences that decode, behind 20 and 600 keys.
StepBatch decode_batch() {
  StepBatch batch;
  model::StepInputs& in = batch.inputs;
  const int keys[] = {20, 600};
  for (int s = 0; s < 2; ++s) {
    in.token_ids.push_back(7 + s);
    in.positions.push_back(keys[s] - 1);
    in.key_positions.push_back(keys[s] - 1);
    in.slots.push_back(3 + s);
    in.segments.push_back({.row_begin = s, .row_count = 1, .run_begin = s, .run_count = 1});
    in.runs.push_back({.block_begin = s, .num_keys = keys[s], .position_offset = 0});
    in.logit_rows.push_back(s);
    batch.logit_uses.push_back({.entry = s, .position = keys[s] - 1, .draft = 0, .samples = true, .scores = false});
  }
  in.blocks.assign(40, 1);
  return batch;
}

TEST_F(StepGraphsTest, OnlyPlainDecodingHasAShape) {
  const auto shape = graphs_->shape_of(decode_batch(), 32);
  ASSERT_TRUE(shape);
  EXPECT_EQ(*shape, (StepGraphs::Shape{.rows = 2, .run_room = 2, .splits = 4}));  // 600 keys: 3 splits
  EXPECT_FALSE(graphs_->shape_of(decode_batch(), 1)) << "two groups of head rows";
  EXPECT_FALSE(graphs_->shape_of(StepBatch(), 32));
  EXPECT_FALSE(StepGraphs(nullptr).shape_of(decode_batch(), 32));
  const std::function<void(StepBatch&)> changes[] = {
      [](StepBatch& b) { b.inputs.run_positions.push_back(0); },
      [](StepBatch& b) { b.inputs.hidden.push_back(0); },
      [](StepBatch& b) { b.inputs.policies.emplace_back(); },
      [](StepBatch& b) { b.inputs.summaries.push_back({}); },
      [](StepBatch& b) { b.inputs.open_cells.push_back(0); },
      [](StepBatch& b) { b.inputs.seals.push_back({}); },
      [](StepBatch& b) { b.inputs.num_step_cells = 1; },
      [](StepBatch& b) { b.inputs.runs[1].score_bias = 0.5f; },
      [](StepBatch& b) { b.inputs.segments[1].row_count = 2; },
      [](StepBatch& b) { b.inputs.logit_rows.pop_back(), b.logit_uses.pop_back(); },
      [](StepBatch& b) { b.logit_uses[0].samples = false; },
      [](StepBatch& b) { b.logit_uses[0].draft = 1; },
  };
  for (std::size_t i = 0; i < std::size(changes); ++i) {
    StepBatch batch = decode_batch();
    changes[i](batch);
    EXPECT_FALSE(graphs_->shape_of(batch, 32)) << "change " << i;
  }
}

}  // namespace
}  // namespace nb::engine
