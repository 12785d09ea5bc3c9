#include "sampling/logprobs.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "sampling/softmax.h"

namespace nb::sampling {

void score_token(std::span<const float> logits, TokenId token, std::span<TokenLogprob> out, Candidates& scratch) {
  NB_ASSERT(!out.empty() && token >= 0 && static_cast<std::size_t>(token) < logits.size());
  scratch.reset(logits);
  const double total = log_sum_exp(logits, scratch.find_maxima());
  const auto logprob = [&](TokenId id) { return static_cast<float>(log_probability(logits, id, total)); };
  std::fill(out.begin(), out.end(), TokenLogprob{});
  out[0] = {token, scratch.rank_of(token), logprob(token)};
  if (out.size() == 1 || std::isnan(total)) return;
  std::int32_t rank = 0;
  for (const auto& candidate : scratch.most_likely(out.size() - 1)) {
    ++rank;
    out[static_cast<std::size_t>(rank)] = {candidate.id, rank, logprob(candidate.id)};
  }
}

}  // namespace nb::sampling
