#include "text/vocabulary.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "base/rng.h"
#include "text/unicode.h"

namespace nb::text {

namespace {

constexpr std::size_t kAlphabetEnd = 256 + 68;

bool spells_itself(std::size_t byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

struct Alphabet {
  std::array<char16_t, 256> char_of{};
  std::array<std::int16_t, kAlphabetEnd> byte_of{};  // by character; -1: not in the alphabet
};

const Alphabet& alphabet() {
  static const Alphabet result = [] {
    Alphabet filled;
    filled.byte_of.fill(-1);
    std::size_t next = 256;
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::size_t code_point = spells_itself(byte) ? byte : next++;
      filled.char_of[byte] = static_cast<char16_t>(code_point);
      filled.byte_of[code_point] = static_cast<std::int16_t>(byte);
    }
    return filled;
  }();
  return result;
}

/// Appends what `text` spells; on a foreign character leaves `out` as it was and returns false.
bool append_spelled(std::string& out, std::string_view text) {
  const Alphabet& letters = alphabet();
  const std::size_t old_size = out.size();
  const char* position = text.data();
  const char* const end = position + text.size();
  const auto unit = [&](int i) { return static_cast<std::uint8_t>(position[i]); };
  while (position < end) {
    // The letters have one or two bytes of UTF-8. A lead byte C0 or C1 would be an overlong form.
    std::size_t code_point = kAlphabetEnd;
    int length = 1;
    if (unit(0) < 0x80) {
      code_point = unit(0);
    } else if (unit(0) >= 0xC2 && unit(0) < 0xE0 && position + 1 < end && (unit(1) & 0xC0) == 0x80) {
      code_point = static_cast<std::size_t>(unit(0) & 0x1F) << 6 | (unit(1) & 0x3F);
      length = 2;
    }
    const int byte = code_point < kAlphabetEnd ? letters.byte_of[code_point] : -1;
    if (byte < 0) {
      out.resize(old_size);
      return false;
    }
    out.push_back(static_cast<char>(static_cast<std::uint8_t>(byte)));
    position += length;
  }
  return true;
}

std::uint64_t load(const char* from, std::size_t size) {
  std::uint64_t value = 0;
  std::memcpy(&value, from, size);
  return value;
}

std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
  return hash ^ (hash >> 32);
}

std::uint64_t hash_of(std::string_view bytes, std::uint64_t seed) {
  std::uint64_t hash = mix(seed, bytes.size());
  const char* position = bytes.data();
  std::size_t left = bytes.size();
  for (; left > 8; left -= 8, position += 8) hash = mix(hash, load(position, 8));
  if (left >= 4) {
    hash = mix(hash, load(position, 4) | (load(position + left - 4, 4) << 32));
  } else if (left > 0) {
    hash = mix(hash, load(position, 1) | (load(position + left / 2, 1) << 8) | (load(position + left - 1, 1) << 16));
  }
  return mix(hash, 0xD6E8FEB86659FD93u);
}

}  // namespace

void append_byte_char(std::string& out, std::uint8_t byte) { append_utf8(out, alphabet().char_of[byte]); }

std::optional<std::string> spelled_bytes(std::string_view text) {
  std::string out;
  if (!append_spelled(out, text)) return std::nullopt;
  return out;
}

std::optional<std::uint8_t> named_byte(std::string_view text) {
  const auto digit = [](char c) {
    if (c >= '0' && c <= '9') return c - '0';
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
  };
  if (text.size() != 6 || text.substr(0, 3) != "<0x" || text[5] != '>') return std::nullopt;
  const int high = digit(text[3]);
  const int low = digit(text[4]);
  if (high < 0 || low < 0) return std::nullopt;
  return static_cast<std::uint8_t>(high * 16 + low);
}

std::string with_spaces(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t from = 0; from < text.size();) {
    const std::size_t mark = text.find(kSpaceMark, from);
    out.append(text.substr(from, mark - from));
    if (mark == std::string_view::npos) break;
    out.push_back(' ');
    from = mark + kSpaceMark.size();
  }
  return out;
}

std::string with_space_marks(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == ' ') {
      out.append(kSpaceMark);
    } else {
      out.push_back(c);
    }
  }
  return out;
}

Vocabulary::Vocabulary(std::span<const std::string_view> tokens, std::span<const TokenType> types, Spelling spelling)
    : spelling_(spelling) {
  const std::size_t size = tokens.size();
  NB_CHECK(size > 0, format, "the vocabulary has no tokens");
  NB_CHECK(size <= static_cast<std::size_t>(std::numeric_limits<TokenId>::max() / 4), format,
           "the vocabulary has too many tokens: ", size);
  NB_CHECK(types.empty() || types.size() == size, format, "the vocabulary has ", size, " tokens but ", types.size(),
           " token types");
  std::size_t text_bytes = 0;
  for (const std::string_view token : tokens) text_bytes += token.size();
  NB_CHECK(text_bytes <= std::numeric_limits<std::uint32_t>::max(), format, "the tokens of the vocabulary have ",
           text_bytes, " bytes of text, more than 4 GB");

  types_.assign(size, TokenType::normal);
  for (std::size_t i = 0; i < types.size(); ++i) {
    const int type = static_cast<int>(types[i]);
    NB_CHECK(type >= 1 && type <= 6, format, "token ", i, " (", in_quotes(tokens[i]), ") has an unknown type: ", type);
    types_[i] = types[i];
  }
  seed_ = random_seed();  // so that no file can be made whose tokens all fall into one slot
  slots_.assign(std::bit_ceil(size + size / 2 + 2), -1);
  mask_ = slots_.size() - 1;
  forms_.assign(size, Form::verbatim);
  pool_.reserve(text_bytes);
  offsets_.reserve(size + 1);
  offsets_.push_back(0);
  for (std::size_t i = 0; i < size; ++i) add(static_cast<TokenId>(i), tokens[i]);
  pool_.shrink_to_fit();
}

Vocabulary::Form Vocabulary::append_bytes(TokenId id, std::string_view text) {
  const TokenType type = types_[static_cast<std::size_t>(id)];
  if (spelling_ == Spelling::byte_level) {
    const bool can_spell = type == TokenType::normal || type == TokenType::byte;
    if (can_spell && append_spelled(pool_, text)) return Form::spelled;
  } else if (type == TokenType::byte) {
    const std::optional<std::uint8_t> byte = named_byte(text);
    NB_CHECK(byte.has_value(), format, "token ", id, " (", in_quotes(text),
             ") is of type byte but not of the form <0x0A>");
    pool_.push_back(static_cast<char>(*byte));
    return Form::byte;
  } else if (type != TokenType::control && type != TokenType::unknown && text.find(' ') == std::string_view::npos) {
    pool_.append(with_spaces(text));
    return Form::spelled;
  }
  pool_.append(text);
  return Form::verbatim;
}

void Vocabulary::add(TokenId id, std::string_view text) {
  const TokenId same = find_text(text);
  NB_CHECK(same < 0, format, "token ", id, " (", in_quotes(text), ") repeats token ", same);
  const Form form = append_bytes(id, text);
  forms_[static_cast<std::size_t>(id)] = form;
  offsets_.push_back(static_cast<std::uint32_t>(pool_.size()));
  const std::string_view bytes = stored(id);
  if (bytes.empty()) return;
  max_token_bytes_ = std::max(max_token_bytes_, bytes.size());
  std::size_t slot = slot_of(bytes, form);
  while (slots_[slot] >= 0) slot = (slot + 1) & mask_;
  slots_[slot] = id;
}

std::string_view Vocabulary::stored(TokenId id) const {
  const std::size_t i = static_cast<std::size_t>(id);
  return std::string_view(pool_).substr(offsets_[i], offsets_[i + 1] - offsets_[i]);
}

std::size_t Vocabulary::slot_of(std::string_view bytes, Form form) const {
  return static_cast<std::size_t>(hash_of(bytes, seed_ + static_cast<std::uint64_t>(form))) & mask_;
}

TokenId Vocabulary::find(std::string_view bytes, Form form) const {
  for (std::size_t slot = slot_of(bytes, form); slots_[slot] >= 0; slot = (slot + 1) & mask_) {
    const TokenId id = slots_[slot];
    if (forms_[static_cast<std::size_t>(id)] == form && stored(id) == bytes) return id;
  }
  return -1;
}

TokenId Vocabulary::find_byte_token(std::uint8_t byte) const {
  const char c = static_cast<char>(byte);
  return find(std::string_view(&c, 1), Form::byte);
}

TokenId Vocabulary::find_text(std::string_view text) const {
  if (spelling_ == Spelling::byte_level) {
    // No two tokens have one text, so that the order does not matter; most are spelled.
    const std::optional<std::string> bytes = spelled_bytes(text);
    const TokenId id = bytes ? find(*bytes, Form::spelled) : -1;
    return id >= 0 ? id : find(text, Form::verbatim);
  }
  if (const TokenId id = find(text, Form::verbatim); id >= 0) return id;
  if (const std::optional<std::uint8_t> byte = named_byte(text)) {
    if (const TokenId id = find_byte_token(*byte); id >= 0) return id;
  }
  return text.find(' ') == std::string_view::npos ? find(with_spaces(text), Form::spelled) : -1;
}

std::string_view Vocabulary::bytes(TokenId id) const {
  return type(id) == TokenType::unused ? std::string_view() : stored(id);
}

std::string Vocabulary::text(TokenId id) const {
  static constexpr char kHex[] = "0123456789ABCDEF";
  const std::string_view bytes = stored(id);
  switch (forms_[static_cast<std::size_t>(id)]) {
    case Form::verbatim:
      return std::string(bytes);
    case Form::byte: {
      const std::uint8_t byte = static_cast<std::uint8_t>(bytes[0]);
      return std::string("<0x") + kHex[byte >> 4] + kHex[byte & 15] + ">";
    }
    case Form::spelled:
      break;
  }
  if (spelling_ == Spelling::sentencepiece) return with_space_marks(bytes);
  std::string out;
  for (const char c : bytes) append_byte_char(out, static_cast<std::uint8_t>(c));
  return out;
}

std::size_t Vocabulary::memory_bytes() const {
  return pool_.capacity() + offsets_.capacity() * sizeof(offsets_[0]) + types_.capacity() * sizeof(types_[0]) +
         forms_.capacity() * sizeof(forms_[0]) + slots_.capacity() * sizeof(slots_[0]);
}

}  // namespace nb::text
