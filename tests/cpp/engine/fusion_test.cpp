// What was decided about fused operators reaches the kernels of every step, and the counters tell it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "engine/engine.h"
#include "engine/engine_fixture.h"
#include "model/unsound_backend.h"

namespace nb::engine {
namespace {

using model::Fusion;
using ops::FusedOp;

struct Outcome {
  std::vector<Answer> answers;
  EngineStats stats;
  model::FusedCalls calls;  ///< of kernels, by steps alone
};

Outcome run(const model::TinyModelOptions& options) {
  const auto model = model::make_tiny_model(options);
  Engine engine(*model, {.kv_format = quant::KvFormat::f32});
  model::fused_calls() = {};
  std::vector<Request> requests = {random_request(1, 20, 8), random_request(2, 3, 8)};
  for (Request& request : requests) request.sampling.logprobs = 0;
  Outcome run{.answers = answer_all(engine, requests), .stats = {}, .calls = model::fused_calls()};
  run.stats = engine.stats();
  return run;
}

Outcome run_unsound(float gain, Fusion fusion) {
  return run({.device = &model::unsound_backend(), .qk_gain = gain, .fusion = {.fusion = fusion}});
}

void expect_same_tokens(const Outcome& a, const Outcome& b) {
  ASSERT_EQ(a.answers.size(), b.answers.size());
  for (std::size_t i = 0; i < a.answers.size(); ++i) {
    EXPECT_EQ(a.answers[i].tokens, b.answers[i].tokens);
    for (std::size_t t = 0; t < a.answers[i].tokens.size(); ++t) {
      EXPECT_EQ(a.answers[i].logprobs[t].logprob, b.answers[i].logprobs[t].logprob);
    }
  }
}

// Two layers, each with one norm_qkv, one attention output and one gate a step.
void expect_path(const Outcome& run, bool qkv_fused, bool residual_fused) {
  const std::int64_t calls = 2 * run.stats.steps;
  EXPECT_GT(run.stats.steps, 5);
  EXPECT_EQ(run.stats.ops.fused[FusedOp::norm_qkv], qkv_fused ? calls : 0);
  EXPECT_EQ(run.stats.ops.composed[FusedOp::norm_qkv], qkv_fused ? 0 : calls);
  EXPECT_EQ(run.calls.norm_qkv, qkv_fused ? calls : 0);
  EXPECT_EQ(run.stats.ops.fused[FusedOp::linear_residual], residual_fused ? calls : 0);
  EXPECT_EQ(run.stats.ops.composed[FusedOp::linear_residual], residual_fused ? 0 : calls);
  EXPECT_EQ(run.calls.linear_residual, residual_fused ? calls : 0);
  EXPECT_EQ(run.stats.ops.composed[FusedOp::norm_gate_up], calls) << "there is no kernel";
  EXPECT_GE(run.stats.ops.composed[FusedOp::head], run.stats.steps);
}

TEST(Fusion, ASmallGainTakesTheFusedKernels) { expect_path(run_unsound(1.0f, Fusion::automatic), true, true); }

TEST(Fusion, AGainOf96TakesTheSmallOperatorsAndGivesTheirTokens) {
  const Outcome chosen = run_unsound(96.0f, Fusion::automatic);
  expect_path(chosen, false, true);
  expect_same_tokens(chosen, run({.qk_gain = 96.0f}));
}

TEST(Fusion, TheOptionIsFollowedEitherWay) {
  const Outcome on = run_unsound(96.0f, Fusion::on), off = run_unsound(1.0f, Fusion::off);
  expect_path(on, true, true);
  expect_path(off, false, false);
  expect_same_tokens(off, run({.qk_gain = 1.0f}));
}

// At a gain of 96 attention sees one key only, whatever the rounding; in between the choice shows in the answers.
TEST(Fusion, WhatTheKernelRoundsShowsInTheAnswers) {
  const Outcome on = run_unsound(4.0f, Fusion::on), off = run_unsound(4.0f, Fusion::off),
                right = run({.qk_gain = 4.0f});
  expect_same_tokens(off, right);
  float apart = 0.0f;
  for (std::size_t t = 0; t < 8; ++t) {
    apart = std::max(apart, std::fabs(on.answers[0].logprobs[t].logprob - right.answers[0].logprobs[t].logprob));
  }
  EXPECT_GT(apart, 1e-4f) << "the kernel is as unsound as it is meant to be";
}

TEST(Fusion, OnTheProcessorOffGivesTheTokensOfOn) {
  for (const std::string& name : ops::available_backends()) {
    if (name == "reference" || name.starts_with("cuda")) continue;
    const auto with = [&](Fusion fusion) {
      return run({.backend = name, .num_threads = 2, .qk_gain = 96.0f, .fusion = {.fusion = fusion}});
    };
    const Outcome on = with(Fusion::on), off = with(Fusion::off);
    expect_same_tokens(on, off);
    for (const FusedOp op : ops::kFusedOps) {
      EXPECT_GT(on.stats.ops.fused[op], 0) << name;
      EXPECT_EQ(on.stats.ops.composed[op], 0) << name;
      EXPECT_EQ(off.stats.ops.fused[op], 0) << name;
      EXPECT_EQ(off.stats.ops.composed[op], on.stats.ops.fused[op]) << name;
    }
  }
}

}  // namespace
}  // namespace nb::engine
