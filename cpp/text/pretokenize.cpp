#include "text/pretokenize.h"

#include <array>
#include <cstdint>
#include <string>

#include "base/error.h"
#include "text/unicode.h"

namespace nb::text {

namespace {

struct Char {
  char32_t code_point;
  std::uint32_t length;
  CharClass char_class;
};

/// The character at `position`, which must be before `end`.
inline Char char_at(const char* position, const char* end) {
  const std::uint8_t byte = static_cast<std::uint8_t>(*position);
  if (byte < 0x80) return {byte, 1, char_class(byte)};
  const DecodedChar decoded = decode_utf8(position, end);
  return {decoded.code_point, decoded.length, char_class(decoded.code_point)};
}

/// The end of the run of characters of one class that begins at `position`.
inline const char* skip(const char* position, const char* end, CharClass wanted) {
  while (position < end) {
    const Char next = char_at(position, end);
    if (next.char_class != wanted) break;
    position += next.length;
  }
  return position;
}

inline bool is_newline(char32_t code_point) { return code_point == '\r' || code_point == '\n'; }

/// The length of 's 't 're 've 'm 'll or 'd at `position`, which holds the apostrophe; 0 if none is there.
/// Folding case makes U+017F (long s) an s too, as Unicode's simple case folding does.
std::size_t contraction_length(const char* position, const char* end, bool fold_case) {
  const auto letter_at = [=](std::ptrdiff_t i) {
    if (end - position <= i) return '\0';
    const char c = position[i];
    return fold_case && c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  };
  const char first = letter_at(1);
  const char second = letter_at(2);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
  if (((first == 'r' || first == 'v') && second == 'e') || (first == 'l' && second == 'l')) return 3;
  if (fold_case && first == '\xC5' && second == '\xBF') return 3;
  return 0;
}

/// A run of whitespace and what the patterns ask about it.
struct Whitespace {
  const char* end;          // after the last character
  const char* last;         // the last character
  const char* newline_end;  // after the last \r or \n; nullptr if there is none
};

Whitespace whitespace_run(const char* position, const char* end) {
  Whitespace run{position, position, nullptr};
  while (run.end < end) {
    const Char next = char_at(run.end, end);
    if (next.char_class != CharClass::whitespace) break;
    run.last = run.end;
    run.end += next.length;
    if (is_newline(next.code_point)) run.newline_end = run.end;
  }
  return run;
}

// gpt2: '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//
// smollm: every \p{N} is first cut out as a piece of its own and the pattern above then applied to what lies between.
// That equals the pattern with two changes (`numbers_apart`): a number stands alone, and whitespace before a number
// is whitespace at the end of a text.
template <bool numbers_apart>
std::size_t scan_gpt2(std::string_view rest) {
  const char* const begin = rest.data();
  const char* const end = begin + rest.size();
  const Char first = char_at(begin, end);
  if (first.code_point == '\'') {
    if (const std::size_t length = contraction_length(begin, end, false); length > 0) return length;
  }
  if (numbers_apart && first.char_class == CharClass::number) return first.length;

  const char* const word = first.code_point == ' ' ? begin + 1 : begin;
  if (word < end) {
    const CharClass word_class = char_at(word, end).char_class;
    const bool has_word = word_class != CharClass::whitespace && !(numbers_apart && word_class == CharClass::number);
    if (has_word) return static_cast<std::size_t>(skip(word, end, word_class) - begin);
  }

  // \s+(?!\S) gives one character back when something follows, if it has one to give; \s+ takes what is left.
  const Whitespace run = whitespace_run(begin, end);
  const bool at_end = run.end == end || (numbers_apart && char_at(run.end, end).char_class == CharClass::number);
  const char* const piece_end = at_end || run.last == begin ? run.end : run.last;
  return static_cast<std::size_t>(piece_end - begin);
}

// llama3: (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|
//         \s+(?!\S)|\s+
// qwen2: the same with \p{N} in place of \p{N}{1,3}
template <int max_numbers>
std::size_t scan_llama3(std::string_view rest) {
  const char* const begin = rest.data();
  const char* const end = begin + rest.size();
  const Char first = char_at(begin, end);
  const char* const second = begin + first.length;
  if (first.code_point == '\'') {
    if (const std::size_t length = contraction_length(begin, end, true); length > 0) return length;
  }

  if (first.char_class == CharClass::letter) {
    return static_cast<std::size_t>(skip(second, end, CharClass::letter) - begin);
  }
  if (first.char_class == CharClass::number) {
    const char* position = second;
    for (int i = 1; i < max_numbers && position < end; ++i) {
      const Char next = char_at(position, end);
      if (next.char_class != CharClass::number) break;
      position += next.length;
    }
    return static_cast<std::size_t>(position - begin);
  }
  if (!is_newline(first.code_point) && second < end && char_at(second, end).char_class == CharClass::letter) {
    return static_cast<std::size_t>(skip(second, end, CharClass::letter) - begin);
  }

  const char* const symbols = first.code_point == ' ' ? begin + 1 : begin;
  if (symbols < end && char_at(symbols, end).char_class == CharClass::other) {
    const char* position = skip(symbols, end, CharClass::other);
    while (position < end && (*position == '\r' || *position == '\n')) ++position;
    return static_cast<std::size_t>(position - begin);
  }

  // \s*[\r\n]+ backtracks to the last newline of the run; without one, as in gpt2.
  const Whitespace run = whitespace_run(begin, end);
  if (run.newline_end != nullptr) return static_cast<std::size_t>(run.newline_end - begin);
  const char* const piece_end = run.end == end || run.last == begin ? run.end : run.last;
  return static_cast<std::size_t>(piece_end - begin);
}

constexpr Scanner kGpt2 = scan_gpt2<false>;
constexpr Scanner kSmollm = scan_gpt2<true>;
constexpr Scanner kLlama3 = scan_llama3<3>;
constexpr Scanner kQwen2 = scan_llama3<1>;

// Names as converters to GGUF write them.
constexpr std::array kPreTokenizers{
    // name, scanner, whole_pieces_first, adds_bos, nfc
    PreTokenizer{"smollm", kSmollm, false, false, false},
    PreTokenizer{"gpt2", kGpt2, false, false, false},
    PreTokenizer{"gpt-2", kGpt2, false, false, false},
    PreTokenizer{"default", kGpt2, false, false, false},
    PreTokenizer{"llama-bpe", kLlama3, true, true, false},
    PreTokenizer{"llama3", kLlama3, true, true, false},
    PreTokenizer{"llama-v3", kLlama3, true, true, false},
    PreTokenizer{"qwen2", kQwen2, false, false, true},
    PreTokenizer{"deepseek-r1-qwen", kQwen2, false, false, false},
};

}  // namespace

std::span<const PreTokenizer> pre_tokenizers() { return kPreTokenizers; }

const PreTokenizer& find_pre_tokenizer(std::string_view name) {
  std::string known;
  for (const PreTokenizer& row : kPreTokenizers) {
    if (row.name == name) return row;
    known.append(known.empty() ? "" : ", ").append(row.name);
  }
  fail(ErrorCode::unsupported, "unknown pre-tokenizer ", in_quotes(name), " (known: ", known, ")");
}

std::vector<std::string_view> split_pieces(const PreTokenizer& pre_tokenizer, std::string_view text) {
  std::vector<std::string_view> pieces;
  while (!text.empty()) {
    const std::size_t length = pre_tokenizer.next_piece(text);
    pieces.push_back(text.substr(0, length));
    text.remove_prefix(length);
  }
  return pieces;
}

}  // namespace nb::text
