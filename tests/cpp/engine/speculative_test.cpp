// Engines that speculate give the answers of those that do not, whoever guesses; and what is counted, learnt, refused.
#include "engine/speculative.h"

#include <gtest/gtest.h>

#include <bit>

#include "base/error.h"
#include "engine/clairvoyant.h"
#include "engine/engine_fixture.h"
#include "sampling/accept.h"

namespace nb::engine {
namespace {

using model::make_tiny_model;

constexpr TokenId kVocab = 320;

/// Requests for which every stage of drawing has something to do.
std::vector<Request> many_requests() {
  std::vector<Request> requests = mixed_requests();
  for (Request& request : requests) request.max_tokens = 40;
  requests.push_back(requests[0]);
  requests.back().sampling = {.temperature = 0.9, .presence_penalty = 0.8, .frequency_penalty = 0.5, .seed = 5};
  requests.back().sampling.logprobs = 3;
  requests.push_back(requests[2]);
  requests.back().sampling.logprobs = 0;
  requests.push_back(requests[4]);
  requests.back().sampling.min_tokens = 20;
  for (TokenId token = 0; token < kVocab; token += 5) requests.back().stop_token_ids.push_back(token);
  requests.push_back(requests.back());
  requests.back().sampling.min_tokens = 0;
  requests.back().sampling.temperature = 1.5;
  requests.back().sampling.seed = 11;
  requests.push_back(requests[7]);
  for (TokenId token = 0; token < kVocab; token += 3) requests.back().sampling.bad_words_token_ids.push_back({token});
  return requests;
}

EngineOptions options_with(const Foreseen& foreseen, double right, int num_draft_tokens) {
  EngineOptions options{.max_num_seqs = 8, .speculative = SpeculativeOptions{}};
  options.speculative->num_draft_tokens = num_draft_tokens;
  options.speculative->adaptive = false;
  options.speculative->make_proposer = [&foreseen, right] {
    return std::make_unique<Clairvoyant>(foreseen, 7u, right, kVocab);
  };
  return options;
}

void expect_same(const Answer& answer, const Answer& wanted) {
  EXPECT_EQ(answer.tokens, wanted.tokens);
  EXPECT_EQ(answer.finish_reason, wanted.finish_reason);
  EXPECT_EQ(answer.error, wanted.error);
  ASSERT_EQ(answer.logprobs.size(), wanted.logprobs.size());
  for (std::size_t i = 0; i < wanted.logprobs.size(); ++i) {
    EXPECT_EQ(answer.logprobs[i].token, wanted.logprobs[i].token);
    EXPECT_EQ(answer.logprobs[i].rank, wanted.logprobs[i].rank);
    EXPECT_EQ(std::bit_cast<std::uint32_t>(answer.logprobs[i].logprob),
              std::bit_cast<std::uint32_t>(wanted.logprobs[i].logprob));
  }
}

Foreseen foresee(const std::vector<Answer>& answers) {
  Foreseen foreseen;
  for (std::size_t i = 0; i < answers.size(); ++i) foreseen[{static_cast<RequestId>(i + 1), 0}] = answers[i].tokens;
  return foreseen;
}

TEST_P(EveryKvFormat, DraftsChangeNoBitOfAnAnswer) {
  const auto model = make_tiny_model({.backend = GetParam().backend, .num_threads = 2});
  const std::vector<Request> requests = many_requests();
  Engine plain(*model, {.kv_format = GetParam().format, .max_num_seqs = 8});
  const std::vector<Answer> wanted = answer_all(plain, requests);
  const Foreseen foreseen = foresee(wanted);
  for (const auto& [right, num_draft_tokens] : {std::pair{0.0, 4}, {0.7, 1}, {0.7, 19}, {1.0, 4}}) {
    SCOPED_TRACE(concat(num_draft_tokens, " drafts, right with ", right));
    EngineOptions options = options_with(foreseen, right, num_draft_tokens);
    options.kv_format = GetParam().format;
    Engine engine(*model, options);
    const std::vector<Answer> answers = answer_all(engine, requests);
    for (std::size_t i = 0; i < requests.size(); ++i) {
      SCOPED_TRACE(i);
      expect_same(answers[i], wanted[i]);
    }
    const DraftCounters drafts = engine.stats().drafts;
    EXPECT_GT(drafts.drafted, 0);
    const double share = static_cast<double>(drafts.accepted) / static_cast<double>(drafts.drafted);
    EXPECT_GE(share, right == 1.0 ? 0.75 : 0.0);  // guesses go past the end of an answer
    EXPECT_LE(share, right == 0.0 ? 0.05 : 1.0);
    EXPECT_TRUE(right < 1.0 || engine.stats().steps < plain.stats().steps);
  }
}

TEST(Speculative, ATextThatRepeatsItselfTakesFewerSteps) {
  const auto model = make_tiny_model({.num_threads = 1});
  Request request = random_request(3, 20, 200);
  request.sampling.allowed_token_ids = {5};
  Engine plain(*model, {});
  const Answer wanted = answer_one(plain, request);
  Engine engine(*model, {.speculative = SpeculativeOptions{.num_draft_tokens = 8, .adaptive = false}});
  expect_same(answer_one(engine, request), wanted);
  EXPECT_LT(engine.stats().steps * 2, plain.stats().steps);
  const DraftCounters drafts = engine.stats().drafts;
  EXPECT_EQ(drafts.steps + drafts.accepted, 199) << "the first token comes with the prompt";
  request.speculative = false;
  Engine without(*model, {.speculative = SpeculativeOptions{.num_draft_tokens = 8, .adaptive = false}});
  expect_same(answer_one(without, request), wanted);
  EXPECT_EQ(without.stats().drafts.drafted, 0);
  EXPECT_EQ(without.stats().steps, plain.stats().steps);
}

TEST(Speculative, OutputsSayWhatWasGuessed) {
  const auto model = make_tiny_model({.num_threads = 1});
  Request request = random_request(3, 20, 60);
  request.sampling.allowed_token_ids = {5};
  Engine engine(*model, {.speculative = SpeculativeOptions{.adaptive = false}});
  engine.submit(request);
  StepOutput last;
  std::size_t longest = 0;
  while (engine.has_work()) {
    for (StepOutput& output : engine.step()) {
      longest = std::max(longest, output.token_ids.size());
      last = std::move(output);
    }
  }
  EXPECT_EQ(longest, 5u) << "four drafts and a token";
  EXPECT_EQ(last.num_drafted, engine.stats().drafts.drafted);
  EXPECT_EQ(last.num_accepted, engine.stats().drafts.accepted);
  EXPECT_GT(last.num_accepted, 0);
}

TEST(Speculative, RefusesWhatCannotBe) {
  const auto model = make_tiny_model({.num_threads = 1});
  const auto message = [&](const EngineOptions& options, const Request& request) -> std::string {
    try {
      Engine(*model, options).submit(request);
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  };
  const Request plain = random_request(1, 5, 5);
  Request wants = plain;
  wants.speculative = true;
  EXPECT_NE(message({}, wants).find("speculative is true"), std::string::npos);
  EXPECT_EQ(message({.speculative = SpeculativeOptions{}}, wants), "accepted");
  wants.keeps_kv = false;
  EXPECT_NE(message({.speculative = SpeculativeOptions{}}, wants).find("kv_policy none"), std::string::npos);
  const auto with = [&](const SpeculativeOptions& options) { return message({.speculative = options}, plain); };
  EXPECT_NE(with({.num_draft_tokens = 0}).find("num_draft_tokens must be in [1, 64], got 0"), std::string::npos);
  EXPECT_NE(with({.num_draft_tokens = 65}).find("num_draft_tokens"), std::string::npos);
  EXPECT_NE(with({.prompt_lookup_min = 0}).find("prompt_lookup_min must be >= 1"), std::string::npos);
  EXPECT_NE(with({.prompt_lookup_min = 5}).find("prompt_lookup_max must be >= prompt_lookup_min (5), got 4"),
            std::string::npos);
}

// ---- what drafts are worth, in a Speculator by itself ----

/// Guesses 9, ..., 9 with the evidence that a test says.
struct Constant final : Proposer {
  int propose(const Sequence& /*sequence*/, std::unique_ptr<DraftState>& /*memory*/, int most,
              std::vector<TokenId>& drafts) override {
    drafts.assign(static_cast<std::size_t>(most), 9);
    return 1;
  }
};

/// One sequence of which the speculator is told that `right` of its drafts are right each time, and that a step takes
/// 10 ms and `each` for every draft.
class SpeculatorTest : public testing::Test {
 protected:
  int step(int right, double each) {
    sequence_.drafts.clear();
    const DraftCandidate candidate{.sequence = &sequence_, .most = 100};
    speculator_.propose(std::span(&candidate, 1), {.planned_rows = 1, .free_rows = 50});
    const int num_drafts = static_cast<int>(sequence_.drafts.size());
    StepPlan plan{.entries = {{.sequence = &sequence_, .first = 3, .count = 1 + num_drafts, .samples = true}},
                  .num_tokens = 1 + num_drafts,
                  .num_draws = 1 + num_drafts};
    plan.entries[0].num_drafts = num_drafts;
    std::vector<TokenId> drawn(static_cast<std::size_t>(1 + num_drafts), sampling::kNotDrawn);
    for (int i = 0; i <= std::min(right, num_drafts); ++i) drawn[static_cast<std::size_t>(i)] = i < right ? 9 : 8;
    speculator_.record(plan, drawn, 0.01 + each * num_drafts);
    return num_drafts;
  }

  Request request() {
    Request request = random_request(1, 4, 50);
    return request;
  }

  Sequence sequence_{1, request(), {}, 1000};
  Speculator speculator_{{.num_draft_tokens = 6, .make_proposer = [] { return std::make_unique<Constant>(); }}, kVocab};
};

TEST_F(SpeculatorTest, GivesUpGuessesThatAreWrongAndTriesThemSeldom) {
  for (int i = 0; i < 40; ++i) step(0, 0.002);
  int num_drafted = 0;
  for (int i = 0; i < 640; ++i) num_drafted += step(0, 0.002);
  EXPECT_GT(num_drafted, 0);
  EXPECT_LE(num_drafted, 10 * 6);
}

TEST_F(SpeculatorTest, NoticesThatGuessesHaveBecomeRightWithoutVerifyingThem) {
  for (int i = 0; i < 40; ++i) step(0, 0.0005);
  int num_steps = 0;
  while (num_steps < 100 && step(6, 0.0005) == 0) ++num_steps;
  EXPECT_LT(num_steps, 20);
}

TEST_F(SpeculatorTest, GivesUpGuessesThatCostMoreThanTheyYield) {
  for (int i = 0; i < 200; ++i) step(6, 0.02);
  int num_drafted = 0;
  for (int i = 0; i < 640; ++i) num_drafted += step(6, 0.02);
  EXPECT_LE(num_drafted, 10 * 6);
}

class SpeculatorCosts : public SpeculatorTest, public testing::WithParamInterface<double> {};

TEST_P(SpeculatorCosts, LittleTimeGoesIntoGuessesThatDoNotPay) {
  for (int i = 0; i < 300; ++i) step(0, GetParam());
  int num_drafted = 0;
  for (int i = 0; i < 20000; ++i) num_drafted += step(0, GetParam());
  EXPECT_GT(num_drafted, 0);
  EXPECT_LT(num_drafted * GetParam(), 0.012 * 20000 * 0.01);
}

INSTANTIATE_TEST_SUITE_P(Engine, SpeculatorCosts, testing::Values(0.001, 0.02, 0.1));

TEST_F(SpeculatorTest, CountsAndEstimatesWhatWasSaved) {
  for (int i = 0; i < 200; ++i) step(6, 0.0005);
  const DraftCounters counters = speculator_.counters();
  EXPECT_EQ(counters.steps, 200);
  EXPECT_GT(counters.drafts, 150);
  EXPECT_LT(counters.drafts, counters.steps) << "the first step has none";
  EXPECT_EQ(counters.accepted, counters.drafted);
  // Seven tokens in 13 ms, where they would have taken 70.
  EXPECT_NEAR(counters.saved_seconds / (static_cast<double>(counters.accepted) / 6), 0.057, 0.003);
}

}  // namespace
}  // namespace nb::engine
