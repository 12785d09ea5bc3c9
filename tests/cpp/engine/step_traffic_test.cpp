#include "engine/step_traffic.h"

#include <gtest/gtest.h>

#include "model/tiny_model.h"

namespace nb::engine {
namespace {

// The tiny model in f32: 2 layers, hidden 64, 4 query and 2 key heads of 16, intermediate 96, vocabulary 320.
constexpr std::int64_t kLayer = 4 * (64 * (64 + 2 * 32) + 64 * 64 + 2 * 96 * 64 + 96 * 64);
constexpr std::int64_t kHead = 4 * 320 * 64;
constexpr std::int64_t kRow = 4 * 64;
constexpr std::int64_t kToken = 4 * 2 * 2 * 32;  // keys and values of 2 layers

const kv::KvShape kShape{.format = quant::KvFormat::f32, .num_layers = 2, .num_kv_heads = 2, .head_dim = 16};

/// Segments of (rows, keys).
model::StepInputs inputs_of(std::initializer_list<std::pair<int, int>> sequences) {
  model::StepInputs inputs;
  for (const auto& [rows, keys] : sequences) {
    inputs.segments.push_back({.row_begin = inputs.num_tokens(),
                               .row_count = rows,
                               .run_begin = static_cast<std::int32_t>(inputs.runs.size()),
                               .run_count = 1});
    inputs.runs.push_back({.block_begin = 0, .num_keys = keys, .position_offset = 0});
    inputs.token_ids.resize(inputs.token_ids.size() + static_cast<std::size_t>(rows));
  }
  return inputs;
}

TEST(StepTraffic, CountsWeightsOnceAndKeysAndValuesOfEveryRun) {
  const auto model = model::make_tiny_model();
  const StepTraffic traffic(*model, kShape);
  EXPECT_EQ(traffic.bytes(inputs_of({{1, 100}}), 1), 2 * kLayer + kHead + kRow + 100 * kToken);
  EXPECT_EQ(traffic.bytes(inputs_of({{1, 100}, {40, 57}}), 1), 2 * kLayer + kHead + 41 * kRow + 157 * kToken);
  EXPECT_EQ(traffic.bytes(inputs_of({{1, 100}, {40, 57}}), 1, 48), 2 * kLayer + kHead + 41 * kRow + 109 * kToken);
  EXPECT_EQ(traffic.bytes(inputs_of({{40, 57}}), 0), 2 * kLayer + 40 * kRow + 57 * kToken);  // no logits wanted
  EXPECT_EQ(traffic.bytes(inputs_of({{40, 57}}), 2), 2 * kLayer + 2 * kHead + 40 * kRow + 57 * kToken);
}

TEST(StepTraffic, AWindowLimitsTheKeysThatAreRead) {
  model::ModelConfig config = model::tiny_config({});
  config.sliding_window = 32;
  auto pool = std::make_unique<ThreadPool>(1);
  const ops::Backend& backend = ops::find_backend("reference");
  const model::TinyModelOptions options;
  model::ModelWeights weights = model::TinyWeights(options, backend, *pool).build(config);
  const model::Model model(std::move(config), std::move(weights), backend, std::move(pool));
  const StepTraffic traffic(model, kShape);
  const std::int64_t fixed = 2 * kLayer;
  EXPECT_EQ(traffic.bytes(inputs_of({{1, 20}}), 0), fixed + kRow + 20 * kToken);
  EXPECT_EQ(traffic.bytes(inputs_of({{1, 100}}), 0), fixed + kRow + 32 * kToken);
  EXPECT_EQ(traffic.bytes(inputs_of({{8, 100}}), 0), fixed + 8 * kRow + (32 + 7) * kToken);
}

TEST(StepTraffic, APolicyLimitsTheBlocksThatAreRead) {
  const auto model = model::make_tiny_model();
  const StepTraffic traffic(*model, kShape);
  model::StepInputs inputs = inputs_of({{1, 100}});
  inputs.positions = {99};
  inputs.policies = {{.rule = ops::KeyRule::window, .prefix = 4, .window = 20}};
  inputs.segments[0].policy = 0;
  EXPECT_EQ(traffic.bytes(inputs, 0), 2 * kLayer + kRow + (16 + 20) * kToken);  // the sinks' block, and from 80 on
}

}  // namespace
}  // namespace nb::engine
