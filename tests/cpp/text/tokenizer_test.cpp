#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <deque>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "tiny_vocabulary.h"

namespace nb::text {
namespace {

using Ids = std::vector<TokenId>;

Ids joined(std::initializer_list<Ids> parts) {
  Ids out;
  for (const Ids& part : parts) out.insert(out.end(), part.begin(), part.end());
  return out;
}

/// The code and message of the error that building a tokenizer from `spec` throws.
Error build_error(const TokenizerSpec& spec) {
  try {
    const Tokenizer tokenizer(spec);
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "no error";
  return Error(ErrorCode::internal, "none");
}

void expect_error(const TokenizerSpec& spec, ErrorCode code, std::initializer_list<const char*> parts) {
  const Error error = build_error(spec);
  EXPECT_EQ(error.code(), code) << error.what();
  for (const char* part : parts) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what() << " lacks " << part;
  }
}

TEST(Tokenizer, MergesInsideOfPiecesOnly) {
  TinyVocabulary tiny;
  const TokenId th = tiny.merge("t", "h");
  const TokenId the = tiny.merge("th", "e");
  const TokenId space_the = tiny.merge(" ", "the");
  tiny.merge("e", " ");  // crosses pieces and so never happens
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.encode("the the"), (Ids{the, space_the}));
  EXPECT_EQ(tokenizer.encode("tha"), (Ids{th, 'a'}));
  EXPECT_EQ(tokenizer.encode("e x"), byte_ids("e x"));
  EXPECT_EQ(tokenizer.encode(""), Ids{});
  EXPECT_EQ(tokenizer.token_text(space_the), "\xC4\xA0the");
  EXPECT_EQ(tokenizer.token_bytes(space_the), " the");
  EXPECT_EQ(tokenizer.find_token("\xC4\xA0the"), space_the);
  EXPECT_EQ(tokenizer.find_token(" the"), std::nullopt);
  EXPECT_EQ(tokenizer.vocab_size(), 260);
}

// A token that its own bytes are not encoded as must not be used for a whole piece (except where the family says so).
TEST(Tokenizer, WholePiecesFollowTheMerges) {
  for (const char* pre : {"gpt2", "llama-bpe"}) {
    TinyVocabulary tiny(pre);
    const TokenId bc = tiny.merge("b", "c");
    const TokenId ab = tiny.merge("a", "b");
    const TokenId abc = tiny.merge("ab", "c");  // never reached: b and c merge first
    const TokenId lone = tiny.add("xyz", TokenType::normal);
    const Tokenizer tokenizer(tiny.spec);
    const bool whole_first = find_pre_tokenizer(pre).whole_pieces_first;
    EXPECT_EQ(tokenizer.encode("abc", false), whole_first ? Ids{abc} : (Ids{'a', bc}));
    EXPECT_EQ(tokenizer.encode("xyz", false), whole_first ? Ids{lone} : byte_ids("xyz"));
    EXPECT_EQ(tokenizer.encode("ab", false), Ids{ab});
    EXPECT_EQ(tokenizer.encode("abcd", false), (Ids{'a', bc, 'd'}));
  }
}

TEST(Tokenizer, UserTextNeverBecomesAControlToken) {
  TinyVocabulary tiny;
  const TokenId end = tiny.add("<|im_end|>", TokenType::control);
  const TokenId unknown = tiny.add("<unk>", TokenType::unknown);
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.encode("a<|im_end|><unk>"), byte_ids("a<|im_end|><unk>"));
  EXPECT_EQ(tokenizer.encode("a<|im_end|><unk>b", true, true), joined({{'a', end, unknown}, byte_ids("b")}));
  EXPECT_TRUE(tokenizer.is_special(end));
  EXPECT_TRUE(tokenizer.is_special(unknown));
  EXPECT_FALSE(tokenizer.is_special('a'));
}

TEST(Tokenizer, MergesIntoControlTokensAreLeftOut) {
  TinyVocabulary tiny;
  const TokenId control = tiny.merge("x", "y");
  tiny.spec.types[static_cast<std::size_t>(control)] = TokenType::control;
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.encode("xy"), byte_ids("xy"));
  EXPECT_EQ(tokenizer.encode("xy", true, true), Ids{control});
}

// Some files call the end of turn a user-defined or normal token; text must not be able to end a turn.
TEST(Tokenizer, EndTokensAreControlWhateverTheFileCallsThem) {
  for (const TokenType type : {TokenType::user_defined, TokenType::normal, TokenType::unused}) {
    TinyVocabulary tiny("llama-bpe");
    tiny.spec.eot = tiny.add("end", type);
    const Tokenizer tokenizer(tiny.spec);
    EXPECT_EQ(tokenizer.token_type(tiny.spec.eot), TokenType::control);
    EXPECT_EQ(tokenizer.encode("end"), byte_ids("end"));
    EXPECT_EQ(tokenizer.encode("end", true, true), Ids{tiny.spec.eot});
  }
}

TEST(Tokenizer, AnOrdinaryTokenMayEndAnswersAndStaysText) {
  TinyVocabulary tiny;
  tiny.spec.eos = '\n';
  tiny.spec.eot = tiny.merge("\n", "\n");
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.encode("\n"), Ids{'\n'});
  EXPECT_EQ(tokenizer.encode("\n\n"), Ids{tiny.spec.eot});
  EXPECT_EQ(tokenizer.decode(Ids{'a', tiny.spec.eot}), "a\n\n");
  EXPECT_EQ(tokenizer.eos_ids(), (Ids{'\n', tiny.spec.eot}));
}

TEST(Tokenizer, UserDefinedTokensAreAlwaysFoundLongestFirst) {
  TinyVocabulary tiny;
  const TokenId a = tiny.add("<a>", TokenType::user_defined);
  const TokenId aa = tiny.add("<a><a>", TokenType::user_defined);
  const TokenId accent = tiny.add("\xC3\xA9\xC3\xA9", TokenType::user_defined);
  const TokenId control = tiny.add("<a", TokenType::control);
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.encode("<a><a><a>x<a"), joined({{aa, a}, byte_ids("x<a")}));
  EXPECT_EQ(tokenizer.encode("<a><a><a>x<a", true, true), (Ids{aa, a, 'x', control}));
  EXPECT_EQ(tokenizer.encode("\xC3\xA9\xC3\xA9\xC3\xA9"), joined({{accent}, byte_ids("\xC3\xA9")}));
  EXPECT_EQ(tokenizer.decode(Ids{accent, a}), "\xC3\xA9\xC3\xA9<a>");
  EXPECT_EQ(tokenizer.token_text(accent), "\xC3\xA9\xC3\xA9");
}

// The pre-tokenizer must not see across an added token: before it, whitespace is at the end of a text.
TEST(Tokenizer, AddedTokensAreCutOutBeforePieces) {
  TinyVocabulary tiny;
  const TokenId spaces = tiny.merge(" ", " ");
  const TokenId mark = tiny.add("<m>", TokenType::user_defined);
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.encode("  <m>  <"), (Ids{spaces, mark, ' ', ' ', '<'}));
}

TEST(Tokenizer, BosAndEosWhereTheFileAsksForThem) {
  TinyVocabulary tiny;
  tiny.spec.bos = tiny.add("<s>", TokenType::control);
  tiny.spec.eos = tiny.add("</s>", TokenType::control);
  const Ids plain = byte_ids("a");
  EXPECT_EQ(Tokenizer(tiny.spec).encode("a"), plain);
  tiny.spec.add_bos = true;
  EXPECT_EQ(Tokenizer(tiny.spec).encode("a"), joined({{tiny.spec.bos}, plain}));
  EXPECT_EQ(Tokenizer(tiny.spec).encode(""), Ids{tiny.spec.bos});
  tiny.spec.add_eos = true;
  EXPECT_EQ(Tokenizer(tiny.spec).encode("a"), joined({{tiny.spec.bos}, plain, {tiny.spec.eos}}));
  EXPECT_EQ(Tokenizer(tiny.spec).encode("a", false), plain);
}

TEST(Tokenizer, EosIdsHaveNoDuplicates) {
  TinyVocabulary tiny;
  tiny.spec.eos = tiny.add("<|end|>", TokenType::control);
  tiny.spec.eot = tiny.spec.eos;
  tiny.spec.eom = tiny.add("<|eom|>", TokenType::control);
  EXPECT_EQ(Tokenizer(tiny.spec).eos_ids(), (Ids{tiny.spec.eos, tiny.spec.eom}));
  EXPECT_EQ(Tokenizer(tiny.spec).bos(), -1);
}

TEST(Tokenizer, DecodeSkipsSpecialTokensOnRequest) {
  TinyVocabulary tiny;
  const TokenId end = tiny.add("<|im_end|>", TokenType::control);
  const TokenId padding = tiny.add("[PAD0]", TokenType::unused);
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.decode(Ids{'a', end, padding, 'b'}), "ab");
  EXPECT_EQ(tokenizer.decode(Ids{'a', end, padding, 'b'}, false), "a<|im_end|>b");
  EXPECT_EQ(tokenizer.token_text(padding), "[PAD0]");
  EXPECT_EQ(tokenizer.token_bytes(padding), "");
  // A character split by a special token is whole again when that is left out.
  EXPECT_EQ(tokenizer.decode(Ids{0xC3, end, 0xA9}), "\xC3\xA9");
}

TEST(Tokenizer, IdsOutOfRangeAreNamed) {
  const TinyVocabulary tiny;
  const Tokenizer tokenizer(tiny.spec);
  for (const TokenId id : {-1, 256, 1'000'000}) {
    try {
      tokenizer.decode(Ids{'a', id});
      FAIL() << "accepted " << id;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      EXPECT_NE(std::string(error.what()).find(std::to_string(id)), std::string::npos);
    }
    EXPECT_THROW(tokenizer.token_bytes(id), Error);
    EXPECT_THROW(tokenizer.token_text(id), Error);
    EXPECT_THROW(tokenizer.is_special(id), Error);
    EXPECT_THROW(tokenizer.token_type(id), Error);
  }
}

TEST(Tokenizer, AnyBytesAreEncodedWithoutLoss) {
  std::mt19937 random(5);
  for (const PreTokenizer& row : pre_tokenizers()) {
    TinyVocabulary tiny{std::string(row.name)};
    tiny.spec.nfc = false;  // which would change the text
    for (int i = 0; i < 400; ++i) {
      std::string left(1, static_cast<char>(random() % 256));
      std::string right(1, static_cast<char>(random() % 256));
      tiny.merge(left, right);
    }
    const Tokenizer tokenizer(tiny.spec);
    for (int round = 0; round < 2000; ++round) {
      std::string text;
      const std::size_t length = random() % 60;
      for (std::size_t i = 0; i < length; ++i) text.push_back(static_cast<char>(random() % 256));
      std::string bytes;
      for (const TokenId id : tokenizer.encode(text)) bytes += tokenizer.token_bytes(id);
      ASSERT_EQ(bytes, text);
    }
  }
}

TEST(Tokenizer, BytesThatTheVocabularyLacksAreLeftOut) {
  TinyVocabulary tiny;
  const TokenId ab = tiny.merge("a", "b");
  tiny.spec.tokens['x'] = "replacement";
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.missing_bytes(), std::vector<std::uint8_t>{'x'});
  EXPECT_EQ(tokenizer.encode("axb"), Ids{ab});
  EXPECT_EQ(tokenizer.encode("x"), Ids{});
}

// Spans must stay inside of the text where tokens and text do not have the same bytes.
TEST(Tokenizer, SpansPassOverBytesThatTheVocabularyLacks) {
  TinyVocabulary tiny("llama-bpe");
  const TokenId ab = tiny.merge("a", "b");
  const TokenId whole = tiny.add("axb", TokenType::normal);  // only as a whole piece
  tiny.spec.tokens['x'] = "replacement";
  const Tokenizer tokenizer(tiny.spec);
  Encoding found = tokenizer.encode_with_spans("axb", false);
  EXPECT_EQ(found.ids, Ids{whole});
  EXPECT_EQ(found.spans, (std::vector<TextSpan>{{0, 3}}));
  found = tokenizer.encode_with_spans("xaxxbxc axb", false);
  EXPECT_EQ(found.ids, (Ids{ab, 'c', ' ', ab}));
  EXPECT_EQ(found.spans, (std::vector<TextSpan>{{1, 5}, {6, 7}, {7, 8}, {8, 11}}));
}

TEST(Tokenizer, NormalTokensOfForeignLettersStandForTheirText) {
  TinyVocabulary tiny;
  const TokenId foreign = tiny.add("\xE4\xB8\xAD", TokenType::normal);
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.token_bytes(foreign), "\xE4\xB8\xAD");
  EXPECT_EQ(tokenizer.token_text(foreign), "\xE4\xB8\xAD");
  EXPECT_EQ(tokenizer.find_token("\xE4\xB8\xAD"), foreign);
  EXPECT_EQ(tokenizer.encode("\xE4\xB8\xAD"), byte_ids("\xE4\xB8\xAD"));
}

TEST(Tokenizer, EveryTokenIsFoundByItsText) {
  TinyVocabulary tiny;
  tiny.merge("a", "b");
  tiny.add("<|x|>", TokenType::control);
  const Tokenizer tokenizer(tiny.spec);
  for (TokenId id = 0; id < tokenizer.vocab_size(); ++id) {
    EXPECT_EQ(tokenizer.token_text(id), tiny.spec.tokens[static_cast<std::size_t>(id)]);
    EXPECT_EQ(tokenizer.find_token(tokenizer.token_text(id)), id);
  }
}

TEST(Tokenizer, UnknownModelsAndPreTokenizersAreUnsupported) {
  TinyVocabulary tiny;
  tiny.spec.model = "rwkv";
  expect_error(tiny.spec, ErrorCode::unsupported, {"\"rwkv\"", "gpt2"});
  tiny.spec.model = "gpt2";
  tiny.spec.pre = "viking";
  expect_error(tiny.spec, ErrorCode::unsupported, {"\"viking\"", "qwen2"});
}

TEST(Tokenizer, BrokenVocabulariesAreFormatErrors) {
  {
    TinyVocabulary tiny;
    tiny.add("abc", TokenType::normal);
    tiny.add("abc", TokenType::control);
    expect_error(tiny.spec, ErrorCode::format, {"token 257", "\"abc\"", "256"});
  }
  {
    TinyVocabulary tiny;
    tiny.spec.types.pop_back();
    expect_error(tiny.spec, ErrorCode::format, {"256", "255"});
  }
  {
    TinyVocabulary tiny;
    tiny.spec.types['!'] = static_cast<TokenType>(9);
    expect_error(tiny.spec, ErrorCode::format, {"token 33", "\"!\"", "9"});
  }
  {
    TokenizerSpec spec;
    spec.model = spec.pre = "gpt2";
    expect_error(spec, ErrorCode::format, {"no tokens"});
  }
}

TEST(Tokenizer, BrokenMergesAreFormatErrors) {
  for (const char* merge : {"", " ", "a", "a ", " a", "a b c", "a zz", "zz a", "\xFF a"}) {
    TinyVocabulary tiny;
    tiny.merge("a", "b");
    tiny.spec.merges.push_back(merge);
    expect_error(tiny.spec, ErrorCode::format, {"merge 1"});
  }
  TinyVocabulary tiny;
  tiny.spec.merges.push_back("q r");
  expect_error(tiny.spec, ErrorCode::format, {"merge 0", "\"q r\"", "\"qr\" is not a token"});
}

TEST(Tokenizer, SpecialIdsMustBeInTheVocabulary) {
  for (const TokenId bad : {256, -2, 1 << 30}) {
    TinyVocabulary tiny;
    tiny.spec.eot = bad;
    expect_error(tiny.spec, ErrorCode::format, {"eot", std::to_string(bad).c_str()});
  }
  TinyVocabulary tiny;
  tiny.spec.add_bos = true;
  expect_error(tiny.spec, ErrorCode::format, {"bos"});
}

TEST(Tokenizer, EmptyTokensAreAllowedAndNeverFound) {
  TinyVocabulary tiny;
  const TokenId empty = tiny.add("", TokenType::user_defined);
  tiny.add("", TokenType::normal);
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.encode("ab", true, true), byte_ids("ab"));
  EXPECT_EQ(tokenizer.decode(Ids{'a', empty}), "a");
  EXPECT_EQ(tokenizer.find_token(""), std::nullopt);
}

TEST(Tokenizer, TypesMayBeMissing) {
  TinyVocabulary tiny;
  tiny.spec.eos = tiny.add("<|endoftext|>", TokenType::normal);
  tiny.spec.types.clear();
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_TRUE(tokenizer.is_special(tiny.spec.eos));
  EXPECT_EQ(tokenizer.encode("<|endoftext|>", true, true), Ids{tiny.spec.eos});
}

TEST(Tokenizer, KeepsNothingOfTheSpec) {
  std::optional<Tokenizer> tokenizer;
  {
    TinyVocabulary tiny;
    tiny.merge("a", "b");
    tiny.add("<m>", TokenType::user_defined);
    tokenizer.emplace(tiny.spec);
  }
  EXPECT_EQ(tokenizer->encode("ab<m>"), (Ids{256, 257}));
}

TEST(Tokenizer, ServesManyThreads) {
  TinyVocabulary tiny;
  tiny.merge("a", "b");
  tiny.merge("ab", "ab");
  const Tokenizer tokenizer(tiny.spec);
  const std::string text = "abab ab" + std::string(500, 'a') + "b";
  const Ids expected = tokenizer.encode(text);
  std::vector<std::thread> threads;
  std::vector<int> equal(4, 0);
  for (std::size_t i = 0; i < equal.size(); ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < 200; ++round) equal[i] += tokenizer.encode(text) == expected;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(equal, std::vector<int>(4, 200));
}

TEST(Tokenizer, MemoryOfALargeVocabularyIsBounded) {
  // As many tokens and merges as SmolLM2 has, each a letter longer than one before.
  TinyVocabulary tiny;
  std::deque<std::string> merges;
  std::vector<std::string> tokens;
  for (char c = 'a'; c <= 'z'; ++c) tokens.emplace_back(1, c);
  for (std::size_t parent = 0; merges.size() < 48'900; ++parent) {
    for (char c = 'a'; c <= 'z'; ++c) {
      tiny.spec.merges.push_back(merges.emplace_back(tokens[parent] + " " + c));
      tiny.add(tokens.emplace_back(tokens[parent] + c), TokenType::normal);
    }
  }
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_GE(tokenizer.vocab_size(), 49'152);
  EXPECT_LE(tokenizer.memory_bytes(), 6'000'000u);
  EXPECT_EQ(tokenizer.encode("abc").size(), 1u);
}

TEST(Tokenizer, SentencePieceTextComesBack) {
  TinyPieces tiny;
  const TokenId space_a = tiny.add(
      "\xE2\x96\x81"
      "a",
      -1);
  const TokenId unknown = tiny.add("<unk>", 0, TokenType::unknown);
  const TokenId end = tiny.add("</s>", 0, TokenType::control);
  tiny.spec.eos = end;
  tiny.spec.space_prefix = SpacePrefix::text;
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_TRUE(tokenizer.drops_first_space());
  EXPECT_EQ(tokenizer.encode("a a\n"), (Ids{space_a, space_a, '\n'}));
  EXPECT_EQ(tokenizer.decode(Ids{space_a, space_a, '\n'}), "a a\n");
  EXPECT_EQ(tokenizer.encode(""), Ids{});
  EXPECT_EQ(tokenizer.encode("</s>"), joined({{' '}, byte_ids("</s>")}));
  EXPECT_EQ(tokenizer.encode("a</s>a", true, true), (Ids{space_a, end, 'a'}));
  EXPECT_EQ(tokenizer.encode("<unk>", true, true), Ids{unknown});
  EXPECT_EQ(tokenizer.token_text('\n'), "<0x0A>");
  EXPECT_EQ(tokenizer.token_bytes('\n'), "\n");
  EXPECT_EQ(tokenizer.find_token("<0x0A>"), '\n');
  EXPECT_EQ(tokenizer.find_token("\xE2\x96\x81"
                                 "a"),
            space_a);
  EXPECT_TRUE(tokenizer.missing_bytes().empty());
}

TEST(Tokenizer, PartsOfAPromptGetASpaceByTheirPlace) {
  TinyPieces tiny;
  const auto encode = [&](SpacePrefix where, TextPlace place) {
    tiny.spec.space_prefix = where;
    return Tokenizer(tiny.spec).encode("a", false, false, place);
  };
  const Ids bare{'a'};
  const Ids spaced{' ', 'a'};
  for (const SpacePrefix where : {SpacePrefix::text, SpacePrefix::text_if_unspaced}) {
    EXPECT_EQ(encode(where, TextPlace::start), spaced);
    EXPECT_EQ(encode(where, TextPlace::after_token), bare);
    EXPECT_EQ(encode(where, TextPlace::within), bare);
  }
  for (const SpacePrefix where : {SpacePrefix::stretches, SpacePrefix::stretches_unspaced}) {
    EXPECT_EQ(encode(where, TextPlace::start), spaced);
    EXPECT_EQ(encode(where, TextPlace::after_token), spaced);
    EXPECT_EQ(encode(where, TextPlace::within), bare);
  }
  EXPECT_EQ(encode(SpacePrefix::none, TextPlace::start), bare);
}

TEST(Tokenizer, EachSpacePrefix) {
  TinyPieces tiny;
  const TokenId mark = tiny.add("<m>", 0, TokenType::user_defined);
  const TokenId end = tiny.add("</s>", 0, TokenType::control);
  const auto encode = [&](SpacePrefix where, std::string_view text) {
    tiny.spec.space_prefix = where;
    return Tokenizer(tiny.spec).encode(text, false, true);
  };
  EXPECT_EQ(encode(SpacePrefix::none, "a<m>b"), (Ids{'a', mark, 'b'}));
  EXPECT_EQ(encode(SpacePrefix::text, "a<m>b"), (Ids{' ', 'a', mark, 'b'}));
  EXPECT_EQ(encode(SpacePrefix::text, "<m>b"), (Ids{' ', mark, 'b'}));
  EXPECT_EQ(encode(SpacePrefix::text, "</s>b"), (Ids{end, 'b'}));
  EXPECT_EQ(encode(SpacePrefix::stretches, "a<m>b</s> c"), (Ids{' ', 'a', mark, ' ', 'b', end, ' ', ' ', 'c'}));
  EXPECT_EQ(encode(SpacePrefix::stretches, "<m></s>"), (Ids{mark, end}));
  EXPECT_EQ(encode(SpacePrefix::text_if_unspaced, "a<m>b"), (Ids{' ', 'a', mark, 'b'}));
  EXPECT_EQ(encode(SpacePrefix::text_if_unspaced, " a"), (Ids{' ', 'a'}));
  EXPECT_EQ(encode(SpacePrefix::text_if_unspaced, "<m>a"), (Ids{mark, 'a'}));
  EXPECT_EQ(encode(SpacePrefix::stretches_unspaced, "a<m>b<m> c"), (Ids{' ', 'a', mark, ' ', 'b', mark, ' ', 'c'}));
}

TEST(Tokenizer, ExtraSpacesAreRemovedWhereTheFileSaysSo) {
  TinyPieces tiny;
  const TokenId mark = tiny.add("<m>", 0, TokenType::user_defined);
  tiny.spec.remove_extra_whitespaces = true;
  tiny.spec.space_prefix = SpacePrefix::text;
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.encode("  a  b  "), byte_ids(" a b"));
  EXPECT_EQ(tokenizer.encode("   "), Ids{});
  EXPECT_EQ(tokenizer.encode("a  <m>  b "), joined({byte_ids(" a "), {mark}, byte_ids(" b")}));
}

// A space that a byte token spells was in the text; one that a piece begins with was put in front.
TEST(Tokenizer, TheFirstSpaceIsDroppedOnce) {
  TinyPieces tiny;
  const TokenId space_a = tiny.add(
      "\xE2\x96\x81"
      "a",
      -1);
  const TokenId end = tiny.add("</s>", 0, TokenType::control);
  const TokenId padding = tiny.add("[pad]", 0, TokenType::unused);
  tiny.spec.space_prefix = SpacePrefix::stretches;
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.decode(Ids{' ', space_a}), "  a");
  EXPECT_EQ(tokenizer.decode(Ids{end, padding, space_a, space_a}), "a a");
  EXPECT_EQ(tokenizer.decode(Ids{end, space_a}, false), "</s>a");
  bool is_first = tokenizer.drops_first_space();
  std::string out;
  tokenizer.append_token(end, is_first, out);
  tokenizer.append_token(padding, is_first, out);
  EXPECT_TRUE(is_first);
  tokenizer.append_token(space_a, is_first, out);
  EXPECT_FALSE(is_first);
  tokenizer.append_token(space_a, is_first, out);
  EXPECT_EQ(out, "</s>a a");
  tiny.spec.space_prefix = SpacePrefix::none;
  const Tokenizer plain(tiny.spec);
  EXPECT_FALSE(plain.drops_first_space());
  EXPECT_EQ(plain.decode(Ids{space_a}), " a");
  EXPECT_THROW(plain.append_token(-1, is_first, out), Error);
}

TEST(Tokenizer, SeveralTokensEndAnswers) {
  TinyVocabulary tiny;
  tiny.spec.eos = tiny.add("<|end|>", TokenType::control);
  tiny.spec.eot = tiny.add("<|eot|>", TokenType::user_defined);
  const TokenId third = tiny.add("<|third|>", TokenType::normal);
  tiny.spec.eos_ids = {tiny.spec.eot, third, '\n', third, tiny.spec.eos};
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.eos_ids(), (Ids{tiny.spec.eos, tiny.spec.eot, third, '\n'}));
  EXPECT_EQ(tokenizer.eos(), tiny.spec.eos);
  EXPECT_TRUE(tokenizer.is_special(tiny.spec.eot));
  EXPECT_TRUE(tokenizer.is_special(third));
  EXPECT_FALSE(tokenizer.is_special('\n'));
  EXPECT_EQ(tokenizer.encode("<|third|>"), byte_ids("<|third|>"));
  for (const TokenId bad : {-1, 1000}) {
    tiny.spec.eos_ids = {third, bad};
    expect_error(tiny.spec, ErrorCode::format, {"eos", std::to_string(bad).c_str()});
  }
}

TEST(Tokenizer, SentencePieceEndTokensAreControlUnlessBytes) {
  TinyPieces tiny;
  const TokenId end = tiny.add("ab", 0);
  tiny.spec.eos_ids = {end, '\n'};
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.encode("ab\n"), byte_ids("ab\n"));
  EXPECT_TRUE(tokenizer.is_special(end));
  EXPECT_EQ(tokenizer.token_type('\n'), TokenType::byte);
  EXPECT_EQ(tokenizer.eos_ids(), (Ids{end, '\n'}));
}

TEST(Tokenizer, AddedTokensMayTakeTheWhitespaceAroundThem) {
  TinyVocabulary tiny;
  const TokenId left = tiny.add("<l>", TokenType::user_defined);
  const TokenId right = tiny.add("<r>", TokenType::user_defined);
  const TokenId both = tiny.add("<b>", TokenType::control);
  tiny.spec.lstrip = {both, left};
  tiny.spec.rstrip = {right, both};
  const Tokenizer tokenizer(tiny.spec);
  EXPECT_EQ(tokenizer.encode("a \n\t<l> b"), (Ids{'a', left, ' ', 'b'}));
  EXPECT_EQ(tokenizer.encode("a <r> \n b"), (Ids{'a', ' ', right, 'b'}));
  EXPECT_EQ(tokenizer.encode("a\xC2\xA0\xE3\x80\x80<b>\xE2\x80\xA8 b ", true, true), (Ids{'a', both, 'b', ' '}));
  EXPECT_EQ(tokenizer.encode("a <b> b"), byte_ids("a <b> b"));
  EXPECT_EQ(tokenizer.encode(" <l> <r>  <l>  "), (Ids{left, ' ', right, left, ' ', ' '}));
  EXPECT_EQ(tokenizer.encode("\xA0<l>"), (Ids{0xA0, left}));  // no character and so no whitespace
  const Encoding found = tokenizer.encode_with_spans("a <l> <r> b");
  EXPECT_EQ(found.ids, (Ids{'a', left, ' ', right, 'b'}));
  EXPECT_EQ(found.spans, (std::vector<TextSpan>{{0, 1}, {2, 5}, {5, 6}, {6, 9}, {10, 11}}));
  tiny.spec.rstrip = {1000};
  expect_error(tiny.spec, ErrorCode::format, {"rstrip", "1000"});
}

TEST(Tokenizer, SpansOfComposedText) {
  TinyVocabulary tiny;
  tiny.spec.nfc = true;
  const TokenId accent = tiny.merge("\xC3", "\xA9");
  tiny.spec.bos = tiny.spec.eos = tiny.add("<s>", TokenType::control);
  tiny.spec.add_bos = tiny.spec.add_eos = true;
  const Tokenizer tokenizer(tiny.spec);
  const Encoding found = tokenizer.encode_with_spans("ae\xCC\x81 u\xCC\x88");
  EXPECT_EQ(found.ids, (Ids{tiny.spec.bos, 'a', accent, ' ', 0xC3, 0xBC, tiny.spec.eos}));
  EXPECT_EQ(found.spans, (std::vector<TextSpan>{{0, 0}, {0, 1}, {1, 4}, {4, 5}, {5, 8}, {5, 8}, {0, 0}}));
  EXPECT_EQ(tokenizer.encode("ae\xCC\x81 u\xCC\x88"), found.ids);
}

TEST(Tokenizer, SpansOfSentencePieceText) {
  TinyPieces tiny;
  const TokenId space_a = tiny.add(
      "\xE2\x96\x81"
      "a",
      -1);
  const TokenId mark = tiny.add("<m>", 0, TokenType::user_defined);
  tiny.spec.space_prefix = SpacePrefix::stretches;
  const Tokenizer tokenizer(tiny.spec);
  const Encoding found = tokenizer.encode_with_spans(
      "a\xE2\x96\x81"
      "a<m>a\xC3\xA9");
  EXPECT_EQ(found.ids, (Ids{space_a, space_a, mark, space_a, 0xC3, 0xA9}));
  EXPECT_EQ(found.spans, (std::vector<TextSpan>{{0, 1}, {1, 5}, {5, 8}, {8, 9}, {9, 10}, {10, 11}}));
}

// Random texts of both kinds: spans ascend, those of text that nothing changes are the bytes of their tokens.
TEST(Tokenizer, SpansAreTheBytesOfTheirTokens) {
  TinyVocabulary byte_level;
  byte_level.merge("a", "b");
  byte_level.merge("\xC3", "\xA9");
  byte_level.add("<m>", TokenType::user_defined);
  TinyPieces pieces;
  pieces.add("ab", -1);
  pieces.add("\xC3\xA9", -1);
  pieces.add(
      "\xE2\x96\x81"
      "a",
      -2, TokenType::unused);
  pieces.add(
      "\xE2\x96\x81"
      "ab",
      -3);
  pieces.add("<m>", 0, TokenType::user_defined);
  std::mt19937 random(8);
  const std::string parts[] = {"a", "b", " ", "\xC3\xA9", "\xC3", "<m>", "\n", "\xFF"};
  for (const TokenizerSpec* spec : {&byte_level.spec, &pieces.spec}) {
    const Tokenizer tokenizer(*spec);
    for (int round = 0; round < 2000; ++round) {
      std::string text;
      for (std::size_t length = random() % 20; length > 0; --length) text += parts[random() % std::size(parts)];
      const Encoding found = tokenizer.encode_with_spans(text);
      ASSERT_EQ(found.ids, tokenizer.encode(text));
      ASSERT_EQ(found.spans.size(), found.ids.size());
      std::size_t end = 0;
      for (std::size_t i = 0; i < found.ids.size(); ++i) {
        const TextSpan span = found.spans[i];
        ASSERT_EQ(span.begin, end);
        end = span.end;
        ASSERT_EQ(text.substr(span.begin, span.end - span.begin), tokenizer.token_bytes(found.ids[i]));
      }
      ASSERT_EQ(end, text.size());
    }
  }
}

TEST(Tokenizer, BrokenSentencePieceVocabulariesAreFormatErrors) {
  TinyPieces tiny;
  tiny.spec.scores.pop_back();
  expect_error(tiny.spec, ErrorCode::format, {"256 tokens", "255 scores"});
  tiny.spec.scores.clear();
  expect_error(tiny.spec, ErrorCode::format, {"0 scores"});
  TinyPieces lacking;
  lacking.spec.types[0x41] = TokenType::unused;
  expect_error(lacking.spec, ErrorCode::format, {"<0x41>"});
}

}  // namespace
}  // namespace nb::text
