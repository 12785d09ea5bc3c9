#include "engine/engine.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <random>

#include "base/code_of.h"
#include "base/error.h"
#include "engine/engine_fixture.h"

namespace nb::engine {
namespace {

using model::make_tiny_model;

TEST_P(EveryKvFormat, TokensAreTheSameAloneInABatchAndSliced) {
  for (const quant::Format format : {quant::Format::q4_1, quant::Format::bf16}) {
    const auto model = make_tiny_model({.backend = GetParam().backend, .format = format, .num_threads = 2});
    std::vector<Request> requests = mixed_requests();
    std::vector<int> slices = {7};
    if (format == quant::Format::q4_1) slices = {1, 7, 64, 100};
    if (GetParam().backend == "reference") {  // slow on purpose
      requests.resize(5);
      slices = {7};
    }
    Engine together(*model, {.kv_format = GetParam().format, .max_num_seqs = 8});
    const std::vector<Answer> expected = answer_all(together, requests);
    for (const Answer& answer : expected) ASSERT_EQ(answer.tokens.size(), 12u);
    EXPECT_NE(expected[0].tokens, expected[2].tokens);
    for (std::size_t i = 0; i < requests.size(); ++i) {
      Engine alone(*model, {.kv_format = GetParam().format, .enable_prefix_caching = false});
      EXPECT_EQ(answer_one(alone, requests[i]).tokens, expected[i].tokens) << "request " << i;
    }
    for (const int slice : slices) {
      Engine sliced(*model, {.kv_format = GetParam().format, .max_num_seqs = 3, .max_batch_tokens = slice});
      const std::vector<Answer> answers = answer_all(sliced, requests);
      for (std::size_t i = 0; i < requests.size(); ++i) {
        EXPECT_EQ(answers[i].tokens, expected[i].tokens) << "request " << i << ", slice " << slice;
      }
    }
  }
}

TEST_P(EveryKvFormat, TokensAreTheSameWithAHitAMissAndPreemption) {
  const auto model = make_tiny_model({.backend = GetParam().backend, .num_threads = 2});
  std::vector<Request> requests = mixed_requests();
  if (GetParam().backend == "reference") requests.resize(5);  // slow on purpose
  const std::vector<TokenId> shared = random_request(5, 50, 1).prompt;
  for (std::size_t i = 0; i < requests.size(); i += 2) {
    requests[i].prompt.insert(requests[i].prompt.begin(), shared.begin(), shared.end());
  }
  Engine plain(*model, {.kv_format = GetParam().format, .max_num_seqs = 8, .enable_prefix_caching = false});
  const std::vector<Answer> expected = answer_all(plain, requests);
  EXPECT_EQ(plain.stats().prefix_hit_tokens, 0);
  EXPECT_EQ(plain.stats().blocks_cached, 0);

  Engine caching(*model, {.kv_format = GetParam().format, .max_num_seqs = 8, .max_batch_tokens = 64});
  for (const char* round : {"miss", "hit"}) {
    const std::vector<Answer> answers = answer_all(caching, requests);
    for (std::size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(answers[i].tokens, expected[i].tokens) << round << i;
  }
  EXPECT_GT(caching.stats().prefix_hit_tokens, 48 * 2);

  int needed = 0;
  for (const Request& request : requests) {
    needed += kv::BlockTable::blocks_for(static_cast<int>(request.prompt.size()) + request.max_tokens);
  }
  const std::int64_t block_bytes = plain.stats().kv_bytes / plain.stats().blocks_total;
  for (const bool cached : {false, true}) {
    std::vector<Request> longer = requests;
    for (Request& request : longer) request.max_tokens = 40;
    Engine ample(*model, {.kv_format = GetParam().format, .max_num_seqs = 8, .enable_prefix_caching = false});
    Engine tight(*model, {.kv_format = GetParam().format,
                          .max_num_seqs = 8,
                          .kv_cache_bytes = block_bytes * (needed * 2 / 5 + 8),
                          .enable_prefix_caching = cached});
    const std::vector<Answer> wanted = answer_all(ample, longer);
    const std::vector<Answer> answers = answer_all(tight, longer);
    for (std::size_t i = 0; i < longer.size(); ++i) EXPECT_EQ(answers[i].tokens, wanted[i].tokens) << i;
    EXPECT_GT(tight.stats().preemptions, 0) << cached;
  }
}

TEST_P(EveryKvFormat, SeveralAnswersAreThoseOfSeveralRequests) {
  const auto model = make_tiny_model({.backend = GetParam().backend, .num_threads = 2});
  for (const int num_prompt : {1, 16, 17, 40}) {
    Request request = random_request(static_cast<unsigned>(num_prompt), num_prompt, 10);
    request.sampling = {.temperature = 1.0, .seed = 3};
    Engine plain(*model, {.kv_format = GetParam().format, .enable_prefix_caching = false});
    std::vector<std::vector<TokenId>> expected;
    for (std::uint32_t choice = 0; choice < 4; ++choice) {
      request.sampling.choice_index = choice;
      expected.push_back(answer_one(plain, request).tokens);
    }
    EXPECT_NE(expected[0], expected[1]);
    request.sampling.choice_index = 0;
    request.n = 4;
    for (const int max_num_seqs : {1, 2, 8}) {
      for (const bool cached : {false, true}) {
        SCOPED_TRACE(concat("prompt of ", num_prompt, ", ", max_num_seqs, " at a time, cached ", cached));
        Engine engine(*model, {.kv_format = GetParam().format,
                               .max_num_seqs = max_num_seqs,
                               .max_batch_tokens = 12,
                               .enable_prefix_caching = cached});
        engine.submit(request);
        std::vector<std::vector<TokenId>> answers(4);
        while (engine.has_work()) {
          for (const StepOutput& output : engine.step()) {
            auto& tokens = answers[static_cast<std::size_t>(output.choice)];
            tokens.insert(tokens.end(), output.token_ids.begin(), output.token_ids.end());
          }
        }
        EXPECT_EQ(answers, expected);
        if (max_num_seqs == 8) {
          // Where keys are sealed, the tokens of the last group are computed again instead of being copied.
          const bool seals = GetParam().format && quant::seals_keys(*GetParam().format);
          const int again = 1 + (seals ? (num_prompt - 1) % kBlockTokens : 0);
          EXPECT_EQ(engine.stats().forked_tokens, 3 * (num_prompt - again));
          EXPECT_EQ(engine.stats().prompt_tokens, num_prompt + 3 * again);
        }
      }
    }
  }
}

// Reading shared blocks once is invisible but for the counter: with a shared system prompt, forks and another length.
TEST_P(EveryKvFormat, ReadingSharedBlocksOnceChangesNoBit) {
  const auto model = make_tiny_model({.backend = GetParam().backend, .num_threads = 2});
  const bool slow = GetParam().backend == "reference";
  const std::vector<TokenId> system = random_request(5, slow ? 90 : 333, 1).prompt;
  std::vector<Request> requests;
  for (unsigned i = 0; i < (slow ? 3u : 7u); ++i) {
    Request request = random_request(20 + i, static_cast<int>(3 + 20 * i), 12);
    request.prompt.insert(request.prompt.begin(), system.begin(), system.end());
    request.sampling.logprobs = 2;
    if (i % 3 == 1) request.sampling.temperature = 1.0, request.sampling.seed = i;
    requests.push_back(request);
  }
  requests.push_back(random_request(40, 30, 12));  // shares nothing
  const auto run = [&](const EngineOptions& options, std::int64_t& saved) {
    Engine engine(*model, options);
    std::vector<Answer> answers = answer_all(engine, requests);
    saved = engine.stats().cascade_saved_tokens;
    return answers;
  };
  std::int64_t saved_on = 0, saved_off = 0, saved_without_cache = 0;
  const auto on = run({.kv_format = GetParam().format, .max_num_seqs = 8, .max_batch_tokens = 100}, saved_on);
  const auto off =
      run({.kv_format = GetParam().format, .max_num_seqs = 8, .max_batch_tokens = 100, .cascade = false}, saved_off);
  const auto alone =
      run({.kv_format = GetParam().format, .max_num_seqs = 8, .enable_prefix_caching = false}, saved_without_cache);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    for (const auto* other : {&off[i], &alone[i]}) {
      EXPECT_EQ(on[i].tokens, other->tokens) << i;
      ASSERT_EQ(on[i].logprobs.size(), other->logprobs.size()) << i;
      for (std::size_t j = 0; j < on[i].logprobs.size(); ++j) {
        EXPECT_EQ(on[i].logprobs[j].token, other->logprobs[j].token);
        EXPECT_EQ(on[i].logprobs[j].logprob, other->logprobs[j].logprob) << i << ", " << j;
      }
    }
  }
  // All but the first of those with the prefix read its full blocks again, in at least 8 of the 11 steps that decode.
  const auto again = static_cast<std::int64_t>(requests.size() - 2);
  EXPECT_GE(saved_on, 8 * again * static_cast<std::int64_t>(system.size() / kBlockTokens * kBlockTokens));
  EXPECT_EQ(saved_off, 0);
  EXPECT_EQ(saved_without_cache, 0);
}

// Nor does reading the chunks that several sequences have, behind beginnings of different lengths.
TEST_P(EveryKvFormat, ReadingSharedChunksOnceChangesNoBit) {
  const auto model = make_tiny_model({.backend = GetParam().backend, .num_threads = 2});
  const bool slow = GetParam().backend == "reference";
  const std::vector<TokenId> document = random_request(5, slow ? 70 : 200, 1).prompt;
  std::vector<Request> requests;
  for (unsigned i = 0; i < 4; ++i) {
    Request request = random_request(20 + i, static_cast<int>(3 + 5 * i), 12);
    for (int copy = 0; copy < 2; ++copy) {
      request.chunks.push_back(
          {.begin = static_cast<int>(request.prompt.size()), .count = static_cast<int>(document.size()) - copy});
      request.prompt.insert(request.prompt.end(), document.begin(), document.end() - copy);
    }
    request.prompt.push_back(static_cast<TokenId>(i));
    request.reuse.mode = i == 3 ? ReuseMode::blend : ReuseMode::isolated;
    request.sampling.logprobs = 2;
    requests.push_back(request);
  }
  const auto run = [&](bool cascade, std::int64_t& saved) {
    Engine engine(*model, {.kv_format = GetParam().format, .max_num_seqs = 4, .cascade = cascade});
    std::vector<Answer> answers = answer_all(engine, requests);
    saved = engine.stats().cascade_saved_tokens;
    return answers;
  };
  std::int64_t saved_on = 0, saved_off = 0;
  const auto on = run(true, saved_on), off = run(false, saved_off);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(on[i].tokens, off[i].tokens) << i;
    ASSERT_EQ(on[i].logprobs.size(), off[i].logprobs.size()) << i;
    for (std::size_t j = 0; j < on[i].logprobs.size(); ++j) {
      EXPECT_EQ(on[i].logprobs[j].logprob, off[i].logprobs[j].logprob) << i << ", " << j;
    }
  }
  // Three of four read both chunks again in most of the 11 steps that decode.
  EXPECT_GE(saved_on, static_cast<std::int64_t>(6 * 3 * 2 * (document.size() - 1)));
  EXPECT_EQ(saved_off, 0);
}

TEST(Engine, AnswersToOnePromptReadItOnce) {
  const auto model = make_tiny_model({.num_threads = 2});
  Request request = random_request(3, 150, 9);
  request.n = 3;
  const auto saved = [&](bool cascade) {
    Engine engine(*model, {.max_num_seqs = 4, .enable_prefix_caching = false, .cascade = cascade});
    engine.submit(request);
    while (engine.has_work()) engine.step();
    return engine.stats().cascade_saved_tokens;
  };
  // 144 tokens are in full blocks that the forks share. The first answer is a step ahead: all three take part in 8
  // steps, in the first of which the forks compute the last prompt token again, and the forks alone in one more.
  EXPECT_EQ(saved(true), 2 * 144 * 8 + 144);
  EXPECT_EQ(saved(false), 0);
}

TEST(Engine, APrefixThatManyWaitForIsComputedOnce) {
  const auto model = make_tiny_model();
  Engine engine(*model, {.max_num_seqs = 8, .max_batch_tokens = 32});
  const std::vector<TokenId> shared = random_request(1, 96, 1).prompt;
  std::vector<Request> requests;
  for (unsigned i = 0; i < 6; ++i) {
    Request request = random_request(10 + i, 10, 5);
    request.prompt.insert(request.prompt.begin(), shared.begin(), shared.end());
    requests.push_back(request);
  }
  const std::vector<Answer> answers = answer_all(engine, requests);
  EXPECT_EQ(engine.stats().prompt_tokens, 96 + 6 * 10);
  EXPECT_EQ(engine.stats().prefix_hit_tokens, 5 * 96);
  Engine plain(*model, {.enable_prefix_caching = false});
  for (std::size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(answers[i].tokens, answer_one(plain, requests[i]).tokens) << i;
  }
}

TEST(Engine, AWhollyCachedPromptIsComputedButForItsLastToken) {
  const auto model = make_tiny_model();
  for (const int length : {15, 16, 17, 32, 64}) {
    Engine engine(*model, {});
    const Request request = random_request(9, length, 4);
    const Answer first = answer_one(engine, request);
    const std::int64_t computed = engine.stats().prompt_tokens;
    EXPECT_EQ(answer_one(engine, request).tokens, first.tokens);
    EXPECT_EQ(engine.stats().prompt_tokens - computed, length - (length - 1) / 16 * 16) << length;
    Request salted = request;
    salted.cache_salt = "mine";
    EXPECT_EQ(answer_one(engine, salted).tokens, first.tokens);
    EXPECT_EQ(engine.stats().prefix_hit_tokens, (length - 1) / 16 * 16) << "another namespace must not hit";
    Request scored = request;
    scored.prompt_logprobs = 0;
    EXPECT_EQ(answer_one(engine, scored).prompt_logprobs.size(), static_cast<std::size_t>(length) - 1);
    EXPECT_EQ(engine.stats().prefix_hit_tokens, (length - 1) / 16 * 16) << "scores need every position";
  }
}

TEST(Engine, AConversationReusesItsAnswers) {
  const auto model = make_tiny_model();
  Engine engine(*model, {});
  Engine plain(*model, {.enable_prefix_caching = false});
  Request request = random_request(3, 40, 30);
  for (int turn = 0; turn < 4; ++turn) {
    const std::int64_t computed = engine.stats().prompt_tokens;
    const Answer answer = answer_one(engine, request);
    EXPECT_EQ(answer.tokens, answer_one(plain, request).tokens);
    if (turn > 0) {
      EXPECT_LE(engine.stats().prompt_tokens - computed, 20 + 16);
    }
    request.prompt.insert(request.prompt.end(), answer.tokens.begin(), answer.tokens.end());
    const auto more = random_request(50 + static_cast<unsigned>(turn), 20, 1).prompt;
    request.prompt.insert(request.prompt.end(), more.begin(), more.end());
  }
}

// Slots, positions and blocks are right if reading the whole text at once predicts what was generated step by step.
TEST_P(EveryKvFormat, ScoringTheAnswerPredictsTheAnswer) {
  const auto model = make_tiny_model({.backend = GetParam().backend, .format = quant::Format::q8_0, .num_threads = 2});
  Engine engine(*model, {.kv_format = GetParam().format, .max_batch_tokens = 33});
  const Request request = random_request(5, 70, 30);
  const Answer answer = answer_one(engine, request);
  ASSERT_EQ(answer.tokens.size(), 30u);
  Request score = request;
  score.prompt.insert(score.prompt.end(), answer.tokens.begin(), answer.tokens.end());
  score.max_tokens = 0;
  score.prompt_logits = true;
  const Answer scored = answer_one(engine, score);
  EXPECT_EQ(scored.finish_reason, FinishReason::length);
  EXPECT_TRUE(scored.tokens.empty());
  ASSERT_EQ(scored.prompt_logits.bytes(), 100u * 320u * sizeof(float));
  for (std::size_t i = 0; i < 30; ++i) {
    const float* row = scored.prompt_logits.as<float>() + (69 + i) * 320;
    EXPECT_EQ(std::max_element(row, row + 320) - row, answer.tokens[i]) << "token " << i;
  }
}

// Token 7 turns every logit after it into NaN, so that nothing can be drawn.
TEST_P(EveryKvFormat, AFailedStepAbortsWhatRanAndNothingElse) {
  const auto model = make_tiny_model({.backend = GetParam().backend, .nan_token = 7});
  Engine engine(*model, {.kv_format = GetParam().format, .max_num_seqs = 2});
  Request good = random_request(1, 20, 6, 7);  // tokens below 7
  const std::vector<TokenId> expected = answer_one(engine, good).tokens;
  Request bad = random_request(2, 31, 6, 7);
  bad.prompt.back() = 7;  // its keys and values are NaN, where `good` has masked positions
  bad.sampling.temperature = 1.0;
  const RequestId companion = engine.submit(good);
  const RequestId failing = engine.submit(bad);
  const RequestId waiting = engine.submit(good);
  EXPECT_EQ(code_of([&] { engine.step(); }), ErrorCode::internal);
  engine.check_invariants();
  Answers answers;
  add(answers, engine.step());
  EXPECT_EQ(answers[failing].finish_reason, FinishReason::abort);
  EXPECT_EQ(answers[companion].finish_reason, FinishReason::abort);
  EXPECT_TRUE(answers[companion].tokens.empty());
  drain(engine, answers);
  EXPECT_EQ(answers[waiting].finish_reason, FinishReason::length);
  EXPECT_EQ(answers[waiting].tokens, expected);  // the blocks that held NaN have been cleared
  EXPECT_EQ(engine.stats().blocks_owned, 0);
}

INSTANTIATE_TEST_SUITE_P(Engine, EveryBackend, testing::ValuesIn(engine_backends()), backend_test_name);
INSTANTIATE_TEST_SUITE_P(Engine, EveryKvFormat, testing::ValuesIn(kv_cases()), kv_case_name);

// What the kernels cannot read is refused before anything is allocated, by the names of both.
TEST(Engine, AKvFormatThatTheBackendLacksIsRefused) {
  const auto model = make_tiny_model({.backend = "scalar"});
  ops::KernelTable plain = *model->backend().kernels;
  plain.kv_formats = ops::kPlainKvFormats;
  ops::Backend backend = model->backend();
  backend.kernels = &plain;
  const model::TinyModelOptions options{.backend = "scalar"};
  auto pool = std::make_unique<ThreadPool>(1);
  model::ModelConfig config = model::tiny_config(options);
  model::ModelWeights weights = model::TinyWeights(options, backend, *pool).build(config);
  const model::Model poor(std::move(config), std::move(weights), backend, std::move(pool));
  EXPECT_NO_THROW(Engine(poor, {.kv_format = quant::KvFormat::bf16}));
  for (const quant::KvFormat format : {quant::KvFormat::f16, quant::KvFormat::int8, quant::KvFormat::mixed}) {
    EXPECT_NO_THROW(Engine(*model, {.kv_format = format}));
    try {
      Engine(poor, {.kv_format = format});
      ADD_FAILURE() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::unsupported);
      EXPECT_EQ(std::string(error.what()), concat("KV format ", quant::to_string(format),
                                                  " is not offered by backend scalar, which has: f32, bf16"));
    }
  }
}

TEST(Engine, CancellationGivesBlocksBackWithinOneStep) {
  const auto model = make_tiny_model();
  Engine engine(*model, {.max_num_seqs = 2, .max_batch_tokens = 128});
  const RequestId running = engine.submit(random_request(1, 100, 50));
  engine.submit(random_request(2, 10, 5));
  const RequestId waiting = engine.submit(random_request(3, 10, 5));
  engine.step();
  EXPECT_EQ(engine.stats().blocks_owned, 7 + 1);
  EXPECT_EQ(engine.stats().waiting, 1);
  engine.cancel(running);
  engine.cancel(waiting);
  engine.cancel(12345);
  Answers answers;
  add(answers, engine.step());
  EXPECT_EQ(answers[running].finish_reason, FinishReason::abort);
  EXPECT_EQ(answers[waiting].finish_reason, FinishReason::abort);
  EXPECT_TRUE(answers[waiting].tokens.empty());
  EXPECT_EQ(engine.stats().blocks_owned, 1);
  engine.cancel(running);  // already gone
  drain(engine, answers);
  EXPECT_EQ(engine.stats().blocks_owned, 0);
  EXPECT_EQ(answers.size(), 3u);
}

TEST(Engine, CancellingTheOnlyRequestStillReportsIt) {
  const auto model = make_tiny_model();
  Engine engine(*model, {});
  const RequestId id = engine.submit(random_request(1, 10, 5));
  engine.cancel(id);
  EXPECT_TRUE(engine.has_work());
  const auto outputs = engine.step();
  ASSERT_EQ(outputs.size(), 1u);
  EXPECT_EQ(outputs[0].finish_reason, FinishReason::abort);
  EXPECT_FALSE(engine.has_work());
  EXPECT_EQ(engine.stats().steps, 0);
}

TEST(Engine, StopsAtEndOfSequenceAndStopTokens) {
  const auto model = make_tiny_model();
  const Request request = random_request(9, 20, 12);
  Engine plain(*model, {});
  const std::vector<TokenId> all = answer_one(plain, request).tokens;
  std::size_t at = 3;  // a token that has not occurred before
  while (std::find(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(at), all[at]) !=
         all.begin() + static_cast<std::ptrdiff_t>(at)) {
    ASSERT_LT(++at, all.size());
  }
  const std::vector<TokenId> before(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(at));

  Engine with_eos(*model, {.eos_ids = {all[at]}});
  Answer answer = answer_one(with_eos, request);
  EXPECT_EQ(answer.tokens, before);
  EXPECT_EQ(answer.finish_reason, FinishReason::stop);
  Request ignoring = request;
  ignoring.ignore_eos = true;
  answer = answer_one(with_eos, ignoring);
  EXPECT_EQ(answer.tokens, all);
  EXPECT_EQ(answer.finish_reason, FinishReason::length);
  ignoring.stop_token_ids = {all[at]};
  EXPECT_EQ(answer_one(with_eos, ignoring).tokens, before);
}

TEST(Engine, TheContextLimitsOutput) {
  const auto model = make_tiny_model();
  Engine engine(*model, {.max_model_len = 20});
  const Answer answer = answer_one(engine, random_request(1, 17, 100));
  EXPECT_EQ(answer.tokens.size(), 3u);
  EXPECT_EQ(answer.finish_reason, FinishReason::length);
}

TEST(Engine, APoolOfExactlyOneSequenceServesManyInTurn) {
  const auto model = make_tiny_model();
  Engine probe(*model, {});
  const std::int64_t block_bytes = probe.stats().kv_bytes / probe.stats().blocks_total;
  Engine engine(*model, {.kv_cache_bytes = 3 * block_bytes});
  EXPECT_EQ(engine.stats().blocks_total, 3);
  for (const Answer& answer : answer_all(engine, std::vector<Request>(4, random_request(1, 40, 8)))) {
    EXPECT_EQ(answer.tokens.size(), 8u);
  }
  EXPECT_EQ(code_of([&] { engine.submit(random_request(1, 40, 9)); }), ErrorCode::invalid_argument);
  EXPECT_EQ(code_of([&] { Engine none(*model, {.kv_cache_bytes = 1}); }), ErrorCode::invalid_argument);
}

TEST(Engine, SeedsDecideSampledText) {
  const auto model = make_tiny_model();
  Engine engine(*model, {});
  Request request = random_request(1, 10, 20);
  request.sampling.temperature = 1.0;
  request.sampling.seed = 1;
  const auto first = answer_one(engine, request).tokens;
  EXPECT_EQ(answer_one(engine, request).tokens, first);
  request.sampling.choice_index = 1;
  EXPECT_NE(answer_one(engine, request).tokens, first);
  request.sampling.choice_index = 0;
  request.sampling.seed.reset();
  EXPECT_NE(answer_one(engine, request).tokens, answer_one(engine, request).tokens);
  request.sampling.top_k = 1;
  Request greedy = request;
  greedy.sampling.temperature = 0.0;
  EXPECT_EQ(answer_one(engine, request).tokens, answer_one(engine, greedy).tokens);
}

TEST(Engine, RefusesBadInputAndStaysAsItWas) {
  const auto model = make_tiny_model();
  Engine engine(*model, {.max_model_len = 64, .max_num_seqs = 1, .max_waiting = 1});
  EXPECT_EQ(code_of([&] { engine.submit(random_request(1, 0, 5)); }), ErrorCode::invalid_argument);
  EXPECT_EQ(code_of([&] { engine.submit(random_request(1, 64, 5)); }), ErrorCode::invalid_argument);
  EXPECT_EQ(code_of([&] { engine.submit(random_request(1, 5, 0)); }), ErrorCode::invalid_argument);
  Request bad = random_request(1, 5, 5);
  bad.prompt[2] = 320;
  EXPECT_EQ(code_of([&] { engine.submit(bad); }), ErrorCode::invalid_argument);
  EXPECT_FALSE(engine.has_work());
  EXPECT_EQ(engine.submit(random_request(1, 5, 5)), 1u);
  EXPECT_EQ(engine.submit(random_request(1, 5, 5)), 2u);
  EXPECT_EQ(code_of([&] { engine.submit(random_request(1, 5, 5)); }), ErrorCode::overloaded);
  Answers answers;
  drain(engine, answers);
  EXPECT_EQ(answers.size(), 2u);
}

TEST(Engine, RefusesImpossibleOptions) {
  const auto model = make_tiny_model({.max_position_embeddings = 100});
  const auto refuse = [&](const EngineOptions& options) {
    EXPECT_EQ(code_of([&] { Engine engine(*model, options); }), ErrorCode::invalid_argument);
  };
  refuse({.max_model_len = 101});
  refuse({.max_model_len = -1});
  refuse({.max_num_seqs = 0});
  refuse({.max_batch_tokens = 0});
  refuse({.max_waiting = -1});
  refuse({.kv_cache_bytes = -1});
  refuse({.eos_ids = {320}});
  Engine engine(*model, {});
  EXPECT_EQ(engine.options().max_model_len, 100);
  EXPECT_EQ(engine.options().kv_format, quant::KvFormat::f32);
}

TEST(Engine, AWarmEngineAsksForNoMoreMemory) {
  const auto model = make_tiny_model({.backend = "scalar", .format = quant::Format::q4_1, .num_threads = 2});
  Engine engine(*model, {.max_num_seqs = 4});
  std::vector<Request> requests = mixed_requests();
  answer_all(engine, requests);
  const auto growths = engine.stats().workspace_growths;
  EXPECT_GT(growths, 0);
  answer_all(engine, requests);
  EXPECT_EQ(engine.stats().workspace_growths, growths);
}

TEST(Engine, ARequestWhoseMasksLeaveNothingEndsAlone) {
  const auto model = make_tiny_model({.num_threads = 2});
  Engine engine(*model, {});
  Request good = random_request(1, 10, 8);
  const auto expected = answer_one(engine, good).tokens;
  Request bad = random_request(2, 5, 8);
  bad.sampling.allowed_token_ids = {4};
  bad.sampling.bad_words_token_ids = {{4, 4, 4}};  // after two of them nothing is left
  bad.sampling.logprobs = 0;
  const auto answers = answer_all(engine, {good, bad, good});
  EXPECT_EQ(answers[0].tokens, expected);
  EXPECT_EQ(answers[0].error, "");
  EXPECT_EQ(answers[2].tokens, expected);
  EXPECT_EQ(answers[1].tokens, (std::vector<TokenId>{4, 4}));
  EXPECT_EQ(answers[1].logprobs.size(), 2u);
  EXPECT_EQ(answers[1].finish_reason, FinishReason::error);
  EXPECT_NE(answers[1].error.find("bad_words_token_ids and allowed_token_ids"), std::string::npos) << answers[1].error;
}

TEST(Engine, LogprobsComeWithTheirTokensAndChangeNone) {
  const auto model = make_tiny_model({.num_threads = 2});
  Engine engine(*model, {.max_batch_tokens = 8});
  std::vector<Request> requests = mixed_requests();
  const auto plain = answer_all(engine, requests);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].sampling.logprobs = static_cast<int>(i % 4);
    requests[i].prompt_logprobs = 2;
  }
  const auto answers = answer_all(engine, requests);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    SCOPED_TRACE(i);
    EXPECT_EQ(answers[i].tokens, plain[i].tokens);
    const std::size_t stride = 1 + i % 4;
    ASSERT_EQ(answers[i].logprobs.size(), answers[i].tokens.size() * stride);
    for (std::size_t t = 0; t < answers[i].tokens.size(); ++t) {
      EXPECT_EQ(answers[i].logprobs[t * stride].token, answers[i].tokens[t]);
    }
    ASSERT_EQ(answers[i].prompt_logprobs.size(), (requests[i].prompt.size() - 1) * 3);
    for (std::size_t t = 0; t + 1 < requests[i].prompt.size(); ++t) {
      EXPECT_EQ(answers[i].prompt_logprobs[t * 3].token, requests[i].prompt[t + 1]);
    }
  }
}

TEST(Engine, MinTokensHoldsTheStopTokensBack) {
  const auto model = make_tiny_model();
  Request request = random_request(1, 6, 12);
  Engine free(*model, {});
  const auto tokens = answer_one(free, request).tokens;
  Engine engine(*model, {.eos_ids = {tokens[2]}});
  EXPECT_LE(answer_one(engine, request).tokens.size(), 2u);
  request.sampling.min_tokens = 7;
  const Answer answer = answer_one(engine, request);
  EXPECT_GE(answer.tokens.size(), 7u);
  EXPECT_EQ(std::count(answer.tokens.begin(), answer.tokens.end(), tokens[2]), 0);
}

TEST(Engine, CountsAndTimes) {
  const auto model = make_tiny_model();
  Engine engine(*model, {.max_batch_tokens = 8});
  Request request = random_request(1, 20, 6);
  request.prompt_logprobs = 0;
  const Answer answer = answer_one(engine, request);
  EXPECT_EQ(answer.prompt_logprobs.size(), 19u);
  EXPECT_LE(answer.metrics.queue_ms, answer.metrics.ttft_ms);
  EXPECT_LT(answer.metrics.ttft_ms, answer.metrics.total_ms);
  EXPECT_GE(answer.metrics.queue_ms, 0.0);
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.steps, 3 + 5);
  EXPECT_EQ(stats.prompt_tokens, 20);
  EXPECT_EQ(stats.generated_tokens, 6);
  EXPECT_EQ(stats.blocks_free + stats.blocks_cached, stats.blocks_total);
  EXPECT_EQ(stats.blocks_cached, 1);  // of 25 stored tokens
  EXPECT_EQ(stats.running + stats.waiting, 0);
  EXPECT_GT(stats.kv_bytes, 0);
  EXPECT_GT(stats.workspace_bytes, 0);
  EXPECT_GT(stats.forward_seconds, 0.0);
  EXPECT_GT(stats.sample_seconds, 0.0);
  EXPECT_GT(stats.plan_seconds, 0.0);
  EXPECT_GT(answer.metrics.tokens_per_s, 0.0);
  EXPECT_GT(stats.tokens_per_s, 0.0);
  EXPECT_LT(stats.tokens_per_s, answer.metrics.tokens_per_s);  // the prompt took time too
  EXPECT_EQ(stats.recent_tokens_per_s, stats.tokens_per_s);    // few steps
  EXPECT_EQ(stats.recent_read_gb_per_s, stats.read_gb_per_s);
  EXPECT_DOUBLE_EQ(stats.read_gb_per_s, static_cast<double>(stats.read_bytes) / 1e9 / stats.forward_seconds);
}

}  // namespace
}  // namespace nb::engine
