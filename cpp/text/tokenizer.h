// Text to token ids and back, as a model's file defines it.
//
// Added tokens are cut out, what lies between is normalised (normalize.h) and given to the vocabulary's kind:
// byte-level BPE (byte_bpe.h) or SentencePiece BPE (spm.h). Not for chat templates. Immutable after construction; safe
// to use from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/ids.h"
#include "text/added_tokens.h"
#include "text/byte_bpe.h"
#include "text/normalize.h"
#include "text/spm.h"
#include "text/vocabulary.h"

namespace nb::text {

/// What a model's file says about its tokenizer. Plain data, filled by io/; the views need to live only until the
/// tokenizer is built.
struct TokenizerSpec {
  std::string model;                     ///< kind of tokenizer: "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE)
  std::string pre;                       ///< gpt2: name of the pre-tokenizer, e.g. "smollm"
  std::vector<std::string_view> tokens;  ///< as spelled in the file
  std::vector<TokenType> types;          ///< one per token, or empty: all normal
  std::vector<std::string_view> merges;  ///< gpt2: "left right", best first
  std::vector<float> scores;             ///< llama: one per token, the best is the greatest
  std::optional<bool> nfc;               ///< gpt2: normalise to NFC; nothing: as find_pre_tokenizer(pre).nfc
  std::optional<bool> ignore_merges;     ///< gpt2: as PreTokenizer.whole_pieces_first; nothing: as it says
  SpacePrefix space_prefix = SpacePrefix::none;  ///< llama
  bool remove_extra_whitespaces = false;         ///< llama: spaces are collapsed
  TokenId bos = -1;                              ///< this and the following: -1 means none
  TokenId eos = -1;
  TokenId eot = -1;
  TokenId eom = -1;
  std::vector<TokenId> eos_ids;  ///< more tokens that end an answer
  TokenId unk = -1;
  TokenId pad = -1;
  bool add_bos = false;         ///< encode begins with bos; if the file does not say, find_pre_tokenizer(pre).adds_bos
  bool add_eos = false;         ///< encode ends with eos
  std::vector<TokenId> lstrip;  ///< added tokens that take the whitespace before them
  std::vector<TokenId> rstrip;  ///< added tokens that take the whitespace behind them
};

/// What stands before a text that is encoded; says where SentencePiece puts its space.
enum class TextPlace : std::uint8_t {
  start,        ///< nothing: it begins a prompt
  after_token,  ///< a control token
  within,       ///< text, in one stretch with it
};

/// Bytes [begin, end) of a text.
struct TextSpan {
  std::size_t begin;
  std::size_t end;
  friend bool operator==(const TextSpan&, const TextSpan&) = default;
};

/// Token ids and where each comes from. Tokens that are in no text (bos, eos) have the span [0, 0).
struct Encoding {
  std::vector<TokenId> ids;
  std::vector<TextSpan> spans;
};

class Tokenizer {
 public:
  /// Throws `unsupported` for a model or pre-tokenizer it does not know, naming it, and `format`, naming index and
  /// text, for repeated tokens, merges of or into unknown tokens, scores that are missing or not numbers, missing byte
  /// tokens of SentencePiece, and special ids outside the vocabulary.
  ///
  /// Unlike other readers it lets no text become a control token by merging: merges into control and unknown tokens
  /// are left out, as are those into tokens that stand for other bytes than are merged, and bos, eos, eot and eom are
  /// control tokens whatever the file calls them, unless they are made by merges or are single bytes (a model whose
  /// end token is a newline keeps its newlines). Of repeated merges the first counts.
  explicit Tokenizer(const TokenizerSpec& spec);
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  /// The ids of `text`. User-defined tokens are always recognised in it; control and unknown tokens only with
  /// `parse_special`: leave it off for anything that a user wrote. `add_special_tokens` adds bos and eos where the
  /// file asks for them. `place` is for prompts that are put together from parts.
  ///
  /// Any bytes are accepted: invalid UTF-8 is split off as characters of no class and encoded byte by byte, so the
  /// bytes of the tokens, joined, are `text`. The one exception: bytes that the vocabulary lacks (missing_bytes())
  /// are left out, as transformers and llama.cpp leave them out. What normalisation changes comes back changed: NFC,
  /// U+2581 to a space, collapsed spaces, whitespace that added tokens take. Throws `invalid_argument` for 2 GB and
  /// more. O(n log n).
  std::vector<TokenId> encode(std::string_view text, bool add_special_tokens = true, bool parse_special = false,
                              TextPlace place = TextPlace::start) const;

  /// The same with the bytes of `text` that each token comes from. Several tokens of one character have the same span
  /// only if normalisation changed it; a space that SentencePiece puts in front comes from nowhere.
  Encoding encode_with_spans(std::string_view text, bool add_special_tokens = true, bool parse_special = false) const;

  /// The text of the ids: their bytes joined, with U+FFFD in place of what is not UTF-8 (one per maximal subpart).
  /// `skip_special` leaves control and unknown tokens out. Where encode puts a space in front of a text, the space
  /// that the first token begins with is left out. Throws `invalid_argument` naming an id out of range.
  std::string decode(std::span<const TokenId> ids, bool skip_special = true) const;

  /// Appends the bytes of one token of a text. `is_first` says that no text was before it, and must be
  /// drops_first_space() at the start of a text; it is cleared when text has come. Then decode is this for every id.
  void append_token(TokenId id, bool& is_first, std::string& out) const;

  /// The bytes a token stands for, in any order of UTF-8; unused tokens stand for nothing. Lives as long as the
  /// tokenizer. This and the functions below throw `invalid_argument` for an id out of range.
  std::string_view token_bytes(TokenId id) const;

  /// The token as the file spells it, e.g. "Ġthe".
  std::string token_text(TokenId id) const;

  TokenType token_type(TokenId id) const;

  /// Whether the token is no text (type control or unknown), so that decode leaves it out.
  bool is_special(TokenId id) const;

  /// The token that the file spells so.
  std::optional<TokenId> find_token(std::string_view text) const;

  int vocab_size() const { return vocabulary_.size(); }
  TokenId bos() const { return bos_; }  ///< this and the following: -1 if there is none
  TokenId eos() const { return eos_; }
  TokenId unk() const { return unk_; }
  TokenId pad() const { return pad_; }
  bool adds_bos() const { return add_bos_; }
  bool adds_eos() const { return add_eos_; }

  /// Whether decoding leaves out the space that the first token of a text begins with.
  bool drops_first_space() const { return normalization_.space_prefix != SpacePrefix::none; }

  /// The tokens that end an answer: eos, eot, eom and those that the file adds, each once.
  const std::vector<TokenId>& eos_ids() const { return eos_ids_; }

  /// Bytes that no token spells, so that encode leaves them out. Usually empty or bytes that UTF-8 never uses.
  std::vector<std::uint8_t> missing_bytes() const;

  /// Heap memory held, in bytes.
  std::size_t memory_bytes() const;

 private:
  using Kind = std::variant<ByteBpe, SentencePieceBpe>;

  static Kind make_kind(const TokenizerSpec& spec, Vocabulary& vocabulary);
  void check_id(TokenId id) const;
  void collect_added_tokens();
  void encode_into(std::string_view text, bool add_special_tokens, bool parse_special, TextPlace place,
                   std::vector<TokenId>& ids, std::vector<TextSpan>* spans) const;
  void append_stretch(std::string_view text, std::size_t begin, const Stretch& stretch, std::vector<TokenId>& ids,
                      std::vector<TextSpan>* spans) const;
  bool lacks_byte(std::uint8_t byte) const;

  Vocabulary vocabulary_;
  Kind kind_;  // has the address of the vocabulary
  Normalization normalization_;
  AddedTokens user_defined_;
  AddedTokens all_added_;        // user-defined, control and unknown
  std::vector<TokenId> lstrip_;  // sorted
  std::vector<TokenId> rstrip_;
  TokenId bos_;
  TokenId eos_;
  TokenId unk_;
  TokenId pad_;
  bool add_bos_;
  bool add_eos_;
  std::vector<TokenId> eos_ids_;
};

}  // namespace nb::text
