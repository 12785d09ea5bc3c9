// Text to token ids and back, as a model's file defines it.
//
// Byte-level BPE ("gpt2" in GGUF: SmolLM, GPT-2, Llama 3, Qwen 2): added tokens are cut out, the rest is split into
// pieces (pretokenize.h) and merged (bpe.h). Not for chat templates, and no normalisation takes place. Immutable after
// construction; safe to use from any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.h"
#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/pretokenize.h"
#include "text/vocabulary.h"

namespace nb::text {

/// What a model's file says about its tokenizer. Plain data, filled by io/; the views need to live only until the
/// tokenizer is built.
struct TokenizerSpec {
  std::string model;                     ///< kind of tokenizer: "gpt2"
  std::string pre;                       ///< name of the pre-tokenizer, e.g. "smollm"
  std::vector<std::string_view> tokens;  ///< as spelled in the file
  std::vector<TokenType> types;          ///< one per token, or empty: all normal
  std::vector<std::string_view> merges;  ///< "left right", best first
  TokenId bos = -1;                      ///< this and the following: -1 means none
  TokenId eos = -1;
  TokenId eot = -1;
  TokenId eom = -1;
  TokenId unk = -1;
  TokenId pad = -1;
  bool add_bos = false;  ///< encode begins with bos; if the file does not say, find_pre_tokenizer(pre).adds_bos
  bool add_eos = false;  ///< encode ends with eos
};

class Tokenizer {
 public:
  /// Throws `unsupported` for a model or pre-tokenizer it does not know, naming it, and `format`, naming index and
  /// text, for repeated tokens, merges of or into unknown tokens, and special ids outside the vocabulary.
  ///
  /// Unlike other readers it lets no text become a control token by merging: merges into control and unknown tokens
  /// are left out, and bos, eos, eot and eom are control tokens whatever the file calls them, unless they are made by
  /// merges or are single bytes (a model whose end token is a newline keeps its newlines). Of repeated merges the
  /// first counts.
  explicit Tokenizer(const TokenizerSpec& spec);
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  /// The ids of `text`. User-defined tokens are always recognised in it; control and unknown tokens only with
  /// `parse_special`: leave it off for anything that a user wrote. `add_special_tokens` adds bos and eos where the
  /// file asks for them.
  ///
  /// Any bytes are accepted: invalid UTF-8 is split off as characters of no class and encoded byte by byte, so the
  /// bytes of the tokens, joined, are `text`. The one exception: bytes that the vocabulary lacks (missing_bytes())
  /// are left out, as transformers and llama.cpp leave them out. Throws `invalid_argument` for 2 GB and more.
  /// O(n log n).
  std::vector<TokenId> encode(std::string_view text, bool add_special_tokens = true, bool parse_special = false) const;

  /// The text of the ids: their bytes joined, with U+FFFD in place of what is not UTF-8 (one per maximal subpart).
  /// `skip_special` leaves control and unknown tokens out. Throws `invalid_argument` naming an id out of range.
  std::string decode(std::span<const TokenId> ids, bool skip_special = true) const;

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

  /// The tokens that end an answer: eos, eot and eom, those that there are, each once.
  const std::vector<TokenId>& eos_ids() const { return eos_ids_; }

  /// Bytes that no token spells, so that encode leaves them out. Usually empty or bytes that UTF-8 never uses.
  std::vector<std::uint8_t> missing_bytes() const;

  /// Heap memory held, in bytes.
  std::size_t memory_bytes() const;

 private:
  void check_id(TokenId id) const;
  std::vector<Merge> parse_merges(std::span<const std::string_view> merges) const;
  void find_byte_tokens();
  void protect_end_tokens(const TokenizerSpec& spec, std::span<const Merge> merges);
  void find_whole_tokens();
  void collect_added_tokens();
  void append_pieces(std::string_view text, std::vector<TokenId>& ids) const;
  void append_merged(std::string_view piece, std::vector<TokenId>& ids) const;

  const PreTokenizer* pre_tokenizer_;
  Vocabulary vocabulary_;
  MergeTable merges_;
  std::array<TokenId, 256> byte_tokens_{};  // -1: the vocabulary lacks the byte
  std::vector<bool> whole_;                 // tokens that their own bytes are encoded as, so that merging can be spared
  AddedTokens user_defined_;
  AddedTokens all_added_;  // user-defined, control and unknown
  TokenId bos_;
  TokenId eos_;
  TokenId unk_;
  TokenId pad_;
  bool add_bos_;
  bool add_eos_;
  std::vector<TokenId> eos_ids_;
};

}  // namespace nb::text
