// Reads a file's header from front to back, every step checked against its end.
//
// For parsers of hostile bytes: nothing is read that is not there, and errors say path, offset and, in `context`, what
// is being read. Not for tensor data. Used by one parser at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"
#include "io/bytes.h"
#include "text/unicode.h"

namespace nb::io {

class ByteCursor {
 public:
  /// Both must outlive the cursor. Offsets count from the start of `bytes`; reading starts at `begin`, and what ends
  /// with the bytes is called `whole` in messages.
  ByteCursor(std::span<const std::byte> bytes, const std::string& path, std::uint64_t begin = 0,
             const char* whole = "file")
      : bytes_(bytes), path_(path), whole_(whole), at_(begin) {}

  std::string context;

  template <class... Pieces>
  [[noreturn]] void refuse(std::uint64_t offset, const Pieces&... pieces) const {
    fail(ErrorCode::format, path_, ": at offset ", offset, ": ", pieces..., context.empty() ? "" : " (", context,
         context.empty() ? "" : ")");
  }

  const std::string& path() const { return path_; }
  const char* whole() const { return whole_; }
  std::uint64_t size() const { return bytes_.size(); }
  std::uint64_t at() const { return at_; }
  std::uint64_t left() const { return bytes_.size() - at_; }

  std::span<const std::byte> take_bytes(std::uint64_t length, const char* what) {
    if (length > left()) {
      refuse(at_, what, " needs ", length, " bytes, but the ", whole_, " ends after ", left());
    }
    const std::span<const std::byte> taken = bytes_.subspan(at_, length);
    at_ += length;
    return taken;
  }

  /// What has been taken since offset `begin`.
  std::span<const std::byte> since(std::uint64_t begin) const { return bytes_.subspan(begin, at_ - begin); }

  template <class T>
  T take(const char* what) {
    return load<T>(take_bytes(sizeof(T), what).data());
  }

  std::span<const std::byte> take_string(const char* what) {
    const std::uint64_t length = take<std::uint64_t>(what);
    return take_bytes(length, what);
  }

  /// A key or a name: short, not empty, UTF-8.
  std::string_view take_name(const char* what, std::size_t max_length) {
    const std::uint64_t offset = at_;
    const std::string_view name = as_text(take_string(what));
    if (name.empty()) refuse(offset, what, " is empty");
    if (name.size() > max_length) refuse(offset, what, " has ", name.size(), " bytes, more than ", max_length);
    if (!text::is_utf8(name)) refuse(offset, what, " ", text::in_quotes(name), " is not UTF-8");
    return name;
  }

  /// Refuses a count of things that take `least_bytes` each and cannot be there, or are more than `most`.
  void check_count(std::uint64_t offset, const char* what, std::uint64_t count, std::uint64_t most,
                   std::uint64_t least_bytes) const {
    if (count > left() / least_bytes) refuse(offset, what, " ", count, " is more than the ", whole_, " can hold");
    if (count > most) refuse(offset, what, " ", count, " is more than ", most);
  }

 private:
  std::span<const std::byte> bytes_;
  const std::string& path_;
  const char* whole_;
  std::uint64_t at_;
};

}  // namespace nb::io
