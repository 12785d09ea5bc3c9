#include "text/tokenizer.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/error.h"
#include "text/unicode.h"

namespace nb::text {

namespace {

const PreTokenizer& pre_tokenizer_of(const TokenizerSpec& spec) {
  NB_CHECK(spec.model == "gpt2", unsupported, "tokenizer model ", in_quotes(spec.model),
           " is not supported (known: gpt2, which is byte-level BPE)");
  return find_pre_tokenizer(spec.pre);
}

void check_special_ids(const TokenizerSpec& spec, const Vocabulary& vocabulary) {
  const std::pair<const char*, TokenId> ids[] = {{"bos", spec.bos}, {"eos", spec.eos}, {"eot", spec.eot},
                                                 {"eom", spec.eom}, {"unk", spec.unk}, {"pad", spec.pad}};
  for (const auto& [name, id] : ids) {
    NB_CHECK(id == -1 || vocabulary.contains(id), format, "the ", name, " token has id ", id,
             ", outside the vocabulary of ", vocabulary.size());
  }
  NB_CHECK(!spec.add_bos || spec.bos >= 0, format, "the file asks for a bos token but names none");
  NB_CHECK(!spec.add_eos || spec.eos >= 0, format, "the file asks for an eos token but names none");
}

bool is_special_type(TokenType type) { return type == TokenType::control || type == TokenType::unknown; }

}  // namespace

Tokenizer::Tokenizer(const TokenizerSpec& spec)
    : pre_tokenizer_(&pre_tokenizer_of(spec)),
      vocabulary_(spec.tokens, spec.types),
      bos_(spec.bos),
      eos_(spec.eos),
      unk_(spec.unk),
      pad_(spec.pad),
      add_bos_(spec.add_bos),
      add_eos_(spec.add_eos) {
  check_special_ids(spec, vocabulary_);
  const std::vector<Merge> merges = parse_merges(spec.merges);
  merges_ = MergeTable(merges);
  find_byte_tokens();
  protect_end_tokens(spec, merges);
  find_whole_tokens();
  collect_added_tokens();
  for (const TokenId id : {spec.eos, spec.eot, spec.eom}) {
    if (id >= 0 && std::find(eos_ids_.begin(), eos_ids_.end(), id) == eos_ids_.end()) eos_ids_.push_back(id);
  }
}

std::vector<Merge> Tokenizer::parse_merges(std::span<const std::string_view> merges) const {
  std::vector<Merge> parsed;
  parsed.reserve(merges.size());
  std::string joined;
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const std::string_view merge = merges[i];
    const auto known = [&](std::string_view text) {
      const TokenId id = vocabulary_.find_text(text);
      NB_CHECK(id >= 0, format, "merge ", i, " (", in_quotes(merge), "): ", in_quotes(text), " is not a token");
      return id;
    };
    // The left part is not empty, so that it may begin with a space.
    const std::size_t space = merge.empty() ? std::string_view::npos : merge.find(' ', 1);
    NB_CHECK(space != std::string_view::npos && space + 1 < merge.size(), format, "merge ", i, " (", in_quotes(merge),
             ") does not have the form \"left right\"");
    const std::string_view left = merge.substr(0, space);
    const std::string_view right = merge.substr(space + 1);
    joined.assign(left).append(right);
    const TokenId merged = known(joined);
    parsed.push_back({known(left), known(right), is_special_type(vocabulary_.type(merged)) ? -1 : merged});
  }
  return parsed;
}

void Tokenizer::find_byte_tokens() {
  for (std::size_t byte = 0; byte < byte_tokens_.size(); ++byte) {
    const char c = static_cast<char>(static_cast<std::uint8_t>(byte));
    byte_tokens_[byte] = vocabulary_.find_bytes(std::string_view(&c, 1));
  }
}

void Tokenizer::protect_end_tokens(const TokenizerSpec& spec, std::span<const Merge> merges) {
  for (const TokenId id : {spec.bos, spec.eos, spec.eot, spec.eom}) {
    if (id < 0) continue;
    const bool is_byte = std::find(byte_tokens_.begin(), byte_tokens_.end(), id) != byte_tokens_.end();
    const bool is_merged = std::any_of(merges.begin(), merges.end(), [id](const Merge& m) { return m.merged == id; });
    if (!is_byte && !is_merged && !is_special_type(vocabulary_.type(id))) {
      vocabulary_.set_type(id, TokenType::control);
    }
  }
}

void Tokenizer::find_whole_tokens() {
  whole_.assign(static_cast<std::size_t>(vocabulary_.size()), false);
  std::vector<TokenId> ids;
  for (TokenId id = 0; id < vocabulary_.size(); ++id) {
    const std::string_view bytes = vocabulary_.bytes(id);
    if (vocabulary_.find_bytes(bytes) != id || is_special_type(vocabulary_.type(id))) continue;
    bool is_whole = pre_tokenizer_->whole_pieces_first;
    if (!is_whole) {
      ids.clear();
      append_merged(bytes, ids);
      is_whole = ids.size() == 1 && ids[0] == id;
    }
    whole_[static_cast<std::size_t>(id)] = is_whole;
  }
}

void Tokenizer::collect_added_tokens() {
  std::vector<TokenId> user_defined;
  std::vector<TokenId> all;
  for (TokenId id = 0; id < vocabulary_.size(); ++id) {
    const TokenType type = vocabulary_.type(id);
    if (type == TokenType::user_defined) user_defined.push_back(id);
    if (type == TokenType::user_defined || is_special_type(type)) all.push_back(id);
  }
  user_defined_ = AddedTokens(vocabulary_, std::move(user_defined));
  all_added_ = AddedTokens(vocabulary_, std::move(all));
}

std::vector<TokenId> Tokenizer::encode(std::string_view text, bool add_special_tokens, bool parse_special) const {
  NB_CHECK(text.size() < static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()), invalid_argument,
           "text of ", text.size(), " bytes is too long to tokenize");
  std::vector<TokenId> ids;
  ids.reserve(text.size() / 4 + 2);
  if (add_special_tokens && add_bos_) ids.push_back(bos_);
  const AddedTokens& added = parse_special ? all_added_ : user_defined_;
  for (std::size_t position = 0; position < text.size();) {
    const AddedTokens::Match match = added.find(text, position);
    append_pieces(text.substr(position, match.begin - position), ids);
    if (match.id >= 0) ids.push_back(match.id);
    position = match.begin + match.length;
  }
  if (add_special_tokens && add_eos_) ids.push_back(eos_);
  return ids;
}

void Tokenizer::append_pieces(std::string_view text, std::vector<TokenId>& ids) const {
  while (!text.empty()) {
    const std::string_view piece = text.substr(0, pre_tokenizer_->next_piece(text));
    text.remove_prefix(piece.size());
    if (piece.size() <= vocabulary_.max_token_bytes()) {
      const TokenId id = vocabulary_.find_bytes(piece);
      if (id >= 0 && whole_[static_cast<std::size_t>(id)]) {
        ids.push_back(id);
        continue;
      }
    }
    append_merged(piece, ids);
  }
}

void Tokenizer::append_merged(std::string_view piece, std::vector<TokenId>& ids) const {
  const std::size_t first = ids.size();
  for (const char c : piece) {
    const TokenId id = byte_tokens_[static_cast<std::uint8_t>(c)];
    if (id >= 0) ids.push_back(id);
  }
  merge_symbols(merges_, ids, first);
}

std::string Tokenizer::decode(std::span<const TokenId> ids, bool skip_special) const {
  std::string bytes;
  for (const TokenId id : ids) {
    check_id(id);
    if (!skip_special || !is_special(id)) bytes += vocabulary_.bytes(id);
  }
  return replace_invalid_utf8(bytes);
}

void Tokenizer::check_id(TokenId id) const {
  NB_CHECK(vocabulary_.contains(id), invalid_argument, "token id ", id, " is outside the vocabulary of ",
           vocabulary_.size());
}

std::string_view Tokenizer::token_bytes(TokenId id) const {
  check_id(id);
  return vocabulary_.bytes(id);
}

std::string Tokenizer::token_text(TokenId id) const {
  check_id(id);
  return vocabulary_.text(id);
}

TokenType Tokenizer::token_type(TokenId id) const {
  check_id(id);
  return vocabulary_.type(id);
}

bool Tokenizer::is_special(TokenId id) const {
  check_id(id);
  return is_special_type(vocabulary_.type(id));
}

std::optional<TokenId> Tokenizer::find_token(std::string_view text) const {
  const TokenId id = vocabulary_.find_text(text);
  return id >= 0 ? std::optional<TokenId>(id) : std::nullopt;
}

std::vector<std::uint8_t> Tokenizer::missing_bytes() const {
  std::vector<std::uint8_t> missing;
  for (std::size_t byte = 0; byte < byte_tokens_.size(); ++byte) {
    if (byte_tokens_[byte] < 0) missing.push_back(static_cast<std::uint8_t>(byte));
  }
  return missing;
}

std::size_t Tokenizer::memory_bytes() const {
  return vocabulary_.memory_bytes() + merges_.memory_bytes() + whole_.capacity() / 8 + user_defined_.memory_bytes() +
         all_added_.memory_bytes() + eos_ids_.capacity() * sizeof(TokenId);
}

}  // namespace nb::text
