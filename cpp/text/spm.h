// SentencePiece BPE ("llama" in GGUF: Llama 2, TinyLlama, Mistral): text without added tokens to ids.
//
// Pieces have scores instead of listed merges: two neighbours may be merged if their joined text is a piece, the best
// score first. What no piece spells becomes byte tokens. Not for Unigram models, for normalisation or for added tokens,
// which tokenizer.h does before; text comes with spaces where the file has U+2581. Immutable after construction; safe
// to use from any thread. After T. Kudo and J. Richardson, SentencePiece (2018).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/ids.h"
#include "text/bpe.h"
#include "text/vocabulary.h"

namespace nb::text {

class SentencePieceBpe {
 public:
  /// The longest piece in bytes that is accepted: building the merges is quadratic in the length of a piece.
  static constexpr std::size_t kMaxPieceBytes = 1024;

  /// `vocabulary` must outlive this object and keep its address; it must have SentencePiece spelling. `scores` has one
  /// entry per token. Throws `format`, naming the token, for another number of scores, one that is not a number, a
  /// piece that is too long or not UTF-8, and a byte without a byte token.
  SentencePieceBpe(const Vocabulary& vocabulary, std::span<const float> scores);

  /// Appends the ids of `text`. Any bytes: what is not UTF-8 becomes byte tokens. O(n log n).
  void append(std::string_view text, std::vector<TokenId>& ids) const;

  std::size_t memory_bytes() const;

 private:
  // Inside of the merging, a symbol below 0 is a character or byte that is no piece of its own.
  TokenId symbol_of(std::string_view character) const;
  void append_symbols(std::string_view text, std::vector<TokenId>& symbols) const;
  void append_merged(std::string_view text, std::vector<TokenId>& ids) const;
  void append_symbol(TokenId symbol, std::vector<TokenId>& ids) const;
  bool takes_part(TokenId id) const;
  void build_merges(std::span<const float> scores);
  void find_whole_pieces();
  void find_unused_parts();

  const Vocabulary* vocabulary_;
  MergeTable merges_;
  std::array<TokenId, 256> byte_tokens_{};
  std::array<TokenId, 128> ascii_{};  // symbols
  std::vector<bool> whole_;           // pieces that their own text is encoded as, so that merging can be spared
  std::unordered_map<TokenId, std::pair<TokenId, TokenId>> unused_parts_;  // what an unused piece was merged from
  bool words_apart_ = true;  // no piece has a space after another character, so that words are merged one by one
};

}  // namespace nb::text
