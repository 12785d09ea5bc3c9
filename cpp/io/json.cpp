#include "io/json.h"

#include <limits>

#include "base/error.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

constexpr std::size_t kMaxDepth = 32;

bool is_digit(char c) { return c >= '0' && c <= '9'; }

}  // namespace

JsonCursor::JsonCursor(std::string_view text, const std::string& path, std::uint64_t offset)
    : text_(text), path_(path), base_(offset) {
  if (!text::is_utf8(text)) refuse("the JSON text is not UTF-8");
}

void JsonCursor::refuse(const std::string& what) const {
  fail(ErrorCode::format, path_, ": at offset ", offset(), ": ", what);
}

void JsonCursor::skip_space() {
  while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r'))
    ++at_;
}

bool JsonCursor::take(char character) {
  if (at_ >= text_.size() || text_[at_] != character) return false;
  ++at_;
  return true;
}

void JsonCursor::expect(char character, const char* what) {
  skip_space();
  if (!take(character)) refuse(std::string("expected ") + what);
}

void JsonCursor::open(char bracket, const char* what) {
  expect(bracket, what);
  if (has_items_.size() >= kMaxDepth) refuse("more than " + std::to_string(kMaxDepth) + " levels of nesting");
  has_items_.push_back(false);
}

void JsonCursor::begin_object() { open('{', "an object"); }
void JsonCursor::begin_array() { open('[', "an array"); }

bool JsonCursor::next_item(char end) {
  NB_ASSERT(!has_items_.empty());
  skip_space();
  if (take(end)) {
    has_items_.pop_back();
    return false;
  }
  if (has_items_.back()) expect(',', end == '}' ? "',' or '}'" : "',' or ']'");
  has_items_.back() = true;
  return true;
}

bool JsonCursor::next_element() { return next_item(']'); }

bool JsonCursor::next_key(std::string& key) {
  if (!next_item('}')) return false;
  key = string();
  expect(':', "':'");
  return true;
}

std::uint32_t JsonCursor::hex4() {
  std::uint32_t value = 0;
  for (int i = 0; i < 4; ++i, ++at_) {
    const char c = at_ < text_.size() ? text_[at_] : ' ';
    std::uint32_t digit = 0;
    if (is_digit(c)) {
      digit = static_cast<std::uint32_t>(c - '0');
    } else if ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
      digit = static_cast<std::uint32_t>((c | 32) - 'a' + 10);
    } else {
      refuse("\\u wants four hexadecimal digits");
    }
    value = value << 4 | digit;
  }
  return value;
}

void JsonCursor::escape(std::string& out) {
  constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
  const char letter = at_ < text_.size() ? text_[at_++] : ' ';
  if (const std::size_t index = kFrom.find(letter); index != std::string_view::npos) {
    out += kTo[index];
    return;
  }
  if (letter != 'u') refuse("unknown escape in a string");
  std::uint32_t code = hex4();
  if (code >= 0xd800 && code < 0xdc00 && text_.substr(at_, 2) == "\\u") {
    at_ += 2;
    const std::uint32_t low = hex4();
    if (low < 0xdc00 || low >= 0xe000) refuse("half of a surrogate pair in a string");
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }
  if (code >= 0xd800 && code < 0xe000) refuse("half of a surrogate pair in a string");
  text::append_utf8(out, static_cast<char32_t>(code));
}

std::string JsonCursor::string() {
  expect('"', "a string");
  std::string out;
  while (!take('"')) {
    if (at_ >= text_.size()) refuse("the text ends inside a string");
    const char c = text_[at_];
    if (static_cast<unsigned char>(c) < 0x20) refuse("a control character inside a string");
    ++at_;
    if (c == '\\') {
      escape(out);
    } else {
      out += c;
    }
  }
  return out;
}

std::uint64_t JsonCursor::unsigned_integer() {
  skip_space();
  const std::size_t begin = at_;
  constexpr std::uint64_t kMax = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t value = 0;
  for (; at_ < text_.size() && is_digit(text_[at_]); ++at_) {
    const auto digit = static_cast<std::uint64_t>(text_[at_] - '0');
    if (value > (kMax - digit) / 10) refuse("the number is too large");
    value = value * 10 + digit;
  }
  if (at_ == begin) refuse("expected a number without sign");
  if (at_ - begin > 1 && text_[begin] == '0') refuse("a number with a leading zero");
  if (at_ < text_.size() && (text_[at_] == '.' || (text_[at_] | 32) == 'e')) refuse("expected a whole number");
  return value;
}

void JsonCursor::skip_number() {
  const auto digits = [&] {
    const std::size_t begin = at_;
    while (at_ < text_.size() && is_digit(text_[at_])) ++at_;
    if (at_ == begin) refuse("expected a value");
  };
  take('-');
  if (!take('0')) digits();
  if (take('.')) digits();
  if (at_ < text_.size() && (text_[at_] | 32) == 'e') {
    ++at_;
    if (!take('+')) take('-');
    digits();
  }
}

void JsonCursor::skip_word(std::string_view word) {
  if (text_.substr(at_, word.size()) != word) refuse("expected a value");
  at_ += word.size();
}

void JsonCursor::skip_value() {
  skip_space();
  const char c = at_ < text_.size() ? text_[at_] : ' ';
  if (c == '{') {
    begin_object();
    std::string key;
    while (next_key(key)) skip_value();
  } else if (c == '[') {
    begin_array();
    while (next_element()) skip_value();
  } else if (c == '"') {
    static_cast<void>(string());
  } else if (c == 't') {
    skip_word("true");
  } else if (c == 'f') {
    skip_word("false");
  } else if (c == 'n') {
    skip_word("null");
  } else {
    skip_number();
  }
}

void JsonCursor::finish() {
  NB_ASSERT(has_items_.empty());
  skip_space();
  if (at_ != text_.size()) refuse("something follows the end of the JSON text");
}

}  // namespace nb::io
