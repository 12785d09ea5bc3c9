#include "engine/selection_runner.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "base/code_of.h"
#include "engine/engine_fixture.h"

namespace nb::engine {
namespace {

/// Steps an engine with one blend request until its tokens are chosen, and returns the positions it then computes.
class Selection : public EveryBackend {
 protected:
  /// A prompt of `lead` tokens, a chunk of 50 behind `anchor`, and a tail.
  static Request blended(std::vector<TokenId> lead, std::vector<TokenId> anchor, double ratio) {
    Request request = random_request(9, 50, 1);
    request.chunks = {{.begin = static_cast<int>(lead.size()), .count = 50, .anchor = std::move(anchor)}};
    lead.insert(lead.end(), request.prompt.begin(), request.prompt.end());
    lead.insert(lead.end(), {1, 2, 3});
    request.prompt = lead;
    request.reuse = {.mode = ReuseMode::blend, .ratio = ratio};
    return request;
  }

  /// The deviations that a scheduler, a builder and a runner make of a request, slice by slice.
  std::vector<float> measure(const Request& request, int max_batch_tokens, const std::string& backend) {
    const auto model = model::make_tiny_model({.backend = backend});
    const kv::KvShape shape{.format = quant::KvFormat::f32, .num_layers = 2, .num_kv_heads = 2, .head_dim = 16};
    kv::KvStorage storage(shape, 64);
    Scheduler scheduler({.max_batch_tokens = max_batch_tokens, .max_num_seqs = 4}, 64);
    auto owned = std::make_unique<Sequence>(RequestId{1}, request, std::span<const TokenId>(), 512);
    Sequence& sequence = *owned;
    scheduler.submit(std::move(owned));
    Workspace workspace(CachingPool::create(nullptr));
    ops::ExecContext ctx{.kernels = model->backend().kernels, .pool = &model->pool(), .workspace = &workspace};
    SelectionRunner runner(*model);
    StepBatch batch;
    while (sequence.is_selecting()) {
      const StepPlan& plan = scheduler.plan();
      for (const BlockId block : scheduler.fresh_blocks()) storage.zero(block);
      scheduler.fresh_blocks().clear();
      build_batch(plan, scheduler.chunks(), batch);
      for (const PlannedSequence& entry : plan.entries) {
        if (entry.selects) runner.run(entry, storage, scheduler.chunks(), ctx);
      }
      workspace.reset();
      if (plan.num_tokens > 0) model->decoder().forward(batch.inputs, storage, ctx);
      scheduler.commit(plan, std::vector<TokenId>(plan.entries.size(), 5));
    }
    const auto deviations = sequence.composition->deviations();
    return {deviations.begin(), deviations.end()};
  }
};

// Behind its own anchor a chunk is what computing the prompt gives, so nothing deviates; behind anything else it does.
TEST_P(Selection, NothingDeviatesBehindTheAnchor) {
  const std::vector<TokenId> lead = random_request(3, 20, 1).prompt;
  std::vector<TokenId> other = lead;
  other[7] = (other[7] + 1) % 320;
  const auto same = measure(blended(lead, lead, 0.2), 512, GetParam());
  const auto changed = measure(blended(other, lead, 0.2), 512, GetParam());
  const float largest = *std::max_element(changed.begin(), changed.end());
  EXPECT_GT(largest, 1e-3f);
  EXPECT_LT(*std::max_element(same.begin(), same.end()), 1e-5f * largest);
}

// Plain tokens between chunks count too, though only their first layer is there while deviations are measured.
TEST_P(Selection, SeesPlainTokensBetweenChunks) {
  const auto with_middle = [](TokenId middle) {
    Request request = random_request(9, 90, 1);
    request.prompt[44] = middle;
    request.chunks = {{.begin = 5, .count = 39}, {.begin = 45, .count = 40}};
    request.reuse = {.mode = ReuseMode::blend, .ratio = 0.2};
    return request;
  };
  const auto one = measure(with_middle(7), 512, GetParam()), other = measure(with_middle(8), 512, GetParam());
  for (std::size_t i = 0; i < 39; ++i) EXPECT_EQ(one[i], other[i]);
  int different = 0;
  for (std::size_t i = 39; i < 79; ++i) different += one[i] != other[i] ? 1 : 0;
  EXPECT_EQ(different, 40);
}

TEST_P(Selection, SlicesChangeNoBit) {
  Request request = random_request(9, 120, 1);
  request.chunks = {{.begin = 3, .count = 40, .anchor = {5}}, {.begin = 60, .count = 50}};
  request.reuse = {.mode = ReuseMode::blend, .ratio = 0.2};
  const auto whole = measure(request, 512, GetParam());
  for (const int slice : {1, 7, 16, 33}) EXPECT_EQ(measure(request, slice, GetParam()), whole) << slice;
}

INSTANTIATE_TEST_SUITE_P(Backends, Selection, testing::ValuesIn(ops::available_backends()), backend_test_name);

TEST(SelectionRunner, AModelWithOneLayerHasNothingToCompare) {
  const auto model = model::make_tiny_model({.num_layers = 1});
  Engine engine(*model, {});
  Request request = random_request(9, 50, 1);
  request.chunks = {{.begin = 5, .count = 40}};
  request.reuse = {.mode = ReuseMode::blend};
  engine.submit(request);
  const auto run = [&] {
    while (engine.has_work()) engine.step();
  };
  EXPECT_EQ(code_of(run), ErrorCode::unsupported);
  run();  // what ran has ended
  request.reuse.selection = BlendSelection::first;
  EXPECT_EQ(answer_one(engine, request).finish_reason, FinishReason::length);
}

}  // namespace
}  // namespace nb::engine
