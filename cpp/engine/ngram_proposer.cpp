#include "engine/ngram_proposer.h"

#include <algorithm>

#include "engine/sequence.h"

namespace nb::engine {

std::optional<NgramMatch> find_ngram(std::span<const TokenId> text, int least, int most) {
  std::optional<NgramMatch> best;
  for (std::size_t next = text.size(); next-- > 1;) {
    const int longest = static_cast<int>(std::min(static_cast<std::size_t>(most), next));
    int length = 0;
    while (length < longest) {
      const auto back = static_cast<std::size_t>(length) + 1;
      if (text[next - back] != text[text.size() - back]) break;
      ++length;
    }
    if (length < least || (best && length <= best->length)) continue;
    best = {.next = next, .length = length};
    if (length == most) break;
  }
  return best;
}

int NgramProposer::propose(const Sequence& sequence, std::unique_ptr<DraftState>& /*memory*/, int most,
                           std::vector<TokenId>& drafts) {
  const std::span<const TokenId> text = sequence.tokens;
  const auto match = find_ngram(text, least_, most_);
  if (!match) return 0;
  // Where the occurrence ends with the text itself, the text is taken to repeat.
  for (std::size_t from = match->next; static_cast<int>(drafts.size()) < most; ++from) {
    drafts.push_back(from < text.size() ? text[from] : drafts[from - text.size()]);
  }
  return match->length;
}

}  // namespace nb::engine
