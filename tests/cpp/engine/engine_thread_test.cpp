#include "engine/engine_thread.h"

#include <atomic>
#include <limits>
#include <numeric>
#include <thread>

#include "base/code_of.h"
#include "engine/engine_fixture.h"
#include "kv/disk_scratch.h"

namespace nb::engine {

using model::make_tiny_model;
using namespace std::chrono_literals;

namespace {

constexpr Outbox::Seconds kForEver{std::numeric_limits<double>::infinity()};

// Reads an outbox until all its answers have ended.
Answers read_all(Outbox& outbox) {
  Answers answers;
  while (outbox.num_unfinished() > 0) add(answers, outbox.wait(kForEver));
  add(answers, outbox.poll());
  return answers;
}

Answer answer_of(EngineThread& engine, const Request& request) {
  const auto outbox = std::make_shared<Outbox>();
  const RequestId id = engine.submit(request, outbox);
  return read_all(*outbox)[id];
}

// Has the thread wait at its first token until it is let go.
class Gate : public TokenMonitor {
 public:
  explicit Gate(std::atomic<int>& state) : state_(state) {}
  bool ends_with(TokenId) noexcept override {
    if (state_.load() == 0) {
      state_.store(1);
      state_.notify_all();
      state_.wait(1);
    }
    return false;
  }

 private:
  std::atomic<int>& state_;  // 0: not reached, 1: waits, 2: open
};

Request gated(std::atomic<int>& state, int max_tokens = 20) {
  Request request = random_request(90, 4, max_tokens);
  request.make_monitor = [&state] { return std::make_unique<Gate>(state); };
  return request;
}

void wait_until_reached(std::atomic<int>& state) { state.wait(0); }

void open(std::atomic<int>& state) {
  state.store(2);
  state.notify_all();
}

// Tokens of each request alone, by an engine without a thread.
std::vector<std::vector<TokenId>> expected_tokens(const model::Model& model, const std::vector<Request>& requests) {
  std::vector<std::vector<TokenId>> expected;
  Engine engine(model, {});
  for (const Request& request : requests) expected.push_back(answer_one(engine, request).tokens);
  return expected;
}

}  // namespace

TEST(EngineThread, ManyThreadsGetTheTokensOfEachRequestAlone) {
  const auto model = make_tiny_model({.num_threads = 2});
  const auto requests = mixed_requests();
  const auto expected = expected_tokens(*model, requests);
  EngineThread engine(*model, {.max_num_seqs = 3, .max_batch_tokens = 16});
  std::vector<std::thread> users;
  for (std::size_t user = 0; user < 6; ++user) {
    users.emplace_back([&, user] {
      for (std::size_t i = 0; i < requests.size(); ++i) {
        const std::size_t which = (user + i) % requests.size();
        const Answer answer = answer_of(engine, requests[which]);
        EXPECT_EQ(answer.tokens, expected[which]);
        EXPECT_EQ(answer.finish_reason, FinishReason::length);
        if (i % 3 == 0) engine.stats();
      }
    });
  }
  for (std::thread& user : users) user.join();
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.running + stats.waiting + stats.blocks_owned, 0);
}

TEST(EngineThread, OneOutboxOfManyRequestsGetsEveryTokenOnceAndInOrder) {
  const auto model = make_tiny_model({.num_threads = 2});
  auto requests = mixed_requests();
  const auto expected = expected_tokens(*model, requests);
  for (const auto wake : {Outbox::Wake::each_step, Outbox::Wake::ends}) {
    EngineThread engine(*model, {.max_num_seqs = 4});
    const auto outbox = std::make_shared<Outbox>(wake);
    std::vector<RequestId> ids;
    for (const Request& request : requests) ids.push_back(engine.submit(request, outbox));
    EXPECT_TRUE(std::is_sorted(ids.begin(), ids.end()));
    Answers answers = read_all(*outbox);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      EXPECT_EQ(answers[ids[i]].tokens, expected[i]);
      EXPECT_EQ(answers[ids[i]].finish_reason, FinishReason::length);
    }
  }
}

TEST(EngineThread, OutputsNobodyReadBecomeOne) {
  const auto model = make_tiny_model();
  EngineThread engine(*model, {});
  Request request = random_request(3, 5, 40);
  request.sampling.logprobs = 1;
  request.n = 2;
  const auto expected = expected_tokens(*model, {random_request(3, 5, 40)});
  const auto outbox = std::make_shared<Outbox>();
  engine.submit(request, outbox);
  EXPECT_TRUE(outbox->wait_for_ends(kForEver));
  const auto outputs = outbox->poll();
  ASSERT_EQ(outputs.size(), 2u);  // one for each answer
  for (const StepOutput& output : outputs) {
    EXPECT_EQ(output.token_ids, expected[0]);
    EXPECT_EQ(output.logprobs.size(), 2 * expected[0].size());
    EXPECT_EQ(output.finish_reason, FinishReason::length);
  }
  EXPECT_EQ(outbox->num_unfinished(), 0);
}

TEST(EngineThread, WhatIsHeldEntersOneStepTogether) {
  const auto model = make_tiny_model();
  EngineThread engine(*model, {.max_num_seqs = 8});
  const auto outbox = std::make_shared<Outbox>();
  engine.hold();
  engine.hold();
  for (unsigned i = 0; i < 4; ++i) engine.submit(random_request(i, 5, 10), outbox);
  engine.release();
  EXPECT_FALSE(outbox->wait_for_ends(20ms));
  EXPECT_EQ(engine.stats().steps, 0);
  EXPECT_EQ(engine.stats().waiting, 4);
  engine.release();
  EXPECT_EQ(read_all(*outbox).size(), 4u);
  EXPECT_EQ(engine.stats().steps, 10);
  engine.hold();
  engine.submit(random_request(5, 5, 10), outbox);
  engine.cancel_all(*outbox);  // ends what is held too
  EXPECT_TRUE(outbox->wait_for_ends(kForEver));
  engine.release();
}

// Says of every thread that asks it for a mask whether the engine knows it as its own.
class Witness : public TokenConstraint {
 public:
  Witness(const EngineThread& engine, std::atomic<int>& own, std::atomic<int>& foreign)
      : engine_(engine), own_(own), foreign_(foreign) {}
  bool allow(std::span<std::uint32_t> bits) override {
    ++(engine_.is_this_thread() ? own_ : foreign_);
    std::fill(bits.begin(), bits.end(), ~0u);
    return false;
  }
  bool accept(TokenId) noexcept override { return false; }

 private:
  const EngineThread& engine_;
  std::atomic<int>& own_;
  std::atomic<int>& foreign_;
};

TEST(EngineThread, TheTeamCountsAsItsThread) {
  const auto model = make_tiny_model({.num_threads = 3});
  EngineThread engine(*model, {});
  std::atomic<int> own{0};
  std::atomic<int> foreign{0};
  Request request = random_request(1, 5, 6);
  request.make_constraint = [&] { return std::make_unique<Witness>(engine, own, foreign); };
  const auto outbox = std::make_shared<Outbox>();
  engine.hold();
  for (int i = 0; i < 6; ++i) engine.submit(request, outbox);  // rows for every member
  engine.release();
  read_all(*outbox);
  EXPECT_EQ(own, 36);
  EXPECT_EQ(foreign, 0);
  EXPECT_FALSE(engine.is_this_thread());
}

TEST(EngineThread, SubmitRefusesAtOnceAndLeavesNothingBehind) {
  const auto model = make_tiny_model();
  EngineThread engine(*model, {.max_num_seqs = 1, .max_waiting = 1});
  const auto outbox = std::make_shared<Outbox>();
  EXPECT_EQ(code_of([&] { engine.submit(random_request(1, 0, 5), outbox); }), ErrorCode::invalid_argument);
  std::atomic<int> gate{0};
  engine.submit(gated(gate), outbox);
  engine.submit(random_request(1, 5, 5), outbox);
  EXPECT_EQ(code_of([&] { engine.submit(random_request(1, 5, 5), outbox); }), ErrorCode::overloaded);
  wait_until_reached(gate);
  EXPECT_EQ(code_of([&] { engine.submit(random_request(1, 5, 5), outbox); }), ErrorCode::overloaded);
  EXPECT_EQ(outbox->num_unfinished(), 2);
  open(gate);
  EXPECT_EQ(read_all(*outbox).size(), 2u);
  engine.submit(random_request(1, 5, 5), outbox);
  EXPECT_EQ(read_all(*outbox).size(), 1u);
}

TEST(EngineThread, TheWholePoolBeingTooSmallIsSaidBySubmit) {
  const auto model = make_tiny_model();
  Engine probe(*model, {.max_model_len = 16, .max_num_seqs = 1});
  EngineThread engine(*model, {.max_num_seqs = 1, .kv_cache_bytes = 2 * probe.stats().kv_bytes});
  const auto outbox = std::make_shared<Outbox>();
  EXPECT_EQ(code_of([&] { engine.submit(random_request(1, 30, 30), outbox); }), ErrorCode::invalid_argument);
  EXPECT_EQ(outbox->num_unfinished(), 0);
}

TEST(EngineThread, CancelEndsOneRequestOrAllOfAnOutbox) {
  const auto model = make_tiny_model();
  EngineThread engine(*model, {.max_num_seqs = 3});
  std::atomic<int> gate{0};
  const auto mine = std::make_shared<Outbox>();
  const auto others = std::make_shared<Outbox>();
  const RequestId first = engine.submit(gated(gate), mine);
  const RequestId second = engine.submit(random_request(2, 5, 100), mine);
  const RequestId waiting = engine.submit(random_request(3, 5, 100), mine);
  const RequestId other = engine.submit(random_request(4, 5, 8), others);
  wait_until_reached(gate);
  engine.cancel(second);
  engine.cancel(12345);
  open(gate);
  Answers answers;
  while (answers[second].finish_reason == FinishReason::none) add(answers, mine->wait(kForEver));
  EXPECT_EQ(answers[second].finish_reason, FinishReason::abort);
  EXPECT_LT(answers[second].tokens.size(), 100u);
  engine.cancel_all(*mine);
  EXPECT_TRUE(mine->wait_for_ends(kForEver));
  add(answers, mine->poll());
  EXPECT_EQ(answers[waiting].finish_reason, FinishReason::abort);
  EXPECT_NE(answers[first].finish_reason, FinishReason::none);
  EXPECT_EQ(read_all(*others)[other].finish_reason, FinishReason::length);
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.running + stats.waiting + stats.blocks_owned, 0);
  engine.cancel(first);  // long gone
  EXPECT_EQ(answer_of(engine, random_request(2, 5, 8)).finish_reason, FinishReason::length);
}

TEST(EngineThread, AFailedStepEndsItsRequestsWithTheReason) {
  const auto model = make_tiny_model({.nan_token = 7});
  EngineThread engine(*model, {});
  Request bad = random_request(1, 6, 6);
  bad.prompt.back() = 7;
  bad.sampling.temperature = 1.0;
  const Answer answer = answer_of(engine, bad);
  EXPECT_EQ(answer.finish_reason, FinishReason::abort);
  EXPECT_NE(answer.error, "");
  const auto expected = expected_tokens(*model, {random_request(2, 6, 6)});
  EXPECT_EQ(answer_of(engine, random_request(2, 6, 6)).tokens, expected[0]);
}

TEST(EngineThread, CallsRunBetweenStepsAndPassTheirErrorsOn) {
  const auto model = make_tiny_model({});
  EngineThread engine(*model, {});
  std::vector<std::thread> callers;
  std::atomic<int> calls = 0;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int j = 0; j < 50; ++j) {
        engine.call([&](Engine& inner) {
          EXPECT_TRUE(engine.is_this_thread());
          EXPECT_TRUE(inner.chunks().chunks().empty());
          ++calls;
        });
      }
    });
  }
  for (unsigned i = 0; i < 5; ++i) answer_of(engine, random_request(i, 10, 5));
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(calls, 200);
  EXPECT_EQ(code_of([&] { engine.call([](Engine&) { throw Error(ErrorCode::unsupported, "no"); }); }),
            ErrorCode::unsupported);
  engine.call([&](Engine&) { engine.call([&](Engine&) { ++calls; }); });  // by the thread itself
  EXPECT_EQ(calls, 201);
  engine.close();
  EXPECT_EQ(code_of([&] { engine.call([](Engine&) {}); }), ErrorCode::invalid_argument);
}

TEST(EngineThread, DrainingFinishesWhatIsThereAndTakesNoMore) {
  const auto model = make_tiny_model();
  EngineThread engine(*model, {});
  const auto outbox = std::make_shared<Outbox>();
  std::atomic<int> gate{0};
  engine.submit(gated(gate, 30), outbox);
  wait_until_reached(gate);
  EXPECT_FALSE(engine.drain(1ms));
  EXPECT_EQ(code_of([&] { engine.submit(random_request(1, 5, 5), outbox); }), ErrorCode::overloaded);
  open(gate);
  EXPECT_TRUE(engine.drain(kForEver));
  const auto outputs = outbox->poll();
  EXPECT_EQ(outputs.back().finish_reason, FinishReason::length);
}

TEST(EngineThread, ClosingEndsWhatIsThereAndMayBeRepeated) {
  const auto model = make_tiny_model();
  const auto outbox = std::make_shared<Outbox>();
  std::atomic<int> gate{0};
  {
    EngineThread engine(*model, {.max_num_seqs = 1});
    engine.submit(gated(gate, 100), outbox);
    engine.submit(random_request(1, 5, 5), outbox);
    wait_until_reached(gate);
    std::thread closes([&] { engine.close(); });
    std::this_thread::sleep_for(5ms);
    open(gate);
    closes.join();
    engine.close();
    EXPECT_EQ(code_of([&] { engine.submit(random_request(1, 5, 5), outbox); }), ErrorCode::invalid_argument);
  }
  const Answers answers = read_all(*outbox);
  ASSERT_EQ(answers.size(), 2u);
  for (const auto& [id, answer] : answers) EXPECT_EQ(answer.finish_reason, FinishReason::abort);
  EXPECT_EQ(outbox->num_unfinished(), 0);
}

TEST(EngineThread, ATimeoutEndsARequestWithWhatItHas) {
  const auto model = make_tiny_model();
  EngineThread engine(*model, {.max_num_seqs = 1});
  std::atomic<int> gate{0};
  const auto outbox = std::make_shared<Outbox>();
  Request slow = gated(gate, 100);
  slow.timeout_seconds = 0.05;
  const RequestId first = engine.submit(slow, outbox);
  Request waiting = random_request(2, 5, 5);
  waiting.timeout_seconds = 1e-9;
  waiting.prompt_logprobs = 0;
  const RequestId second = engine.submit(waiting, outbox);
  Request patient = random_request(3, 5, 5);
  patient.timeout_seconds = std::numeric_limits<double>::infinity();
  const RequestId third = engine.submit(patient, outbox);
  wait_until_reached(gate);
  std::this_thread::sleep_for(60ms);
  open(gate);
  Answers answers = read_all(*outbox);
  EXPECT_EQ(answers[first].finish_reason, FinishReason::timeout);
  EXPECT_EQ(answers[first].tokens.size(), 1u);
  EXPECT_EQ(answers[second].finish_reason, FinishReason::timeout);
  EXPECT_TRUE(answers[second].tokens.empty());
  EXPECT_TRUE(answers[second].prompt_logprobs.empty());
  EXPECT_EQ(answers[third].finish_reason, FinishReason::length);
  for (const double bad : {-1.0, std::numeric_limits<double>::quiet_NaN()}) {
    slow.timeout_seconds = bad;
    EXPECT_EQ(code_of([&] { engine.submit(slow, outbox); }), ErrorCode::invalid_argument);
  }
}

TEST(EngineThread, LoadsFromTheStoreWhileOthersRunOrAreCancelled) {
  const kv::Scratch scratch;
  const auto model = make_tiny_model({.num_threads = 2});
  const EngineOptions options{
      .max_num_seqs = 4, .kv_store_path = scratch.store(), .kv_store_bytes = std::int64_t{1} << 30};
  std::vector<Request> requests;
  for (unsigned i = 0; i < 6; ++i) requests.push_back(random_request(60 + i, 280 + static_cast<int>(i) * 20, 6));
  std::vector<std::vector<TokenId>> expected;
  {
    Engine first(*model, options);
    for (const Answer& answer : answer_all(first, requests)) expected.push_back(answer.tokens);
  }
  std::int64_t hits = 0;
  for (int round = 0; round < 4; ++round) {
    EngineThread engine(*model, options);
    std::vector<std::shared_ptr<Outbox>> outboxes;
    for (std::size_t i = 0; i < requests.size(); ++i) {
      outboxes.push_back(std::make_shared<Outbox>());
      const RequestId id = engine.submit(requests[i], outboxes.back());
      if ((static_cast<int>(i) + round) % 3 == 0) engine.cancel(id);
    }
    if (round == 3) engine.close();  // with loads under way, or before any
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const Answers answers = read_all(*outboxes[i]);
      ASSERT_EQ(answers.size(), 1u);
      const Answer& answer = answers.begin()->second;
      EXPECT_TRUE(answer.tokens == expected[i] || answer.finish_reason == FinishReason::abort) << "request " << i;
    }
    EXPECT_TRUE(engine.drain(kForEver));
    const auto& misses = engine.stats().disk.misses;
    EXPECT_EQ(std::accumulate(misses.begin(), misses.end(), std::int64_t{0}), 0) << "what is stopped is no miss";
    hits += engine.stats().disk_hit_tokens;
  }
  EXPECT_GT(hits, 2000);
}

}  // namespace nb::engine
