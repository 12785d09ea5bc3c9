#include "text/tokenizer.h"

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "text/pretokenize.h"
#include "text/unicode.h"

namespace nb::text {

namespace {

void check_special_ids(const TokenizerSpec& spec, const Vocabulary& vocabulary) {
  const auto check = [&](const char* name, TokenId id) {
    NB_CHECK(vocabulary.contains(id), format, "the ", name, " token has id ", id, ", outside the vocabulary of ",
             vocabulary.size());
  };
  const std::pair<const char*, TokenId> ids[] = {{"bos", spec.bos}, {"eos", spec.eos}, {"eot", spec.eot},
                                                 {"eom", spec.eom}, {"unk", spec.unk}, {"pad", spec.pad}};
  for (const auto& [name, id] : ids) {
    if (id != -1) check(name, id);
  }
  for (const TokenId id : spec.eos_ids) check("eos", id);
  for (const TokenId id : spec.lstrip) check("lstrip", id);
  for (const TokenId id : spec.rstrip) check("rstrip", id);
  NB_CHECK(!spec.add_bos || spec.bos >= 0, format, "the file asks for a bos token but names none");
  NB_CHECK(!spec.add_eos || spec.eos >= 0, format, "the file asks for an eos token but names none");
}

Spelling spelling_of(const TokenizerSpec& spec) {
  return spec.model == "llama" ? Spelling::sentencepiece : Spelling::byte_level;
}

/// Tokens that no text may become: bos and those that end an answer.
std::vector<TokenId> protected_ids(const TokenizerSpec& spec) {
  std::vector<TokenId> ids{spec.bos, spec.eos, spec.eot, spec.eom};
  ids.insert(ids.end(), spec.eos_ids.begin(), spec.eos_ids.end());
  ids.erase(std::remove(ids.begin(), ids.end(), -1), ids.end());
  return ids;
}

Normalization normalization_of(const TokenizerSpec& spec) {
  Normalization how;
  if (spec.model == "llama") {
    how.space_marks = true;
    how.collapse_spaces = spec.remove_extra_whitespaces;
    how.space_prefix = spec.space_prefix;
  } else {
    how.nfc = spec.nfc.value_or(find_pre_tokenizer(spec.pre).nfc);
  }
  return how;
}

bool contains(const std::vector<TokenId>& sorted, TokenId id) {
  return !sorted.empty() && std::binary_search(sorted.begin(), sorted.end(), id);
}

std::vector<TokenId> sorted(std::vector<TokenId> ids) {
  std::sort(ids.begin(), ids.end());
  return ids;
}

/// How many bytes of whitespace `text` begins or ends with.
std::size_t leading_whitespace(std::string_view text) {
  std::size_t length = 0;
  while (length < text.size()) {
    const DecodedChar next = decode_utf8(text.data() + length, text.data() + text.size());
    if (!is_whitespace(next.code_point)) break;
    length += next.length;
  }
  return length;
}

std::size_t trailing_whitespace(std::string_view text) {
  std::size_t begin = text.size();
  while (begin > 0) {
    std::size_t previous = begin - 1;
    while (previous > 0 && begin - previous < 4 && (static_cast<std::uint8_t>(text[previous]) & 0xC0) == 0x80) {
      --previous;
    }
    const DecodedChar last = decode_utf8(text.data() + previous, text.data() + begin);
    if (previous + last.length != begin || !is_whitespace(last.code_point)) break;
    begin = previous;
  }
  return text.size() - begin;
}

}  // namespace

Tokenizer::Tokenizer(const TokenizerSpec& spec)
    : vocabulary_(spec.tokens, spec.types, spelling_of(spec)),
      kind_(make_kind(spec, vocabulary_)),
      normalization_(normalization_of(spec)),
      lstrip_(sorted(spec.lstrip)),
      rstrip_(sorted(spec.rstrip)),
      bos_(spec.bos),
      eos_(spec.eos),
      unk_(spec.unk),
      pad_(spec.pad),
      add_bos_(spec.add_bos),
      add_eos_(spec.add_eos) {
  collect_added_tokens();
  std::vector<TokenId> ends{spec.eos, spec.eot, spec.eom};
  ends.insert(ends.end(), spec.eos_ids.begin(), spec.eos_ids.end());
  for (const TokenId id : ends) {
    if (id >= 0 && std::find(eos_ids_.begin(), eos_ids_.end(), id) == eos_ids_.end()) eos_ids_.push_back(id);
  }
}

Tokenizer::Kind Tokenizer::make_kind(const TokenizerSpec& spec, Vocabulary& vocabulary) {
  check_special_ids(spec, vocabulary);
  const std::vector<TokenId> protect = protected_ids(spec);
  if (spec.model == "gpt2") {
    PreTokenizer pre_tokenizer = find_pre_tokenizer(spec.pre);
    pre_tokenizer.whole_pieces_first = spec.ignore_merges.value_or(pre_tokenizer.whole_pieces_first);
    return Kind(std::in_place_type<ByteBpe>, vocabulary, pre_tokenizer, spec.merges, protect);
  }
  NB_CHECK(spec.model == "llama", unsupported, "tokenizer model ", in_quotes(spec.model),
           " is not supported (known: gpt2, which is byte-level BPE, and llama, which is SentencePiece BPE)");
  for (const TokenId id : protect) {
    if (vocabulary.type(id) != TokenType::byte) vocabulary.set_type(id, TokenType::control);
  }
  return Kind(std::in_place_type<SentencePieceBpe>, vocabulary, spec.scores);
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

std::vector<TokenId> Tokenizer::encode(std::string_view text, bool add_special_tokens, bool parse_special,
                                       TextPlace place) const {
  std::vector<TokenId> ids;
  encode_into(text, add_special_tokens, parse_special, place, ids, nullptr);
  return ids;
}

Encoding Tokenizer::encode_with_spans(std::string_view text, bool add_special_tokens, bool parse_special) const {
  Encoding out;
  encode_into(text, add_special_tokens, parse_special, TextPlace::start, out.ids, &out.spans);
  return out;
}

void Tokenizer::encode_into(std::string_view text, bool add_special_tokens, bool parse_special, TextPlace place,
                            std::vector<TokenId>& ids, std::vector<TextSpan>* spans) const {
  NB_CHECK(text.size() < static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()), invalid_argument,
           "text of ", text.size(), " bytes is too long to tokenize");
  ids.reserve(text.size() / 4 + 2);
  const auto append = [&](TokenId id, TextSpan span) {
    ids.push_back(id);
    if (spans != nullptr) spans->push_back(span);
  };
  if (add_special_tokens && add_bos_) append(bos_, {0, 0});
  const AddedTokens& added = parse_special ? all_added_ : user_defined_;
  for (std::size_t position = 0; position < text.size();) {
    const AddedTokens::Match match = added.find(text, position);
    const bool strips_left = match.id >= 0 && contains(lstrip_, match.id);
    std::string_view before = text.substr(position, match.begin - position);
    if (strips_left) before.remove_suffix(trailing_whitespace(before));
    // sentencepiece puts its prefix even in front of a user-defined piece, but no control token is text to it.
    const bool is_text = match.id < 0 || !is_special_type(vocabulary_.type(match.id));
    const bool begins_text = position == 0 && place == TextPlace::start;
    const bool begins_stretch = position > 0 || place != TextPlace::within;
    const bool prefix = begins_stretch && (!before.empty() || is_text) &&
                        wants_prefix(normalization_.space_prefix, begins_text, before);
    append_stretch(before, position, {begins_text, match.id < 0, prefix}, ids, spans);
    const std::size_t end = match.begin + match.length;
    position = end;
    if (match.id < 0) break;
    if (contains(rstrip_, match.id)) position += leading_whitespace(text.substr(end));
    append(match.id, {match.begin, end});
  }
  if (add_special_tokens && add_eos_) append(eos_, {0, 0});
}

void Tokenizer::append_stretch(std::string_view text, std::size_t begin, const Stretch& stretch,
                               std::vector<TokenId>& ids, std::vector<TextSpan>* spans) const {
  if (text.empty() && !stretch.prefix) return;
  Normalized normalized;
  const bool is_changed = !normalization_.is_identity();
  if (is_changed) normalized = normalize(normalization_, text, stretch);
  const std::string_view source = is_changed ? normalized.text : text;
  const std::size_t first = ids.size();
  std::visit([&](const auto& kind) { kind.append(source, ids); }, kind_);
  if (spans == nullptr) return;
  // The bytes of the tokens, joined, are the normalised text without bytes that no token spells: these are passed over.
  std::size_t position = 0;
  std::size_t cursor = 0;
  for (std::size_t i = first; i < ids.size(); ++i) {
    const std::string_view bytes = vocabulary_.stored(ids[i]);
    position = source.find(bytes.front(), position);
    const std::size_t token_begin = position;
    for (const char c : bytes) position = source.find(c, position) + 1;
    TextSpan span{token_begin, position};
    if (is_changed) {
      const auto [from, to] = normalized.source_of(token_begin, position, cursor);
      span = {from, to};
    }
    spans->push_back({begin + span.begin, begin + span.end});
  }
}

bool Tokenizer::lacks_byte(std::uint8_t byte) const {
  const ByteBpe* byte_level = std::get_if<ByteBpe>(&kind_);
  return byte_level != nullptr && !byte_level->has_byte(byte);
}

std::string Tokenizer::decode(std::span<const TokenId> ids, bool skip_special) const {
  std::string bytes;
  bool is_first = drops_first_space();
  for (const TokenId id : ids) {
    check_id(id);
    if (skip_special && is_special(id)) continue;
    append_token(id, is_first, bytes);
  }
  return replace_invalid_utf8(bytes);
}

void Tokenizer::append_token(TokenId id, bool& is_first, std::string& out) const {
  std::string_view bytes = token_bytes(id);
  if (is_first && !bytes.empty() && !is_special(id)) {
    is_first = false;
    // <0x20> is a space that was in the text.
    if (bytes.front() == ' ' && vocabulary_.type(id) != TokenType::byte) bytes.remove_prefix(1);
  }
  out += bytes;
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
  for (int byte = 0; byte < 256; ++byte) {
    if (lacks_byte(static_cast<std::uint8_t>(byte))) missing.push_back(static_cast<std::uint8_t>(byte));
  }
  return missing;
}

std::size_t Tokenizer::memory_bytes() const {
  const std::size_t kind_bytes = std::visit([](const auto& kind) { return kind.memory_bytes(); }, kind_);
  return vocabulary_.memory_bytes() + kind_bytes + user_defined_.memory_bytes() + all_added_.memory_bytes() +
         (eos_ids_.capacity() + lstrip_.capacity() + rstrip_.capacity()) * sizeof(TokenId);
}

}  // namespace nb::text
