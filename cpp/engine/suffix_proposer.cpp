#include "engine/suffix_proposer.h"

#include <algorithm>

#include "engine/sequence.h"
#include "engine/suffix_index.h"

namespace nb::engine {

namespace {

struct Memory final : DraftState {
  SuffixIndex index;
};

}  // namespace

int SuffixProposer::propose(const Sequence& sequence, std::unique_ptr<DraftState>& memory, int most,
                            std::vector<TokenId>& drafts) {
  if (memory == nullptr) memory = std::make_unique<Memory>();
  SuffixIndex& index = static_cast<Memory&>(*memory).index;
  const std::size_t end = std::min(sequence.tokens.size(), index.size() + kMostIndexed);
  while (index.size() < end) index.push(sequence.tokens[index.size()]);
  if (index.size() < sequence.tokens.size()) return 0;
  const int length = index.match_length();
  if (length < least_) return 0;
  index.guess(static_cast<int>(std::min<std::int64_t>(most, std::int64_t{kDraftsPerToken} * length)), drafts);
  return length;
}

}  // namespace nb::engine
