// What an engine says about itself; counters of their own have tests of their own (kv_use_test.cpp,
// throughput_test.cpp).
#include <gtest/gtest.h>

#include "engine/engine_fixture.h"

namespace nb::engine {
namespace {

TEST(EngineStats, FollowWhatIsAndWhatWasDone) {
  const auto model = model::make_tiny_model({.num_threads = 1});
  Engine engine(*model, {.max_num_seqs = 1});
  const EngineStats at_first = engine.stats();
  EXPECT_EQ(at_first.blocks_free, at_first.blocks_total);
  EXPECT_EQ(at_first.block_bytes * at_first.blocks_total, at_first.kv_bytes);
  EXPECT_EQ(at_first.steps, 0);
  engine.submit(random_request(1, 20, 5));
  engine.submit(random_request(2, 20, 5));
  engine.step();
  const EngineStats running = engine.stats();
  EXPECT_EQ(running.running, 1);
  EXPECT_EQ(running.waiting, 1);
  EXPECT_EQ(running.blocks_owned, 2);
  EXPECT_EQ(running.steps, 1);
  EXPECT_EQ(running.prompt_tokens, 20);
  EXPECT_EQ(running.generated_tokens, 1);
  EXPECT_EQ(running.drafts.steps, 0) << "it does not speculate";
  Answers answers;
  drain(engine, answers);
  const EngineStats at_last = engine.stats();
  EXPECT_EQ(at_last.running + at_last.waiting + at_last.blocks_owned, 0);
  EXPECT_EQ(at_last.generated_tokens, 10);
  EXPECT_EQ(at_last.blocks_free + at_last.blocks_cached, at_last.blocks_total);
}

}  // namespace
}  // namespace nb::engine
