// Finds added tokens (<|im_end|>, user-defined words) in text, before it is cut into pieces.
//
// The leftmost match counts, and of those that begin at one place the longest. Not for ordinary tokens. Immutable
// after construction; holds views into the vocabulary it was made from; safe to use from any thread.
#pragma once

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "text/vocabulary.h"

namespace nb::text {

class AddedTokens {
 public:
  struct Match {
    std::size_t begin;   ///< the size of the text if nothing was found
    std::size_t length;  ///< 0 if nothing was found
    TokenId id;          ///< -1 if nothing was found
  };

  AddedTokens() = default;

  /// `ids` name tokens of `vocabulary`, which must outlive this object and keep its address; empty tokens are ignored.
  AddedTokens(const Vocabulary& vocabulary, std::vector<TokenId> ids);

  /// The first match at or after `from`.
  Match find(std::string_view text, std::size_t from) const;

  std::size_t memory_bytes() const { return ids_.capacity() * sizeof(TokenId) + sizeof(*this); }

 private:
  Match longest_at(std::string_view text, std::size_t begin) const;
  int byte_at(std::size_t index, std::size_t depth) const;

  const Vocabulary* vocabulary_ = nullptr;
  std::vector<TokenId> ids_;  // sorted by bytes
  std::bitset<256> first_bytes_;
};

}  // namespace nb::text
