#include "text/pretokenize.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "text/unicode.h"

namespace nb::text {
namespace {

using Pieces = std::vector<std::string>;

Pieces pieces_of(std::string_view name, const std::string& text) {
  Pieces out;
  for (const std::string_view piece : split_pieces(find_pre_tokenizer(name), text)) out.emplace_back(piece);
  return out;
}

// --- an independent reading of the patterns: a backtracking matcher over code points -------------------------------

using Text = std::u32string;
using Set = std::function<bool(char32_t)>;

struct Item {
  Set set;
  int least;
  int most;
};

/// A sequence of repeated character sets; `not_before_text` is a final (?!\S).
struct Alternative {
  std::vector<Item> items;
  bool not_before_text = false;
};

/// The end of a greedy match of items[index..) at `position`; npos if there is none.
std::size_t match(const Alternative& pattern, std::size_t index, const Text& text, std::size_t position) {
  if (index == pattern.items.size()) {
    const bool refused = pattern.not_before_text && position < text.size() && !is_whitespace(text[position]);
    return refused ? Text::npos : position;
  }
  const Item& item = pattern.items[index];
  int count = 0;
  while (count < item.most && position + static_cast<std::size_t>(count) < text.size() &&
         item.set(text[position + static_cast<std::size_t>(count)])) {
    ++count;
  }
  for (; count >= item.least; --count) {
    const std::size_t end = match(pattern, index + 1, text, position + static_cast<std::size_t>(count));
    if (end != Text::npos) return end;
  }
  return Text::npos;
}

constexpr int kAny = 1'000'000;

Set one_of(std::u32string letters) {
  return [letters](char32_t c) { return letters.find(c) != std::u32string::npos; };
}
bool is_other(char32_t c) { return !is_whitespace(c) && !is_letter(c) && !is_number(c); }
bool is_newline(char32_t c) { return c == '\r' || c == '\n'; }
bool is_prefix(char32_t c) { return !is_newline(c) && !is_letter(c) && !is_number(c); }

void add_contractions(std::vector<Alternative>& pattern, bool fold_case) {
  for (const char* word : {"s", "t", "re", "ve", "m", "ll", "d"}) {
    Alternative contraction{{{one_of(U"'"), 1, 1}}};
    for (const char* c = word; *c != '\0'; ++c) {
      std::u32string letters(1, static_cast<char32_t>(*c));
      if (fold_case) letters.push_back(static_cast<char32_t>(*c - 'a' + 'A'));
      if (fold_case && *c == 's') letters.push_back(0x17F);
      contraction.items.push_back({one_of(letters), 1, 1});
    }
    pattern.push_back(contraction);
  }
}

std::vector<Alternative> gpt2_pattern() {
  std::vector<Alternative> pattern;
  add_contractions(pattern, false);
  pattern.push_back({{{one_of(U" "), 0, 1}, {is_letter, 1, kAny}}});
  pattern.push_back({{{one_of(U" "), 0, 1}, {is_number, 1, kAny}}});
  pattern.push_back({{{one_of(U" "), 0, 1}, {is_other, 1, kAny}}});
  pattern.push_back({{{is_whitespace, 1, kAny}}, true});
  pattern.push_back({{{is_whitespace, 1, kAny}}});
  return pattern;
}

std::vector<Alternative> llama3_pattern(int max_numbers) {
  std::vector<Alternative> pattern;
  add_contractions(pattern, true);
  pattern.push_back({{{is_prefix, 0, 1}, {is_letter, 1, kAny}}});
  pattern.push_back({{{is_number, 1, max_numbers}}});
  pattern.push_back({{{one_of(U" "), 0, 1}, {is_other, 1, kAny}, {is_newline, 0, kAny}}});
  pattern.push_back({{{is_whitespace, 0, kAny}, {is_newline, 1, kAny}}});
  pattern.push_back({{{is_whitespace, 1, kAny}}, true});
  pattern.push_back({{{is_whitespace, 1, kAny}}});
  return pattern;
}

std::string to_utf8(const Text& text) {
  std::string out;
  for (const char32_t c : text) append_utf8(out, c);
  return out;
}

void append_matches(const std::vector<Alternative>& pattern, const Text& text, Pieces& out) {
  for (std::size_t position = 0; position < text.size();) {
    std::size_t end = Text::npos;
    for (const Alternative& alternative : pattern) {
      end = match(alternative, 0, text, position);
      if (end != Text::npos) break;
    }
    ASSERT_NE(end, Text::npos);
    out.push_back(to_utf8(text.substr(position, end - position)));
    position = end;
  }
}

Pieces expected_pieces(const std::string& name, const Text& text) {
  Pieces out;
  if (name == "llama-bpe") append_matches(llama3_pattern(3), text, out);
  if (name == "qwen2") append_matches(llama3_pattern(1), text, out);
  if (name == "gpt2") append_matches(gpt2_pattern(), text, out);
  if (name == "smollm") {
    Text segment;
    for (const char32_t c : text + U"0") {
      if (!is_number(c)) {
        segment.push_back(c);
        continue;
      }
      append_matches(gpt2_pattern(), segment, out);
      segment.clear();
      out.push_back(to_utf8(Text(1, c)));
    }
    out.pop_back();  // the number that was put behind the text
  }
  return out;
}

class PretokenizeTest : public testing::TestWithParam<const char*> {};

TEST_P(PretokenizeTest, AgreesWithThePatternOnRandomText) {
  const Text alphabet =
      U"abstrevmldSTREVMLD'''    \n\n\r\t012\u0664\u00BD!?-_.\u00E9\u017F\u4E2D\u00A0\u3000\u2028\u0301\u200D"
      U"\U0001F600";
  std::mt19937 random(3);
  for (int round = 0; round < 20'000; ++round) {
    Text text;
    const std::size_t length = random() % 14;
    for (std::size_t i = 0; i < length; ++i) text.push_back(alphabet[random() % alphabet.size()]);
    ASSERT_EQ(pieces_of(GetParam(), to_utf8(text)), expected_pieces(GetParam(), text)) << to_utf8(text);
  }
}

TEST_P(PretokenizeTest, PiecesOfAnyBytesJoinToTheText) {
  std::mt19937 random(4);
  for (int round = 0; round < 20'000; ++round) {
    std::string text;
    const std::size_t length = random() % 12;
    for (std::size_t i = 0; i < length; ++i) {
      static constexpr char kBytes[] = "a' \n1!\x80\xBF\xC2\xC3\xE2\x82\xED\xA0\xF0\x9F\x98\xF4\xFF";
      text.push_back(kBytes[random() % (sizeof(kBytes) - 1)]);
    }
    std::string joined;
    for (const std::string& piece : pieces_of(GetParam(), text)) {
      ASSERT_FALSE(piece.empty());
      joined += piece;
    }
    ASSERT_EQ(joined, text);
  }
}

TEST_P(PretokenizeTest, LongRunsTakeLinearTime) {
  // A quadratic scanner would need 10^12 steps.
  EXPECT_EQ(pieces_of(GetParam(), std::string(1'000'000, 'a')).size(), 1u);
  EXPECT_EQ(pieces_of(GetParam(), std::string(1'000'000, ' ') + "a").size(), 2u);
  EXPECT_EQ(pieces_of(GetParam(), std::string(1'000'000, '!')).size(), 1u);
  std::string lines;
  for (int i = 0; i < 500'000; ++i) lines += "\n ";
  EXPECT_LE(pieces_of(GetParam(), lines + "x").size(), 2u);
}

INSTANTIATE_TEST_SUITE_P(All, PretokenizeTest, testing::Values("gpt2", "smollm", "llama-bpe", "qwen2"),
                         [](const auto& row) {
                           std::string name = row.param;
                           std::erase(name, '-');
                           return name;
                         });

TEST(Pretokenize, Gpt2Examples) {
  EXPECT_EQ(pieces_of("gpt2", "Hello world's  2nd  day.\n"),
            (Pieces{"Hello", " world", "'s", " ", " 2", "nd", " ", " day", ".", "\n"}));
  EXPECT_EQ(pieces_of("gpt2", "I'LL we'll 1234"), (Pieces{"I", "'", "LL", " we", "'ll", " 1234"}));
  EXPECT_EQ(pieces_of("gpt2", "a   "), (Pieces{"a", "   "}));
  EXPECT_EQ(pieces_of("gpt2", "\t\tx"), (Pieces{"\t", "\t", "x"}));
  EXPECT_EQ(pieces_of("gpt2", ""), Pieces{});
}

TEST(Pretokenize, SmollmSetsNumbersApart) {
  EXPECT_EQ(pieces_of("smollm", "a  12 b"), (Pieces{"a", "  ", "1", "2", " b"}));
  EXPECT_EQ(pieces_of("smollm", " 1"), (Pieces{" ", "1"}));
  EXPECT_EQ(pieces_of("smollm", "x\xC2\xBD.5"), (Pieces{"x", "\xC2\xBD", ".", "5"}));
}

TEST(Pretokenize, Llama3AndQwen2Examples) {
  EXPECT_EQ(pieces_of("llama-bpe", "I'LL pay $12345!\n\n  ok"),
            (Pieces{"I", "'LL", " pay", " $", "123", "45", "!\n\n", " ", " ok"}));
  EXPECT_EQ(pieces_of("qwen2", "x=12\n \n  y"), (Pieces{"x", "=", "1", "2", "\n \n", " ", " y"}));
  EXPECT_EQ(pieces_of("llama-bpe", "it'\xC5\xBF"), (Pieces{"it", "'\xC5\xBF"}));
  EXPECT_EQ(pieces_of("qwen2", "(foo)\t\tbar"), (Pieces{"(foo", ")", "\t", "\tbar"}));
}

// U+FFFD in place of the invalid byte gives the same pieces.
TEST(Pretokenize, InvalidBytesAreCharactersOfNoClass) {
  EXPECT_EQ(pieces_of("gpt2", "a \xFF\xFE b\xC3"), (Pieces{"a", " \xFF\xFE", " b", "\xC3"}));
  EXPECT_EQ(pieces_of("qwen2",
                      "1\xE2\x82"
                      "a"),
            (Pieces{"1",
                    "\xE2\x82"
                    "a"}));
}

TEST(Pretokenize, UnknownNamesAreRefusedByName) {
  try {
    find_pre_tokenizer("tekken");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_NE(std::string(error.what()).find("\"tekken\""), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("smollm"), std::string::npos);
  }
}

TEST(Pretokenize, TableHasTheNamesOfTheFamilies) {
  for (const char* name : {"smollm", "gpt2", "gpt-2", "default", "llama-bpe", "llama3", "qwen2"}) {
    EXPECT_EQ(find_pre_tokenizer(name).name, name);
  }
  EXPECT_TRUE(find_pre_tokenizer("llama-bpe").adds_bos);
  EXPECT_TRUE(find_pre_tokenizer("llama-bpe").whole_pieces_first);
  EXPECT_FALSE(find_pre_tokenizer("smollm").adds_bos);
}

}  // namespace
}  // namespace nb::text
