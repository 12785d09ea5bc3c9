// Steps that are recorded once and replayed: the tokens of steps whose kernels are started one by one.
#include <gtest/gtest.h>

#include <array>
#include <string>

#include "base/error.h"
#include "cuda_emulation/device_fixture.h"
#include "engine/engine.h"
#include "engine/engine_fixture.h"

namespace nb::engine {
namespace {

/// What only the emulator counts.
bool is_emulated() { return &cuda::tested_backend() == &emulation::backend(); }

struct Outcome {
  std::vector<Answer> answers;
  EngineStats stats;
};

/// Submits request i before step i * `pause`, and drains.
Outcome run_all(const model::TinyModelOptions& model_options, const std::vector<Request>& requests,
                EngineOptions options, bool enforce_eager, int pause = 0) {
  const auto model = model::make_tiny_model(model_options);
  options.enforce_eager = enforce_eager;
  Engine engine(*model, options);
  Answers answers;
  std::vector<RequestId> ids;
  for (int step = 0; ids.size() < requests.size() || engine.has_work(); ++step) {
    while (ids.size() < requests.size() && step >= pause * static_cast<int>(ids.size())) {
      ids.push_back(engine.submit(requests[ids.size()]));
    }
    add(answers, engine.step());
  }
  Outcome run{.answers = {}, .stats = engine.stats()};
  for (const RequestId id : ids) run.answers.push_back(std::move(answers[id]));
  return run;
}

/// The run with graphs.
Outcome expect_same_tokens(const model::TinyModelOptions& model, const std::vector<Request>& requests,
                           const EngineOptions& options, int pause = 0) {
  const std::size_t in_use = emulation::device_bytes_in_use();
  const Outcome eager = run_all(model, requests, options, true, pause);
  Outcome recorded = run_all(model, requests, options, false, pause);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(recorded.answers[i].tokens, eager.answers[i].tokens) << "request " << i;
    EXPECT_EQ(recorded.answers[i].finish_reason, eager.answers[i].finish_reason) << "request " << i;
  }
  EXPECT_EQ(eager.stats.graphs_recorded, 0);
  EXPECT_EQ(eager.stats.graph_steps, 0);
  // With several, what a step takes of a prompt depends on the time that steps have taken.
  for (const ops::FusedOp op : ops::kFusedOps) {
    if (requests.size() > 1) break;
    EXPECT_EQ(recorded.stats.ops.fused[op], eager.stats.ops.fused[op]) << to_string(op);
    EXPECT_EQ(recorded.stats.ops.composed[op], eager.stats.ops.composed[op]) << to_string(op);
  }
  EXPECT_EQ(emulation::device_bytes_in_use(), in_use) << "memory of the device that nobody gave back";
  EXPECT_EQ(emulation::device_calls().graphs_alive, 0U);
  return recorded;
}

class StepGraphsOnDevice : public testing::TestWithParam<const ops::Backend*> {
 protected:
  ~StepGraphsOnDevice() override { emulation::refuse_recording(emulation::Refusal::none); }

  /// Long ones on the emulator, where tests are reduced: the reference shows what the host side does wrong.
  static bool is_left_out() { return is_reduced() && GetParam() != &emulation::reference_backend(); }

  // Deterministic, since how prompts are cut depends on times.
  model::TinyModelOptions device_{.device = GetParam(), .deterministic = true};
};

/// Eight requests of different lengths, some of which draw, or show logits.
std::vector<Request> company(int num_tokens) {
  std::vector<Request> requests;
  for (int i = 0; i < 8; ++i) {
    requests.push_back(random_request(500 + static_cast<unsigned>(i), 2 + i, num_tokens - i));
  }
  requests[2].sampling = {.temperature = 0.9, .top_k = 30, .seed = 4};
  requests[4].sampling = {.temperature = 1.0, .repetition_penalty = 1.3, .seed = 5};
  requests[6].sampling.logprobs = 2;
  return requests;
}

TEST_P(StepGraphsOnDevice, SequencesJoinAndLeave) {
  if (is_left_out()) GTEST_SKIP();
  const Outcome run = expect_same_tokens(device_, company(36), {.max_num_seqs = 8}, 4);
  EXPECT_GT(run.stats.graphs_recorded, 3);
  EXPECT_GT(run.stats.graph_steps, 10);
}

TEST_P(StepGraphsOnDevice, BatchesOfEverySize) {
  for (int size = 1; size <= 8; ++size) {
    if (!is_full() && size % 3 != 2) continue;
    std::vector<Request> some = company(13);
    some.resize(static_cast<std::size_t>(size));
    for (Request& request : some) request.max_tokens = 5;
    const Outcome together = expect_same_tokens(device_, some, {.max_num_seqs = 8});
    EXPECT_GT(together.stats.graph_steps, 0) << size << " sequences";
  }
}

TEST_P(StepGraphsOnDevice, StepsThatDrawHaveGraphsOfTheirOwn) {
  std::vector<Request> one_by_one;
  for (unsigned i = 0; i < 3; ++i) one_by_one.push_back(random_request(60 + i, 4, 8));
  one_by_one[1].sampling = {.temperature = 1.0, .seed = 3};
  const Outcome run = expect_same_tokens(device_, one_by_one, {.max_num_seqs = 1});
  EXPECT_GE(run.stats.graphs_recorded, 2) << "with logits and without";
}

TEST_P(StepGraphsOnDevice, ContextsCrossTheBordersOfBlocksAndSplits) {
  std::vector<Request> requests = {random_request(1, 10, 26), random_request(2, 248, 26), random_request(3, 30, 26)};
  const Outcome run = expect_same_tokens(device_, requests, {.max_num_seqs = 4, .max_batch_tokens = 512});
  EXPECT_EQ(run.stats.graphs_recorded, 2) << "one of up to 256 keys, one of more";
  EXPECT_GE(run.stats.graph_steps, 20);
}

TEST_P(StepGraphsOnDevice, PreemptedSequencesComeBack) {
  if (is_left_out()) GTEST_SKIP();
  std::vector<Request> requests;
  for (unsigned i = 0; i < 5; ++i) requests.push_back(random_request(7 + i % 4, 20, 40));
  const kv::KvShape shape{quant::KvFormat::f32, 2, 2, 16};
  const EngineOptions options{
      .kv_format = quant::KvFormat::f32, .max_num_seqs = 4, .kv_cache_bytes = 9 * shape.block_bytes()};
  const Outcome run = expect_same_tokens(device_, requests, options);
  EXPECT_GT(run.stats.preemptions, 0);
  EXPECT_GT(run.stats.graph_steps, 20);
}

TEST_P(StepGraphsOnDevice, StepsThatCannotBeRecordedAreStartedOneByOne) {
  for (const auto refusal : {emulation::Refusal::at_begin, emulation::Refusal::at_end}) {
    emulation::refuse_recording(refusal);
    const Outcome run = expect_same_tokens(device_, {random_request(1, 10, 8)}, {.max_num_seqs = 2});
    EXPECT_EQ(is_emulated() ? run.stats.graph_steps : 0, 0);
  }
}

TEST_P(StepGraphsOnDevice, AStepThatGrowsTheWorkspaceDropsGraphs) {
  const auto model = model::make_tiny_model(device_);
  Engine engine(*model, {.max_num_seqs = 2, .max_batch_tokens = 128});
  const Request request = random_request(1, 10, 6);
  const Answer first = answer_one(engine, request);
  const EngineStats before = engine.stats();
  EXPECT_EQ(before.graphs_recorded, 1);
  EXPECT_EQ(answer_one(engine, request).tokens, first.tokens);
  EXPECT_EQ(engine.stats().graphs_recorded, 1) << "the same shape again";
  EXPECT_GT(engine.stats().graph_steps, before.graph_steps);
  answer_one(engine, random_request(2, 100, 1));  // a large step
  EXPECT_GT(engine.stats().workspace_growths, before.workspace_growths);
  EXPECT_EQ(answer_one(engine, request).tokens, first.tokens);
  EXPECT_EQ(engine.stats().graphs_recorded, 2);
}

TEST_P(StepGraphsOnDevice, GraphsAreGivenBackAfterAnError) {
  if (!is_emulated()) GTEST_SKIP() << "only emulated memory ends when it is to";
  const auto model = model::make_tiny_model(device_);
  Engine engine(*model, {.max_num_seqs = 2, .max_batch_tokens = 256});
  const Request request = random_request(1, 10, 6);
  const Answer first = answer_one(engine, request);
  emulation::set_device_bytes(emulation::device_bytes_in_use());
  engine.submit(random_request(4, 200, 5));
  EXPECT_THROW(static_cast<void>(engine.step()), Error);
  EXPECT_EQ(emulation::device_calls().graphs_alive, 0U);
  emulation::set_device_bytes(std::size_t{4} << 30);
  Answers ended;
  drain(engine, ended);
  EXPECT_EQ(answer_one(engine, request).tokens, first.tokens);
}

/// Steps that decode and are recorded by no one.
TEST_P(StepGraphsOnDevice, OtherStepsAreStartedOneByOne) {
  Request policy = random_request(1, 40, 6);
  policy.key_policy = {.rule = ops::KeyRule::window, .prefix = 4, .window = 16};
  EXPECT_EQ(expect_same_tokens(device_, {policy}, {.max_num_seqs = 2}).stats.graphs_recorded, 0);
  const EngineOptions sealed{.kv_format = quant::KvFormat::int4, .max_num_seqs = 2};
  EXPECT_EQ(expect_same_tokens(device_, {random_request(2, 20, 6)}, sealed).stats.graphs_recorded, 0);
}

TEST_P(StepGraphsOnDevice, DraftsAreVerifiedBesideRecordedSteps) {
  Request repeats = random_request(3, 12, 24);
  repeats.prompt.insert(repeats.prompt.end(), repeats.prompt.begin(), repeats.prompt.end());
  const EngineOptions speculative{.max_num_seqs = 2,
                                  .speculative = SpeculativeOptions{.method = SpeculativeMethod::ngram}};
  const Outcome run = expect_same_tokens(device_, {repeats, random_request(4, 6, 24)}, speculative);
  EXPECT_GT(run.stats.drafts.drafted, 0);
}

TEST_P(StepGraphsOnDevice, AReplayedStepIsOneCopyAndOneGraph) {
  expect_same_tokens(device_, {random_request(1, 2, 12)}, {.max_num_seqs = 2});
  if (!is_emulated()) GTEST_SKIP() << "only the emulator counts";
  const auto model = model::make_tiny_model(device_);
  Engine engine(*model, {.max_num_seqs = 2});
  engine.submit(random_request(1, 2, 12));
  int replayed = 0;
  while (engine.has_work()) {
    const emulation::DeviceCalls before = emulation::device_calls();
    const std::size_t started = emulation::num_started();
    const std::int64_t steps = engine.stats().graph_steps;
    static_cast<void>(engine.step());
    if (engine.stats().graph_steps == steps) continue;
    ++replayed;
    const emulation::DeviceCalls after = emulation::device_calls();
    EXPECT_EQ(after.replays, before.replays + 1);
    EXPECT_EQ(after.copies_in, before.copies_in + 1);
    EXPECT_EQ(after.copies_out, before.copies_out + 1);
    EXPECT_EQ(emulation::num_started(), started);
  }
  EXPECT_EQ(replayed, 10) << "all that decode, but the first";
}

INSTANTIATE_TEST_SUITE_P(, StepGraphsOnDevice,
                         testing::Values(&emulation::reference_backend(), &cuda::tested_backend()),
                         [](const auto& which) { return std::string(which.index == 0 ? "reference" : "emulated"); });

TEST(RecordingDeathTest, NothingElseHappensWhileWorkIsRecorded) {
  const DeviceMemory& memory = emulation::device_memory();
  char byte = 0;
  const Buffer there = allocate_on(memory, 1);
  EXPECT_DEATH((memory.begin_recording(), memory.allocate(1)), "allocate while work is recorded");
  EXPECT_DEATH((memory.begin_recording(), memory.copy_in(there.data(), &byte, 1)), "copy_in while work is recorded");
  EXPECT_DEATH((memory.begin_recording(), memory.copy_out(&byte, there.data(), 1)), "copy_out while work is recorded");
}

TEST(Recording, CopiesAndFillsAreKeptUntilTheyAreReplayed) {
  const DeviceMemory& memory = *cuda::tested_backend().kernels->memory;
  const Buffer a = allocate_on(memory, 4), b = allocate_on(memory, 4);
  memory.fill(a.data(), 1, 4), memory.fill(b.data(), 2, 4);
  ASSERT_TRUE(memory.begin_recording());
  memory.copy_within(b.data(), a.data(), 4);
  memory.fill(a.data(), 3, 2);
  void* const graph = memory.end_recording();
  ASSERT_NE(graph, nullptr);
  const auto bytes_of = [&](const Buffer& buffer) {
    std::array<unsigned char, 4> bytes{};
    memory.copy_out(bytes.data(), buffer.data(), 4);
    check(memory);
    return bytes;
  };
  using Bytes = std::array<unsigned char, 4>;
  EXPECT_EQ(bytes_of(a), (Bytes{1, 1, 1, 1}));
  EXPECT_EQ(bytes_of(b), (Bytes{2, 2, 2, 2}));
  memory.replay(graph);
  EXPECT_EQ(bytes_of(a), (Bytes{3, 3, 1, 1}));
  EXPECT_EQ(bytes_of(b), (Bytes{1, 1, 1, 1}));
  memory.fill(a.data(), 5, 4);
  memory.replay(graph);
  EXPECT_EQ(bytes_of(b), (Bytes{5, 5, 5, 5}));
  memory.delete_graph(graph);
}

}  // namespace
}  // namespace nb::engine
