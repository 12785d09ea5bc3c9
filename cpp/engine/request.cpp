#include "engine/request.h"

#include <algorithm>
#include <span>

#include "base/error.h"
#include "ops/check_plan.h"

namespace nb::engine {

namespace {

void check_tokens(const char* what, std::span<const TokenId> tokens, int vocab_size) {
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    NB_CHECK(tokens[i] >= 0 && tokens[i] < vocab_size, invalid_argument, what, "[", i, "] is ", tokens[i],
             ", outside the vocabulary [0, ", vocab_size, ")");
  }
}

/// Parts of the prompt, in order; and what cannot be had together with them.
void check_chunks(const Request& request, int vocab_size, int max_model_len) {
  int end = 0;
  for (std::size_t i = 0; i < request.chunks.size(); ++i) {
    const ChunkSpan& chunk = request.chunks[i];
    NB_CHECK(
        chunk.count >= 1 && chunk.begin >= end && chunk.count <= static_cast<int>(request.prompt.size()) - chunk.begin,
        invalid_argument, "chunks[", i, "] has ", chunk.count, " tokens from ", chunk.begin,
        " on; chunks must have tokens, ascend and lie within the prompt of ", request.prompt.size(), " tokens");
    check_tokens("chunk anchor", chunk.anchor, vocab_size);
    NB_CHECK(static_cast<int>(chunk.anchor.size()) + chunk.count <= max_model_len, invalid_argument, "chunks[", i,
             "] has ", chunk.count, " tokens behind an anchor of ", chunk.anchor.size(), "; the context has ",
             max_model_len);
    end = chunk.begin + chunk.count;
  }
  const Reuse& reuse = request.reuse;
  NB_CHECK(reuse.ratio > 0.0 && reuse.ratio <= 1.0, invalid_argument, "the blend ratio must be in (0, 1], got ",
           reuse.ratio);
  NB_CHECK(!request.only_chunks || (!request.chunks.empty() && request.max_tokens == 0 && request.n == 1),
           invalid_argument, "a request for chunks only needs chunks, max_tokens 0 and n 1");
  NB_CHECK(!request.pin_chunks || request.only_chunks, invalid_argument,
           "only a request for nothing but chunks can pin them");
  NB_CHECK(reuse.mode == ReuseMode::exact || !request.prompt_logprobs, unsupported,
           "prompt_logprobs need the whole prompt computed: not with reuse of chunks in mode ", to_string(reuse.mode));
}

void check_policy(const Request& request) {
  ops::check_policy(request.key_policy);
  NB_CHECK(request.key_policy.rule != ops::KeyRule::summary || request.key_policy.period % kBlockTokens == 0,
           invalid_argument, "groups of summaries must be multiples of ", kBlockTokens, " tokens, got ",
           request.key_policy.period);
  const bool is_full = request.key_policy.rule == ops::KeyRule::full;
  NB_CHECK(is_full || request.keeps_kv, invalid_argument, "a request that keeps no KV cannot have a rule for it");
  NB_CHECK(request.keeps_kv || !request.speculative.value_or(false), unsupported,
           "kv_policy none computes all tokens anew for each one: not together with speculative");
  if (is_full && request.keeps_kv) return;
  NB_CHECK(!wants_composition(request) && !request.only_chunks, unsupported,
           "kv_policy other than full cannot be had together with chunks in mode ", to_string(request.reuse.mode));
  NB_CHECK(request.keeps_kv || request.n == 1, unsupported, "kv_policy none gives one answer to a prompt, n is ",
           request.n);
}

}  // namespace

bool wants_composition(const Request& request) {
  const bool recomputes_all = request.reuse.mode == ReuseMode::blend && request.reuse.ratio >= 1.0;
  return request.reuse.mode != ReuseMode::exact && !recomputes_all && !request.only_chunks;
}

int rotation_room(const Request& request) {
  int room = 0;
  if (!wants_composition(request)) return room;
  for (const ChunkSpan& chunk : request.chunks) {
    room = std::max(room, static_cast<int>(chunk.anchor.size()) - chunk.begin);
  }
  return room;
}

void validate(const Request& request, int vocab_size, int max_model_len) {
  NB_CHECK(request.n >= 1 && request.n <= kMaxChoices, invalid_argument, "n must be in [1, ", kMaxChoices, "], got ",
           request.n);
  const bool observes = static_cast<bool>(request.observer.see);
  const bool scores = request.prompt_logprobs.has_value() || request.prompt_logits || observes;
  NB_CHECK(!request.prompt.empty(), invalid_argument, "the prompt is empty");
  check_chunks(request, vocab_size, max_model_len);
  check_policy(request);
  NB_CHECK(request.max_tokens >= 1 || (request.max_tokens == 0 && (scores || request.only_chunks)), invalid_argument,
           "max_tokens must be >= 1 (0 only with prompt_logprobs or prompt_logits), got ", request.max_tokens);
  NB_CHECK(!observes || !wants_composition(request), invalid_argument,
           "an observer of logits needs the whole prompt computed: not with reuse of chunks in mode ",
           to_string(request.reuse.mode));
  const int room = rotation_room(request);
  NB_CHECK(room < max_model_len, invalid_argument, "an anchor reaches ", room,
           " tokens before the prompt; the context has ", max_model_len);
  const std::size_t longest = static_cast<std::size_t>(max_model_len - room) - (request.max_tokens > 0 ? 1 : 0);
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
  NB_CHECK(!(request.make_constraint && request.ignore_eos), invalid_argument,
           "ignore_eos cannot be true for a guided answer, which ends where its grammar says");
  constexpr int kMost = sampling::kMaxLogprobs;
  const int wanted = request.prompt_logprobs.value_or(0);
  NB_CHECK(wanted >= 0 && wanted <= kMost, invalid_argument, "prompt_logprobs must be in [0, ", kMost, "], got ",
           wanted);
}

const char* to_string(ReuseMode mode) {
  switch (mode) {
    case ReuseMode::exact:
      return "exact";
    case ReuseMode::isolated:
      return "isolated";
    case ReuseMode::blend:
      return "blend";
  }
  return "exact";
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
