#include "text/nfc.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "text/unicode.h"

namespace nb::text {
namespace {

using Chars = std::u32string;

std::string utf8(const Chars& chars) {
  std::string out;
  for (const char32_t c : chars) append_utf8(out, c);
  return out;
}

// The definition, on the tables: the whole text is decomposed, marks are exchanged until they are in order, and each
// is joined with the last starter unless it is blocked (Unicode 16, D115 and D117).

std::uint8_t class_of(char32_t c) {
  for (std::size_t i = 0; i < tables::kNumNfcRanges; ++i) {
    const tables::NfcRange& range = tables::kNfcRanges[i];
    if (range.first <= c && c <= range.last) return range.combining_class;
  }
  return 0;
}

Chars naive_decomposition(char32_t c) {
  if (c >= 0xAC00 && c < 0xAC00 + 11172) {
    const char32_t index = c - 0xAC00;
    Chars out = {0x1100 + index / 588, 0x1161 + index % 588 / 28};
    if (index % 28 != 0) out.push_back(0x11A7 + index % 28);
    return out;
  }
  for (std::size_t i = 0; i < tables::kNumDecompositions; ++i) {
    const tables::Decomposition& row = tables::kDecompositions[i];
    if (row.code_point != c) continue;
    return naive_decomposition(row.first) + (row.second != 0 ? naive_decomposition(row.second) : Chars());
  }
  return {c};
}

char32_t naive_composition(char32_t first, char32_t second) {
  for (char32_t c = 0xAC00; c < 0xAC00 + 11172; c += 28) {
    if (naive_decomposition(c) == Chars{first, second}) return c;
    if (first == c && second > 0x11A7 && second < 0x11A7 + 28) return c + (second - 0x11A7);
    if (first < 0x1100 || (first > 0x1112 && first < 0xAC00)) break;
  }
  for (std::size_t i = 0; i < tables::kNumCompositions; ++i) {
    const tables::Composition& row = tables::kCompositions[i];
    if (row.first == first && row.second == second) return row.composed;
  }
  return 0;
}

Chars naive_nfc(const Chars& text) {
  Chars chars;
  for (const char32_t c : text) chars += naive_decomposition(c);
  for (bool changed = true; changed;) {
    changed = false;
    for (std::size_t i = 0; i + 1 < chars.size(); ++i) {
      if (class_of(chars[i + 1]) == 0 || class_of(chars[i]) <= class_of(chars[i + 1])) continue;
      std::swap(chars[i], chars[i + 1]);
      changed = true;
    }
  }
  for (std::size_t i = 1; i < chars.size(); ++i) {
    // The last starter before it, and whether anything between has class 0 or at least its own.
    std::size_t starter = i;
    bool is_blocked = false;
    while (starter > 0 && class_of(chars[--starter]) != 0) {
      is_blocked = is_blocked || class_of(chars[starter]) >= class_of(chars[i]);
    }
    if (is_blocked || class_of(chars[starter]) != 0) continue;
    const char32_t joined = naive_composition(chars[starter], chars[i]);
    if (joined == 0) continue;
    chars[starter] = joined;
    chars.erase(i, 1);
    --i;
  }
  return chars;
}

struct Case {
  const char* what;
  Chars given;
  Chars expected;
};

// Checked by hand against the Unicode Character Database.
const Case kCases[] = {
    {"e + acute", U"e\u0301", U"\u00E9"},
    {"one step at a time", U"A\u030A\u0301", U"\u01FA"},
    {"ring, then dot below, is reordered first", U"s\u0307\u0323", U"\u1E69"},
    {"recomposed in another way", U"\u1E0B\u0323", U"\u1E0D\u0307"},
    {"three marks of two classes", U"q\u0307\u0323", U"q\u0323\u0307"},
    {"horn and acute", U"o\u0301\u031B", U"\u1EDB"},
    {"Vietnamese, dot below last", U"e\u0302\u0323", U"\u1EC7"},
    {"marks of one class keep their order", U"a\u0305\u0301", U"a\u0305\u0301"},
    {"the second of one class is not joined past the first", U"a\u0301\u0302", U"\u00E1\u0302"},
    {"a lower class between does not block", U"a\u0323\u0305\u0302", U"\u1EA1\u0305\u0302"},
    {"not blocked by a lower class", U"a\u0327\u0301", U"\u00E1\u0327"},
    {"singleton, Ohm", U"\u2126", U"\u03A9"},
    {"singleton, Kelvin", U"\u212A", U"K"},
    {"singleton, Angstrom", U"\u212B", U"\u00C5"},
    {"singleton, Greek question mark", U"\u037E", U";"},
    {"singleton mark", U"a\u0340", U"\u00E0"},
    {"singleton ideograph", U"\uF900", U"\u8C48"},
    {"singleton above the first plane", U"\U0002F800", U"\u4E3D"},
    {"angle brackets", U"\u2329\u232A", U"\u3008\u3009"},
    {"excluded: Devanagari qa", U"\u0958", U"\u0915\u093C"},
    {"excluded: stays apart", U"\u0915\u093C", U"\u0915\u093C"},
    {"but nna is composed", U"\u0928\u093C", U"\u0929"},
    {"excluded: Hebrew shin", U"\uFB2A", U"\u05E9\u05C1"},
    {"excluded: four steps deep", U"\uFB2C", U"\u05E9\u05BC\u05C1"},
    {"excluded: forking", U"\u2ADC", U"\u2ADD\u0338"},
    {"excluded: a mark of its own two marks", U"\u0344", U"\u0308\u0301"},
    {"excluded: musical symbols", U"\U0001D15E", U"\U0001D157\U0001D165"},
    {"joined starters: Bengali o", U"\u09C7\u09BE", U"\u09CB"},
    {"Sinhala, two steps", U"\u0DD9\u0DCF\u0DCA", U"\u0DDD"},
    {"Kaithi, above the first plane", U"\U00011099\U000110BA", U"\U0001109A"},
    {"kana with voiced mark", U"\u304B\u3099", U"\u304C"},
    {"Hangul L V", U"\u1100\u1161", U"\uAC00"},
    {"Hangul L V T", U"\u1100\u1161\u11A8", U"\uAC01"},
    {"Hangul LV T", U"\uAC00\u11A8", U"\uAC01"},
    {"Hangul LVT T", U"\uAC01\u11A8", U"\uAC01\u11A8"},
    {"Hangul L L V", U"\u1100\u1100\u1161", U"\u1100\uAC00"},
    {"Hangul L T", U"\u1100\u11A8", U"\u1100\u11A8"},
    {"Hangul V T", U"\u1161\u11A8", U"\u1161\u11A8"},
    {"Hangul: U+11A7 is no trailing consonant", U"\uAC00\u11A7", U"\uAC00\u11A7"},
    {"Hangul: the last of all", U"\u1112\u1175\u11C2", U"\uD7A3"},
    {"Hangul: past the last ones", U"\u1113\u1161\u1100\u1176\uAC00\u11C3", U"\u1113\u1161\u1100\u1176\uAC00\u11C3"},
    {"Hangul: a mark between blocks", U"\u1100\u0301\u1161", U"\u1100\u0301\u1161"},
    {"Hangul syllables stay", U"\uD55C\uAD6D\uC5B4", U"\uD55C\uAD6D\uC5B4"},
    {"marks without a starter", U"\u0301\u0323", U"\u0323\u0301"},
    {"composed again after reordering of the decomposed", U"\u00E9\u0323", U"\u1EB9\u0301"},
    {"a non-joiner is a starter", U"e\u200C\u0301", U"e\u200C\u0301"},
    {"the grapheme joiner stops reordering", U"a\u0301\u034F\u0323", U"\u00E1\u034F\u0323"},
    {"compatibility stays", U"\uFB01\u00BD\u2460\uFF21", U"\uFB01\u00BD\u2460\uFF21"},
    {"Unicode 16: Tulu-Tigalari", U"\U000113C2\U000113C2", U"\U000113C5"},
    {"text", U"Cafe\u0301, nai\u0308ve 1 + 1\n", U"Caf\u00E9, na\u00EFve 1 + 1\n"},
    {"empty", U"", U""},
};

TEST(Nfc, KnownCases) {
  for (const Case& row : kCases) {
    EXPECT_EQ(to_nfc(utf8(row.given)), utf8(row.expected)) << row.what;
    EXPECT_EQ(to_nfc(utf8(row.expected)), utf8(row.expected)) << row.what;
    EXPECT_EQ(to_nfc("x " + utf8(row.given) + " y"), "x " + utf8(row.expected) + " y") << row.what;
    EXPECT_EQ(naive_nfc(row.given), row.expected) << row.what << ": the definition";
  }
}

TEST(Nfc, EveryHangulSyllableIsComposedOfItsParts) {
  for (char32_t c = 0xAC00; c <= 0xD7A3; ++c) {
    ASSERT_EQ(to_nfc(utf8(naive_decomposition(c))), utf8({c}));
    ASSERT_EQ(to_nfc(utf8({c})), utf8({c}));
  }
}

TEST(Nfc, TablesAreInOrderAndOfOneMind) {
  for (std::size_t i = 0; i < tables::kNumNfcRanges; ++i) {
    const tables::NfcRange& range = tables::kNfcRanges[i];
    ASSERT_LE(range.first, range.last);
    ASSERT_GE(range.first, 0x300u);  // what is below is taken for simple without a look
    if (i > 0) {
      ASSERT_GT(range.first, tables::kNfcRanges[i - 1].last);
    }
  }
  for (std::size_t i = 1; i < tables::kNumDecompositions; ++i) {
    ASSERT_GT(tables::kDecompositions[i].code_point, tables::kDecompositions[i - 1].code_point);
  }
  for (std::size_t i = 0; i < tables::kNumCompositions; ++i) {
    const tables::Composition& row = tables::kCompositions[i];
    if (i > 0) {
      const tables::Composition& before = tables::kCompositions[i - 1];
      ASSERT_TRUE(row.first > before.first || (row.first == before.first && row.second > before.second));
    }
    // A character that others are composed of is in its own decomposition.
    ASSERT_EQ(naive_decomposition(row.composed), naive_decomposition(row.first) + naive_decomposition(row.second));
  }
}

TEST(Nfc, EveryCharacterAlone) {
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    const std::string given = utf8({c});
    const std::string composed = to_nfc(given);
    // Only what has a decomposition changes alone; the definition is slow, so that it is asked only then.
    const bool decomposes = std::any_of(tables::kDecompositions, tables::kDecompositions + tables::kNumDecompositions,
                                        [c](const tables::Decomposition& row) { return row.code_point == c; });
    ASSERT_EQ(composed, decomposes ? utf8(naive_nfc({c})) : given) << std::hex << static_cast<std::uint32_t>(c);
    if (c == 0x3FFFF) c = 0xDFFFF;  // planes 4 to 13 have no characters
  }
}

Chars random_chars(std::mt19937& random, std::size_t length) {
  static const Chars kCommon =
      U"aeos q\u00E9\u00C5\u1EC7\u0300\u0301\u0302\u0307\u0308\u030A\u031B\u0323\u0327\u0328\u0338\u0345\u034F\u0344"
      U"\u1100\u1112\u1161\u1175\u11A7\u11A8\u11C2\uAC00\uAC01\u0958\u0915\u093C\u0928\u05E9\u05BC\u05C1\u2126\u212B"
      U"\u09C7\u09BE\u0DD9\u0DCF\u0DCA\u304B\u3099\u4E2D\U0001D15E\U0001D165\U00011099\U000110BA";
  Chars chars;
  for (std::size_t i = 0; i < length; ++i) {
    switch (random() % 8) {
      case 0: {
        const tables::NfcRange& range = tables::kNfcRanges[random() % tables::kNumNfcRanges];
        chars.push_back(range.first + static_cast<char32_t>(random() % (range.last - range.first + 1)));
        break;
      }
      case 1:
        chars.push_back(tables::kDecompositions[random() % tables::kNumDecompositions].code_point);
        break;
      case 2: {
        const tables::Composition& row = tables::kCompositions[random() % tables::kNumCompositions];
        chars.push_back(row.first);
        chars.push_back(row.second);
        break;
      }
      default:
        chars.push_back(kCommon[random() % kCommon.size()]);
    }
  }
  return chars;
}

/// What find_not_nfc says of the whole text, as a new text; checks what it promises.
std::string replaced_stretches(std::string_view text) {
  std::string out;
  std::string composed;
  for (std::size_t position = 0; position < text.size();) {
    const NfcStretch odd = find_not_nfc(text, position, composed);
    EXPECT_LE(position, odd.begin);
    EXPECT_LE(odd.begin, odd.end);
    EXPECT_LE(odd.end, text.size());
    out += text.substr(position, odd.begin - position);
    if (odd.begin == odd.end) {
      EXPECT_EQ(odd.begin, text.size());
      break;
    }
    EXPECT_NE(composed, text.substr(odd.begin, odd.end - odd.begin));
    out += composed;
    position = odd.end;
  }
  return out;
}

TEST(Nfc, AgreesWithTheDefinitionOnRandomText) {
  std::mt19937 random(16);
  int num_changed = 0;
  for (int round = 0; round < 3000; ++round) {
    const Chars chars = random_chars(random, random() % 14);
    const std::string given = utf8(chars);
    const std::string expected = utf8(naive_nfc(chars));
    ASSERT_EQ(to_nfc(given), expected) << "round " << round << ' ' << given;
    ASSERT_EQ(to_nfc(expected), expected) << "round " << round;
    ASSERT_EQ(replaced_stretches(given), expected);
    std::string composed;
    const bool is_nfc = find_not_nfc(given, 0, composed).begin == given.size();
    ASSERT_EQ(is_nfc, given == expected);
    num_changed += !is_nfc;
  }
  EXPECT_GT(num_changed, 1000);
}

TEST(Nfc, LongRunsOfMarksAreSorted) {
  Chars given = U"a";
  Chars expected = U"\u1EA1";  // takes the first dot below
  for (int i = 0; i < 20000; ++i) given += U"\u0305\u0323";
  expected += Chars(19999, U'\u0323');
  expected += Chars(20000, U'\u0305');
  EXPECT_EQ(to_nfc(utf8(given)), utf8(expected));
  const Chars graves(50000, U'\u0300');
  EXPECT_EQ(to_nfc(utf8(U"a" + graves)), utf8(U"\u00E0" + graves.substr(1)));
}

TEST(Nfc, InvalidBytesStayAndEndAStretch) {
  const std::string acute = "\xCC\x81";
  for (const char* bad : {"\xFF", "\xC3", "\xE1\xBA", "\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80"}) {
    EXPECT_EQ(to_nfc(bad), bad);
    EXPECT_EQ(to_nfc("e" + acute + bad + acute), "\xC3\xA9" + (bad + acute));
    EXPECT_EQ(to_nfc(std::string("e") + bad + acute), std::string("e") + bad + acute);
    EXPECT_EQ(to_nfc(bad + acute + "\xCC\xA3" + bad), std::string(bad) + "\xCC\xA3" + acute + bad);
    EXPECT_EQ(to_nfc(bad + ("e" + acute)), std::string(bad) + "\xC3\xA9");
  }
  std::mt19937 random(17);
  for (int round = 0; round < 3000; ++round) {
    std::string given;
    std::string expected;
    for (int part = 0; part < 3; ++part) {
      const Chars chars = random_chars(random, random() % 5);
      given += utf8(chars) + "\xFF";
      expected += utf8(naive_nfc(chars)) + "\xFF";
    }
    ASSERT_EQ(to_nfc(given), expected);
  }
}

TEST(Nfc, TheSearchBeginsWhereItIsTold) {
  const std::string text = utf8(U"e\u0301 ab e\u0302.");
  std::string composed;
  const NfcStretch first = find_not_nfc(text, 0, composed);
  EXPECT_EQ(first.begin, 0u);
  EXPECT_EQ(first.end, 3u);
  EXPECT_EQ(composed, "\xC3\xA9");
  const NfcStretch second = find_not_nfc(text, first.end, composed);
  EXPECT_EQ(second.begin, 7u);
  EXPECT_EQ(second.end, 10u);
  EXPECT_EQ(composed, "\xC3\xAA");
  const NfcStretch none = find_not_nfc(text, second.end, composed);
  EXPECT_EQ(none.begin, text.size());
  EXPECT_EQ(none.end, text.size());
}

}  // namespace
}  // namespace nb::text
