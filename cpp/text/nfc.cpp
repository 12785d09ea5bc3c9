#include "text/nfc.h"

#include <algorithm>
#include <vector>

#include "text/unicode.h"

namespace nb::text {

namespace {

// Hangul syllables are composed by arithmetic (Unicode 16, section 3.12): L leading, V vowels, T trailing consonants.
constexpr char32_t kSyllables = 0xAC00, kL = 0x1100, kV = 0x1161, kT = 0x11A7;
constexpr char32_t kNumL = 19, kNumV = 21, kNumT = 28;
constexpr char32_t kNumSyllables = kNumL * kNumV * kNumT;

constexpr char32_t kFirstOdd = 0x300;  // below, every character is in NFC and begins a new stretch

struct Mark {
  char32_t code_point;
  std::uint8_t combining_class;
};

const tables::NfcRange* range_of(char32_t code_point) {
  const tables::NfcRange* const end = tables::kNfcRanges + tables::kNumNfcRanges;
  const tables::NfcRange* const found = std::lower_bound(
      tables::kNfcRanges, end, code_point, [](const tables::NfcRange& range, char32_t c) { return range.last < c; });
  return found != end && found->first <= code_point ? found : nullptr;
}

bool is_simple(char32_t code_point) { return code_point < kFirstOdd || range_of(code_point) == nullptr; }

std::uint8_t combining_class(char32_t code_point) {
  const tables::NfcRange* range = code_point < kFirstOdd ? nullptr : range_of(code_point);
  return range == nullptr ? 0 : range->combining_class;
}

void decompose(char32_t code_point, std::vector<Mark>& out) {
  if (code_point - kSyllables < kNumSyllables) {
    const char32_t index = code_point - kSyllables;
    out.push_back({kL + index / (kNumV * kNumT), 0});
    out.push_back({kV + index % (kNumV * kNumT) / kNumT, 0});
    if (index % kNumT != 0) out.push_back({kT + index % kNumT, 0});
    return;
  }
  const tables::Decomposition* const end = tables::kDecompositions + tables::kNumDecompositions;
  const tables::Decomposition* const found =
      std::lower_bound(tables::kDecompositions, end, code_point,
                       [](const tables::Decomposition& row, char32_t c) { return row.code_point < c; });
  if (found == end || found->code_point != code_point) {
    out.push_back({code_point, combining_class(code_point)});
    return;
  }
  decompose(found->first, out);  // at most four deep
  if (found->second != 0) decompose(found->second, out);
}

/// 0 if the two do not compose.
char32_t compose(char32_t first, char32_t second) {
  if (first - kL < kNumL && second - kV < kNumV) return kSyllables + ((first - kL) * kNumV + (second - kV)) * kNumT;
  const bool is_pair = first - kSyllables < kNumSyllables && (first - kSyllables) % kNumT == 0;
  if (is_pair && second - kT - 1 < kNumT - 1) return first + (second - kT);
  const tables::Composition* const end = tables::kCompositions + tables::kNumCompositions;
  const tables::Composition* const found =
      std::lower_bound(tables::kCompositions, end, second, [first](const tables::Composition& row, char32_t s) {
        return row.first != first ? row.first < first : row.second < s;
      });
  return found != end && found->first == first && found->second == second ? found->composed : 0;
}

/// Puts marks of one base into the order of their classes.
void reorder(std::vector<Mark>& marks) {
  const auto is_starter = [](const Mark& mark) { return mark.combining_class == 0; };
  for (auto from = marks.begin(); from != marks.end();) {
    const auto begin = std::find_if_not(from, marks.end(), is_starter);
    from = std::find_if(begin, marks.end(), is_starter);
    std::stable_sort(begin, from, [](const Mark& a, const Mark& b) { return a.combining_class < b.combining_class; });
  }
}

/// Joins each mark with the starter before it unless something between has its class or a higher one.
void compose_all(std::vector<Mark>& marks) {
  std::size_t size = 0;
  std::size_t starter = marks.size();  // none yet
  for (const Mark& mark : std::vector<Mark>(marks)) {
    if (starter < size) {
      const bool is_next = size == starter + 1;
      const bool is_blocked = !is_next && marks[size - 1].combining_class >= mark.combining_class;
      const char32_t joined = is_blocked ? 0 : compose(marks[starter].code_point, mark.code_point);
      if (joined != 0) {
        marks[starter].code_point = joined;
        continue;
      }
    }
    if (mark.combining_class == 0) starter = size;
    marks[size++] = mark;
  }
  marks.resize(size);
}

void normalize_stretch(std::string_view text, std::string& composed) {
  std::vector<Mark> marks;
  for (std::size_t position = 0; position < text.size();) {
    const DecodedChar next = decode_utf8(text.data() + position, text.data() + text.size());
    decompose(next.code_point, marks);
    position += next.length;
  }
  reorder(marks);
  compose_all(marks);
  composed.clear();
  for (const Mark& mark : marks) append_utf8(composed, mark.code_point);
}

}  // namespace

NfcStretch find_not_nfc(std::string_view text, std::size_t from, std::string& composed) {
  const char* const data = text.data();
  const char* const end = data + text.size();
  std::size_t begin = from;  // of the stretch: its first character is simple, the others are not
  bool is_odd = false;
  std::size_t position = from;
  while (true) {
    const bool at_end = position == text.size();
    const DecodedChar next = at_end ? DecodedChar{0, 0, Utf8Status::valid} : decode_utf8(data + position, end);
    const bool is_valid = next.status == Utf8Status::valid;
    if (at_end || !is_valid || is_simple(next.code_point)) {
      const std::string_view stretch = text.substr(begin, position - begin);
      if (is_odd) {
        normalize_stretch(stretch, composed);
        if (composed != stretch) return {begin, position};
      }
      if (at_end) return {text.size(), text.size()};
      begin = is_valid ? position : position + next.length;
      is_odd = false;
    } else {
      is_odd = true;
    }
    position += next.length;
  }
}

std::string to_nfc(std::string_view text) {
  std::string out;
  std::string composed;
  for (std::size_t position = 0; position < text.size();) {
    const NfcStretch odd = find_not_nfc(text, position, composed);
    out.append(text.substr(position, odd.begin - position));
    if (odd.begin < odd.end) out.append(composed);
    position = odd.end;
  }
  return out;
}

}  // namespace nb::text
