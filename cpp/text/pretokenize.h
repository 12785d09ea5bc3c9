// Named scanners which cut text into the pieces that byte-pair merges never cross.
//
// Each is written by hand after the regular expression that the model family publishes (quoted above it in the
// source); no regex library runs. Not for added tokens such as <|im_end|>: they are cut out before. Pure functions;
// safe to use from any thread.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

namespace nb::text {

/// The length in bytes (> 0) of the first piece of `rest`, which must not be empty and must reach to the end of the
/// text: the patterns look ahead. Bytes that are not UTF-8 count as one character of no class for each maximal
/// subpart (see DecodedChar).
using Scanner = std::size_t (*)(std::string_view rest);

/// One row of the table. To support another pre-tokenizer, add a scanner and a row.
struct PreTokenizer {
  std::string_view name;  ///< the value of tokenizer.ggml.pre
  Scanner next_piece;
  bool whole_pieces_first;  ///< a piece that is a token is that token, whatever the merges say ("ignore_merges")
  bool adds_bos;            ///< the family begins texts with BOS when its file does not say
  bool nfc;                 ///< the family normalises texts to NFC first
};

/// Every known pre-tokenizer, aliases included.
std::span<const PreTokenizer> pre_tokenizers();

/// The row called `name`; throws `unsupported`, listing the known names, if there is none.
const PreTokenizer& find_pre_tokenizer(std::string_view name);

/// All pieces of `text` in order; joined, they are `text`. The views point into `text`.
std::vector<std::string_view> split_pieces(const PreTokenizer& pre_tokenizer, std::string_view text);

}  // namespace nb::text
