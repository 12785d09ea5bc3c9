#include "sampling/params.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "base/error.h"

namespace nb::sampling {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(SamplingParams, AcceptsDefaultsAndBorders) {
  validate({}, 10);
  SamplingParams params;
  params.temperature = 0.0;
  params.top_k = 0;
  params.top_p = 1e-9;
  params.min_p = 1.0;
  params.repetition_penalty = 0.5;
  params.presence_penalty = 2.0;
  params.frequency_penalty = -2.0;
  params.logprobs = 20;
  params.bad_words_token_ids = {{9}, {0, 3, 3}};
  params.allowed_token_ids = {3, 9};
  params.logit_bias = {{0, -100.0}, {9, 100.0}};
  validate(params, 10);
}

TEST(SamplingParams, RefusesEachFieldByNameAndValue) {
  struct Case {
    const char* field;
    const char* value;
    void (*set)(SamplingParams&);
  };
  const Case cases[] = {
      {"temperature", "-1", [](SamplingParams& p) { p.temperature = -1; }},
      {"temperature", "nan", [](SamplingParams& p) { p.temperature = kNan; }},
      {"temperature", "inf", [](SamplingParams& p) { p.temperature = kInfinity; }},
      {"top_k", "-2", [](SamplingParams& p) { p.top_k = -2; }},
      {"top_p", "0", [](SamplingParams& p) { p.top_p = 0; }},
      {"top_p", "1.1", [](SamplingParams& p) { p.top_p = 1.1; }},
      {"top_p", "nan", [](SamplingParams& p) { p.top_p = kNan; }},
      {"min_p", "-0.1", [](SamplingParams& p) { p.min_p = -0.1; }},
      {"min_p", "1.5", [](SamplingParams& p) { p.min_p = 1.5; }},
      {"min_p", "nan", [](SamplingParams& p) { p.min_p = kNan; }},
      {"repetition_penalty", "0", [](SamplingParams& p) { p.repetition_penalty = 0; }},
      {"repetition_penalty", "nan", [](SamplingParams& p) { p.repetition_penalty = kNan; }},
      {"repetition_penalty", "inf", [](SamplingParams& p) { p.repetition_penalty = kInfinity; }},
      {"presence_penalty", "2.5", [](SamplingParams& p) { p.presence_penalty = 2.5; }},
      {"presence_penalty", "nan", [](SamplingParams& p) { p.presence_penalty = kNan; }},
      {"frequency_penalty", "-3", [](SamplingParams& p) { p.frequency_penalty = -3; }},
      {"frequency_penalty", "nan", [](SamplingParams& p) { p.frequency_penalty = kNan; }},
      {"min_tokens", "-1", [](SamplingParams& p) { p.min_tokens = -1; }},
      {"logprobs", "-1", [](SamplingParams& p) { p.logprobs = -1; }},
      {"logprobs", "21", [](SamplingParams& p) { p.logprobs = 21; }},
      {"bad_words_token_ids", "[1] is empty",
       [](SamplingParams& p) {
         p.bad_words_token_ids = {{1}, {}};
       }},
      {"bad_words_token_ids", "10",
       [](SamplingParams& p) {
         p.bad_words_token_ids = {{1, 10}};
       }},
      {"bad_words_token_ids", "-1", [](SamplingParams& p) { p.bad_words_token_ids = {{-1}}; }},
      {"allowed_token_ids", "empty", [](SamplingParams& p) { p.allowed_token_ids.emplace(); }},
      {"allowed_token_ids", "10",
       [](SamplingParams& p) {
         p.allowed_token_ids = {3, 10};
       }},
      {"bad_words_token_ids", "every token of allowed_token_ids",
       [](SamplingParams& p) {
         p.allowed_token_ids = {3, 4};
         p.bad_words_token_ids = {{4}, {1}, {3}};
       }},
      {"logit_bias", "10",
       [](SamplingParams& p) {
         p.logit_bias = {{10, 1.0}};
       }},
      {"logit_bias", "-1",
       [](SamplingParams& p) {
         p.logit_bias = {{-1, 1.0}};
       }},
      {"logit_bias", "nan",
       [](SamplingParams& p) {
         p.logit_bias = {{1, kNan}};
       }},
      {"logit_bias", "101",
       [](SamplingParams& p) {
         p.logit_bias = {{1, 101.0}};
       }},
  };
  for (const Case& test : cases) {
    SamplingParams params;
    test.set(params);
    try {
      validate(params, 10);
      ADD_FAILURE() << test.field << " = " << test.value << " was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      const std::string message = error.what();
      EXPECT_NE(message.find(test.field), std::string::npos) << message;
      EXPECT_NE(message.find(test.value), std::string::npos) << message;
    }
  }
}

TEST(SamplingParams, PlainGreedyMeansTheRawArgmax) {
  SamplingParams params;
  EXPECT_FALSE(is_plain_greedy(params, 0));
  params.temperature = 0.0;
  params.top_k = 5;  // changes nothing at temperature 0
  params.logprobs = 3;
  EXPECT_TRUE(is_plain_greedy(params, 0));
  void (*const changes[])(SamplingParams&) = {
      [](SamplingParams& p) { p.repetition_penalty = 1.1; }, [](SamplingParams& p) { p.presence_penalty = 0.1; },
      [](SamplingParams& p) { p.frequency_penalty = -0.1; }, [](SamplingParams& p) { p.bad_words_token_ids = {{1}}; },
      [](SamplingParams& p) { p.allowed_token_ids = {1}; },  [](SamplingParams& p) {
        p.logit_bias = {{1, 2.0}}; },
  };
  for (const auto change : changes) {
    SamplingParams changed = params;
    change(changed);
    EXPECT_FALSE(is_plain_greedy(changed, 5));
  }
  params.min_tokens = 3;
  EXPECT_FALSE(is_plain_greedy(params, 2));
  EXPECT_TRUE(is_plain_greedy(params, 3));
}

}  // namespace
}  // namespace nb::sampling
