// Prompts put together from chunks, on a device that is emulated: the tokens of the CPU reference, whatever happens
// around a request, and nothing of an approximation in an exact answer.
#include <gtest/gtest.h>

#include <bit>
#include <span>
#include <string>

#include "base/effort.h"
#include "base/error.h"
#include "cuda_emulation/device_fixture.h"
#include "engine/engine.h"
#include "engine/engine_fixture.h"

namespace nb::engine {
namespace {

std::vector<TokenId> tokens_of(unsigned seed, int count) { return random_request(seed, count, 1).prompt; }

/// A prompt that is written piece by piece.
class Prompt {
 public:
  Prompt& plain(unsigned seed, int count) {
    const auto tokens = tokens_of(seed, count);
    request_.prompt.insert(request_.prompt.end(), tokens.begin(), tokens.end());
    return *this;
  }

  Prompt& chunk(unsigned seed, int count, std::vector<TokenId> anchor = {}) {
    const auto begin = static_cast<int>(request_.prompt.size());
    request_.chunks.push_back({.begin = begin, .count = count, .anchor = std::move(anchor)});
    return plain(seed, count);
  }

  Request ask(const Reuse& reuse, int max_tokens = 4) const {
    Request request = request_;
    request.reuse = reuse;
    request.max_tokens = max_tokens;
    request.sampling.temperature = 0.0;
    return request;
  }

 private:
  Request request_;
};

const Reuse kExact{};
const Reuse kIsolated{.mode = ReuseMode::isolated};
const Reuse kWithSinks{.mode = ReuseMode::isolated, .mask_sink = false};
const Reuse kByDeviation{.mode = ReuseMode::blend, .ratio = 0.3};
const Reuse kFirst{.mode = ReuseMode::blend, .ratio = 0.3, .selection = BlendSelection::first};

/// Every mode over the same pieces: chunks in either order, one of them twice, behind anchors (one of which stands
/// before the beginning of its prompt), next to each other, around the borders of blocks, at both ends of a prompt.
std::vector<Request> composed_requests() {
  const std::vector<TokenId> bos = {1}, system = tokens_of(60, 18);
  const Prompt two = Prompt().plain(1, 7).chunk(50, 21).plain(2, 2).chunk(51, 16).plain(8, 2);
  const Prompt turned = Prompt().plain(1, 7).chunk(51, 16).chunk(50, 21).plain(4, 3);
  const Prompt twice = Prompt().plain(5, 16).chunk(52, 13).chunk(52, 13).plain(6, 5);
  const Prompt anchored = Prompt().chunk(50, 21, system).plain(2, 2).chunk(51, 16, bos).plain(3, 4);
  const Prompt at_the_ends = Prompt().chunk(53, 19).plain(7, 2).chunk(52, 13);
  std::vector<Request> requests;
  for (const Reuse& reuse : {kExact, kIsolated, kWithSinks, kByDeviation, kFirst}) requests.push_back(two.ask(reuse));
  for (const Reuse& reuse : {kIsolated, kByDeviation}) {
    requests.push_back(turned.ask(reuse));
    requests.push_back(twice.ask(reuse));
    requests.push_back(anchored.ask(reuse));
    requests.push_back(at_the_ends.ask(reuse));
  }
  requests.push_back(anchored.ask(kFirst));
  return requests;
}

/// One of each mode and prompt that matter most, for what takes an emulator long.
std::vector<Request> some_composed_requests() {
  const std::vector<Request> all = composed_requests();
  return {all[1], all[3], all[6], all[11], all[12]};
}

/// Answers of an engine of their own to each request alone, without anything kept from others.
std::vector<Answer> answers_alone(const model::Model& model, const std::vector<Request>& requests,
                                  const EngineOptions& options) {
  std::vector<Answer> answers;
  for (const Request& request : requests) {
    Engine engine(model, options);
    answers.push_back(answer_one(engine, request));
  }
  return answers;
}

void expect_same_tokens(const std::vector<Answer>& got, const std::vector<Answer>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].tokens, expected[i].tokens) << "request " << i;
    EXPECT_EQ(got[i].finish_reason, FinishReason::length) << "request " << i;
    EXPECT_EQ(got[i].error, "");
  }
}

void expect_same_logprobs(const std::vector<Answer>& got, const std::vector<Answer>& expected) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(got[i].logprobs.size(), expected[i].logprobs.size());
    for (std::size_t t = 0; t < got[i].logprobs.size(); ++t) {
      EXPECT_EQ(got[i].logprobs[t].token, expected[i].logprobs[t].token) << "request " << i;
      EXPECT_EQ(std::bit_cast<std::uint32_t>(got[i].logprobs[t].logprob),
                std::bit_cast<std::uint32_t>(expected[i].logprobs[t].logprob))
          << "request " << i << ", token " << t;
    }
  }
}

/// The oracle: every request alone on the CPU, in one slice.
const std::vector<Answer>& on_the_host() {
  static const std::vector<Answer> answers =
      answers_alone(*model::make_tiny_model({}), composed_requests(), {.kv_format = quant::KvFormat::f32});
  return answers;
}

/// A device: the reference in its memory, then the kernels of cuda/, then those of the deterministic mode.
struct Kind {
  friend void PrintTo(const Kind& kind, std::ostream* out) { *out << kind.name; }

  std::string name;
  const ops::Backend* backend;
  bool deterministic;
};

class Composed : public testing::TestWithParam<Kind> {
 protected:
  Composed()
      : model_(model::make_tiny_model({.device = GetParam().backend, .deterministic = GetParam().deterministic})) {}

  // Where tests are reduced, of every `stride`-th request.
  EngineStats expect_answers(const EngineOptions& options, std::size_t stride) {
    Engine engine(*model_, options);
    expect_same_tokens(answer_all(engine, some_of(composed_requests(), stride)), some_of(on_the_host(), stride));
    return engine.stats();
  }

  std::unique_ptr<model::Model> model_;
};

TEST(ComposedOracle, ModesDiffer) {
  const auto& answers = on_the_host();
  for (int i = 0; i < 5; ++i) {
    for (int j = 0; j < i; ++j) {
      EXPECT_NE(answers[static_cast<std::size_t>(i)].tokens, answers[static_cast<std::size_t>(j)].tokens)
          << "requests " << i << " and " << j << " of one prompt; choose another one";
    }
  }
}

TEST_P(Composed, AllTogetherGiveTheTokensOfTheHost) {
  const std::size_t before = emulation::device_bytes_in_use();
  const EngineStats stats =
      expect_answers({.kv_format = quant::KvFormat::f32, .max_num_seqs = 8, .max_batch_tokens = 512}, 1);
  EXPECT_GT(stats.chunk_hits, 10);
  EXPECT_GT(stats.measured_tokens, 100);
  EXPECT_EQ(emulation::device_bytes_in_use(), before);
}

TEST_P(Composed, SlicesGiveTheTokensOfTheHost) {
  expect_answers({.kv_format = quant::KvFormat::f32, .max_num_seqs = 3, .max_batch_tokens = 11}, 3);
}

// Nothing else runs, so that several slices in a row are only measured: each must see its own arrays, not those that
// the slice before it left on the device.
TEST_P(Composed, OneAloneIsMeasuredInSlices) {
  const std::vector<Request> requests = composed_requests();
  for (const std::size_t i : {3, 11}) {
    Engine engine(*model_, {.kv_format = quant::KvFormat::f32, .max_num_seqs = 1, .max_batch_tokens = 12});
    expect_same_tokens({answer_one(engine, requests[i])}, {on_the_host()[i]});
    EXPECT_EQ(engine.stats().measured_tokens, 37);
  }
}

TEST_P(Composed, PreemptedOnesGiveTheTokensOfTheHost) {
  std::vector<Request> requests = some_composed_requests();
  for (Request& request : requests) {
    request.max_tokens = 14;
    request.streams = false;  // else what a step takes of the prompts depends on time
  }
  const kv::KvShape shape{quant::KvFormat::f32, 2, 2, 16};
  const auto host = model::make_tiny_model({});
  const auto expected = answers_alone(*host, requests, {.kv_format = quant::KvFormat::f32});
  Engine engine(*model_, {.kv_format = quant::KvFormat::f32,
                          .max_num_seqs = 8,
                          .max_batch_tokens = 40,
                          .kv_cache_bytes = 11 * shape.block_bytes()});
  expect_same_tokens(answer_all(engine, requests), expected);
  EXPECT_GT(engine.stats().preemptions, 0);
  EXPECT_GT(engine.stats().chunk_evictions, 0);
}

// Runs of chunks are sealed to the end, and what is measured for blend goes through open cells of its own.
TEST_P(Composed, SealedKeysGiveTheTokensOfTheHost) {
  const EngineOptions options{.kv_format = quant::KvFormat::int4, .max_num_seqs = 3, .max_batch_tokens = 40};
  const std::vector<Request> requests = some_composed_requests();
  Engine engine(*model_, options);
  expect_same_tokens(answer_all(engine, requests), answers_alone(*model::make_tiny_model({}), requests, options));
  EXPECT_GT(engine.stats().measured_tokens, 50);
}

TEST_P(Composed, SiblingsForkOnTheDevice) {
  const auto all_of = [](const model::Model& model) {
    Engine engine(model, {.kv_format = quant::KvFormat::f32, .max_num_seqs = 6, .max_batch_tokens = 30});
    const std::vector<Request> requests = composed_requests();
    for (const std::size_t i : {1, 3, 7}) {
      Request request = requests[i];
      request.n = 2;
      request.max_tokens = 6;
      request.sampling = {.temperature = 1.0, .seed = 5};
      engine.submit(request);
    }
    std::map<std::pair<RequestId, int>, std::vector<TokenId>> tokens;
    while (engine.has_work()) {
      for (const StepOutput& output : engine.step()) {
        auto& answer = tokens[{output.request_id, output.choice}];
        answer.insert(answer.end(), output.token_ids.begin(), output.token_ids.end());
      }
      engine.check_invariants();
    }
    EXPECT_GT(engine.stats().forked_tokens, 0);
    return tokens;
  };
  const auto expected = all_of(*model::make_tiny_model({}));
  EXPECT_EQ(expected.size(), 6U);
  EXPECT_EQ(all_of(*model_), expected);
}

// What composed requests have computed behind chunks is of no use to an exact one: it gets the bits of an engine in
// which they never were. Its own leading blocks, which are exact, are used.
TEST_P(Composed, AnExactRequestAfterThemGivesColdBits) {
  const std::vector<Request> all = some_composed_requests(), composed = some_of(all, 2);
  std::vector<Request> exact = some_of<Request>({all[2], all[0], all[3]}, 3);
  for (Request& request : exact) {
    request.reuse = kExact;
    request.sampling.logprobs = 2;
    request.max_tokens = 2;
  }
  // With up to 8 rows in a step a row has its bits whatever the company, with more in the deterministic mode.
  const EngineOptions options{
      .kv_format = quant::KvFormat::f32, .max_num_seqs = 4, .max_batch_tokens = GetParam().deterministic ? 100 : 8};
  const auto cold = answers_alone(*model_, exact, options);
  Engine engine(*model_, options);
  static_cast<void>(answer_all(engine, composed));
  const std::int64_t hits = engine.stats().prefix_hit_tokens;
  const auto after = answer_all(engine, exact);
  expect_same_tokens(after, cold);
  expect_same_logprobs(after, cold);
  EXPECT_GT(engine.stats().prefix_hit_tokens, hits);
}

// Sanitizers make the emulator five times slower; they see the kernels in the tests of operators and in
// engine_test.cpp, and here how an engine uses the memory of a device.
std::vector<Kind> kinds() {
  std::vector<Kind> kinds = {{"ReferenceOnDevice", &emulation::reference_backend(), false}};
  if (!is_reduced()) {
    kinds.push_back({"Kernels", &cuda::tested_backend(), false});
    kinds.push_back({"DeterministicKernels", &cuda::tested_backend(), true});
  }
  return kinds;
}

INSTANTIATE_TEST_SUITE_P(Devices, Composed, testing::ValuesIn(kinds()),
                         [](const auto& kind) { return kind.param.name; });

/// The bits of composed requests alone in steps of a few rows, against those in company in large steps.
TEST(ComposedBits, DeterministicModelsGiveTheSameForAnyNumberOfRows) {
  if (is_reduced()) GTEST_SKIP();
  std::vector<Request> requests = some_composed_requests();
  for (Request& request : requests) request.sampling.logprobs = 2;
  const auto model =
      model::make_tiny_model({.format = quant::Format::bf16, .device = &cuda::tested_backend(), .deterministic = true});
  const auto alone = answers_alone(*model, requests, {.max_num_seqs = 1, .max_batch_tokens = 13});
  Engine engine(*model, {.max_num_seqs = 8, .max_batch_tokens = 300});
  const auto together = answer_all(engine, requests);
  expect_same_tokens(together, alone);
  expect_same_logprobs(together, alone);
}

/// A chunk at the beginning behind an anchor, in a prompt that ends where the rotation table does.
TEST(ComposedContext, APromptAtItsVeryEndWorks) {
  if (is_reduced()) GTEST_SKIP();
  constexpr int kContext = 96;
  const std::vector<TokenId> anchor = tokens_of(60, 6);
  const auto asked = [&](int num_plain, int max_tokens) {
    return Prompt().chunk(50, 21, anchor).plain(3, num_plain).ask(kIsolated, max_tokens);
  };
  for (const ops::Backend* backend : {&ops::find_backend("reference"), &cuda::tested_backend()}) {
    const auto model = model::make_tiny_model({.max_position_embeddings = kContext, .device = backend});
    Engine engine(*model, {.kv_format = quant::KvFormat::f32, .max_num_seqs = 2});
    const int room = kContext - static_cast<int>(anchor.size());
    EXPECT_EQ(answer_one(engine, asked(room - 1 - 21, 5)).tokens.size(), 1U);
    EXPECT_EQ(answer_one(engine, asked(room - 4 - 21, 50)).tokens.size(), 4U);
    EXPECT_THROW(engine.submit(asked(room - 21, 5)), Error);
    Request scored = asked(room - 21, 0);
    scored.prompt_logits = true;
    EXPECT_EQ(answer_one(engine, scored).finish_reason, FinishReason::length);
    scored = asked(room + 1 - 21, 0);
    scored.prompt_logits = true;
    EXPECT_THROW(engine.submit(scored), Error);
  }
}

}  // namespace
}  // namespace nb::engine
