#include "text/normalize.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "text/nfc.h"
#include "text/vocabulary.h"

namespace nb::text {
namespace {

using Source = std::pair<std::size_t, std::size_t>;

const std::string kMark(kSpaceMark);

constexpr SpacePrefix kPrefixes[] = {SpacePrefix::none, SpacePrefix::text, SpacePrefix::stretches,
                                     SpacePrefix::text_if_unspaced, SpacePrefix::stretches_unspaced};

Source source_of(const Normalized& normalized, std::size_t begin, std::size_t end) {
  std::size_t cursor = 0;
  return normalized.source_of(begin, end, cursor);
}

TEST(Normalize, EachPrefixRule) {
  struct Case {
    bool begins_text;
    std::string stretch;
    bool wanted[5];  // in the order of kPrefixes
  };
  const Case cases[] = {
      {true, "a", {false, true, true, true, true}},
      {true, " a", {false, true, true, false, false}},
      {true, kMark + "a", {false, true, true, false, false}},
      {true, "\n", {false, true, true, true, true}},
      {true, "\xE2\x96\x80", {false, true, true, true, true}},
      {true, "", {false, true, false, false, false}},
      {false, "a", {false, false, true, false, true}},
      {false, " a", {false, false, true, false, false}},
      {false, kMark, {false, false, true, false, false}},
      {false, "", {false, false, false, false, false}},
  };
  for (const Case& row : cases) {
    for (std::size_t i = 0; i < std::size(kPrefixes); ++i) {
      EXPECT_EQ(wants_prefix(kPrefixes[i], row.begins_text, row.stretch), row.wanted[i])
          << "rule " << i << (row.begins_text ? " at the start \"" : " behind a token \"") << row.stretch << '"';
    }
  }
}

TEST(Normalize, IdentityIsKnown) {
  EXPECT_TRUE(Normalization{}.is_identity());
  EXPECT_FALSE((Normalization{true, false, false, SpacePrefix::none}).is_identity());
  EXPECT_FALSE((Normalization{false, true, false, SpacePrefix::none}).is_identity());
  EXPECT_FALSE((Normalization{false, false, true, SpacePrefix::none}).is_identity());
  EXPECT_FALSE((Normalization{false, false, false, SpacePrefix::text}).is_identity());
}

TEST(Normalize, SpaceMarksAreSpaces) {
  Normalization how;
  how.space_marks = true;
  const std::string text = "a" + kMark + "b " + kMark + "\xE2\x96";
  EXPECT_EQ(normalize(how, text, {}).text, "a b  \xE2\x96");
  EXPECT_EQ(normalize({}, text, {}).text, text);
  const Normalized normalized = normalize(how, text, {});
  EXPECT_EQ(source_of(normalized, 0, 1), (Source{0, 1}));
  EXPECT_EQ(source_of(normalized, 1, 2), (Source{1, 4}));
  EXPECT_EQ(source_of(normalized, 1, 3), (Source{1, 5}));
  EXPECT_EQ(source_of(normalized, 3, 4), (Source{5, 6}));
  EXPECT_EQ(source_of(normalized, 4, 5), (Source{6, 9}));
  EXPECT_EQ(source_of(normalized, 5, 7), (Source{9, 11}));
}

TEST(Normalize, PrefixesAreInFront) {
  Normalization how;
  how.space_marks = true;
  Stretch stretch;
  stretch.prefix = true;
  const Normalized normalized = normalize(how, "ab", stretch);
  EXPECT_EQ(normalized.text, " ab");
  EXPECT_EQ(source_of(normalized, 0, 1), (Source{0, 0}));
  EXPECT_EQ(source_of(normalized, 0, 2), (Source{0, 1}));
  EXPECT_EQ(source_of(normalized, 1, 3), (Source{0, 2}));
  EXPECT_EQ(normalize(how, "", stretch).text, " ");
  EXPECT_EQ(normalize(how, " a", stretch).text, "  a");
}

TEST(Normalize, SpacesCollapse) {
  Normalization how;
  how.collapse_spaces = how.space_marks = true;
  const std::string text = "  a " + kMark + "  b\n  ";
  EXPECT_EQ(normalize(how, text, {true, true, false}).text, "a b\n");
  EXPECT_EQ(normalize(how, text, {true, true, true}).text, " a b\n");
  EXPECT_EQ(normalize(how, text, {true, false, false}).text, "a b\n ");
  EXPECT_EQ(normalize(how, text, {false, true, false}).text, " a b\n");
  EXPECT_EQ(normalize(how, text, {false, false, false}).text, " a b\n ");
  EXPECT_EQ(normalize(how, "   ", {true, true, true}).text, "");
  EXPECT_EQ(normalize(how, "   ", {true, true, false}).text, "");
  EXPECT_EQ(normalize(how, "   ", {false, true, false}).text, "");
  EXPECT_EQ(normalize(how, "   ", {false, false, false}).text, " ");
  how.space_marks = false;
  EXPECT_EQ(normalize(how, " a " + kMark + " ", {true, true, false}).text, "a " + kMark);
}

TEST(Normalize, CollapsedSpacesKnowTheirSource) {
  Normalization how;
  how.collapse_spaces = true;
  const Normalized normalized = normalize(how, " a   b ", {true, true, true});
  ASSERT_EQ(normalized.text, " a b");
  EXPECT_EQ(source_of(normalized, 1, 2), (Source{1, 2}));  // a
  EXPECT_EQ(source_of(normalized, 2, 3).first, 2u);        // the first of the spaces
  EXPECT_EQ(source_of(normalized, 2, 4), (Source{2, 6}));
  EXPECT_EQ(source_of(normalized, 3, 4), (Source{5, 6}));  // b
}

TEST(Normalize, ComposedCharactersComeFromAllTheirParts) {
  Normalization how;
  how.nfc = true;
  const std::string text = "ae\xCC\x81z";
  const Normalized normalized = normalize(how, text, {});
  ASSERT_EQ(normalized.text, "a\xC3\xA9z");
  EXPECT_EQ(source_of(normalized, 0, 1), (Source{0, 1}));
  EXPECT_EQ(source_of(normalized, 1, 3), (Source{1, 4}));
  EXPECT_EQ(source_of(normalized, 1, 2), (Source{1, 4}));
  EXPECT_EQ(source_of(normalized, 2, 4), (Source{1, 5}));
  EXPECT_EQ(source_of(normalized, 3, 4), (Source{4, 5}));
  EXPECT_EQ(normalize(how, "\xFF\xC3\xA9", {}).text, "\xFF\xC3\xA9");
}

/// The definition, byte by byte, with the source of each byte.
struct NaiveSpaces {
  std::string text;
  std::vector<Source> sources;
};

NaiveSpaces space_naively(const Normalization& how, const std::string& text, const Stretch& stretch) {
  NaiveSpaces units;  // characters, each one byte that is a space or any other byte
  for (std::size_t i = 0; i < text.size(); ++i) {
    const bool is_mark = how.space_marks && text.compare(i, kMark.size(), kMark) == 0;
    const std::size_t length = is_mark ? kMark.size() : 1;
    units.text.push_back(is_mark ? ' ' : text[i]);
    units.sources.emplace_back(i, i + length);
    i += length - 1;
  }
  NaiveSpaces out;
  for (std::size_t i = 0; i < units.text.size(); ++i) {
    if (how.collapse_spaces && units.text[i] == ' ') {
      const bool after_space = i == 0 ? stretch.is_first : units.text[i - 1] == ' ';
      const bool at_end = stretch.is_last && units.text.find_first_not_of(' ', i) == std::string::npos;
      if (after_space || at_end) continue;
    }
    out.text.push_back(units.text[i]);
    out.sources.push_back(units.sources[i]);
  }
  const bool is_nothing = how.collapse_spaces && stretch.is_first && stretch.is_last && out.text.empty();
  if (stretch.prefix && !is_nothing) {
    out.text.insert(out.text.begin(), ' ');
    out.sources.insert(out.sources.begin(), {0, 0});
  }
  return out;
}

TEST(Normalize, AgreesWithTheDefinitionOnRandomText) {
  std::mt19937 random(21);
  const std::string parts[] = {" ", " ", kMark, "a", "b", "\n", "\xE2", "\xE2\x96", "\x81", "\xC3\xA9"};
  for (int round = 0; round < 20000; ++round) {
    Normalization how;
    how.space_marks = random() % 2 == 0;
    how.collapse_spaces = random() % 2 == 0;
    const Stretch stretch{random() % 2 == 0, random() % 2 == 0, random() % 2 == 0};
    std::string text;
    for (std::size_t length = random() % 12; length > 0; --length) text += parts[random() % std::size(parts)];
    const NaiveSpaces expected = space_naively(how, text, stretch);
    const Normalized normalized = normalize(how, text, stretch);
    ASSERT_EQ(normalized.text, expected.text) << "round " << round << " \"" << text << '"';
    ASSERT_EQ(normalized.source_size, text.size());
    // Cut into random tokens: in order, inside of the text, each from the first to the last of its bytes.
    std::size_t cursor = 0;
    Source previous{0, 0};
    for (std::size_t begin = 0; begin < normalized.text.size();) {
      const std::size_t end = std::min(normalized.text.size(), begin + 1 + random() % 3);
      const Source source = normalized.source_of(begin, end, cursor);
      ASSERT_LE(source.second, text.size());
      ASSERT_LE(source.first, source.second);
      ASSERT_LE(previous.first, source.first);
      ASSERT_LE(previous.second, source.second);
      const bool is_prefix = begin == 0 && stretch.prefix;
      if (!is_prefix) {
        ASSERT_EQ(source.first, expected.sources[begin].first) << round << " at " << begin;
      }
      // What was dropped behind a replaced space may count as its source.
      if (normalized.text[end - 1] != ' ') {
        ASSERT_EQ(source.second, expected.sources[end - 1].second) << round;
      }
      ASSERT_GE(source.second, expected.sources[end - 1].second) << round;
      previous = source;
      begin = end;
    }
  }
}

// Compared with composing the bytes that each run comes from.
TEST(Normalize, RunsOfNfcCoverTheText) {
  std::mt19937 random(22);
  const std::string parts[] = {"a",    "e", "\xCC\x81",    "\xCC\xA3", "\xE1\x84\x80", "\xE1\x85\xA1",
                               "\xFF", " ", "\xE2\x84\xA6"};
  Normalization how;
  how.nfc = true;
  for (int round = 0; round < 5000; ++round) {
    std::string text;
    for (std::size_t length = random() % 12; length > 0; --length) text += parts[random() % std::size(parts)];
    const Normalized normalized = normalize(how, text, {});
    ASSERT_EQ(normalized.text, to_nfc(text));
    std::size_t cursor = 0;
    std::size_t source_end = 0;
    for (std::size_t i = 0; i < normalized.runs.size(); ++i) {
      const std::size_t begin = normalized.runs[i].begin;
      const std::size_t end = i + 1 < normalized.runs.size() ? normalized.runs[i + 1].begin : normalized.text.size();
      const Source source = normalized.source_of(begin, end, cursor);
      ASSERT_EQ(source.first, source_end);
      source_end = source.second;
      const std::string given = text.substr(source.first, source.second - source.first);
      ASSERT_EQ(normalized.text.substr(begin, end - begin), to_nfc(given));
      ASSERT_EQ(normalized.runs[i].copied, to_nfc(given) == given);
    }
    ASSERT_EQ(source_end, text.size());
  }
}

}  // namespace
}  // namespace nb::text
