// Errors of fused operators as they are measured, and the decisions that follow from them.
#include "model/fusion.h"

#include <gtest/gtest.h>

#include <limits>

#include "base/code_of.h"
#include "base/error.h"
#include "model/tiny_model.h"
#include "model/unsound_backend.h"

namespace nb::model {
namespace {

using ops::FusedOp;

std::unique_ptr<Model> unsound_model(float gain, const FusionOptions& fusion = {}) {
  return make_tiny_model({.device = &unsound_backend(), .qk_gain = gain, .fusion = fusion});
}

const FusionError& error_of(const FusionPlan& plan, const std::string& quantity) {
  for (const FusionError& error : plan.errors) {
    if (error.quantity == quantity) return error;
  }
  throw std::runtime_error("no error of " + quantity);
}

TEST(Fusion, SmallGainsKeepAKernelThatRounds) {
  const auto model = unsound_model(1.0f);
  const FusionPlan& plan = model->fusion();
  const FusionError& scores = error_of(plan, "scores");
  EXPECT_GT(scores.error, 0.001) << "rounding to bf16 is there to be seen";
  EXPECT_LT(scores.error, kScoreBound);
  EXPECT_TRUE(plan.fused[FusedOp::norm_qkv]);
  EXPECT_NE(model->kernels().norm_qkv, nullptr);
  EXPECT_EQ(error_of(plan, "values").error, 0.0);
  EXPECT_EQ(error_of(plan, "residual").error, 0.0);
  EXPECT_GT(plan.seconds, 0.0);
}

TEST(Fusion, LargeGainsTakeTheSmallOperators) {
  const auto model = unsound_model(96.0f);
  const FusionPlan& plan = model->fusion();
  EXPECT_GT(error_of(plan, "scores").error, 20.0);
  EXPECT_FALSE(plan.fused[FusedOp::norm_qkv]);
  EXPECT_EQ(model->kernels().norm_qkv, nullptr);
  EXPECT_TRUE(plan.fused[FusedOp::linear_residual]) << "each operator answers for itself";
  EXPECT_NE(model->kernels().linear_residual, nullptr);
  EXPECT_FALSE(plan.has_kernel[FusedOp::head]);
  EXPECT_NE(describe(plan).find("norm_qkv composed (scores off by "), std::string::npos) << describe(plan);
}

TEST(Fusion, ErrorsOfScoresGrowWithTheProductOfTheGains) {
  const double one = error_of(unsound_model(1.0f)->fusion(), "scores").error;
  EXPECT_NEAR(error_of(unsound_model(8.0f)->fusion(), "scores").error / one, 64.0, 1.0);
}

TEST(Fusion, ItIsTheLayerThatAmplifiesMostThatCounts) {
  auto pool = std::make_unique<ThreadPool>(1);
  const TinyModelOptions options{.num_layers = 5, .qk_gain = 1.0f};
  ModelConfig config = tiny_config(options);
  ModelWeights weights = TinyWeights(options, unsound_backend(), *pool).build(config);
  for (int i = 0; i < config.head_dim; ++i) weights.layers[3].k_norm.as<float>()[i] *= 96.0f;
  const Model model(std::move(config), std::move(weights), unsound_backend(), std::move(pool));
  EXPECT_EQ(error_of(model.fusion(), "scores").layer, 3);
  EXPECT_GT(error_of(model.fusion(), "scores").error, kScoreBound);
  EXPECT_FALSE(model.fusion().fused[FusedOp::norm_qkv]);
}

TEST(Fusion, TheOptionForcesEitherWay) {
  const auto on = unsound_model(96.0f, {.fusion = Fusion::on});
  EXPECT_TRUE(on->fusion().fused[FusedOp::norm_qkv]);
  EXPECT_TRUE(on->fusion().errors.empty()) << "nothing depends on it";
  const auto off = unsound_model(1.0f, {.fusion = Fusion::off, .measure = true});
  for (const FusedOp op : ops::kFusedOps) {
    EXPECT_FALSE(off->fusion().fused[op]);
    EXPECT_FALSE(ops::has_kernel(off->kernels(), op));
  }
  EXPECT_LT(error_of(off->fusion(), "scores").error, kScoreBound) << "measured all the same";
}

TEST(Fusion, WhatIsNotANumberInOneFormOnlyIsAnError) {
  static ops::KernelTable table = *unsound_backend().kernels;
  table.linear_residual = [](const ops::LinearResidualArgs& a, const Part& part) {
    sound_linear_residual(a, part);
    a.residual[1] = std::numeric_limits<float>::quiet_NaN();
  };
  ops::Backend backend = unsound_backend();
  backend.kernels = &table;
  const auto model = make_tiny_model({.device = &backend, .qk_gain = 1.0f});
  EXPECT_FALSE(model->fusion().fused[FusedOp::linear_residual]);
  EXPECT_TRUE(model->fusion().fused[FusedOp::norm_qkv]);
}

TEST(Fusion, ABackendWithoutFusedKernelsHasNothingToMeasure) {
  const auto model = make_tiny_model({.qk_gain = 96.0f, .fusion = {.measure = true}});
  EXPECT_TRUE(model->fusion().errors.empty());
  for (const FusedOp op : ops::kFusedOps) EXPECT_FALSE(model->fusion().fused[op]);
}

TEST(Fusion, TablesOfTheProcessorAreExact) {
  for (const ops::Backend& backend : ops::compiled_backends()) {
    if (!backend.usable() || backend.kernels->memory != nullptr || backend.name == "reference") continue;
    for (const quant::Format format : {quant::Format::q8_0, quant::Format::bf16, quant::Format::f32}) {
      const auto model = make_tiny_model(
          {.backend = backend.name, .format = format, .num_threads = 2, .qk_gain = 96.0f, .fusion = {.measure = true}});
      ASSERT_EQ(model->fusion().errors.size(), 5u) << backend.name;
      for (const FusionError& error : model->fusion().errors) {
        EXPECT_EQ(error.error, 0.0) << backend.name << " " << quant::to_string(format) << " " << error.quantity;
      }
      for (const FusedOp op : ops::kFusedOps) EXPECT_TRUE(model->fusion().fused[op]);
    }
    EXPECT_TRUE(make_tiny_model({.backend = backend.name})->fusion().errors.empty()) << "they say so themselves";
  }
}

TEST(Fusion, NamesAreThoseOfTheOption) {
  for (const char* name : {"auto", "on", "off"}) EXPECT_STREQ(to_string(parse_fusion(name)), name);
  EXPECT_EQ(code_of([] { parse_fusion("fast"); }), ErrorCode::invalid_argument);
}

}  // namespace
}  // namespace nb::model
