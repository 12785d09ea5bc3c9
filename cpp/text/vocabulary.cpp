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
  while (position < end) {
    const DecodedChar next = decode_utf8(position, end);
    const bool known = next.status == Utf8Status::valid && next.code_point < kAlphabetEnd;
    const int byte = known ? letters.byte_of[next.code_point] : -1;
    if (byte < 0) {
      out.resize(old_size);
      return false;
    }
    out.push_back(static_cast<char>(static_cast<std::uint8_t>(byte)));
    position += next.length;
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

Vocabulary::Vocabulary(std::span<const std::string_view> tokens, std::span<const TokenType> types) {
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
  raw_.assign(size, false);
  pool_.reserve(text_bytes);
  offsets_.reserve(size + 1);
  offsets_.push_back(0);
  for (std::size_t i = 0; i < size; ++i) add(static_cast<TokenId>(i), tokens[i]);
  pool_.shrink_to_fit();
}

void Vocabulary::add(TokenId id, std::string_view text) {
  const TokenId same = find_text(text);
  NB_CHECK(same < 0, format, "token ", id, " (", in_quotes(text), ") repeats token ", same);
  const bool can_spell = type(id) == TokenType::normal || type(id) == TokenType::byte;
  const bool is_raw = !can_spell || !append_spelled(pool_, text);
  if (is_raw) pool_.append(text);
  raw_[static_cast<std::size_t>(id)] = is_raw;
  offsets_.push_back(static_cast<std::uint32_t>(pool_.size()));
  const std::string_view bytes = stored(id);
  if (bytes.empty()) return;
  max_token_bytes_ = std::max(max_token_bytes_, bytes.size());
  std::size_t slot = slot_of(bytes, is_raw);
  while (slots_[slot] >= 0) slot = (slot + 1) & mask_;
  slots_[slot] = id;
}

std::string_view Vocabulary::stored(TokenId id) const {
  const std::size_t i = static_cast<std::size_t>(id);
  return std::string_view(pool_).substr(offsets_[i], offsets_[i + 1] - offsets_[i]);
}

std::size_t Vocabulary::slot_of(std::string_view bytes, bool is_raw) const {
  return static_cast<std::size_t>(hash_of(bytes, is_raw ? ~seed_ : seed_)) & mask_;
}

TokenId Vocabulary::find(std::string_view bytes, bool is_raw) const {
  for (std::size_t slot = slot_of(bytes, is_raw); slots_[slot] >= 0; slot = (slot + 1) & mask_) {
    const TokenId id = slots_[slot];
    if (raw_[static_cast<std::size_t>(id)] == is_raw && stored(id) == bytes) return id;
  }
  return -1;
}

TokenId Vocabulary::find_text(std::string_view text) const {
  if (const TokenId id = find(text, true); id >= 0) return id;
  const std::optional<std::string> bytes = spelled_bytes(text);
  return bytes ? find(*bytes, false) : -1;
}

std::string_view Vocabulary::bytes(TokenId id) const {
  return type(id) == TokenType::unused ? std::string_view() : stored(id);
}

std::string Vocabulary::text(TokenId id) const {
  if (raw_[static_cast<std::size_t>(id)]) return std::string(stored(id));
  std::string out;
  for (const char c : stored(id)) append_byte_char(out, static_cast<std::uint8_t>(c));
  return out;
}

std::size_t Vocabulary::memory_bytes() const {
  return pool_.capacity() + offsets_.capacity() * sizeof(offsets_[0]) + types_.capacity() * sizeof(types_[0]) +
         raw_.capacity() / 8 + slots_.capacity() * sizeof(slots_[0]);
}

}  // namespace nb::text
