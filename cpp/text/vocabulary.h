// The tokens of a vocabulary: what bytes each stands for, its type, and look-up by bytes or by text.
//
// A file spells bytes as printable characters (GPT-2's alphabet: "Ġ" is a space; SentencePiece: "▁" is a space and
// "<0x0A>" a byte); here they are kept as bytes, in one pool with offsets, beside an open-addressing table of ids. Not
// for merges or for splitting text. Immutable after construction; safe to use from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.h"

namespace nb::text {

/// What a token is for, numbered as in GGUF.
enum class TokenType : std::uint8_t {
  normal = 1,
  unknown = 2,       ///< stands for what the vocabulary lacks; treated as control
  control = 3,       ///< says something to the model and is no text, e.g. <|im_end|>
  user_defined = 4,  ///< added text that is always one token
  unused = 5,        ///< padding of the vocabulary; stands for nothing
  byte = 6,          ///< SentencePiece's <0x0A>; in a byte-level vocabulary the same as normal
};

/// Whether tokens of the type are no text, and are left out of it: control and unknown.
constexpr bool is_special_type(TokenType type) { return type == TokenType::control || type == TokenType::unknown; }

/// U+2581, which stands for a space in SentencePiece's files.
inline constexpr std::string_view kSpaceMark = "\xE2\x96\x81";

/// How the texts of tokens spell bytes.
enum class Spelling : std::uint8_t {
  byte_level,     ///< GPT-2's alphabet
  sentencepiece,  ///< UTF-8 with U+2581 for a space; a token of type byte is "<0x0A>"
};

class Vocabulary {
 public:
  /// Copies what it needs. `types` is empty (all normal) or has one entry per token. Throws `format`, naming index and
  /// text, for a token that repeats another, an unknown type, or more than 4 GB of text. Empty tokens are allowed
  /// and never found.
  Vocabulary(std::span<const std::string_view> tokens, std::span<const TokenType> types,
             Spelling spelling = Spelling::byte_level);

  int size() const { return static_cast<int>(types_.size()); }
  bool contains(TokenId id) const { return id >= 0 && id < size(); }

  // The functions below take ids that the vocabulary contains.

  TokenType type(TokenId id) const { return types_[static_cast<std::size_t>(id)]; }
  void set_type(TokenId id, TokenType type) { types_[static_cast<std::size_t>(id)] = type; }

  /// The bytes a token stands for: of a normal token what its text spells, or the text itself if it spells nothing;
  /// of others the text (under SentencePiece spelling user-defined ones are spelled too); of unused ones nothing.
  /// Lives as long as the vocabulary.
  std::string_view bytes(TokenId id) const;

  /// The token as the file has it.
  std::string text(TokenId id) const;

  /// The bytes the text of a token spells, of unused ones too.
  std::string_view stored(TokenId id) const;

  /// The token whose text spells exactly these bytes; -1 if there is none. Not for SentencePiece's tokens of type byte.
  TokenId find_bytes(std::string_view bytes) const { return find(bytes, Form::spelled); }

  /// SentencePiece's token of type byte for `byte`; -1 if there is none.
  TokenId find_byte_token(std::uint8_t byte) const;

  /// Whether find_bytes can find the token, the first of its bytes.
  bool is_spelled(TokenId id) const { return forms_[static_cast<std::size_t>(id)] == Form::spelled; }

  /// The token with this text, of whatever type; -1 if there is none.
  TokenId find_text(std::string_view text) const;

  /// The most bytes any token stands for.
  std::size_t max_token_bytes() const { return max_token_bytes_; }

  std::size_t memory_bytes() const;

 private:
  // What the pool has of a token.
  enum class Form : std::uint8_t {
    spelled,   // the bytes that its text spells
    verbatim,  // the text itself
    byte,      // the byte of "<0x0A>"
  };

  std::size_t slot_of(std::string_view bytes, Form form) const;
  TokenId find(std::string_view bytes, Form form) const;
  Form append_bytes(TokenId id, std::string_view text);
  void add(TokenId id, std::string_view text);

  std::string pool_;
  std::vector<std::uint32_t> offsets_;  // token i is pool_[offsets_[i], offsets_[i + 1])
  std::vector<TokenType> types_;
  std::vector<Form> forms_;
  Spelling spelling_;
  std::vector<TokenId> slots_;
  std::size_t mask_ = 0;
  std::uint64_t seed_ = 0;
  std::size_t max_token_bytes_ = 0;
};

/// Appends the character that spells `byte` in GPT-2's alphabet: printable Latin-1 bytes spell themselves, the other
/// 68 are U+0100 and up, in order.
void append_byte_char(std::string& out, std::uint8_t byte);

/// The bytes that `text` spells in that alphabet; nothing if a character of it is not a letter of the alphabet.
std::optional<std::string> spelled_bytes(std::string_view text);

/// The byte that "<0x0A>" names, the form that SentencePiece writes: two upper-case hexadecimal digits.
std::optional<std::uint8_t> named_byte(std::string_view text);

/// `text` with a space in place of every U+2581, and the other way round.
std::string with_spaces(std::string_view text);
std::string with_space_marks(std::string_view text);

}  // namespace nb::text
