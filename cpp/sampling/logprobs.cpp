#include "sampling/logprobs.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "sampling/softmax.h"

namespace nb::sampling {

namespace {

/// 1 + the number of tokens in front of `token`; a NaN stands with -infinity.
std::int32_t rank_of(std::span<const float> logits, TokenId token) {
  const std::size_t index = static_cast<std::size_t>(token);
  const float own = std::isnan(logits[index]) ? -std::numeric_limits<float>::infinity() : logits[index];
  std::int32_t before = 0;
  for (const float logit : logits) before += logit > own ? 1 : 0;
  for (const float logit : logits.first(index)) before += logit == own ? 1 : 0;
  return before + 1;
}

}  // namespace

void score_token(std::span<const float> logits, TokenId token, std::span<TokenLogprob> out, Candidates& scratch) {
  NB_ASSERT(!out.empty() && token >= 0 && static_cast<std::size_t>(token) < logits.size());
  const double total = log_sum_exp(logits);
  const auto logprob = [&](TokenId id) { return static_cast<float>(log_probability(logits, id, total)); };
  std::fill(out.begin(), out.end(), TokenLogprob{});
  out[0] = {token, rank_of(logits, token), logprob(token)};
  if (out.size() == 1 || std::isnan(total)) return;
  scratch.reset(logits);
  scratch.settle();
  std::int32_t rank = 0;
  for (const auto& candidate : scratch.most_likely(out.size() - 1)) {
    ++rank;
    out[static_cast<std::size_t>(rank)] = {candidate.id, rank, logprob(candidate.id)};
  }
}

}  // namespace nb::sampling
