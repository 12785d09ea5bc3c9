#include "text/spm.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "base/error.h"
#include "text/unicode.h"

namespace nb::text {

namespace {

// Symbols that are no pieces: a character is -2 - code point, a byte that belongs to none comes after the characters.
constexpr TokenId kNoPiece = -1;
constexpr TokenId kFirstByte = 0x110000;

TokenId symbol_of_char(const DecodedChar& found, const char* position) {
  if (found.status == Utf8Status::valid) return -2 - static_cast<TokenId>(found.code_point);
  return -2 - kFirstByte - static_cast<TokenId>(static_cast<std::uint8_t>(*position));
}

std::string bytes_of_symbol(TokenId symbol) {
  const TokenId value = -2 - symbol;
  std::string bytes;
  if (value < kFirstByte) {
    append_utf8(bytes, static_cast<char32_t>(value));
  } else {
    bytes.push_back(static_cast<char>(static_cast<std::uint8_t>(value - kFirstByte)));
  }
  return bytes;
}

std::string hex_name(std::size_t byte) {
  static constexpr char kHex[] = "0123456789ABCDEF";
  return std::string("<0x") + kHex[byte >> 4] + kHex[byte & 15] + ">";
}

/// Where the characters of `text` begin, and its end; empty if it is not UTF-8.
std::vector<std::size_t> char_starts(std::string_view text) {
  std::vector<std::size_t> starts;
  std::size_t position = 0;
  while (position < text.size()) {
    const DecodedChar next = decode_utf8(text.data() + position, text.data() + text.size());
    if (next.status != Utf8Status::valid) return {};
    starts.push_back(position);
    position += next.length;
  }
  starts.push_back(position);
  return starts;
}

/// The end of the first word of `text`: spaces, and what follows them up to the next space.
std::size_t word_length(std::string_view text) {
  const std::size_t word = text.find_first_not_of(' ');
  return word == std::string_view::npos ? text.size() : std::min(text.find(' ', word), text.size());
}

}  // namespace

SentencePieceBpe::SentencePieceBpe(const Vocabulary& vocabulary, std::span<const float> scores)
    : vocabulary_(&vocabulary) {
  NB_CHECK(scores.size() == static_cast<std::size_t>(vocabulary.size()), format, "the vocabulary has ",
           vocabulary.size(), " tokens but ", scores.size(), " scores");
  for (std::size_t byte = 0; byte < byte_tokens_.size(); ++byte) {
    byte_tokens_[byte] = vocabulary.find_byte_token(static_cast<std::uint8_t>(byte));
    NB_CHECK(byte_tokens_[byte] >= 0, format, "the vocabulary has no byte token ", hex_name(byte),
             ": models without byte fallback are not supported");
  }
  for (std::size_t i = 0; i < ascii_.size(); ++i) {
    const char c = static_cast<char>(i);
    ascii_[i] = symbol_of(std::string_view(&c, 1));
  }
  build_merges(scores);
  find_unused_parts();
  find_whole_pieces();
}

bool SentencePieceBpe::takes_part(TokenId id) const {
  const TokenType type = vocabulary_->type(id);
  return vocabulary_->is_spelled(id) && (type == TokenType::normal || type == TokenType::unused);
}

TokenId SentencePieceBpe::symbol_of(std::string_view character) const {
  const TokenId id = vocabulary_->find_bytes(character);
  if (id >= 0 && takes_part(id)) return id;
  return symbol_of_char(decode_utf8(character.data(), character.data() + character.size()), character.data());
}

// Every way to cut a piece in two where both parts can arise is a merge, ranked by the score of the piece.
void SentencePieceBpe::build_merges(std::span<const float> scores) {
  std::vector<TokenId> pieces;
  for (TokenId id = 0; id < vocabulary_->size(); ++id) {
    const float score = scores[static_cast<std::size_t>(id)];
    const std::string_view bytes = vocabulary_->stored(id);
    NB_CHECK(!std::isnan(score), format, "the score of token ", id, " (", in_quotes(bytes), ") is not a number");
    if (!takes_part(id) || bytes.empty()) continue;
    NB_CHECK(bytes.size() <= kMaxPieceBytes, format, "token ", id, " (", in_quotes(bytes), ") has ", bytes.size(),
             " bytes, more than the ", kMaxPieceBytes, " a piece may have");
    pieces.push_back(id);
  }
  const auto score_of = [&](TokenId id) { return scores[static_cast<std::size_t>(id)]; };
  std::stable_sort(pieces.begin(), pieces.end(), [&](TokenId a, TokenId b) { return score_of(a) > score_of(b); });
  std::vector<Merge> merges;
  std::vector<std::int32_t> ranks;
  std::int32_t rank = 0;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (i > 0 && score_of(pieces[i]) != score_of(pieces[i - 1])) ++rank;
    const std::string_view bytes = vocabulary_->stored(pieces[i]);
    const std::vector<std::size_t> starts = char_starts(bytes);
    NB_CHECK(!starts.empty(), format, "token ", pieces[i], " (", in_quotes(bytes), ") is not UTF-8");
    const std::size_t num_chars = starts.size() - 1;
    for (std::size_t cut = 1; cut < num_chars; ++cut) {
      words_apart_ = words_apart_ && !(bytes[starts[cut]] == ' ' && bytes[starts[cut] - 1] != ' ');
      const auto part = [&](std::size_t from, std::size_t to) {
        const std::string_view text = bytes.substr(starts[from], starts[to] - starts[from]);
        if (to - from == 1) return symbol_of(text);
        const TokenId id = vocabulary_->find_bytes(text);
        return id >= 0 && takes_part(id) ? id : kNoPiece;
      };
      const TokenId left = part(0, cut);
      const TokenId right = part(cut, num_chars);
      if (left == kNoPiece || right == kNoPiece) continue;
      merges.push_back({left, right, pieces[i]});
      ranks.push_back(rank);
    }
  }
  merges_ = MergeTable(merges, ranks);
}

// An unused piece may arise on the way to a longer one, but not at the end: there it falls apart again into what it
// was merged from. That is found by merging its own text up to the last step.
void SentencePieceBpe::find_unused_parts() {
  std::vector<TokenId> symbols;
  for (TokenId id = 0; id < vocabulary_->size(); ++id) {
    if (vocabulary_->type(id) != TokenType::unused || !takes_part(id)) continue;
    symbols.clear();
    append_symbols(vocabulary_->stored(id), symbols);
    merge_symbols(merges_, symbols, 0, 2);
    if (symbols.size() == 2) unused_parts_[id] = {symbols[0], symbols[1]};
  }
}

void SentencePieceBpe::find_whole_pieces() {
  whole_.assign(static_cast<std::size_t>(vocabulary_->size()), false);
  std::vector<TokenId> ids;
  for (TokenId id = 0; id < vocabulary_->size(); ++id) {
    if (vocabulary_->type(id) != TokenType::normal || !takes_part(id)) continue;
    ids.clear();
    append_merged(vocabulary_->stored(id), ids);
    whole_[static_cast<std::size_t>(id)] = ids.size() == 1 && ids[0] == id;
  }
}

void SentencePieceBpe::append(std::string_view text, std::vector<TokenId>& ids) const {
  while (!text.empty()) {
    const std::string_view word = words_apart_ ? text.substr(0, word_length(text)) : text;
    text.remove_prefix(word.size());
    if (word.size() <= vocabulary_->max_token_bytes()) {
      const TokenId id = vocabulary_->find_bytes(word);
      if (id >= 0 && whole_[static_cast<std::size_t>(id)]) {
        ids.push_back(id);
        continue;
      }
    }
    append_merged(word, ids);
  }
}

void SentencePieceBpe::append_symbols(std::string_view text, std::vector<TokenId>& symbols) const {
  const char* position = text.data();
  const char* const end = position + text.size();
  while (position < end) {
    if (static_cast<std::uint8_t>(*position) < 0x80) {
      symbols.push_back(ascii_[static_cast<std::uint8_t>(*position++)]);
      continue;
    }
    const DecodedChar next = decode_utf8(position, end);
    // Bytes that are no character stay bytes, one symbol each.
    const std::uint32_t length = next.status == Utf8Status::valid ? next.length : 1;
    symbols.push_back(next.status == Utf8Status::valid ? symbol_of(std::string_view(position, length))
                                                       : symbol_of_char(next, position));
    position += length;
  }
}

void SentencePieceBpe::append_merged(std::string_view text, std::vector<TokenId>& ids) const {
  const std::size_t first = ids.size();
  append_symbols(text, ids);
  merge_symbols(merges_, ids, first);
  const auto is_final = [this](TokenId id) { return id >= 0 && vocabulary_->type(id) != TokenType::unused; };
  const auto begin = ids.begin() + static_cast<std::ptrdiff_t>(first);
  const auto odd = std::find_if_not(begin, ids.end(), is_final);
  if (odd == ids.end()) return;
  const std::vector<TokenId> symbols(odd, ids.end());
  ids.erase(odd, ids.end());
  for (const TokenId symbol : symbols) append_symbol(symbol, ids);
}

void SentencePieceBpe::append_symbol(TokenId symbol, std::vector<TokenId>& ids) const {
  // An unused piece is taken apart, at most as often as it has characters; the stack keeps the parts in order.
  std::vector<TokenId> stack{symbol};
  while (!stack.empty()) {
    const TokenId top = stack.back();
    stack.pop_back();
    if (top >= 0 && vocabulary_->type(top) != TokenType::unused) {
      ids.push_back(top);
      continue;
    }
    if (const auto parts = unused_parts_.find(top); parts != unused_parts_.end()) {
      stack.push_back(parts->second.second);
      stack.push_back(parts->second.first);
      continue;
    }
    const std::string bytes = top >= 0 ? std::string(vocabulary_->stored(top)) : bytes_of_symbol(top);
    for (const char c : bytes) ids.push_back(byte_tokens_[static_cast<std::uint8_t>(c)]);
  }
}

std::size_t SentencePieceBpe::memory_bytes() const {
  return merges_.memory_bytes() + whole_.capacity() / 8 +
         unused_parts_.size() * (sizeof(*unused_parts_.begin()) + 2 * sizeof(void*));
}

}  // namespace nb::text
