// Guesses that a text goes on as it did the last time its latest tokens occurred: prompt lookup.
//
// Costs a look at the whole text for each guess and remembers nothing. Idea: Saxena 2023 (prompt lookup decoding). Not
// for matches longer than a few tokens, or for choosing among occurrences (suffix_proposer.h).
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine/speculative.h"

namespace nb::engine {

/// Where the last tokens of a text occurred before.
struct NgramMatch {
  std::size_t next;  ///< of the token behind the occurrence
  int length;        ///< tokens that agree
};

/// The latest of the longest earlier occurrences of at least `least` and at most `most` last tokens.
std::optional<NgramMatch> find_ngram(std::span<const TokenId> text, int least, int most);

class NgramProposer final : public Proposer {
 public:
  NgramProposer(int least, int most) : least_(least), most_(most) {}
  int propose(const Sequence& sequence, std::unique_ptr<DraftState>& memory, int most,
              std::vector<TokenId>& drafts) override;

 private:
  int least_;
  int most_;
};

}  // namespace nb::engine
