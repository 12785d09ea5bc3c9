// Guesses that a text goes on as its longest latest part did most often, anywhere in its prompt (documents and chunks
// too) and answer.
//
// Idea: Oliaro et al. 2024 (SuffixDecoding), here over one request's own tokens. The longer the match, the more is
// guessed. The index of a long prompt is built over several steps, so that none is held up.
#pragma once

#include <memory>
#include <vector>

#include "engine/speculative.h"

namespace nb::engine {

class SuffixProposer final : public Proposer {
 public:
  static constexpr int kMostIndexed = 4096;  ///< tokens, for each guess
  static constexpr int kDraftsPerToken = 2;  ///< of the match

  /// `least`: tokens that a match must have.
  explicit SuffixProposer(int least) : least_(least) {}
  int propose(const Sequence& sequence, std::unique_ptr<DraftState>& memory, int most,
              std::vector<TokenId>& drafts) override;

 private:
  int least_;
};

}  // namespace nb::engine
