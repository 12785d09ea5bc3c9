// A strict JSON reader that is asked for what it expects: no tree, no more memory than the strings it gives back.
//
// For headers of hostile files: errors say path and offset, depth is bounded, and what is not asked for is skipped but
// still checked. Not for documents of unknown shape. Used by one parser at a time. Source of the grammar: RFC 8259.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace nb::io {

class JsonCursor {
 public:
  /// Both must outlive the cursor; `offset` is where `text` begins in the file, for messages. Throws format if the text
  /// is not UTF-8.
  JsonCursor(std::string_view text, const std::string& path, std::uint64_t offset = 0);

  /// All throw format if something else stands here.
  void begin_object();
  /// Takes the next key and its colon; false at the end of the object, which it takes too.
  bool next_key(std::string& key);
  void begin_array();
  /// True if an element follows; false at the end of the array, which it takes too.
  bool next_element();
  std::string string();
  /// Digits only: a sign, a fraction or an exponent is refused, and so is what does not fit.
  std::uint64_t unsigned_integer();
  /// Any value.
  void skip_value();
  /// Nothing but space may follow.
  void finish();

  /// Offset in the file of what comes next.
  std::uint64_t offset() const { return base_ + at_; }

 private:
  [[noreturn]] void refuse(const std::string& what) const;
  void skip_space();
  bool take(char character);
  void expect(char character, const char* what);
  void open(char bracket, const char* what);
  bool next_item(char end);
  void skip_number();
  void skip_word(std::string_view word);
  std::uint32_t hex4();
  void escape(std::string& out);

  std::string_view text_;
  const std::string& path_;
  std::uint64_t base_;
  std::size_t at_ = 0;
  std::vector<bool> has_items_;  // one for each open object or array
};

}  // namespace nb::io
