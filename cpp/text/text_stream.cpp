#include "text/text_stream.h"

#include <cstddef>

#include "text/tokenizer.h"
#include "text/unicode.h"

namespace nb::text {

TextStream::TextStream(const Tokenizer& tokenizer, bool skip_special, bool at_start)
    : tokenizer_(tokenizer), skip_special_(skip_special), is_first_(at_start && tokenizer.drops_first_space()) {}

std::string TextStream::push(TokenId id) {
  if (tokenizer_.is_special(id) && skip_special_) return {};
  tokenizer_.append_token(id, is_first_, pending_);
  std::string out;
  pending_.erase(0, append_replacing_invalid(out, pending_));
  return out;
}

std::string TextStream::finish() {
  std::string out = replace_invalid_utf8(pending_);
  pending_.clear();
  is_first_ = tokenizer_.drops_first_space();
  return out;
}

}  // namespace nb::text
