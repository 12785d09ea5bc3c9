#include "text/normalize.h"

#include <algorithm>

#include "text/nfc.h"
#include "text/vocabulary.h"

namespace nb::text {

namespace {

/// Appends to a Normalized, joining neighbouring copied runs.
class Builder {
 public:
  explicit Builder(Normalized& out) : out_(out) {}

  void copy(std::string_view bytes, std::size_t source_begin) {
    if (bytes.empty()) return;
    const bool goes_on = !out_.runs.empty() && out_.runs.back().copied &&
                         out_.text.size() - out_.runs.back().begin == source_begin - out_.runs.back().source_begin;
    if (!goes_on) out_.runs.push_back({out_.text.size(), source_begin, true});
    out_.text += bytes;
  }

  /// `bytes` stand for what begins at `source_begin` and ends where the next run begins; they may be empty.
  void replace(std::string_view bytes, std::size_t source_begin) {
    out_.runs.push_back({out_.text.size(), source_begin, false});
    out_.text += bytes;
  }

 private:
  Normalized& out_;
};

Normalized composed(std::string_view text) {
  Normalized out;
  Builder builder(out);
  std::string stretch;
  std::size_t position = 0;
  while (position < text.size()) {
    const NfcStretch odd = find_not_nfc(text, position, stretch);
    builder.copy(text.substr(position, odd.begin - position), position);
    if (odd.begin < odd.end) builder.replace(stretch, odd.begin);
    position = odd.end;
  }
  out.source_size = text.size();
  return out;
}

// U+2581 to a space, runs of spaces to one, none at the ends of the text.
Normalized spaced(const Normalization& how, std::string_view text, const Stretch& stretch) {
  Normalized out;
  Builder builder(out);
  if (stretch.prefix) builder.replace(" ", 0);
  const std::size_t first = out.text.size();
  bool after_space = stretch.is_first;
  std::size_t position = 0;
  // Looked for anew only when passed, so that each byte is read once.
  std::size_t mark = how.space_marks ? text.find(kSpaceMark) : std::string_view::npos;
  std::size_t space = how.collapse_spaces ? text.find(' ') : std::string_view::npos;
  while (position < text.size()) {
    if (mark < position) mark = text.find(kSpaceMark, position);
    if (space < position) space = text.find(' ', position);
    const std::size_t next = std::min({mark, space, text.size()});
    if (next > position) {
      builder.copy(text.substr(position, next - position), position);
      after_space = false;
      position = next;
      continue;
    }
    const bool is_dropped = how.collapse_spaces && after_space;
    const bool is_mark = mark == position;
    if (is_dropped || is_mark) {
      builder.replace(is_dropped ? "" : " ", position);
    } else {
      builder.copy(" ", position);
    }
    after_space = true;
    position += is_mark ? kSpaceMark.size() : 1;
  }
  out.source_size = text.size();
  if (how.collapse_spaces && stretch.is_last) {
    while (out.text.size() > first && out.text.back() == ' ') out.text.pop_back();
    if (out.text.size() == first && stretch.is_first) out.text.clear();  // nothing but spaces: no prefix either
    while (!out.runs.empty() && out.runs.back().begin >= out.text.size()) out.runs.pop_back();
  }
  return out;
}

}  // namespace

std::pair<std::size_t, std::size_t> Normalized::source_of(std::size_t begin, std::size_t end,
                                                          std::size_t& cursor) const {
  while (cursor + 1 < runs.size() && runs[cursor + 1].begin <= begin) ++cursor;
  const Run& first = runs[cursor];
  const std::size_t source_begin = first.source_begin + (first.copied ? begin - first.begin : 0);
  // The end belongs to the run of the last byte.
  std::size_t last = cursor;
  while (last + 1 < runs.size() && runs[last + 1].begin < end) ++last;
  const Run& run = runs[last];
  const std::size_t next = last + 1 < runs.size() ? runs[last + 1].source_begin : source_size;
  const std::size_t source_end = run.copied ? run.source_begin + (end - run.begin) : next;
  return {source_begin, std::max(source_begin, source_end)};
}

bool wants_prefix(SpacePrefix where, bool begins_text, std::string_view stretch) {
  const bool is_unspaced = !stretch.empty() && stretch.front() != ' ' && !stretch.starts_with(kSpaceMark);
  switch (where) {
    case SpacePrefix::none:
      return false;
    case SpacePrefix::text:
      return begins_text;
    case SpacePrefix::stretches:
      return !stretch.empty();
    case SpacePrefix::text_if_unspaced:
      return begins_text && is_unspaced;
    case SpacePrefix::stretches_unspaced:
      return is_unspaced;
  }
  return false;
}

Normalized normalize(const Normalization& how, std::string_view text, const Stretch& stretch) {
  // No tokenizer has both; if one did, NFC would come first and its runs would have to be joined with these.
  return how.nfc ? composed(text) : spaced(how, text, stretch);
}

}  // namespace nb::text
