#include "engine/request.h"

#include <span>

#include "base/error.h"

namespace nb::engine {

namespace {

void check_tokens(const char* what, std::span<const TokenId> tokens, int vocab_size) {
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    NB_CHECK(tokens[i] >= 0 && tokens[i] < vocab_size, invalid_argument, what, "[", i, "] is ", tokens[i],
             ", outside the vocabulary [0, ", vocab_size, ")");
  }
}

}  // namespace

void validate(const Request& request, int vocab_size, int max_model_len) {
  NB_CHECK(request.n >= 1 && request.n <= kMaxChoices, invalid_argument, "n must be in [1, ", kMaxChoices, "], got ",
           request.n);
  const bool scores = request.prompt_logprobs.has_value() || request.prompt_logits;
  NB_CHECK(!request.prompt.empty(), invalid_argument, "the prompt is empty");
  NB_CHECK(request.max_tokens >= 1 || (request.max_tokens == 0 && scores), invalid_argument,
           "max_tokens must be >= 1 (0 only with prompt_logprobs or prompt_logits), got ", request.max_tokens);
  const std::size_t longest = static_cast<std::size_t>(max_model_len) - (request.max_tokens > 0 ? 1 : 0);
  NB_CHECK(request.prompt.size() <= longest, invalid_argument, "the prompt has ", request.prompt.size(),
           " tokens; the context of ", max_model_len, " tokens has room for ", longest,
           request.max_tokens > 0 ? " and one generated token" : "");
  check_tokens("prompt token", request.prompt, vocab_size);
  check_tokens("stop_token_ids", request.stop_token_ids, vocab_size);
  sampling::validate(request.sampling, vocab_size);
  NB_CHECK(request.timeout_seconds >= 0.0, invalid_argument, "timeout_seconds must be > 0, or 0 for no limit, got ",
           request.timeout_seconds);
  NB_CHECK(request.sampling.min_tokens <= request.max_tokens, invalid_argument, "min_tokens (",
           request.sampling.min_tokens, ") must not exceed max_tokens (", request.max_tokens, ")");
  constexpr int kMost = sampling::kMaxLogprobs;
  const int wanted = request.prompt_logprobs.value_or(0);
  NB_CHECK(wanted >= 0 && wanted <= kMost, invalid_argument, "prompt_logprobs must be in [0, ", kMost, "], got ",
           wanted);
}

const char* to_string(FinishReason reason) {
  switch (reason) {
    case FinishReason::none:
      return "none";
    case FinishReason::stop:
      return "stop";
    case FinishReason::length:
      return "length";
    case FinishReason::abort:
      return "abort";
    case FinishReason::timeout:
      return "timeout";
    case FinishReason::error:
      return "error";
  }
  return "none";
}

}  // namespace nb::engine
