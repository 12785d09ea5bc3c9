// A proposer that knows what the answers will be, and says so as often as a test wants it to.
//
// For tests only.
#pragma once

#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "engine/sequence.h"
#include "engine/speculative.h"

namespace nb::engine {

/// What a request will be answered, by its number and choice.
using Foreseen = std::map<std::pair<RequestId, int>, std::vector<TokenId>>;

/// Guesses the coming tokens of an answer, each rightly with one probability, else any token.
class Clairvoyant final : public Proposer {
 public:
  Clairvoyant(const Foreseen& foreseen, unsigned seed, double right, TokenId vocab_size)
      : foreseen_(foreseen), random_(seed), is_right_(right), any_(0, vocab_size - 1) {}

  int propose(const Sequence& sequence, std::unique_ptr<DraftState>& /*memory*/, int most,
              std::vector<TokenId>& drafts) override {
    const std::vector<TokenId>& answer = foreseen_.at({sequence.id, sequence.choice});
    auto next = static_cast<std::size_t>(sequence.num_generated());
    for (; static_cast<int>(drafts.size()) < most; ++next) {
      drafts.push_back(next < answer.size() && is_right_(random_) ? answer[next] : any_(random_));
    }
    return 1;
  }

 private:
  const Foreseen& foreseen_;
  std::mt19937 random_;
  std::bernoulli_distribution is_right_;
  std::uniform_int_distribution<TokenId> any_;
};

}  // namespace nb::engine
