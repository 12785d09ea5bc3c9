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
  EXPECT_FALSE(is_plain_greedy(params));
  params.temperature = 0.0;
  EXPECT_TRUE(is_plain_greedy(params));
  params.top_k = 5;  // changes nothing at temperature 0
  EXPECT_TRUE(is_plain_greedy(params));
  params.repetition_penalty = 1.1;
  EXPECT_FALSE(is_plain_greedy(params));
  params.repetition_penalty = 1.0;
  params.logit_bias = {{1, 2.0}};
  EXPECT_FALSE(is_plain_greedy(params));
}

}  // namespace
}  // namespace nb::sampling
