#include "text/text_stream.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "text/unicode.h"
#include "tiny_vocabulary.h"

namespace nb::text {
namespace {

constexpr const char* kReplaced = "\xEF\xBF\xBD";

TEST(TextStream, HoldsBackHalfACharacter) {
  const TinyVocabulary tiny;
  const Tokenizer tokenizer(tiny.spec);
  TextStream stream(tokenizer);
  EXPECT_EQ(stream.push('a'), "a");
  EXPECT_EQ(stream.push(0xF0), "");
  EXPECT_EQ(stream.push(0x9F), "");
  EXPECT_EQ(stream.push(0x98), "");
  EXPECT_EQ(stream.push(0x80), "\xF0\x9F\x98\x80");
  EXPECT_EQ(stream.finish(), "");
}

TEST(TextStream, ReplacesWhatCanNoLongerBecomeACharacterAtOnce) {
  const TinyVocabulary tiny;
  const Tokenizer tokenizer(tiny.spec);
  TextStream stream(tokenizer);
  EXPECT_EQ(stream.push(0xFF), kReplaced);
  EXPECT_EQ(stream.push(0x80), kReplaced);
  EXPECT_EQ(stream.push(0xE2), "");
  EXPECT_EQ(stream.push('a'), std::string(kReplaced) + "a");
  EXPECT_EQ(stream.push(0xE2), "");
  EXPECT_EQ(stream.push(0xE2), kReplaced);  // the second may still begin a character
  EXPECT_EQ(stream.push(0x82), "");
  EXPECT_EQ(stream.push(0xAC), "\xE2\x82\xAC");
  EXPECT_EQ(stream.push(0xED), "");
  EXPECT_EQ(stream.push(0xA0), std::string(kReplaced) + kReplaced);  // a surrogate
}

TEST(TextStream, FinishGivesTheRestAndStartsAnew) {
  const TinyVocabulary tiny;
  const Tokenizer tokenizer(tiny.spec);
  TextStream stream(tokenizer);
  stream.push(0xF0);
  stream.push(0x9F);
  EXPECT_EQ(stream.finish(), kReplaced);
  EXPECT_EQ(stream.finish(), "");
  EXPECT_EQ(stream.push(0x98), kReplaced);  // not joined with what was before
}

TEST(TextStream, SpecialTokensAreSkippedOnRequest) {
  TinyVocabulary tiny;
  const TokenId end = tiny.add("<|im_end|>", TokenType::control);
  const Tokenizer tokenizer(tiny.spec);
  TextStream skipping(tokenizer);
  TextStream keeping(tokenizer, false);
  EXPECT_EQ(skipping.push(0xC3), "");
  EXPECT_EQ(skipping.push(end), "");
  EXPECT_EQ(skipping.push(0xA9), "\xC3\xA9");
  EXPECT_EQ(keeping.push(0xC3), "");
  EXPECT_EQ(keeping.push(end), std::string(kReplaced) + "<|im_end|>");
}

TEST(TextStream, IdsOutOfRangeThrowAndChangeNothing) {
  const TinyVocabulary tiny;
  const Tokenizer tokenizer(tiny.spec);
  TextStream stream(tokenizer);
  stream.push(0xC3);
  EXPECT_THROW(stream.push(-1), Error);
  EXPECT_THROW(stream.push(256), Error);
  EXPECT_EQ(stream.push(0xA9), "\xC3\xA9");
}

// Tokens of one to four random bytes: pushes joined are what decode gives, every push is UTF-8, and no more than the
// beginning of one character (which decode shows as one U+FFFD) is ever held back.
TEST(TextStream, JoinedPushesEqualDecode) {
  std::mt19937 random(9);
  TinyVocabulary tiny;
  static constexpr unsigned char kBytes[] = {'a',  ' ',  0x80, 0x9F, 0xA0, 0xBF, 0xC3, 0xE0, 0xE2,
                                             0xED, 0xF0, 0xF1, 0xF4, 0x8F, 0x90, 0xFF, 0xC0};
  for (int i = 0; i < 300; ++i) {
    std::string bytes;
    for (std::size_t n = 1 + random() % 4; n > 0; --n) bytes.push_back(static_cast<char>(kBytes[random() % 17]));
    bool is_new = true;
    for (const std::string_view token : tiny.spec.tokens) is_new = is_new && token != spelled(bytes);
    if (is_new) tiny.add(spelled(bytes), TokenType::normal);
  }
  tiny.add("<|c|>", TokenType::control);
  const Tokenizer tokenizer(tiny.spec);
  for (int round = 0; round < 20'000; ++round) {
    const bool skip_special = round % 2 == 0;
    TextStream stream(tokenizer, skip_special);
    std::vector<TokenId> ids;
    std::string streamed;
    for (std::size_t n = random() % 12; n > 0; --n) {
      ids.push_back(static_cast<TokenId>(random() % static_cast<unsigned>(tokenizer.vocab_size())));
      const std::string text = stream.push(ids.back());
      ASSERT_EQ(replace_invalid_utf8(text), text);
      streamed += text;
      const std::string so_far = tokenizer.decode(ids, skip_special);
      ASSERT_TRUE(streamed == so_far || streamed + kReplaced == so_far);
    }
    streamed += stream.finish();
    ASSERT_EQ(streamed, tokenizer.decode(ids, skip_special));
  }
}

}  // namespace
}  // namespace nb::text
