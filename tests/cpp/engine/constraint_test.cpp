// Answers under a constraint, by a rule that is a formula, so that the oracle can apply it without the engine's masks.
#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>

#include "base/error.h"
#include "engine/engine_fixture.h"

namespace nb::engine {
namespace {

using model::make_tiny_model;

constexpr TokenId kVocab = 320;
constexpr TokenId kEos = 11;
constexpr TokenId kStop = 300;

/// Behind `n` tokens, about a fifth of the vocabulary may come next.
bool allows(std::size_t n, TokenId token) { return (static_cast<std::size_t>(token) * 7 + n * 13) % 5 == 0; }
/// Behind every third token the answer may end.
bool may_end(std::size_t n) { return n % 3 == 2; }

/// The rule as a constraint, which also checks that it is called as promised.
class Formula : public TokenConstraint {
 public:
  struct Options {
    std::size_t complete_at = 1000;  ///< tokens behind which nothing may follow
    std::size_t throw_at = 1000;     ///< tokens behind which allow() throws
    std::size_t nothing_at = 1000;   ///< tokens behind which it allows nothing, not even the end
  };
  explicit Formula(Options options) : options_(options) {}

  bool allow(std::span<std::uint32_t> bits) override {
    EXPECT_EQ(bits.size(), kVocab / 32u);
    for (const std::uint32_t word : bits) EXPECT_EQ(word, 0u);
    if (tokens_.size() == options_.throw_at) throw std::runtime_error("the formula is out of paper");
    if (tokens_.size() == options_.nothing_at) return false;
    if (tokens_.size() >= options_.complete_at) return true;
    for (TokenId token = 0; token < kVocab; ++token) {
      if (allows(tokens_.size(), token)) bits[static_cast<std::size_t>(token) / 32] |= 1u << token % 32;
    }
    return may_end(tokens_.size());
  }

  bool accept(TokenId token) noexcept override {
    EXPECT_TRUE(allows(tokens_.size(), token)) << token;
    EXPECT_TRUE(token != kEos && token != kStop);
    tokens_.push_back(token);
    return tokens_.size() == options_.complete_at;
  }

 private:
  Options options_;
  std::vector<TokenId> tokens_;
};

void constrain(Request& request, Formula::Options options = {}) {
  request.stop_token_ids = {kStop};
  request.make_constraint = [options] { return std::make_unique<Formula>(options); };
}

/// The answer token by token, each from a request of its own with a list of allowed tokens.
Answer naive_answer(const model::Model& model, Request request, Formula::Options options = {}) {
  Engine engine(model, {.eos_ids = {kEos}, .enable_prefix_caching = false});
  Answer answer;
  const int max_tokens = request.max_tokens;
  const int min_tokens = request.sampling.min_tokens;
  request.make_constraint = nullptr;
  request.max_tokens = 1;
  while (answer.finish_reason == FinishReason::none) {
    const std::size_t n = answer.tokens.size();
    std::vector<TokenId> allowed;
    for (TokenId token = 0; token < kVocab; ++token) {
      const bool ends = token == kEos || token == kStop;
      if (ends ? may_end(n) : allows(n, token)) allowed.push_back(token);
    }
    request.sampling.allowed_token_ids = allowed;
    request.sampling.min_tokens = static_cast<int>(n) < min_tokens ? 1 : 0;
    const Answer one = answer_one(engine, request);
    EXPECT_NE(one.finish_reason, FinishReason::error) << one.error;
    if (one.finish_reason != FinishReason::length) {
      answer.finish_reason = one.finish_reason;
      break;
    }
    answer.tokens.push_back(one.tokens.front());
    request.prompt.push_back(one.tokens.front());
    if (answer.tokens.size() == options.complete_at) {
      answer.finish_reason = FinishReason::stop;
    } else if (static_cast<int>(answer.tokens.size()) == max_tokens) {
      answer.finish_reason = FinishReason::length;
    }
  }
  return answer;
}

/// Greedy and sampled, some with other masks and another token that ends them.
std::vector<Request> constrained_requests() {
  std::vector<Request> requests;
  const int lengths[] = {1, 17, 40, 64, 33, 5};
  for (unsigned i = 0; i < 6; ++i) {
    requests.push_back(random_request(200 + i, lengths[i], 10));
    requests.back().stop_token_ids = {kStop};
  }
  requests[1].sampling = {.temperature = 1.0, .seed = 3};
  requests[2].sampling = {.temperature = 1.5, .top_k = 40, .top_p = 0.9, .min_tokens = 7, .seed = 4};
  requests[3].sampling.logit_bias = {{kEos, 100.0}};  // ends as soon as it may
  requests[4].sampling = {.temperature = 1.0, .min_tokens = 4, .logit_bias = {{kStop, 100.0}}, .seed = 9};
  requests[5].sampling.bad_words_token_ids = {{5}, {10}, {15}};
  return requests;
}

TEST_P(EveryBackend, ConstrainedTokensAreThoseOfTheRuleAloneAndInABatch) {
  const auto model = make_tiny_model({.backend = GetParam(), .num_threads = 2});
  std::vector<Request> requests = constrained_requests();
  std::vector<Answer> expected;
  for (const Request& request : requests) expected.push_back(naive_answer(*model, request));
  EXPECT_EQ(expected[3].tokens.size(), 2u);
  EXPECT_EQ(expected[4].tokens.size(), 5u);
  EXPECT_EQ(expected[5].finish_reason, FinishReason::length);
  const std::size_t num_constrained = requests.size();
  for (Request& request : requests) constrain(request);
  for (unsigned i = 0; i < 3; ++i) requests.push_back(random_request(300 + i, 20, 8));  // and these are free
  Engine engine(*model, {.max_num_seqs = 9, .eos_ids = {kEos}});
  const std::vector<Answer> answers = answer_all(engine, requests);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    SCOPED_TRACE(i);
    Engine other(*model, {.eos_ids = {kEos}, .enable_prefix_caching = false});
    const Answer alone = answer_one(other, requests[i]);
    EXPECT_EQ(answers[i].tokens, alone.tokens);
    EXPECT_EQ(answers[i].finish_reason, alone.finish_reason);
    if (i >= num_constrained) continue;
    EXPECT_EQ(answers[i].tokens, expected[i].tokens);
    EXPECT_EQ(answers[i].finish_reason, expected[i].finish_reason);
  }
}

TEST_P(EveryBackend, ACompleteAnswerEndsAtOnceAndIsOneOfSeveral) {
  const auto model = make_tiny_model({.backend = GetParam(), .num_threads = 2});
  Request request = random_request(1, 20, 10);
  request.stop_token_ids = {kStop};
  request.sampling = {.temperature = 1.0, .min_tokens = 2, .seed = 3};
  const Formula::Options options{.complete_at = 4};
  std::vector<Answer> expected;
  for (std::uint32_t choice = 0; choice < 4; ++choice) {
    request.sampling.choice_index = choice;
    expected.push_back(naive_answer(*model, request, options));
  }
  request.sampling.choice_index = 0;
  request.n = 4;
  constrain(request, options);
  for (const int max_tokens : {4, 10}) {  // the last token may be the one that completes
    request.max_tokens = max_tokens;
    Engine engine(*model, {.eos_ids = {kEos}});
    engine.submit(request);
    std::vector<Answer> answers(4);
    while (engine.has_work()) {
      for (const StepOutput& output : engine.step()) {
        Answer& answer = answers[static_cast<std::size_t>(output.choice)];
        answer.tokens.insert(answer.tokens.end(), output.token_ids.begin(), output.token_ids.end());
        answer.finish_reason = output.finish_reason;
      }
    }
    for (std::size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(answers[i].tokens, expected[i].tokens) << i;
      EXPECT_EQ(answers[i].finish_reason, FinishReason::stop) << i;
    }
  }
}

TEST(Constraint, SurvivesPreemption) {
  const auto model = make_tiny_model();
  std::vector<Request> requests = constrained_requests();
  for (Request& request : requests) {
    request.max_tokens = 40;
    request.sampling.logit_bias.push_back({kEos, -100.0});
    request.sampling.logit_bias.push_back({kStop, -100.0});
    constrain(request);
  }
  Engine ample(*model, {.max_num_seqs = 8, .eos_ids = {kEos}, .enable_prefix_caching = false});
  const std::vector<Answer> wanted = answer_all(ample, requests);
  const std::int64_t block_bytes = ample.stats().kv_bytes / ample.stats().blocks_total;
  Engine tight(*model, {.max_num_seqs = 8, .kv_cache_bytes = block_bytes * 14, .eos_ids = {kEos}});
  const std::vector<Answer> answers = answer_all(tight, requests);
  for (std::size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(answers[i].tokens, wanted[i].tokens) << i;
  EXPECT_GT(tight.stats().preemptions, 0);
}

TEST(Constraint, AFailureEndsTheAnswerAndNoOther) {
  const auto model = make_tiny_model();
  std::vector<Request> requests(5, random_request(1, 20, 8));
  constrain(requests[0], {.throw_at = 2});
  constrain(requests[1], {.nothing_at = 3});
  constrain(requests[2]);
  requests[2].sampling.allowed_token_ids = {1};  // which the rule does not allow at first
  constrain(requests[3], {.complete_at = 3});
  requests[3].sampling.min_tokens = 5;
  Engine engine(*model, {.eos_ids = {kEos}});
  const std::vector<Answer> answers = answer_all(engine, requests);
  const char* messages[] = {"the formula is out of paper", "guided leaves no token to draw",
                            "guided and allowed_token_ids together leave no token to draw",
                            "guided and min_tokens together leave no token to draw"};
  const std::size_t lengths[] = {2, 3, 0, 3};
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(answers[i].finish_reason, FinishReason::error) << i;
    EXPECT_EQ(answers[i].error, messages[i]);
    EXPECT_EQ(answers[i].tokens.size(), lengths[i]) << i;
  }
  EXPECT_EQ(answers[4].finish_reason, FinishReason::length);
  EXPECT_EQ(answers[4].tokens, answer_one(engine, requests[4]).tokens);
}

TEST(Constraint, LogprobsAreThoseOfTheRawRow) {
  const auto model = make_tiny_model();
  Request request = random_request(1, 20, 3);
  request.sampling.logprobs = 1;
  Engine engine(*model, {.eos_ids = {kEos}});
  const Answer free = answer_one(engine, request);
  constrain(request);
  const Answer answer = answer_one(engine, request);
  ASSERT_NE(answer.tokens[0], free.tokens[0]);
  EXPECT_EQ(answer.logprobs[0].token, answer.tokens[0]);
  EXPECT_GT(answer.logprobs[0].rank, 1);
  EXPECT_EQ(answer.logprobs[1].token, free.tokens[0]);
  EXPECT_EQ(answer.logprobs[1].logprob, free.logprobs[1].logprob);
}

TEST(Constraint, IsRefusedWithIgnoreEos) {
  const auto model = make_tiny_model();
  Engine engine(*model, {.eos_ids = {kEos}});
  Request request = random_request(1, 20, 8);
  constrain(request);
  request.ignore_eos = true;
  try {
    engine.submit(request);
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    EXPECT_NE(std::string(error.what()).find("ignore_eos"), std::string::npos);
  }
}

}  // namespace
}  // namespace nb::engine
