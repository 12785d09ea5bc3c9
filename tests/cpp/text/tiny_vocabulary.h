// Vocabularies built in a test: the 256 bytes and what a test adds, byte-level with merges or SentencePiece with
// scores.
//
// Only for tests. They own the texts which their specs view.
#pragma once

#include <deque>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace nb::text {

/// `bytes` spelled in GPT-2's alphabet.
inline std::string spelled(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) append_byte_char(out, static_cast<std::uint8_t>(c));
  return out;
}

class TinyVocabulary {
 public:
  /// Ids 0 to 255 are the bytes.
  explicit TinyVocabulary(std::string pre = "gpt2") {
    spec.model = "gpt2";
    spec.pre = std::move(pre);
    for (int byte = 0; byte < 256; ++byte) {
      const char c = static_cast<char>(static_cast<std::uint8_t>(byte));
      add(spelled(std::string_view(&c, 1)), TokenType::normal);
    }
  }

  /// A token with this text as the file would have it.
  TokenId add(const std::string& text, TokenType type) {
    spec.tokens.push_back(texts_.emplace_back(text));
    spec.types.push_back(type);
    return static_cast<TokenId>(spec.tokens.size() - 1);
  }

  /// A merge of two byte strings and, unless it exists, the token it makes.
  TokenId merge(std::string_view left, std::string_view right) {
    spec.merges.push_back(texts_.emplace_back(spelled(left) + " " + spelled(right)));
    const std::string merged = spelled(left) + spelled(right);
    for (std::size_t i = 0; i < spec.tokens.size(); ++i) {
      if (spec.tokens[i] == merged) return static_cast<TokenId>(i);
    }
    return add(merged, TokenType::normal);
  }

  TokenizerSpec spec;

 private:
  std::deque<std::string> texts_;
};

/// SentencePiece's kind, without normalisation.
class TinyPieces {
 public:
  /// Ids 0 to 255 are the byte tokens.
  TinyPieces() {
    static constexpr char kHex[] = "0123456789ABCDEF";
    spec.model = "llama";
    for (std::size_t byte = 0; byte < 256; ++byte) {
      add(std::string("<0x") + kHex[byte >> 4] + kHex[byte & 15] + ">", -1e9f, TokenType::byte);
    }
  }

  /// A token with this text as the file would have it, and -1 if there is one already.
  TokenId add(const std::string& text, float score, TokenType type = TokenType::normal) {
    if (!seen_.insert(text).second) return -1;
    spec.tokens.push_back(texts_.emplace_back(text));
    spec.types.push_back(type);
    spec.scores.push_back(score);
    return static_cast<TokenId>(spec.tokens.size() - 1);
  }

  TokenizerSpec spec;

 private:
  std::deque<std::string> texts_;
  std::set<std::string> seen_;
};

/// The ids of the bytes of `text` in both.
inline std::vector<TokenId> byte_ids(std::string_view text) {
  std::vector<TokenId> ids;
  for (const char c : text) ids.push_back(static_cast<std::uint8_t>(c));
  return ids;
}

}  // namespace nb::text
