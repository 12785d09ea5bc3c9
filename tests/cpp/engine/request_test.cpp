#include "engine/request.h"

#include <gtest/gtest.h>

#include <string>

#include "base/error.h"
#include "engine/fake_requests.h"

namespace nb::engine {
namespace {

constexpr int kVocab = 50;
constexpr int kContext = 20;

void expect_refused(const Request& request, const std::string& part, ErrorCode code = ErrorCode::invalid_argument) {
  try {
    validate(request, kVocab, kContext);
    ADD_FAILURE() << "accepted; expected '" << part << "'";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code);
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(Request, AcceptsBorders) {
  validate(make_request(1, 1), kVocab, kContext);
  validate(make_request(19, 1'000'000), kVocab, kContext);
  Request scoring = make_request(20, 0);
  scoring.prompt_logprobs = 0;
  validate(scoring, kVocab, kContext);
  scoring.prompt_logprobs = {};
  scoring.prompt_logits = true;
  validate(scoring, kVocab, kContext);
}

TEST(Request, RefusesByNameAndValue) {
  expect_refused(make_request(0, 1), "prompt is empty");
  expect_refused(make_request(20, 1), "20 tokens");
  expect_refused(make_request(1, 0), "max_tokens");
  expect_refused(make_request(1, -3), "-3");
  Request scoring = make_request(21, 0);
  scoring.prompt_logits = true;
  expect_refused(scoring, "21 tokens");
  Request bad = make_request(5, 1);
  bad.prompt[3] = kVocab;
  expect_refused(bad, "prompt token[3] is 50");
  bad.prompt[3] = -1;
  expect_refused(bad, "prompt token[3] is -1");
  bad = make_request(5, 1);
  bad.stop_token_ids = {1, 99};
  expect_refused(bad, "stop_token_ids[1] is 99");
  bad = make_request(5, 1);
  bad.sampling.top_p = 0.0;
  expect_refused(bad, "top_p");
  bad = make_request(5, 3);
  bad.sampling.min_tokens = 4;
  expect_refused(bad, "min_tokens (4) must not exceed max_tokens (3)");
  bad = make_request(5, 1);
  bad.prompt_logprobs = 21;
  expect_refused(bad, "prompt_logprobs must be in [0, 20], got 21");
  bad.prompt_logprobs = -1;
  expect_refused(bad, "prompt_logprobs must be in [0, 20], got -1");
}

TEST(Request, RefusesPoliciesByNameAndValue) {
  Request request = make_request(5, 1);
  request.key_policy = {.rule = ops::KeyRule::window, .prefix = 4, .window = 1};
  validate(request, kVocab, kContext);
  request.key_policy.window = 0;
  expect_refused(request, "window is 0");
  request.key_policy = {.rule = ops::KeyRule::summary, .window = 8, .period = 24};
  expect_refused(request, "multiples of 16 tokens, got 24");
  request.key_policy.period = 32;
  validate(request, kVocab, kContext);
  request.keeps_kv = false;
  expect_refused(request, "keeps no KV");
  request.key_policy = {};
  validate(request, kVocab, kContext);
  request.n = 2;
  expect_refused(request, "one answer to a prompt, n is 2", ErrorCode::unsupported);
  request = make_request(5, 1);
  request.key_policy = {.rule = ops::KeyRule::window, .window = 4};
  request.chunks = {{.begin = 1, .count = 2}};
  validate(request, kVocab, kContext);  // in the mode `exact` chunks are plain tokens
  request.reuse.mode = ReuseMode::isolated;
  expect_refused(request, "chunks in mode isolated", ErrorCode::unsupported);
}

// A chunk at the beginning whose anchor stands before it: queries are rotated to their distance from the anchor.
TEST(Request, AnAnchorBeforeThePromptTakesRoomAtTheEnd) {
  const auto composed = [](int num_prompt, ReuseMode mode) {
    Request request = make_request(num_prompt, 4);
    request.chunks = {{.begin = 1, .count = 5, .anchor = {1, 2, 3, 4}}, {.begin = 7, .count = 2, .anchor = {1, 2}}};
    request.reuse.mode = mode;
    return request;
  };
  EXPECT_EQ(rotation_room(composed(16, ReuseMode::isolated)), 3);
  validate(composed(16, ReuseMode::isolated), kVocab, kContext);
  expect_refused(composed(17, ReuseMode::isolated), "the context of 20 tokens has room for 16 and one generated token");
  expect_refused(composed(17, ReuseMode::blend), "room for 16");
  // Where nothing is composed, nothing is rotated so far.
  validate(composed(19, ReuseMode::exact), kVocab, kContext);
  Request all = composed(19, ReuseMode::blend);
  all.reuse.ratio = 1.0;
  validate(all, kVocab, kContext);
  expect_refused(composed(20, ReuseMode::exact), "room for 19");
  Request reaching = composed(9, ReuseMode::isolated);
  reaching.chunks = {{.begin = 0, .count = 0, .anchor = std::vector<TokenId>(19, 1)}};
  reaching.chunks[0].count = 1;
  expect_refused(reaching, "room for 0 and one");
}

TEST(Request, AnObserverNeedsTheWholePromptComputed) {
  Request request = make_request(16, 0);
  request.observer.see = [](int, std::span<const float>) {};
  validate(request, kVocab, kContext);
  request.chunks = {{.begin = 1, .count = 5, .anchor = {}}};
  validate(request, kVocab, kContext);
  request.reuse.mode = ReuseMode::isolated;
  expect_refused(request, "an observer of logits needs the whole prompt computed");
}

TEST(Request, NamesFinishReasons) {
  EXPECT_STREQ(to_string(FinishReason::stop), "stop");
  EXPECT_STREQ(to_string(FinishReason::length), "length");
  EXPECT_STREQ(to_string(FinishReason::abort), "abort");
  EXPECT_STREQ(to_string(FinishReason::error), "error");
}

}  // namespace
}  // namespace nb::engine
