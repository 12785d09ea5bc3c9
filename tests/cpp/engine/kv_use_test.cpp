// What stats() says of the memory of keys and values: of one block, and of the blocks that running sequences own.
#include <gtest/gtest.h>

#include "engine/engine_fixture.h"

namespace nb::engine {
namespace {

std::size_t kind_of(ops::KeyRule rule) { return static_cast<std::size_t>(rule); }

std::int64_t all_blocks(const EngineStats& stats) {
  std::int64_t sum = 0;
  for (const KvUse& use : stats.kv_use) sum += use.blocks;
  return sum;
}

TEST(KvUse, KindsAreTheRulesInTheirOrderAndNone) {
  EXPECT_STREQ(kKvPolicyNames[kind_of(ops::KeyRule::full)], "full");
  EXPECT_STREQ(kKvPolicyNames[kind_of(ops::KeyRule::window)], "window");
  EXPECT_STREQ(kKvPolicyNames[kind_of(ops::KeyRule::strided)], "strided");
  EXPECT_STREQ(kKvPolicyNames[kind_of(ops::KeyRule::block)], "block");
  EXPECT_STREQ(kKvPolicyNames[kind_of(ops::KeyRule::budget)], "budget");
  EXPECT_STREQ(kKvPolicyNames[kind_of(ops::KeyRule::summary)], "summary");
  EXPECT_STREQ(kKvPolicyNames.back(), "none");
}

TEST(KvUse, ABlockHasTheBytesOfTheStorage) {
  const auto model = model::make_tiny_model();
  for (const auto format : {quant::KvFormat::f32, quant::KvFormat::int8, quant::KvFormat::mixed}) {
    Engine engine(*model, {.kv_format = format, .max_num_seqs = 2});
    const EngineStats stats = engine.stats();
    EXPECT_EQ(stats.kv_format, format);
    EXPECT_EQ(stats.block_bytes * stats.blocks_total, stats.kv_bytes);
    const double numbers = 2.0 * 16 * 2 * 2 * 16;  // layers, tokens, K and V, heads, dimensions
    EXPECT_NEAR(8.0 * static_cast<double>(stats.block_bytes) / numbers,
                quant::kv_format_info(format).bits_per_element(16), 1e-9);
  }
}

TEST(KvUse, CountsTheBlocksOfEachRunningSequence) {
  const auto model = model::make_tiny_model();
  Engine engine(*model, {.max_num_seqs = 4});
  EXPECT_EQ(all_blocks(engine.stats()), 0);
  engine.submit(random_request(1, 40, 20));
  engine.submit(random_request(2, 100, 20));
  engine.step();
  const KvUse use = engine.stats().kv_use[kind_of(ops::KeyRule::full)];
  EXPECT_EQ(use.sequences, 2);
  EXPECT_EQ(use.blocks, 3 + 7);
  EXPECT_EQ(use.largest, 7);
  Answers answers;
  drain(engine, answers);
  EXPECT_EQ(all_blocks(engine.stats()), 0);
}

TEST(KvUse, ASharedBlockCountsForEachThatOwnsIt) {
  const auto model = model::make_tiny_model();
  Engine engine(*model, {.max_num_seqs = 4});
  Request request = random_request(1, 40, 20);
  request.n = 3;
  request.sampling = {.temperature = 1.0, .seed = 1};
  engine.submit(request);
  for (int step = 0; step < 4; ++step) engine.step();
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.kv_use.front().sequences, 3);
  EXPECT_EQ(stats.kv_use.front().blocks, 9);
  EXPECT_EQ(stats.blocks_owned, 2 + 3);  // in the pool each is one
}

TEST(KvUse, APolicyCountsUnderItsNameAndOnlyWhatIsLeftOfIt) {
  const auto model = model::make_tiny_model();
  Engine engine(*model, {.max_num_seqs = 4});
  Request windowed = random_request(1, 200, 20);
  windowed.key_policy = {.rule = ops::KeyRule::window, .prefix = 4, .window = 32};
  Request forgetful = random_request(2, 20, 20);
  forgetful.keeps_kv = false;
  engine.submit(windowed);
  engine.submit(forgetful);
  for (int step = 0; step < 3; ++step) engine.step();
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.kv_use.front().sequences, 0);
  EXPECT_EQ(stats.kv_use.back().sequences, 1);
  const KvUse use = stats.kv_use[kind_of(ops::KeyRule::window)];
  EXPECT_EQ(use.sequences, 1);
  EXPECT_GE(use.blocks, 1 + 32 / 16);  // sinks and window
  EXPECT_LE(use.blocks, 1 + 32 / 16 + 2);
  EXPECT_EQ(all_blocks(stats), stats.blocks_owned);
}

}  // namespace
}  // namespace nb::engine
