// Fuzz target: any bytes, cut into any pieces, arrive as the bytes of tokens do. What comes out must be what a slow
// reading of the definition gives: one U+FFFD for each maximal subpart that is no character.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "text/unicode.h"

namespace {

using namespace nb::text;

void require(bool condition) {
  if (!condition) std::abort();
}

/// Whether `bytes` are exactly one character: the shortest form of a code point that is no surrogate.
bool is_char(std::string_view bytes) {
  const auto at = [&](std::size_t i) { return static_cast<std::uint8_t>(bytes[i]); };
  if (bytes.empty() || bytes.size() > 4) return false;
  if (bytes.size() == 1) return at(0) < 0x80;
  static constexpr std::uint8_t kHeads[] = {0, 0, 0xC0, 0xE0, 0xF0};
  static constexpr std::uint8_t kHeadMasks[] = {0, 0, 0xE0, 0xF0, 0xF8};
  static constexpr std::uint32_t kLowest[] = {0, 0, 0x80, 0x800, 0x10000};
  const std::size_t size = bytes.size();
  if ((at(0) & kHeadMasks[size]) != kHeads[size]) return false;
  std::uint32_t code_point = at(0) & static_cast<std::uint8_t>(~kHeadMasks[size]);
  for (std::size_t i = 1; i < size; ++i) {
    if ((at(i) & 0xC0) != 0x80) return false;
    code_point = code_point * 64 + (at(i) & 0x3F);
  }
  return code_point >= kLowest[size] && code_point < 0x110000 && (code_point < 0xD800 || code_point > 0xDFFF);
}

/// Whether some character begins with `bytes`: the extremes of each byte that may follow are tried.
bool begins_a_char(const std::string& bytes) {
  if (is_char(bytes)) return true;
  if (bytes.size() >= 4) return false;
  for (const char next : {'\x80', '\x8F', '\x90', '\x9F', '\xA0', '\xBF'}) {
    if (begins_a_char(bytes + next)) return true;
  }
  return false;
}

/// The text with U+FFFD, and where the incomplete character at its end begins.
std::string replaced_slowly(std::string_view bytes, std::size_t& incomplete_from) {
  std::string out;
  incomplete_from = bytes.size();
  while (!bytes.empty()) {
    std::size_t length = 1;
    while (length < bytes.size() && begins_a_char(std::string(bytes.substr(0, length + 1)))) ++length;
    const std::string_view part = bytes.substr(0, length);
    const bool valid = is_char(part);
    if (!valid && length == bytes.size() && begins_a_char(std::string(part))) incomplete_from -= length;
    out += valid ? part : "\xEF\xBF\xBD";
    bytes.remove_prefix(length);
  }
  return out;
}

void check_whole(std::string_view bytes) {
  std::size_t incomplete_from = 0;
  const std::string expected = replaced_slowly(bytes, incomplete_from);
  require(replace_invalid_utf8(bytes) == expected);
  require(is_utf8(bytes) == (expected == bytes));
  require(is_utf8(expected));
  std::string out = "kept";
  require(append_replacing_invalid(out, bytes) == incomplete_from);
  require(bytes.size() - incomplete_from <= 3);
  const std::string tail = incomplete_from < bytes.size() ? "\xEF\xBF\xBD" : "";
  require(out + tail == "kept" + expected);
  require(is_utf8(in_quotes(bytes)));
  std::string again;
  for (const char* at = expected.data(); at < expected.data() + expected.size();) {
    const DecodedChar next = decode_utf8(at, expected.data() + expected.size());
    require(next.status == Utf8Status::valid);
    append_utf8(again, next.code_point);
    at += next.length;
  }
  require(again == expected);
}

}  // namespace

// The first byte says how many cuts there are, the following how long each piece is.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t num_cuts = std::min<std::size_t>(data[0] % 32, size - 1);
  const std::string_view cuts = input.substr(1, num_cuts);
  const std::string_view bytes = input.substr(1 + num_cuts);
  check_whole(bytes);
  // As TextStream does it.
  std::string pending;
  std::string streamed;
  std::size_t position = 0;
  for (std::size_t i = 0; position < bytes.size(); ++i) {
    const std::size_t length = cuts.empty() ? 1 : static_cast<std::uint8_t>(cuts[i % cuts.size()]) % 9;
    const std::string_view piece = bytes.substr(position, i < 4 * bytes.size() + 4 ? length : bytes.size());
    position += piece.size();
    pending += piece;
    pending.erase(0, append_replacing_invalid(streamed, pending));
    require(pending.size() <= 3);
    require(is_utf8(streamed));
  }
  streamed += replace_invalid_utf8(pending);
  require(streamed == replace_invalid_utf8(bytes));
  return 0;
}
