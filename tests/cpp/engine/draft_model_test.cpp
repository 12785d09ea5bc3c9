// A draft model reads what its target reads: the target's own weights as the draft model guess every token, whatever
// became of blocks in between; and no draft model changes an answer.
#include "engine/draft_model.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "engine/engine_fixture.h"
#include "engine/speculative.h"
#include "kv/disk_scratch.h"

namespace nb::engine {
namespace {

using model::make_tiny_model;

EngineOptions drafting(const model::Model& draft, int num_draft_tokens, bool adaptive = false) {
  return {.max_num_seqs = 8,
          .speculative = SpeculativeOptions{.method = SpeculativeMethod::draft,
                                            .num_draft_tokens = num_draft_tokens,
                                            .adaptive = adaptive,
                                            .draft_model = &draft}};
}

void expect_same(const std::vector<Answer>& answers, const std::vector<Answer>& wanted) {
  ASSERT_EQ(answers.size(), wanted.size());
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    SCOPED_TRACE(i);
    EXPECT_EQ(answers[i].tokens, wanted[i].tokens);
    EXPECT_EQ(answers[i].finish_reason, wanted[i].finish_reason);
    EXPECT_EQ(answers[i].error, wanted[i].error);
  }
}

void expect_all_right(const Engine& engine) {
  const DraftCounters drafts = engine.stats().drafts;
  EXPECT_GT(drafts.drafted, 0);
  EXPECT_EQ(drafts.accepted, drafts.drafted);
}

/// The requests of every fixture, longer and some with several answers.
std::vector<Request> many_requests() {
  std::vector<Request> requests = mixed_requests();
  for (Request& request : requests) request.max_tokens = 40;
  requests.push_back(requests[5]);
  requests.back().sampling.logprobs = 2;
  requests.push_back(requests[4]);
  requests.back().sampling.presence_penalty = 0.7;
  requests.push_back(requests[2]);
  requests.back().prompt_logprobs = 1;
  return requests;
}

/// A prompt with chunks, anchors and plain tokens between them.
Request composed(ReuseMode mode, unsigned seed = 1) {
  Request request = random_request(seed, 70, 30);
  request.reuse.mode = mode;
  request.reuse.ratio = 0.3;
  request.chunks = {{.begin = 4, .count = 30, .anchor = random_request(50, 20, 1).prompt},
                    {.begin = 40, .count = 21, .anchor = {1, 2, 3}}};
  return request;
}

// ---- the same model guesses everything ----

class EveryDraftKvFormat : public EveryKvFormat {};

TEST_P(EveryDraftKvFormat, ItsOwnTargetGuessesEveryToken) {
  const auto target = make_tiny_model({.backend = GetParam().backend, .num_threads = 2});
  const auto draft = make_tiny_model({.backend = GetParam().backend, .num_threads = 2});
  const std::vector<Request> requests = many_requests();
  Engine plain(*target, {.kv_format = GetParam().format, .max_num_seqs = 8});
  const std::vector<Answer> wanted = answer_all(plain, requests);
  std::vector<int> counts{5};
  if (!GetParam().format) counts = {1, 5, 18};
  for (const int count : counts) {
    SCOPED_TRACE(count);
    EngineOptions options = drafting(*draft, count);
    options.kv_format = GetParam().format;
    Engine engine(*target, options);
    expect_same(answer_all(engine, requests), wanted);
    // One whose keys are not sealed reads them a little otherwise.
    if (!quant::seals_keys(*engine.options().kv_format)) expect_all_right(engine);
    EXPECT_LT(engine.stats().steps, plain.stats().steps);
    const DraftCounters drafts = engine.stats().drafts;
    EXPECT_GT(drafts.model_seconds, 0.0);
    EXPECT_GT(drafts.model_tokens, drafts.drafted);
    EXPECT_GT(drafts.model_kv_bytes, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(DraftModel, EveryDraftKvFormat, testing::ValuesIn(kv_cases()), kv_case_name);

TEST(DraftModel, GuessesSampledTokensByTheirRandomNumbers) {
  const auto target = make_tiny_model({}), draft = make_tiny_model({});
  Request request = random_request(1, 30, 100);
  request.sampling = {.temperature = 1.2, .top_p = 0.99, .seed = 3};
  Engine plain(*target, {}), engine(*target, drafting(*draft, 4));
  expect_same({answer_one(engine, request)}, {answer_one(plain, request)});
  expect_all_right(engine);
}

TEST(DraftModel, KnowsWhatThePrefixCacheGives) {
  const auto target = make_tiny_model({}), draft = make_tiny_model({});
  Engine engine(*target, drafting(*draft, 4));
  const Request first = random_request(1, 100, 40);
  const Answer answer = answer_one(engine, first);
  Request turn = first;
  turn.prompt.insert(turn.prompt.end(), answer.tokens.begin(), answer.tokens.end());
  turn.prompt.push_back(7);
  answer_one(engine, turn);
  EXPECT_GE(engine.stats().prefix_hit_tokens, 128);
  expect_all_right(engine);
  EXPECT_LT(engine.stats().drafts.model_tokens, 300) << "nothing is read twice";
}

TEST(DraftModel, FollowsForksAndPreemption) {
  const auto target = make_tiny_model({}), draft = make_tiny_model({});
  std::vector<Request> requests;
  for (unsigned i = 0; i < 4; ++i) {
    requests.push_back(random_request(i, 37 + 11 * static_cast<int>(i), 60));
    requests.back().sampling = {.temperature = 1.0, .seed = 40 + i};
  }
  Request several = random_request(9, 43, 30);
  several.sampling = {.temperature = 1.0, .seed = 5};
  several.n = 3;
  EngineOptions options = drafting(*draft, 6);
  requests.push_back(several);
  const auto texts_of = [&](Engine& engine) {
    std::map<std::pair<RequestId, int>, std::vector<TokenId>> texts;
    for (const Request& request : requests) engine.submit(request);
    while (engine.has_work()) {
      for (const StepOutput& output : engine.step()) {
        auto& text = texts[{output.request_id, output.choice}];
        text.insert(text.end(), output.token_ids.begin(), output.token_ids.end());
      }
      engine.check_invariants();
    }
    return texts;
  };
  Engine roomy(*target, options);
  const auto wanted = texts_of(roomy);
  EXPECT_EQ(wanted.size(), 7u);
  expect_all_right(roomy);
  EXPECT_GT(roomy.stats().forked_tokens, 0);
  // Two models store as many blocks.
  options.kv_cache_bytes = 13 * 2 * kv::KvShape{*roomy.options().kv_format, 2, 2, 16}.block_bytes();
  Engine tight(*target, options);
  EXPECT_EQ(tight.stats().blocks_total, 13);
  EXPECT_EQ(texts_of(tight), wanted);
  EXPECT_GT(tight.stats().preemptions, 0);
  expect_all_right(tight);
}

TEST(DraftModel, ReadsChunksAsTheTargetDoes) {
  const auto target = make_tiny_model({}), draft = make_tiny_model({});
  for (const ReuseMode mode : {ReuseMode::isolated, ReuseMode::blend}) {
    for (const bool masks : {false, true}) {
      SCOPED_TRACE(concat(to_string(mode), " ", masks));
      Request request = composed(mode);
      request.reuse.mask_sink = masks;
      Engine plain(*target, {}), engine(*target, drafting(*draft, 4));
      const std::vector<Answer> wanted{answer_one(plain, request), answer_one(plain, request)};
      expect_same({answer_one(engine, request), answer_one(engine, request)}, wanted);
      EXPECT_EQ(engine.stats().chunk_hits, 2);
      expect_all_right(engine);
    }
  }
}

TEST(DraftModel, SeesWhatAPolicyShows) {
  const auto target = make_tiny_model({}), draft = make_tiny_model({});
  for (const ops::KeyPolicy& policy :
       {ops::KeyPolicy{.rule = ops::KeyRule::window, .prefix = 4, .window = 24},
        ops::KeyPolicy{.rule = ops::KeyRule::strided, .prefix = 4, .window = 16, .period = 2}}) {
    Request request = random_request(3, 90, 60);
    request.key_policy = policy;
    Engine plain(*target, {}), engine(*target, drafting(*draft, 3));
    expect_same({answer_one(engine, request)}, {answer_one(plain, request)});
    expect_all_right(engine);
  }
}

// ---- what it has not read with the target ----

TEST(DraftModel, ReadsWhatCameFromDisk) {
  const auto target = make_tiny_model({}), draft = make_tiny_model({});
  const std::vector<Request> requests{random_request(1, 200, 30), composed(ReuseMode::isolated),
                                      composed(ReuseMode::blend)};
  for (const Request& request : requests) {
    SCOPED_TRACE(to_string(request.reuse.mode));
    const kv::Scratch scratch;
    EngineOptions options = drafting(*draft, 4);
    options.kv_store_path = scratch.store();
    options.kv_store_bytes = std::int64_t{1} << 30;
    options.kv_store_fingerprint = kv::digest_of("a model");
    std::vector<Answer> wanted;
    {
      Engine engine(*target, options);
      wanted = {answer_one(engine, request)};
      expect_all_right(engine);
      engine.finish_saving(std::chrono::seconds(60));
    }
    options.max_batch_tokens = 16;  // more is missing than one step reads, also of a chunk
    Engine engine(*target, options);
    expect_same({answer_one(engine, request)}, wanted);
    EXPECT_GE(engine.stats().disk_hit_tokens, request.chunks.empty() ? 192 : 51);
    EXPECT_EQ(engine.stats().disk_hit_chunks, static_cast<int>(request.chunks.size()));
    expect_all_right(engine);
  }
}

TEST(DraftModel, TakesNothingOldForWhatCameFromDisk) {
  const auto target = make_tiny_model({}), draft = make_tiny_model({});
  const kv::Scratch scratch;
  EngineOptions options = drafting(*draft, 4);
  options.kv_store_path = scratch.store();
  options.kv_store_bytes = std::int64_t{1} << 30;
  options.kv_store_fingerprint = kv::digest_of("a model");
  options.kv_cache_bytes = 20 * 2 * kv::KvShape{target->default_kv_format(), 2, 2, 16}.block_bytes();
  Engine engine(*target, options);
  const std::vector<Request> requests{random_request(1, 200, 30), random_request(2, 210, 30)};
  std::vector<Answer> wanted;
  for (int round = 0; round < 3; ++round) {
    std::vector<Answer> answers;
    for (const Request& request : requests) {  // each puts the other one out
      answers.push_back(answer_one(engine, request));
      while (engine.has_saves()) engine.save_next();
    }
    if (round == 0) wanted = answers;
    expect_same(answers, wanted);
    expect_all_right(engine);
  }
  EXPECT_GE(engine.stats().disk_hit_tokens, 2 * 192);
}

TEST(DraftModel, ReadsAnswersThatNobodyGuessedFor) {
  const auto target = make_tiny_model({}), draft = make_tiny_model({});
  EngineOptions options = drafting(*draft, 4);
  options.max_batch_tokens = 32;  // more is missing than one step reads
  Engine engine(*target, options);
  Request silent = random_request(1, 90, 60);
  silent.speculative = false;
  const Answer answer = answer_one(engine, silent);
  EXPECT_EQ(engine.stats().drafts.model_tokens, 0);
  Request turn = silent;
  turn.speculative.reset();
  turn.prompt.insert(turn.prompt.end(), answer.tokens.begin(), answer.tokens.end());
  Engine plain(*target, {});
  expect_same({answer_one(engine, turn)}, {answer_one(plain, turn)});
  EXPECT_GE(engine.stats().prefix_hit_tokens, 128);
  expect_all_right(engine);
}

// ---- other models ----

TEST(DraftModel, NoneChangesAnAnswer) {
  const auto target = make_tiny_model({});
  const std::vector<Request> requests = many_requests();
  Engine plain(*target, {.max_num_seqs = 8});
  const std::vector<Answer> wanted = answer_all(plain, requests);
  for (const model::TinyModelOptions& other : {model::TinyModelOptions{.seed = 2},
                                               {.num_layers = 1},
                                               {.vocab_size = 300},
                                               {.vocab_size = 333},
                                               {.max_position_embeddings = 64},
                                               {.nan_token = 5}}) {
    const auto draft = make_tiny_model(other);
    for (const bool adaptive : {false, true}) {
      SCOPED_TRACE(
          concat(other.seed, " ", other.num_layers, " ", other.vocab_size, " ", other.nan_token, " ", adaptive));
      Engine engine(*target, drafting(*draft, 4, adaptive));
      expect_same(answer_all(engine, requests), wanted);
      EXPECT_TRUE(adaptive || engine.stats().drafts.drafted > 0);
    }
  }
}

TEST(DraftModel, RefusesWhatCannotBe) {
  const auto target = make_tiny_model({}), draft = make_tiny_model({});
  const auto message = [&](const EngineOptions& options) -> std::string {
    try {
      const Engine engine(*target, options);
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(message(drafting(*draft, 4)), "accepted");
  EXPECT_NE(message(drafting(*target, 4)).find("loaded beside the model"), std::string::npos);
  const auto other = make_tiny_model({.backend = "scalar"});
  EXPECT_NE(message(drafting(*other, 4)).find("runs on scalar, the model on reference"), std::string::npos);
  EngineOptions options = drafting(*draft, 4);
  options.speculative->draft_model = nullptr;
  EXPECT_NE(message(options).find("needs a draft_model"), std::string::npos);
  options = drafting(*draft, 4);
  options.speculative->method = SpeculativeMethod::suffix;
  EXPECT_NE(message(options).find("of the method draft alone"), std::string::npos);
}

}  // namespace
}  // namespace nb::engine
