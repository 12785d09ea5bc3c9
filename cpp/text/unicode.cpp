#include "text/unicode.h"

namespace nb::text {

namespace {

/// What may follow a lead byte: how many bytes, and the narrower range of the first of them.
struct Lead {
  std::uint32_t num_following;
  std::uint8_t first_low;
  std::uint8_t first_high;
};

// Unicode 16, table 3-7 (well-formed UTF-8). num_following 0: not a lead byte.
Lead lead_of(std::uint8_t byte) {
  if (byte < 0xC2 || byte > 0xF4) return {0, 0, 0};
  if (byte < 0xE0) return {1, 0x80, 0xBF};
  if (byte == 0xE0) return {2, 0xA0, 0xBF};
  if (byte == 0xED) return {2, 0x80, 0x9F};
  if (byte < 0xF0) return {2, 0x80, 0xBF};
  if (byte == 0xF0) return {3, 0x90, 0xBF};
  if (byte == 0xF4) return {3, 0x80, 0x8F};
  return {3, 0x80, 0xBF};
}

constexpr std::size_t kMaxQuotedBytes = 80;

}  // namespace

DecodedChar decode_utf8(const char* begin, const char* end) {
  const std::uint8_t first = static_cast<std::uint8_t>(*begin);
  if (first < 0x80) return {first, 1, Utf8Status::valid};
  const Lead lead = lead_of(first);
  if (lead.num_following == 0) return {kReplacementChar, 1, Utf8Status::invalid};
  const std::size_t available = static_cast<std::size_t>(end - begin);
  char32_t code_point = first & (0x3Fu >> lead.num_following);
  for (std::uint32_t i = 1; i <= lead.num_following; ++i) {
    if (i >= available) return {kReplacementChar, i, Utf8Status::incomplete};
    const std::uint8_t byte = static_cast<std::uint8_t>(begin[i]);
    const std::uint8_t low = i == 1 ? lead.first_low : 0x80;
    const std::uint8_t high = i == 1 ? lead.first_high : 0xBF;
    if (byte < low || byte > high) return {kReplacementChar, i, Utf8Status::invalid};
    code_point = (code_point << 6) | (byte & 0x3Fu);
  }
  return {code_point, lead.num_following + 1, Utf8Status::valid};
}

void append_utf8(std::string& out, char32_t code_point) {
  const auto push = [&out](char32_t byte) { out.push_back(static_cast<char>(static_cast<std::uint8_t>(byte))); };
  if (code_point < 0x80) {
    push(code_point);
  } else if (code_point < 0x800) {
    push(0xC0 | (code_point >> 6));
    push(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    push(0xE0 | (code_point >> 12));
    push(0x80 | ((code_point >> 6) & 0x3F));
    push(0x80 | (code_point & 0x3F));
  } else {
    push(0xF0 | (code_point >> 18));
    push(0x80 | ((code_point >> 12) & 0x3F));
    push(0x80 | ((code_point >> 6) & 0x3F));
    push(0x80 | (code_point & 0x3F));
  }
}

std::size_t append_replacing_invalid(std::string& out, std::string_view bytes) {
  const char* const begin = bytes.data();
  const char* const end = begin + bytes.size();
  const char* valid_from = begin;  // everything before it is in `out`
  const char* position = begin;
  while (position < end) {
    const DecodedChar next = decode_utf8(position, end);
    if (next.status != Utf8Status::valid) {
      out.append(valid_from, position);
      if (next.status == Utf8Status::incomplete) return static_cast<std::size_t>(position - begin);
      append_utf8(out, kReplacementChar);
      valid_from = position + next.length;
    }
    position += next.length;
  }
  out.append(valid_from, end);
  return bytes.size();
}

std::string replace_invalid_utf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  if (append_replacing_invalid(out, bytes) < bytes.size()) append_utf8(out, kReplacementChar);
  return out;
}

bool is_utf8(std::string_view bytes) {
  const char* const end = bytes.data() + bytes.size();
  for (const char* at = bytes.data(); at < end;) {
    const DecodedChar decoded = decode_utf8(at, end);
    if (decoded.status != Utf8Status::valid) return false;
    at += decoded.length;
  }
  return true;
}

std::string in_quotes(std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  const char* position = text.data();
  const char* const end = position + text.size();
  std::string out = "\"";
  while (position < end && out.size() < kMaxQuotedBytes) {
    const DecodedChar next = decode_utf8(position, end);
    const bool printable = next.status == Utf8Status::valid && next.code_point >= 0x20 && next.code_point != 0x7F;
    for (std::uint32_t i = 0; i < next.length; ++i) {
      const std::uint8_t byte = static_cast<std::uint8_t>(position[i]);
      if (printable) {
        out.push_back(position[i]);
      } else {
        out.append("\\x").push_back(kHex[byte >> 4]);
        out.push_back(kHex[byte & 15]);
      }
    }
    position += next.length;
  }
  out += position < end ? "\"..." : "\"";
  return out;
}

}  // namespace nb::text
