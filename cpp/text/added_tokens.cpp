#include "text/added_tokens.h"

#include <algorithm>
#include <utility>

namespace nb::text {

AddedTokens::AddedTokens(const Vocabulary& vocabulary, std::vector<TokenId> ids)
    : vocabulary_(&vocabulary), ids_(std::move(ids)) {
  ids_.erase(std::remove_if(ids_.begin(), ids_.end(), [&](TokenId id) { return vocabulary.bytes(id).empty(); }),
             ids_.end());
  std::sort(ids_.begin(), ids_.end(), [&](TokenId a, TokenId b) { return vocabulary.bytes(a) < vocabulary.bytes(b); });
  ids_.shrink_to_fit();
  for (const TokenId id : ids_) first_bytes_.set(static_cast<std::uint8_t>(vocabulary.bytes(id).front()));
}

AddedTokens::Match AddedTokens::find(std::string_view text, std::size_t from) const {
  if (!ids_.empty()) {
    for (std::size_t begin = from; begin < text.size(); ++begin) {
      if (!first_bytes_[static_cast<std::uint8_t>(text[begin])]) continue;
      const Match match = longest_at(text, begin);
      if (match.length > 0) return match;
    }
  }
  return {text.size(), 0, -1};
}

int AddedTokens::byte_at(std::size_t index, std::size_t depth) const {
  const std::string_view bytes = vocabulary_->bytes(ids_[index]);
  return depth < bytes.size() ? static_cast<std::uint8_t>(bytes[depth]) : -1;
}

// Narrows the range [low, high) of tokens that begin as the text does, one byte at a time, as walking a trie would.
AddedTokens::Match AddedTokens::longest_at(std::string_view text, std::size_t begin) const {
  Match best{text.size(), 0, -1};
  std::size_t low = 0;
  std::size_t high = ids_.size();
  for (std::size_t depth = 0; begin + depth < text.size(); ++depth) {
    const int wanted = static_cast<std::uint8_t>(text[begin + depth]);
    const auto first_above = [&](int value) {
      std::size_t from = low;
      std::size_t to = high;
      while (from < to) {
        const std::size_t middle = from + (to - from) / 2;
        if (byte_at(middle, depth) > value) {
          to = middle;
        } else {
          from = middle + 1;
        }
      }
      return from;
    };
    const std::size_t new_low = first_above(wanted - 1);
    high = first_above(wanted);
    low = new_low;
    if (low == high) break;
    // A token that ends here is the first of its range.
    if (vocabulary_->bytes(ids_[low]).size() == depth + 1) best = {begin, depth + 1, ids_[low]};
  }
  return best;
}

}  // namespace nb::text
