// Fused kernels against their parts as a model is loaded: measured on a device, decided, and followed by the engine.
#include "model/fusion.h"

#include <gtest/gtest.h>

#include "cuda_emulation/device_fixture.h"
#include "engine/engine.h"
#include "engine/engine_fixture.h"

namespace nb::engine {
namespace {

using model::Fusion;
using ops::FusedOp;

model::TinyModelOptions with_gain(quant::Format format, bool deterministic = false) {
  return {.format = format, .device = &cuda::tested_backend(), .deterministic = deterministic, .qk_gain = 96.0F};
}

TEST(CudaFusion, FusedKernelsHaveTheBitsOfTheirPartsAtAnyGain) {
  for (const quant::Format format :
       {quant::Format::f32, quant::Format::bf16, quant::Format::f16, quant::Format::q8_0}) {
    for (const bool deterministic : {false, true}) {
      const auto model = model::make_tiny_model(with_gain(format, deterministic));
      const model::FusionPlan& plan = model->fusion();
      ASSERT_EQ(plan.errors.size(), 5U) << "a device is measured without being asked";
      for (const model::FusionError& error : plan.errors) {
        EXPECT_EQ(error.error, 0.0) << quant::to_string(format) << " " << error.quantity;
      }
      for (const FusedOp op : ops::kFusedOps) EXPECT_TRUE(plan.fused[op]) << ops::to_string(op);
    }
  }
}

TEST(CudaFusion, OffGivesTheTokensOfOn) {
  // At most 8 rows in a step, which the fused kernels take.
  const std::vector<Request> requests = {random_request(1, 6, 5), random_request(2, 2, 5)};
  const auto run = [&](Fusion fusion, EngineStats& stats) {
    model::TinyModelOptions options = with_gain(quant::Format::bf16);
    options.fusion = {.fusion = fusion};
    const auto model = model::make_tiny_model(options);
    Engine engine(*model, {.max_num_seqs = 2, .max_batch_tokens = 8});
    auto answers = answer_all(engine, requests);
    stats = engine.stats();
    return answers;
  };
  EngineStats on, off;
  const std::vector<Answer> fused = run(Fusion::on, on), composed = run(Fusion::off, off);
  for (std::size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(fused[i].tokens, composed[i].tokens);
  for (const FusedOp op : ops::kFusedOps) {
    EXPECT_GT(on.ops.fused[op], 0) << ops::to_string(op);
    EXPECT_EQ(on.ops.composed[op], 0) << ops::to_string(op);
    EXPECT_EQ(off.ops.fused[op], 0) << ops::to_string(op);
    EXPECT_EQ(off.ops.composed[op], on.ops.fused[op]) << ops::to_string(op);
  }
}

TEST(CudaFusion, AKernelThatIsWrongOnTheDeviceIsNotTaken) {
  static const ops::KernelTable& whole = *cuda::tested_backend().kernels;
  static ops::KernelTable table = whole;
  table.norm_gate_up = [](const ops::NormGateUpArgs& args, const Part& part) {
    ops::NormGateUpArgs other = args;
    other.eps *= 1000.0F;
    whole.norm_gate_up(other, part);
  };
  ops::Backend backend = cuda::tested_backend();
  backend.kernels = &table;
  model::TinyModelOptions options = with_gain(quant::Format::bf16);
  options.device = &backend;
  const auto model = model::make_tiny_model(options);
  EXPECT_FALSE(model->fusion().fused[FusedOp::norm_gate_up]) << describe(model->fusion());
  EXPECT_TRUE(model->fusion().fused[FusedOp::norm_qkv]);
  EXPECT_EQ(model->kernels().norm_gate_up, nullptr);
}

}  // namespace
}  // namespace nb::engine
