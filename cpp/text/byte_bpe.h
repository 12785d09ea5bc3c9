// Byte-level BPE ("gpt2" in GGUF: SmolLM, GPT-2, Llama 3, Qwen): text without added tokens to ids.
//
// Text is split into pieces (pretokenize.h), whose bytes are merged (bpe.h). Not for normalisation or added tokens,
// which tokenizer.h does before. Safe to use from any thread after construction: all that changes is what is remembered
// about tokens.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "base/ids.h"
#include "text/bpe.h"
#include "text/pretokenize.h"
#include "text/vocabulary.h"

namespace nb::text {

class ByteBpe {
 public:
  /// `vocabulary` must outlive this object and keep its address; `merges` are "left right", best first. Tokens of
  /// `protect` become control tokens of the vocabulary unless they are made by merges or are single bytes. Throws
  /// `format` naming index and text of a merge of or into unknown tokens. Merges into control and unknown tokens are
  /// left out, and so are those whose result does not stand for the joined bytes (unused tokens).
  ByteBpe(Vocabulary& vocabulary, const PreTokenizer& pre_tokenizer, std::span<const std::string_view> merges,
          std::span<const TokenId> protect);

  /// Appends the ids of `text`, any bytes. Bytes that the vocabulary lacks are left out. O(n log n).
  void append(std::string_view text, std::vector<TokenId>& ids) const;

  /// Whether a token spells the byte alone.
  bool has_byte(std::uint8_t byte) const { return byte_tokens_[byte] >= 0; }

  std::size_t memory_bytes() const {
    return merges_.memory_bytes() + static_cast<std::size_t>(vocabulary_->size()) * sizeof(whole_[0]);
  }

 private:
  std::vector<Merge> parse_merges(std::span<const std::string_view> merges) const;
  void find_byte_tokens();
  bool is_whole(TokenId id) const;
  void append_merged(std::string_view piece, std::vector<TokenId>& ids) const;

  const Vocabulary* vocabulary_;
  PreTokenizer pre_tokenizer_;
  MergeTable merges_;
  std::array<TokenId, 256> byte_tokens_{};  // -1: the vocabulary lacks the byte
  // Tokens that their own bytes are encoded as, so that merging can be spared. Found out when first asked for: most of
  // a vocabulary is never met.
  enum class Whole : std::uint8_t { unknown, no, yes };
  std::unique_ptr<std::atomic<Whole>[]> whole_;
};

}  // namespace nb::text
