// Token ids to text as they arrive: a detokenizer that never sends half a character.
//
// The pieces of text returned, joined, are what Tokenizer::decode gives for all ids. Not for stop strings. One stream
// belongs to one answer and is used by one thread at a time; the tokenizer must outlive it.
#pragma once

#include <string>

#include "base/ids.h"

namespace nb::text {

class Tokenizer;

class TextStream {
 public:
  /// `skip_special` as in Tokenizer::decode. `at_start`: the ids begin a text; if they go on with one, a space that the
  /// first begins with is text.
  explicit TextStream(const Tokenizer& tokenizer, bool skip_special = true, bool at_start = true);

  /// The text that has become certain with this token: whole characters, and U+FFFD for bytes that can no longer
  /// become one. May be empty. Throws `invalid_argument` for an id out of range and then changes nothing.
  std::string push(TokenId id);

  /// What is left: U+FFFD if the last character was cut off, else nothing. The stream then begins a text.
  std::string finish();

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_;
  bool is_first_;
  std::string pending_;  // the beginning of a character, at most 3 bytes
};

}  // namespace nb::text
