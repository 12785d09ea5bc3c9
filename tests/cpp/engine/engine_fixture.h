// Shared by the tests that run an engine over a tiny model.
//
// For tests only.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <optional>
#include <ostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/effort.h"
#include "engine/engine.h"
#include "model/tiny_model.h"
#include "ops/backends.h"
#include "quant/kv_format.h"

namespace nb::engine {

/// Everything an engine said about one request.
struct Answer {
  std::vector<TokenId> tokens;
  FinishReason finish_reason = FinishReason::none;
  std::string error;
  std::vector<sampling::TokenLogprob> logprobs;
  std::vector<sampling::TokenLogprob> prompt_logprobs;
  Buffer prompt_logits;
  RequestMetrics metrics;
};

using Answers = std::map<RequestId, Answer>;

/// Adds the outputs of one step.
inline void add(Answers& answers, std::vector<StepOutput> outputs) {
  for (StepOutput& output : outputs) {
    Answer& answer = answers[output.request_id];
    EXPECT_EQ(answer.finish_reason, FinishReason::none) << "request " << output.request_id << " spoke after its end";
    answer.tokens.insert(answer.tokens.end(), output.token_ids.begin(), output.token_ids.end());
    answer.logprobs.insert(answer.logprobs.end(), output.logprobs.begin(), output.logprobs.end());
    answer.finish_reason = output.finish_reason;
    answer.error = output.error;
    answer.prompt_logprobs = std::move(output.prompt_logprobs);
    answer.prompt_logits = output.prompt_logits;
    answer.metrics = output.metrics;
  }
}

/// Steps until nothing is left to do.
inline void drain(Engine& engine, Answers& answers) {
  for (int step = 0; engine.has_work(); ++step) {
    ASSERT_LT(step, 100'000);
    add(answers, engine.step());
    engine.check_invariants();
  }
}

/// Submits all requests at once and returns the answers in their order.
inline std::vector<Answer> answer_all(Engine& engine, const std::vector<Request>& requests) {
  std::vector<RequestId> ids;
  for (const Request& request : requests) ids.push_back(engine.submit(request));
  Answers answers;
  drain(engine, answers);
  std::vector<Answer> result;
  for (const RequestId id : ids) result.push_back(std::move(answers[id]));
  return result;
}

inline Answer answer_one(Engine& engine, const Request& request) { return answer_all(engine, {request}).front(); }

inline Request random_request(unsigned seed, int num_prompt, int max_tokens, int vocab_size = 320) {
  std::mt19937 random(seed);
  Request request;
  for (int i = 0; i < num_prompt; ++i) {
    request.prompt.push_back(std::uniform_int_distribution<TokenId>(0, vocab_size - 1)(random));
  }
  request.sampling.temperature = 0.0;
  request.max_tokens = max_tokens;
  return request;
}

/// Greedy, penalised and sampled requests with prompts up to 300 tokens.
inline std::vector<Request> mixed_requests() {
  std::vector<Request> requests;
  const int lengths[] = {1, 15, 16, 17, 40, 130, 300, 64};
  for (unsigned i = 0; i < 8; ++i) requests.push_back(random_request(100 + i, lengths[i], 12));
  requests[1].sampling.temperature = 1.0;
  requests[1].sampling.seed = 7;
  requests[3].sampling.repetition_penalty = 1.5;
  requests[5].sampling = {.temperature = 0.8, .top_k = 50, .top_p = 0.95, .min_p = 0.01, .seed = 8};
  requests[6].sampling.logit_bias = {{3, 4.0}, {5, -100.0}};
  return requests;
}

class EveryBackend : public testing::TestWithParam<std::string> {};

inline std::string backend_test_name(const testing::TestParamInfo<std::string>& info) { return info.param; }

/// All backends of this machine; where tests are reduced, the two with the widest vectors, for whose kernels an engine
/// makes the same steps as for the others.
inline std::vector<std::string> engine_backends() {
  std::vector<std::string> names = ops::available_backends();
  if (is_reduced() && names.size() > 2) names.erase(names.begin(), names.end() - 2);
  return names;
}

/// A backend and a format of keys and values; none: the backend's default.
struct KvCase {
  std::string backend;
  std::optional<quant::KvFormat> format;
};

/// How gtest prints it.
inline void PrintTo(const KvCase& kv_case, std::ostream* out) {
  *out << kv_case.backend;
  if (kv_case.format) *out << "_" << quant::to_string(*kv_case.format);
}

class EveryKvFormat : public testing::TestWithParam<KvCase> {};

/// Every one of these backends with its default and with the formats that are nobody's default.
inline std::vector<KvCase> kv_cases() {
  std::vector<KvCase> cases;
  for (const std::string& backend : engine_backends()) {
    cases.push_back({backend, std::nullopt});
    for (const quant::KvFormat format :
         {quant::KvFormat::f16, quant::KvFormat::int8, quant::KvFormat::mixed, quant::KvFormat::int4}) {
      if ((ops::find_backend(backend).kernels->kv_formats & ops::kv_bit(format)) != 0) {
        cases.push_back({backend, format});
      }
    }
  }
  return cases;
}

inline std::string kv_case_name(const testing::TestParamInfo<KvCase>& info) {
  return testing::PrintToString(info.param);
}

}  // namespace nb::engine
