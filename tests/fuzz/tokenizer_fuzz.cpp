// Fuzz target: the input describes a small tokenizer, hostile ones too, and a text. Building may throw nb::Error and
// nothing else; what is built must encode any bytes, say where each token comes from, and give the text back.
//
// The input: a line of numbers and letters (see read_settings), then a line for each token, then an empty line and the
// text. A token's line is its type (a digit), its score (a letter) and its text; one that begins with '+' is a merge.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "text/pretokenize.h"
#include "text/text_stream.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace {

using namespace nb::text;
using nb::TokenId;

constexpr std::size_t kMaxText = 4096;
constexpr std::size_t kMaxTokens = 256;  // described ones, besides the 256 bytes

void require(bool condition) {
  if (!condition) std::abort();
}

class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : rest_(reinterpret_cast<const char*>(data), size) {}

  std::uint8_t byte() {
    if (rest_.empty()) return 0;
    const std::uint8_t first = static_cast<std::uint8_t>(rest_.front());
    rest_.remove_prefix(1);
    return first;
  }

  std::string_view line() {
    const std::size_t length = std::min(rest_.find('\n'), rest_.size());
    const std::string_view out = rest_.substr(0, length);
    rest_.remove_prefix(std::min(length + 1, rest_.size()));
    return out;
  }

  std::string_view rest() const { return rest_; }

 private:
  std::string_view rest_;
};

/// What the input describes; owns the texts which the spec views.
struct Described {
  TokenizerSpec spec;
  std::deque<std::string> texts;
  std::string text;
};

void add_byte_tokens(Described& out) {
  static constexpr char kHex[] = "0123456789ABCDEF";
  for (std::size_t byte = 0; byte < 256; ++byte) {
    std::string text;
    if (out.spec.model == "llama") {
      text = std::string("<0x") + kHex[byte >> 4] + kHex[byte & 15] + ">";
    } else {
      append_byte_char(text, static_cast<std::uint8_t>(byte));
    }
    out.spec.tokens.push_back(out.texts.emplace_back(text));
    out.spec.types.push_back(out.spec.model == "llama" ? TokenType::byte : TokenType::normal);
    out.spec.scores.push_back(-1e9f);
  }
}

float score_of(char letter) {
  if (letter == '?') return std::numeric_limits<float>::quiet_NaN();
  if (letter == '!') return -std::numeric_limits<float>::infinity();
  return -static_cast<float>(static_cast<std::uint8_t>(letter));
}

/// Kind, pre-tokenizer, flags, the number of a special token, what is left out, and one token to replace.
void read_settings(Input& input, Described& out) {
  TokenizerSpec& spec = out.spec;
  const std::uint8_t kind = input.byte();
  const std::uint8_t flags = input.byte();
  const std::uint8_t special = input.byte();
  const std::uint8_t strip = input.byte();
  const std::uint8_t damage = input.byte();
  spec.model = kind % 2 == 0 ? "gpt2" : "llama";
  const auto rows = pre_tokenizers();
  spec.pre = std::string(rows[kind / 2 % rows.size()].name);
  spec.space_prefix = static_cast<SpacePrefix>(flags % 5);
  spec.remove_extra_whitespaces = (flags & 8) != 0;
  if ((flags & 16) != 0) spec.nfc = (flags & 32) != 0;
  if ((flags & 64) != 0) spec.ignore_merges = (flags & 128) != 0;
  if ((damage & 1) == 0) add_byte_tokens(out);
  const TokenId first = (damage & 1) == 0 ? 256 : 0;
  if ((special & 1) != 0) spec.bos = first + special / 16;
  if ((special & 2) != 0) spec.eos = first + special / 8 % 4;
  if ((special & 4) != 0) spec.eos_ids = {first + 1, '\n'};
  spec.add_bos = (special & 1) != 0 && (special & 8) != 0;
  spec.add_eos = (special & 2) != 0 && (special & 16) != 0;
  if ((strip & 1) != 0) spec.lstrip = {first + strip / 4 % 8, first};
  if ((strip & 2) != 0) spec.rstrip = {first + strip / 32};
  // Some byte is another token: byte-level ones then leave it out, SentencePiece must refuse.
  if ((damage & 2) != 0 && !spec.tokens.empty()) spec.tokens[damage / 4 + 32u] = "[none]";
  input.line();
}

Described describe(Input& input) {
  Described out;
  read_settings(input, out);
  for (std::size_t count = 0; count < kMaxTokens; ++count) {
    const std::string_view line = input.line();
    if (line.empty()) break;
    if (line.front() == '+') {
      out.spec.merges.push_back(out.texts.emplace_back(line.substr(1)));
      continue;
    }
    const std::string_view text = line.substr(std::min<std::size_t>(2, line.size()));
    out.spec.tokens.push_back(out.texts.emplace_back(text));
    out.spec.types.push_back(static_cast<TokenType>(line.front() - '0'));
    out.spec.scores.push_back(score_of(line.size() > 1 ? line[1] : 'a'));
  }
  out.text = std::string(input.rest().substr(0, kMaxText));
  if (out.spec.types.size() % 7 == 6) out.spec.types.clear();
  if (out.spec.scores.size() % 11 == 10) out.spec.scores.pop_back();
  return out;
}

std::string streamed(const Tokenizer& tokenizer, std::span<const TokenId> ids, bool skip_special) {
  TextStream stream(tokenizer, skip_special);
  std::string out;
  for (const TokenId id : ids) {
    out += stream.push(id);
    require(is_utf8(out));
  }
  return out + stream.finish();
}

/// Whether the text comes back byte for byte: nothing is normalised, taken by added tokens or missing.
bool keeps_text(const TokenizerSpec& spec, const Tokenizer& tokenizer, std::string_view text) {
  if (!spec.lstrip.empty() || !spec.rstrip.empty() || !tokenizer.missing_bytes().empty()) return false;
  if (spec.model == "gpt2") return !spec.nfc.value_or(find_pre_tokenizer(spec.pre).nfc);
  return spec.space_prefix == SpacePrefix::none && !spec.remove_extra_whitespaces &&
         text.find(kSpaceMark) == std::string_view::npos;
}

void check(const Described& given, const Tokenizer& tokenizer, bool add_special, bool parse_special) {
  const std::string& text = given.text;
  const Encoding found = tokenizer.encode_with_spans(text, add_special, parse_special);
  require(tokenizer.encode(text, add_special, parse_special) == found.ids);
  require(found.spans.size() == found.ids.size());
  TextSpan previous{0, 0};
  std::string bytes;
  for (std::size_t i = 0; i < found.ids.size(); ++i) {
    const TokenId id = found.ids[i];
    const TextSpan span = found.spans[i];
    require(id >= 0 && id < tokenizer.vocab_size());
    const bool is_added = add_special && ((i == 0 && tokenizer.adds_bos() && id == tokenizer.bos()) ||
                                          (i + 1 == found.ids.size() && tokenizer.adds_eos()));
    if (is_added) {
      require(span == (TextSpan{0, 0}));
      continue;
    }
    require(span.begin <= span.end && span.end <= text.size());
    require(previous.begin <= span.begin && previous.end <= span.end);
    previous = span;
    require(parse_special || !tokenizer.is_special(id));
    bytes += tokenizer.token_bytes(id);
    if (keeps_text(given.spec, tokenizer, text)) {
      require(text.substr(span.begin, span.end - span.begin) == tokenizer.token_bytes(id));
    }
  }
  if (keeps_text(given.spec, tokenizer, text)) {
    require(bytes == text);
    if (!add_special) require(tokenizer.decode(found.ids, false) == replace_invalid_utf8(text));
  }
  for (const bool skip_special : {false, true}) {
    require(streamed(tokenizer, found.ids, skip_special) == tokenizer.decode(found.ids, skip_special));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  const Described given = describe(input);
  std::optional<Tokenizer> tokenizer;
  try {
    tokenizer.emplace(given.spec);
  } catch (const nb::Error&) {
    return 0;
  }
  for (const bool add_special : {false, true}) {
    for (const bool parse_special : {false, true}) check(given, *tokenizer, add_special, parse_special);
  }
  // Every token in turn, in an order that no text has.
  std::vector<TokenId> ids;
  for (TokenId id = tokenizer->vocab_size() - 1; id >= 0; --id) {
    ids.push_back(id);
    require(tokenizer->token_text(id) == given.spec.tokens[static_cast<std::size_t>(id)]);
  }
  require(streamed(*tokenizer, ids, false) == tokenizer->decode(ids, false));
  require(tokenizer->memory_bytes() < 64u << 20);
  return 0;
}
