// Unicode's canonical composition (NFC), found and applied stretch by stretch, so that text that is in NFC is only
// read.
//
// The tables are those of Unicode 16.0, written by tools/generate_nfc_tables.py. Not for the compatibility forms. Pure
// functions; safe to use from any thread. Source: Unicode Standard Annex 15.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace nb::text {

/// Bytes [begin, end) of a text; empty, both the size of the text, if nothing was found.
struct NfcStretch {
  std::size_t begin;
  std::size_t end;
};

/// The first stretch at or after `from`, which must not be inside of a character, that NFC changes; `composed` is what
/// it becomes. Bytes that are not UTF-8 end a stretch. O(n log n) in what is read.
NfcStretch find_not_nfc(std::string_view text, std::size_t from, std::string& composed);

/// The whole text in NFC.
std::string to_nfc(std::string_view text);

namespace tables {  // in nfc_tables.cpp

/// Consecutive code points that are not simply copied: a combining class other than 0, or composed with others.
struct NfcRange {
  char32_t first;
  char32_t last;
  std::uint8_t combining_class;
};
struct Decomposition {
  char32_t code_point;
  char32_t first;
  char32_t second;  ///< 0: only one
};
struct Composition {
  char32_t first;
  char32_t second;
  char32_t composed;
};

extern const NfcRange kNfcRanges[];  // in order
extern const std::size_t kNumNfcRanges;
extern const Decomposition kDecompositions[];  // by code point, one step each; without Hangul syllables
extern const std::size_t kNumDecompositions;
extern const Composition kCompositions[];  // by first and second; without Hangul syllables
extern const std::size_t kNumCompositions;

}  // namespace tables
}  // namespace nb::text
