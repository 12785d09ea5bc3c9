// What happens to text before it is split: NFC, SentencePiece's spaces; and the way back from normalised to given
// bytes.
//
// Works on the stretches of text between added tokens. Not for SentencePiece's compiled character maps. Pure functions;
// safe to use from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace nb::text {

/// Where SentencePiece's dummy prefix goes, a space in front of text so that its first word looks like any other.
enum class SpacePrefix : std::uint8_t {
  none,
  text,                ///< in front of the whole text (sentencepiece)
  stretches,           ///< in front of every stretch between added tokens (llama.cpp; tokenizers' Prepend)
  text_if_unspaced,    ///< of a text that begins with neither an added token nor a space (tokenizers' Metaspace, first)
  stretches_unspaced,  ///< of every stretch that does not begin with a space (tokenizers' Metaspace, always)
};

struct Normalization {
  bool nfc = false;                              ///< Unicode's canonical composition
  bool space_marks = false;                      ///< U+2581 is a space, as SentencePiece cannot tell them apart
  bool collapse_spaces = false;                  ///< runs of spaces become one, those at the ends of the text none
  SpacePrefix space_prefix = SpacePrefix::none;  ///< looked at by `wants_prefix` only

  bool is_identity() const { return !nfc && !space_marks && !collapse_spaces && space_prefix == SpacePrefix::none; }
};

/// What is known about a stretch of text between added tokens.
struct Stretch {
  bool is_first = true;  ///< nothing but it, or an added token, is before it
  bool is_last = true;   ///< it ends the text
  bool prefix = false;   ///< put a space in front
};

/// A text and where its bytes come from. Runs are in order and cover the text; a copied run maps byte to byte, another
/// as a whole to the given bytes up to the beginning of the next run.
struct Normalized {
  struct Run {
    std::size_t begin;         ///< in `text`
    std::size_t source_begin;  ///< in the given text
    bool copied;
  };
  std::string text;
  std::vector<Run> runs;
  std::size_t source_size = 0;

  /// The given bytes [first, second) that text[begin, end) comes from. A part of a run that is not copied comes from
  /// all of it. `cursor` must be 0 at first and is kept between calls with ascending positions.
  std::pair<std::size_t, std::size_t> source_of(std::size_t begin, std::size_t end, std::size_t& cursor) const;
};

/// Whether a stretch wants a prefix; it may be empty. `begins_text`: nothing is before it.
bool wants_prefix(SpacePrefix where, bool begins_text, std::string_view stretch);

/// Normalises one stretch. What is not UTF-8 is copied.
Normalized normalize(const Normalization& how, std::string_view text, const Stretch& stretch);

}  // namespace nb::text
