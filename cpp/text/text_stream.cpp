#include "text/text_stream.h"

#include <cstddef>
#include <string_view>

#include "text/tokenizer.h"
#include "text/unicode.h"

namespace nb::text {

TextStream::TextStream(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(tokenizer), skip_special_(skip_special) {}

std::string TextStream::push(TokenId id) {
  const std::string_view bytes = tokenizer_.token_bytes(id);
  if (skip_special_ && tokenizer_.is_special(id)) return {};
  pending_ += bytes;
  std::string out;
  pending_.erase(0, append_replacing_invalid(out, pending_));
  return out;
}

std::string TextStream::finish() {
  std::string out = replace_invalid_utf8(pending_);
  pending_.clear();
  return out;
}

}  // namespace nb::text
