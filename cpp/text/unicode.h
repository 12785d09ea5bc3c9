// UTF-8 and the three character classes that pre-tokenizers ask for: \p{L}, \p{N} and \s.
//
// The classes are those of Unicode 16.0, the edition of the `tokenizers` 0.23 and `tiktoken` 0.14 packages (see
// tools/generate_unicode_tables.py). Not for normalisation, case or display width. Safe to use from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace nb::text {

/// No code point has two of these classes.
enum class CharClass : std::uint8_t { other = 0, letter = 1, number = 2, whitespace = 3 };

namespace tables {  // in unicode_tables.cpp
inline constexpr std::size_t kNumBlocks = 4352;
extern const std::uint8_t kBlockOf[kNumBlocks];
extern const std::uint8_t kBlocks[][64];
}  // namespace tables

/// The class of a code point; values above U+10FFFF are `other`.
inline CharClass char_class(char32_t code_point) {
  if (code_point >= 0x110000) return CharClass::other;
  const std::uint8_t four = tables::kBlocks[tables::kBlockOf[code_point >> 8]][(code_point & 0xffu) >> 2];
  return static_cast<CharClass>((four >> (2 * (code_point & 3u))) & 3u);
}

/// \p{L}
inline bool is_letter(char32_t code_point) { return char_class(code_point) == CharClass::letter; }
/// \p{N}
inline bool is_number(char32_t code_point) { return char_class(code_point) == CharClass::number; }
/// \s, which is the property White_Space
inline bool is_whitespace(char32_t code_point) { return char_class(code_point) == CharClass::whitespace; }

/// U+FFFD, which stands for bytes that are not UTF-8.
inline constexpr char32_t kReplacementChar = 0xFFFD;

enum class Utf8Status : std::uint8_t {
  valid,
  invalid,     ///< can never become a character, whatever follows
  incomplete,  ///< the beginning of a character, cut off by the end of the text
};

/// What `decode_utf8` found. `length` bytes belong to it (1 to 4). Unless the status is `valid`, `code_point` is
/// kReplacementChar and `length` is that of the maximal subpart (Unicode 16, section 3.9, table 3-11), so that one
/// U+FFFD a step gives what Rust's from_utf8_lossy and Python's errors="replace" give.
struct DecodedChar {
  char32_t code_point;
  std::uint32_t length;
  Utf8Status status;
};

/// Decodes the first character of [begin, end), which must not be empty. Strict: no overlong forms, no surrogates,
/// nothing above U+10FFFF.
DecodedChar decode_utf8(const char* begin, const char* end);

/// Appends a code point that is not a surrogate and at most U+10FFFF.
void append_utf8(std::string& out, char32_t code_point);

/// Appends `bytes` with U+FFFD in place of what is not UTF-8, up to an incomplete character at the end.
/// Returns how many bytes were dealt with: at most 3 fewer than `bytes.size()`.
std::size_t append_replacing_invalid(std::string& out, std::string_view bytes);

/// As above for a whole text: an incomplete character at the end becomes one U+FFFD.
std::string replace_invalid_utf8(std::string_view bytes);

/// Whether `bytes` are valid UTF-8 throughout.
bool is_utf8(std::string_view bytes);

/// `text` in double quotes for an error message: control characters and invalid bytes escaped, long texts cut.
std::string in_quotes(std::string_view text);

}  // namespace nb::text
