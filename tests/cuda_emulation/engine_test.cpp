// Whole engines on a device that is emulated: the same tokens as on the CPU, and memory that comes back.
#include "engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "base/error.h"
#include "cuda_emulation/device_fixture.h"
#include "engine/engine_fixture.h"

namespace nb::engine {
namespace {

/// The answers of an engine that is made for this call.
std::vector<Answer> answers_of(const model::TinyModelOptions& options, const std::vector<Request>& requests,
                               const EngineOptions& engine_options) {
  const auto model = model::make_tiny_model(options);
  Engine engine(*model, engine_options);
  return answer_all(engine, requests);
}

void expect_same(const std::vector<Answer>& got, const std::vector<Answer>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].tokens, expected[i].tokens) << "request " << i;
    EXPECT_EQ(got[i].finish_reason, expected[i].finish_reason) << "request " << i;
    EXPECT_EQ(got[i].error, expected[i].error);
  }
}

/// Prompts by every rule, of which each hides a part.
std::vector<Request> policy_requests() {
  const ops::KeyPolicy policies[] = {{.rule = ops::KeyRule::window, .prefix = 4, .window = 20},
                                     {.rule = ops::KeyRule::strided, .window = 16, .period = 3},
                                     {.rule = ops::KeyRule::block, .window = 5, .period = 32, .keep = 16},
                                     {.rule = ops::KeyRule::budget, .prefix = 3, .window = 17, .keep = 1},
                                     {.rule = ops::KeyRule::summary, .prefix = 4, .window = 12, .period = 16}};
  std::vector<Request> requests;
  for (const ops::KeyPolicy& policy : policies) {
    const auto i = static_cast<unsigned>(requests.size());
    requests.push_back(random_request(400 + i, 61 + 7 * static_cast<int>(i), 4));
    requests.back().key_policy = policy;
  }
  requests.push_back(random_request(410, 30, 4));
  return requests;
}

class ReferenceOnDevice : public testing::Test {
 protected:
  model::TinyModelOptions host_;
  model::TinyModelOptions device_{.device = &emulation::reference_backend()};
};

TEST_F(ReferenceOnDevice, GivesTheTokensOfTheHost) {
  const EngineOptions options{.max_num_seqs = 3, .max_batch_tokens = 64};
  const std::size_t before = emulation::device_bytes_in_use();
  expect_same(answers_of(device_, mixed_requests(), options), answers_of(host_, mixed_requests(), options));
  EXPECT_EQ(emulation::device_bytes_in_use(), before) << "memory of the device that nobody gave back";
}

TEST_F(ReferenceOnDevice, PoliciesHideWhatTheyHideOnTheHost) {
  const EngineOptions options{.max_num_seqs = 3, .max_batch_tokens = 40};
  expect_same(answers_of(device_, policy_requests(), options), answers_of(host_, policy_requests(), options));
}

TEST_F(ReferenceOnDevice, SealsTheKeysOfTheHost) {
  const EngineOptions options{.kv_format = quant::KvFormat::int4, .max_num_seqs = 3, .max_batch_tokens = 40};
  const std::size_t before = emulation::device_bytes_in_use();
  expect_same(answers_of(device_, mixed_requests(), options), answers_of(host_, mixed_requests(), options));
  EXPECT_EQ(emulation::device_bytes_in_use(), before);
}

TEST_F(ReferenceOnDevice, PreemptsAndReusesPrefixesAsTheHostDoes) {
  std::vector<Request> requests;
  for (unsigned i = 0; i < 6; ++i) requests.push_back(random_request(7 + i % 5, 60, 40));
  const auto host = model::make_tiny_model(host_), device = model::make_tiny_model(device_);
  const kv::KvShape shape{quant::KvFormat::f32, 2, 2, 16};
  const EngineOptions options{.max_num_seqs = 4, .kv_cache_bytes = 16 * shape.block_bytes()};
  Engine on_host(*host, options), on_device(*device, options);
  expect_same(answer_all(on_device, requests), answer_all(on_host, requests));
  EXPECT_GT(on_device.stats().preemptions, 0);
  EXPECT_GT(on_device.stats().prefix_hit_tokens, 0);
}

TEST_F(ReferenceOnDevice, SiblingsCopyBlocksOnTheDevice) {
  Request request = random_request(5, 40, 12);
  request.n = 3;
  request.sampling = {.temperature = 1.0, .seed = 3};
  const auto all_of = [&](const model::TinyModelOptions& options) {
    const auto model = model::make_tiny_model(options);
    Engine engine(*model, {.max_num_seqs = 3});
    engine.submit(request);
    std::map<int, std::vector<TokenId>> tokens;
    while (engine.has_work()) {
      for (const StepOutput& output : engine.step()) {
        auto& answer = tokens[output.choice];
        answer.insert(answer.end(), output.token_ids.begin(), output.token_ids.end());
      }
    }
    EXPECT_GT(engine.stats().forked_tokens, 0);
    return tokens;
  };
  EXPECT_EQ(all_of(device_), all_of(host_));
}

TEST_F(ReferenceOnDevice, ScoresComeFromTheDevice) {
  Request request = random_request(9, 33, 4);
  request.prompt_logprobs = 2;
  request.prompt_logits = true;
  request.sampling.logprobs = 3;
  const auto host = answers_of(host_, {request}, {}), device = answers_of(device_, {request}, {});
  expect_same(device, host);
  ASSERT_EQ(device[0].prompt_logprobs.size(), host[0].prompt_logprobs.size());
  for (std::size_t i = 0; i < host[0].prompt_logprobs.size(); ++i) {
    EXPECT_EQ(device[0].prompt_logprobs[i].logprob, host[0].prompt_logprobs[i].logprob);
  }
  EXPECT_EQ(std::memcmp(device[0].prompt_logits.data(), host[0].prompt_logits.data(), host[0].prompt_logits.bytes()),
            0);
}

/// Answers of two equal models on a device, one of which guesses, all of it rightly.
std::vector<Answer> answers_with_draft_model(const model::TinyModelOptions& options,
                                             const std::vector<Request>& requests, EngineOptions engine_options) {
  const auto target = model::make_tiny_model(options), draft = model::make_tiny_model(options);
  engine_options.speculative = SpeculativeOptions{
      .method = SpeculativeMethod::draft, .num_draft_tokens = 3, .adaptive = false, .draft_model = draft.get()};
  Engine engine(*target, engine_options);
  std::vector<Answer> answers = answer_all(engine, requests);
  EXPECT_GT(engine.stats().drafts.drafted, 0);
  if (!quant::seals_keys(*engine.options().kv_format)) {
    EXPECT_EQ(engine.stats().drafts.accepted, engine.stats().drafts.drafted);
  }
  return answers;
}

TEST_F(ReferenceOnDevice, ADraftModelGuesses) {
  for (const quant::KvFormat format : {quant::KvFormat::f32, quant::KvFormat::int4}) {
    const EngineOptions options{.kv_format = format, .max_num_seqs = 3, .max_batch_tokens = 64};
    const std::size_t before = emulation::device_bytes_in_use();
    expect_same(answers_with_draft_model(device_, mixed_requests(), options),
                answers_of(host_, mixed_requests(), options));
    EXPECT_EQ(emulation::device_bytes_in_use(), before);
  }
}

TEST_F(ReferenceOnDevice, OutOfMemoryIsAnErrorWithNumbersAndTheEngineGoesOn) {
  const auto model = model::make_tiny_model(device_);
  Engine engine(*model, {.max_num_seqs = 2, .max_batch_tokens = 256});
  const Request request = random_request(3, 20, 5);
  const Answer first = answer_one(engine, request);
  emulation::set_device_bytes(emulation::device_bytes_in_use());
  engine.submit(random_request(4, 200, 5));
  std::string message;
  try {
    while (engine.has_work()) static_cast<void>(engine.step());
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::out_of_memory);
    message = error.what();
  }
  emulation::set_device_bytes(std::size_t{4} << 30);
  EXPECT_NE(message.find("cuda-emulated: cannot allocate"), std::string::npos) << message;
  Answers ended;
  drain(engine, ended);
  EXPECT_EQ(answer_one(engine, request).tokens, first.tokens);
  engine.check_invariants();
}

TEST_F(ReferenceOnDevice, CachesAreSizedFromTheMemoryOfTheDevice) {
  const auto model = model::make_tiny_model(device_);
  const kv::KvShape shape{quant::KvFormat::f32, 2, 2, 16};
  emulation::set_device_bytes(emulation::device_bytes_in_use() + 100 * static_cast<std::size_t>(shape.block_bytes()));
  {
    Engine engine(*model, {.max_num_seqs = 64});
    EXPECT_EQ(engine.stats().blocks_total, 85);
  }
  emulation::set_device_bytes(emulation::device_bytes_in_use() + 10 * static_cast<std::size_t>(shape.block_bytes()));
  EXPECT_THROW(Engine(*model, {.max_num_seqs = 64}), Error);
  emulation::set_device_bytes(std::size_t{4} << 30);
}

// ---- the kernels of cuda/, emulated ----

/// Prompts around the borders of blocks, short enough for an emulator.
std::vector<Request> short_requests() {
  std::vector<Request> requests;
  const int lengths[] = {1, 16, 17, 37};
  for (unsigned i = 0; i < 4; ++i) requests.push_back(random_request(200 + i, lengths[i], 4));
  return requests;
}

TEST(Emulated, GreedyTokensAreThoseOfTheReference) {
  const model::TinyModelOptions host, device{.device = &cuda::tested_backend()};
  const EngineOptions options{.kv_format = quant::KvFormat::f32, .max_num_seqs = 3, .max_batch_tokens = 48};
  const std::size_t before = emulation::device_bytes_in_use();
  expect_same(answers_of(device, short_requests(), options), answers_of(host, short_requests(), options));
  EXPECT_EQ(emulation::device_bytes_in_use(), before);
}

TEST(Emulated, ADraftModelGuesses) {
  const model::TinyModelOptions device{.device = &cuda::tested_backend(), .deterministic = true};
  std::vector<Request> requests = short_requests();
  requests[1].sampling = {.temperature = 1.0, .top_p = 0.9, .seed = 3};
  const EngineOptions options{.max_num_seqs = 3, .max_batch_tokens = 48};
  expect_same(answers_with_draft_model(device, requests, options), answers_of(device, requests, options));
}

/// Every other token, and no end before the third.
class EveryOther : public TokenConstraint {
 public:
  bool allow(std::span<std::uint32_t> bits) override {
    std::fill(bits.begin(), bits.end(), 0x55555555U);
    return taken_ >= 3;
  }
  bool accept(TokenId token) noexcept override {
    EXPECT_EQ(token % 2, 0);
    ++taken_;
    return false;
  }

 private:
  int taken_ = 0;
};

class Failing : public TokenConstraint {
 public:
  bool allow(std::span<std::uint32_t>) override { throw std::runtime_error(++times_ > 1 ? "again" : "no grammar"); }
  bool accept(TokenId) noexcept override { return false; }

 private:
  int times_ = 0;
};

/// Requests that draw in every way, most of them for more than one token; the last two end with an error.
std::vector<Request> sampled_requests() {
  const sampling::SamplingParams params[] = {
      {.temperature = 0.0},  // takes the argmax of the head
      {.seed = 1},
      {.temperature = 0.7, .top_k = 40, .top_p = 0.9, .min_p = 0.01, .seed = 2},
      {.temperature = 0.0, .repetition_penalty = 1.4},
      {.temperature = 1.5, .presence_penalty = 0.5, .frequency_penalty = 0.7, .seed = 3},
      {.repetition_penalty = 1.2, .presence_penalty = -0.5, .logit_bias = {{3, 4.0}, {9, -100.0}, {3, 1.5}}, .seed = 4},
      {.temperature = 0.9, .min_tokens = 4, .seed = 5},
      {.bad_words_token_ids = {{7}, {11, 12}}, .allowed_token_ids = {{7, 11, 12, 100, 200, 300}}, .seed = 6},
      {.top_p = 0.5, .seed = 7, .choice_index = 2},
      {.seed = 8},                                                  // with a constraint
      {.logprobs = 2, .seed = 9},                                   // wants to see its logits
      {.temperature = 0.0, .bad_words_token_ids = {}, .seed = 10},  // its constraint fails
      {.allowed_token_ids = {{5}}, .seed = 11},                     // nothing is left
  };
  std::vector<Request> requests;
  for (const sampling::SamplingParams& wanted : params) {
    const auto i = static_cast<unsigned>(requests.size());
    requests.push_back(random_request(300 + i, 3 + static_cast<int>(i) * 2, 6));
    requests.back().sampling = wanted;
  }
  for (TokenId token = 0; token < 320; token += 3) requests[6].stop_token_ids.push_back(token);
  requests[8].n = 3;
  requests[9].make_constraint = [] { return std::make_unique<EveryOther>(); };
  requests[9].stop_token_ids = {2, 4, 6};
  requests[11].make_constraint = [] { return std::make_unique<Failing>(); };
  requests[12].sampling.bad_words_token_ids = {{requests[12].prompt.back(), 5}};
  return requests;
}

struct Drawn {
  std::map<std::pair<RequestId, int>, Answer> answers;  // by request and choice
  std::int64_t on_device = 0, generated = 0;
};

Drawn draw_all(const model::TinyModelOptions& options) {
  const auto model = model::make_tiny_model(options);
  Engine engine(*model, {.kv_format = quant::KvFormat::f32, .max_num_seqs = 6, .max_batch_tokens = 48});
  for (const Request& request : sampled_requests()) engine.submit(request);
  Drawn drawn;
  while (engine.has_work()) {
    for (const StepOutput& output : engine.step()) {
      Answer& answer = drawn.answers[{output.request_id, output.choice}];
      answer.tokens.insert(answer.tokens.end(), output.token_ids.begin(), output.token_ids.end());
      answer.finish_reason = output.finish_reason;
      answer.error = output.error;
    }
    engine.check_invariants();
  }
  drawn.on_device = engine.stats().drawn_on_device;
  drawn.generated = engine.stats().generated_tokens;
  return drawn;
}

void expect_same(const Drawn& got, const Drawn& expected) {
  ASSERT_EQ(got.answers.size(), expected.answers.size());
  for (const auto& [key, answer] : expected.answers) {
    const Answer& other = got.answers.at(key);
    EXPECT_EQ(other.tokens, answer.tokens) << "request " << key.first << ", choice " << key.second;
    EXPECT_EQ(other.finish_reason, answer.finish_reason) << "request " << key.first;
    EXPECT_EQ(other.error, answer.error) << "request " << key.first;
  }
}

TEST(Emulated, TokensDrawnOnTheDeviceAreThoseOfTheHost) {
  if (is_reduced()) GTEST_SKIP();
  const Drawn host = draw_all({}), device = draw_all({.device = &cuda::tested_backend()});
  expect_same(device, host);
  EXPECT_EQ(host.on_device, 0);
  // All but the six greedy tokens that are the argmax and the six whose logits are shown; and tokens that end an
  // answer.
  const auto stopped = std::count_if(device.answers.begin(), device.answers.end(),
                                     [](const auto& a) { return a.second.finish_reason == FinishReason::stop; });
  EXPECT_EQ(device.on_device, device.generated - 12 + stopped);
  EXPECT_GT(device.on_device, 40);
  const Answer& failed = device.answers.rbegin()->second;
  EXPECT_NE(failed.error.find("allowed_token_ids"), std::string::npos) << failed.error;
  EXPECT_EQ(std::next(device.answers.rbegin())->second.error, "no grammar");
  // Logits that are copied to the host are drawn from there.
  ops::KernelTable table = *cuda::tested_backend().kernels;
  table.sample = nullptr;
  ops::Backend backend = cuda::tested_backend();
  backend.kernels = &table;
  const Drawn logits_on_host = draw_all({.device = &backend});
  expect_same(device, logits_on_host);
  EXPECT_EQ(logits_on_host.on_device, 0);
}

// Arithmetic in f32 over the same weights; prompts of up to 8 tokens a step, which is what multiplies codes as they
// are.
TEST(Emulated, ModelsOfCodesGiveTheTokensOfTheReference) {
  const model::TinyModelOptions host{.dtype = "f32", .format = quant::Format::q8_0};
  model::TinyModelOptions device = host;
  device.device = &cuda::tested_backend();
  const EngineOptions options{.kv_format = quant::KvFormat::f32, .max_num_seqs = 3, .max_batch_tokens = 48};
  expect_same(answers_of(device, short_requests(), options), answers_of(host, short_requests(), options));
}

TEST(Emulated, OtherQuantizedModelsRunAsBf16) {
  const model::TinyModelOptions device{.format = quant::Format::q4_0, .device = &cuda::tested_backend()};
  const auto model = model::make_tiny_model(device);
  EXPECT_EQ(model->act_type(), ops::ActType::bf16);
  EXPECT_EQ(model->default_kv_format(), quant::KvFormat::bf16);
  Engine engine(*model, {.max_num_seqs = 2});
  const Answer answer = answer_one(engine, random_request(1, 20, 4));
  EXPECT_EQ(answer.tokens.size(), 4U);
}

// Codes may differ from the reference's by one, where products are summed in another order: here no token does.
TEST(Emulated, GreedyTokensOverQuantizedKeysAreThoseOfTheReference) {
  const model::TinyModelOptions host, device{.device = &cuda::tested_backend()};
  for (const quant::KvFormat format : {quant::KvFormat::mixed, quant::KvFormat::int4}) {
    const EngineOptions options{.kv_format = format, .max_num_seqs = 3, .max_batch_tokens = 48};
    expect_same(answers_of(device, short_requests(), options), answers_of(host, short_requests(), options));
  }
}

TEST(Emulated, GreedyTokensUnderPoliciesAreThoseOfTheReference) {
  const model::TinyModelOptions host, device{.device = &cuda::tested_backend()};
  const EngineOptions options{.kv_format = quant::KvFormat::f32, .max_num_seqs = 3, .max_batch_tokens = 48};
  expect_same(answers_of(device, policy_requests(), options), answers_of(host, policy_requests(), options));
}

/// Answers alone against answers in company, with the prefix cache and small slices.
void expect_same_alone_and_together(const model::TinyModelOptions& options, int max_batch_tokens,
                                    std::optional<quant::KvFormat> kv_format = {},
                                    std::vector<Request> requests = short_requests()) {
  requests.push_back(requests.back());  // again: found in the prefix cache, or waited for
  const auto model = model::make_tiny_model(options);
  std::vector<Answer> alone;
  for (const Request& request : requests) {
    Engine engine(*model, {.kv_format = kv_format,
                           .max_num_seqs = 1,
                           .max_batch_tokens = max_batch_tokens,
                           .enable_prefix_caching = false});
    alone.push_back(answer_one(engine, request));
  }
  Engine engine(*model, {.kv_format = kv_format, .max_num_seqs = 4, .max_batch_tokens = max_batch_tokens});
  expect_same(answer_all(engine, requests), alone);
  EXPECT_GT(engine.stats().prefix_hit_tokens, 0);
}

TEST(Emulated, UpToEightRowsGiveTheSameBits) {
  if (is_reduced()) GTEST_SKIP();
  for (const quant::Format format : {quant::Format::bf16, quant::Format::f32}) {
    expect_same_alone_and_together({.format = format, .device = &cuda::tested_backend()}, 8);
  }
}

TEST(Emulated, UpToEightRowsGiveTheSameBitsOverQuantizedKeys) {
  if (is_reduced()) GTEST_SKIP();
  for (const quant::KvFormat format : {quant::KvFormat::int8, quant::KvFormat::int4}) {
    expect_same_alone_and_together({.device = &cuda::tested_backend()}, 8, format);
  }
}

TEST(Emulated, UpToEightRowsGiveTheSameBitsUnderPolicies) {
  if (is_reduced()) GTEST_SKIP();
  // Every policy over keys of one kind, in the full run over both; the last request comes twice.
  const std::vector<Request> all = policy_requests();
  std::vector<Request> plain = all, sealed = {all[0], all[1], all[2], all[5], all[3]};  // no summaries of sealed keys
  if (!is_full()) plain = {all[0], all[4], all[5], all[3]}, sealed = {all[1], all[2], all[5]};
  expect_same_alone_and_together({.device = &cuda::tested_backend()}, 8, quant::KvFormat::mixed, plain);
  expect_same_alone_and_together({.device = &cuda::tested_backend()}, 8, quant::KvFormat::int4, sealed);
}

TEST(Emulated, DeterministicModelsGiveTheSameBitsForAnyNumberOfRows) {
  if (is_reduced()) GTEST_SKIP();
  for (const quant::Format format : {quant::Format::bf16, quant::Format::f32}) {
    expect_same_alone_and_together({.format = format, .device = &cuda::tested_backend(), .deterministic = true}, 100);
  }
  expect_same_alone_and_together({.device = &cuda::tested_backend(), .deterministic = true}, 100,
                                 quant::KvFormat::int4);
}

}  // namespace
}  // namespace nb::engine
