#include "engine/batch_builder.h"

#include <gtest/gtest.h>

#include "engine/fake_requests.h"

namespace nb::engine {
namespace {

using Ints = std::vector<std::int32_t>;

/// Commits the plan with one token for every entry.
void commit(Scheduler& scheduler, const StepPlan& plan, TokenId token) {
  scheduler.commit(plan, std::vector<TokenId>(plan.entries.size(), token));
}

TEST(BatchBuilder, WritesRowsSegmentsRunsAndBlocks) {
  Scheduler scheduler({.max_batch_tokens = 20, .max_num_seqs = 4}, 50);
  scheduler.submit(make_sequence(1, 17, 5));  // blocks 0, 1
  scheduler.submit(make_sequence(2, 30, 5));  // blocks 2, 3, 4
  StepBatch batch;
  const StepPlan* plan = &scheduler.plan();
  build_batch(*plan, scheduler.chunks(), batch);
  EXPECT_EQ(batch.inputs.num_tokens(), 20);
  EXPECT_EQ(batch.inputs.logit_rows, (Ints{16}));  // only the first prompt is complete
  commit(scheduler, *plan, 99);

  plan = &scheduler.plan();
  build_batch(*plan, scheduler.chunks(), batch);  // 1: one decode at 17; 2: positions 3..21
  const auto& inputs = batch.inputs;
  ASSERT_EQ(inputs.num_tokens(), 20);
  EXPECT_EQ(inputs.token_ids[0], 99);
  EXPECT_EQ(inputs.positions[0], 17);
  EXPECT_EQ(inputs.slots[0], 1 * 16 + 1);
  EXPECT_EQ(inputs.token_ids[1], 4);  // the prompt is 1, 2, 3, ...
  EXPECT_EQ(inputs.positions[1], 3);
  EXPECT_EQ(inputs.slots[1], 2 * 16 + 3);
  EXPECT_EQ(inputs.positions[19], 21);
  EXPECT_EQ(inputs.slots[19], 3 * 16 + 5);
  EXPECT_EQ(inputs.key_positions, inputs.positions);
  ASSERT_EQ(inputs.segments.size(), 2u);
  EXPECT_EQ(inputs.segments[1].row_begin, 1);
  EXPECT_EQ(inputs.segments[1].row_count, 19);
  EXPECT_EQ(inputs.segments[1].run_begin, 1);
  EXPECT_EQ(inputs.segments[1].run_count, 1);
  ASSERT_EQ(inputs.runs.size(), 2u);
  EXPECT_EQ(inputs.runs[0].num_keys, 18);  // the key of this step included
  EXPECT_EQ(inputs.runs[1].num_keys, 22);
  EXPECT_EQ(inputs.runs[1].block_begin, 2);
  EXPECT_EQ(inputs.runs[1].position_offset, 0);
  EXPECT_EQ(inputs.blocks, (Ints{0, 1, 2, 3}));  // of the second only the blocks in use
  EXPECT_EQ(inputs.logit_rows, (Ints{0}));
  ASSERT_EQ(batch.logit_uses.size(), 1u);
  EXPECT_EQ(batch.logit_uses[0].entry, 0);
  EXPECT_EQ(batch.logit_uses[0].position, 17);
  EXPECT_TRUE(batch.logit_uses[0].samples);
  EXPECT_FALSE(batch.logit_uses[0].scores);
}

TEST(BatchBuilder, AsksForTheLogitsThatScoresNeed) {
  Request logprobs = make_request(4, 3);
  logprobs.prompt_logprobs = 0;
  Request only_logprobs = make_request(4, 0);
  only_logprobs.prompt_logprobs = 0;
  Request logits = make_request(3, 0);
  logits.prompt_logits = true;
  Scheduler scheduler({.max_batch_tokens = 64, .max_num_seqs = 4}, 50);
  scheduler.submit(make_sequence(1, logprobs));
  scheduler.submit(make_sequence(2, only_logprobs));
  scheduler.submit(make_sequence(3, logits));
  StepBatch batch;
  const StepPlan& plan = scheduler.plan();
  build_batch(plan, scheduler.chunks(), batch);
  EXPECT_EQ(batch.inputs.logit_rows, (Ints{0, 1, 2, 3, 4, 5, 6, 8, 9, 10}));
  EXPECT_TRUE(batch.logit_uses[2].scores);
  EXPECT_TRUE(batch.logit_uses[3].samples);
  EXPECT_FALSE(batch.logit_uses[3].scores);  // the last prompt row predicts no prompt token
  EXPECT_FALSE(batch.logit_uses[6].samples);
  EXPECT_TRUE(batch.logit_uses[9].scores);
  commit(scheduler, plan, 9);
  build_batch(scheduler.plan(), scheduler.chunks(), batch);  // decoding: nothing to score any more
  ASSERT_EQ(batch.logit_uses.size(), 1u);
  EXPECT_FALSE(batch.logit_uses[0].scores);
}

TEST(BatchBuilder, AWarmBatchKeepsItsAddresses) {
  Scheduler scheduler({.max_batch_tokens = 32, .max_num_seqs = 4}, 40);
  StepBatch batch;
  batch.reserve(32, 4, 40);
  const auto addresses = [&] {
    const auto& in = batch.inputs;
    return std::vector<const void*>{in.token_ids.data(), in.positions.data(),  in.key_positions.data(),
                                    in.slots.data(),     in.logit_rows.data(), in.segments.data(),
                                    in.runs.data(),      in.blocks.data(),     batch.logit_uses.data()};
  };
  const auto before = addresses();
  for (RequestId id = 1; id <= 6; ++id) {
    Request request = make_request(30, 30);
    request.prompt_logits = true;
    scheduler.submit(make_sequence(id, request));
  }
  while (scheduler.has_work()) {
    const StepPlan& plan = scheduler.plan();
    build_batch(plan, scheduler.chunks(), batch);
    commit(scheduler, plan, 3);
  }
  EXPECT_EQ(addresses(), before);
}

TEST(BatchBuilder, APolicyIsSaidWhereItHidesAndHolesAreFilled) {
  Scheduler scheduler({.max_batch_tokens = 40, .max_num_seqs = 4}, 50);
  Request request = make_request(100, 5);
  request.key_policy = {.rule = ops::KeyRule::window, .prefix = 4, .window = 40};
  scheduler.submit(make_sequence(1, request));
  StepBatch batch;
  const auto& inputs = batch.inputs;
  const StepPlan* plan = &scheduler.plan();
  build_batch(*plan, scheduler.chunks(), batch);  // rows 0 to 39 see all before them
  EXPECT_EQ(inputs.segments[0].policy, -1);
  EXPECT_TRUE(inputs.policies.empty());
  commit(scheduler, *plan, 99);
  plan = &scheduler.plan();
  build_batch(*plan, scheduler.chunks(), batch);
  ASSERT_EQ(inputs.segments[0].policy, 0);
  EXPECT_EQ(inputs.policies[0].window, 40);
  EXPECT_EQ(inputs.blocks, (Ints{0, 1, 2, 3, 4}));
  commit(scheduler, *plan, 99);
  plan = &scheduler.plan();  // row 80 sees 41 on, and sinks in block 0
  build_batch(*plan, scheduler.chunks(), batch);
  EXPECT_EQ(plan->entries[0].sequence->table.num_holes(), 1);
  EXPECT_EQ(inputs.blocks, (Ints{0, 5, 2, 3, 4, 1, 5}));  // block 1 was given back and is the sixth now
  EXPECT_EQ(inputs.runs[0].num_keys, 100);
}

TEST(BatchBuilder, SummariesAreARunAndMadeOnce) {
  Scheduler scheduler({.max_batch_tokens = 48, .max_num_seqs = 4}, 50);
  Request request = make_request(100, 5);
  request.key_policy = {.rule = ops::KeyRule::summary, .window = 20, .period = 32};
  scheduler.submit(make_sequence(1, request));
  StepBatch batch;
  const auto& inputs = batch.inputs;
  const StepPlan* plan = &scheduler.plan();
  build_batch(*plan, scheduler.chunks(), batch);  // up to row 47: the tail of 47 begins with 28, in group 0
  EXPECT_EQ(inputs.runs.size(), 1u);
  EXPECT_TRUE(inputs.summaries.empty());
  commit(scheduler, *plan, 99);
  plan = &scheduler.plan();  // up to row 95: the tail of 95 begins with 76, in group 2
  build_batch(*plan, scheduler.chunks(), batch);
  ASSERT_EQ(inputs.runs.size(), 2u);
  EXPECT_EQ(inputs.segments[0].run_count, 2);
  EXPECT_EQ(inputs.runs[0].num_keys, 2);
  EXPECT_FLOAT_EQ(inputs.runs[0].score_bias, 3.4657359f);  // log(32)
  EXPECT_EQ(inputs.run_positions, (Ints{51, 83}));         // the first rows whose tails begin behind the groups
  EXPECT_EQ(inputs.runs[1].block_begin, 1);
  ASSERT_EQ(inputs.summaries.size(), 2u);
  EXPECT_EQ(inputs.summaries[1].block_begin, 1);
  EXPECT_EQ(inputs.summaries[1].first_key, 32);
  EXPECT_EQ(inputs.summaries[1].num_tokens, 32);
  EXPECT_EQ(inputs.summaries[1].position, 32);
  EXPECT_EQ(inputs.summaries[1].slot_position, 48);
  EXPECT_EQ(inputs.summaries[1].slot, inputs.blocks[0] * 16 + 1);
  commit(scheduler, *plan, 99);
  plan = &scheduler.plan();
  build_batch(*plan, scheduler.chunks(), batch);
  EXPECT_TRUE(inputs.summaries.empty());
  EXPECT_EQ(inputs.runs[0].num_keys, 2);
  EXPECT_EQ(plan->entries[0].sequence->table.num_holes(), 4);
}

TEST(BatchBuilder, AnEmptyPlanGivesAnEmptyBatch) {
  StepBatch batch;
  kv::BlockPool pool(1);
  build_batch({}, kv::ChunkStore(pool), batch);
  EXPECT_EQ(batch.inputs.num_tokens(), 0);
  EXPECT_TRUE(batch.inputs.segments.empty());
}

}  // namespace
}  // namespace nb::engine
