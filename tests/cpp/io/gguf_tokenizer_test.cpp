#include "io/gguf_tokenizer.h"

#include <gtest/gtest.h>

#include <functional>

#include "io/expect_error.h"
#include "io/gguf_builder.h"
#include "io/gguf_file.h"

namespace nb::io {
namespace {

using test::expect_error;
using test::GgufBuilder;
using Edit = std::function<void(GgufBuilder&)>;

// A complete tokenizer without ids; what `edit` adds must not repeat a key.
GgufBuilder vocabulary() {
  GgufBuilder builder;
  builder.string("tokenizer.ggml.model", "gpt2")
      .strings("tokenizer.ggml.tokens", {"<unk>", "a", "b", "ab", "<end>"})
      .strings("tokenizer.ggml.merges", {"a b"});
  return builder;
}

text::TokenizerSpec read(const test::Bytes& bytes) { return read_tokenizer_spec(GgufFile(bytes, "vocab").metadata()); }

TEST(GgufTokenizer, ReadsEveryKey) {
  GgufBuilder builder = vocabulary();
  builder.string("tokenizer.ggml.pre", "smollm")
      .array<std::int32_t>("tokenizer.ggml.token_type", test::kI32, {2, 1, 4, 6, 3})
      .number<std::uint32_t>("tokenizer.ggml.bos_token_id", test::kU32, 1)
      .number<std::uint32_t>("tokenizer.ggml.eos_token_id", test::kU32, 4)
      .number<std::int32_t>("tokenizer.ggml.eot_token_id", test::kI32, 3)
      .number<std::uint64_t>("tokenizer.ggml.eom_token_id", test::kU64, 2)
      .number<std::uint8_t>("tokenizer.ggml.unknown_token_id", test::kU8, 0)
      .number<std::uint32_t>("tokenizer.ggml.padding_token_id", test::kU32, 4)
      .number<std::uint8_t>("tokenizer.ggml.add_bos_token", test::kBool, 1)
      .number<std::uint8_t>("tokenizer.ggml.add_eos_token", test::kBool, 1)
      .string("tokenizer.chat_template", "{{ messages }} \xc3\xa9");
  const test::Bytes bytes = builder.build();
  const GgufFile file(bytes, "vocab");
  const text::TokenizerSpec spec = read_tokenizer_spec(file.metadata());
  EXPECT_EQ(spec.model, "gpt2");
  EXPECT_EQ(spec.pre, "smollm");
  EXPECT_EQ(spec.tokens, (std::vector<std::string_view>{"<unk>", "a", "b", "ab", "<end>"}));
  EXPECT_EQ(spec.merges, (std::vector<std::string_view>{"a b"}));
  using Type = text::TokenType;
  const std::vector<Type> types = {Type::unknown, Type::normal, Type::user_defined, Type::byte, Type::control};
  EXPECT_EQ(spec.types, types);
  EXPECT_EQ(spec.bos, 1);
  EXPECT_EQ(spec.eos, 4);
  EXPECT_EQ(spec.eot, 3);
  EXPECT_EQ(spec.eom, 2);
  EXPECT_EQ(spec.unk, 0);
  EXPECT_EQ(spec.pad, 4);
  EXPECT_TRUE(spec.add_bos);
  EXPECT_TRUE(spec.add_eos);
  EXPECT_EQ(read_chat_template(file.metadata()), "{{ messages }} \xc3\xa9");
  // The tokens are views into the file, not copies.
  const char* begin = reinterpret_cast<const char*>(bytes.data());
  EXPECT_TRUE(spec.tokens[3].data() > begin && spec.tokens[3].data() < begin + bytes.size());
}

TEST(GgufTokenizer, WhatIsMissingHasItsDefault) {
  const test::Bytes bytes = vocabulary().build();
  const GgufFile file(bytes, "vocab");
  const text::TokenizerSpec spec = read_tokenizer_spec(file.metadata());
  EXPECT_EQ(spec.pre, "default");
  EXPECT_TRUE(spec.types.empty());
  for (const TokenId id : {spec.bos, spec.eos, spec.eot, spec.eom, spec.unk, spec.pad}) EXPECT_EQ(id, -1);
  EXPECT_FALSE(spec.add_bos);
  EXPECT_FALSE(spec.add_eos);
  EXPECT_FALSE(read_chat_template(file.metadata()).has_value());
}

TEST(GgufTokenizer, BosFollowsTheFamilyUnlessTheFileSays) {
  const auto add_bos = [](const Edit& edit) {
    GgufBuilder builder = vocabulary();
    edit(builder);
    return read(builder.build()).add_bos;
  };
  const auto pre = [](const char* name) { return [name](GgufBuilder& b) { b.string("tokenizer.ggml.pre", name); }; };
  EXPECT_TRUE(add_bos(pre("llama-bpe")));
  EXPECT_FALSE(add_bos(pre("smollm")));
  EXPECT_FALSE(add_bos(pre("never heard of")));
  EXPECT_FALSE(add_bos([](GgufBuilder& b) {
    b.string("tokenizer.ggml.pre", "llama-bpe").number<std::uint8_t>("tokenizer.ggml.add_bos_token", test::kBool, 0);
  }));
}

TEST(GgufTokenizer, BadFilesNameTheKey) {
  struct Case {
    const char* name;
    Edit edit;
    const char* message;
  };
  const auto id = [](const char* key, std::int64_t value) {
    return [key, value](GgufBuilder& b) { b.number<std::int64_t>(key, test::kI64, value); };
  };
  const auto types = [](std::vector<std::int32_t> values) {
    return [values](GgufBuilder& b) { b.array<std::int32_t>("tokenizer.ggml.token_type", test::kI32, values); };
  };
  const Case cases[] = {
      {"bos at the end", id("tokenizer.ggml.bos_token_id", 5), "bos_token_id is 5, outside the vocabulary of 5"},
      {"eos negative", id("tokenizer.ggml.eos_token_id", -1), "eos_token_id is -1"},
      {"eot beyond 32 bits", id("tokenizer.ggml.eot_token_id", std::int64_t{1} << 32), "eot_token_id is 4294967296"},
      {"eom", id("tokenizer.ggml.eom_token_id", 99), "eom_token_id is 99"},
      {"unknown", id("tokenizer.ggml.unknown_token_id", 99), "unknown_token_id is 99"},
      {"padding", id("tokenizer.ggml.padding_token_id", 99), "padding_token_id is 99"},
      {"id is text", [](GgufBuilder& b) { b.string("tokenizer.ggml.eos_token_id", "2"); }, "is of type string"},
      {"too few types", types({1, 1, 1, 1}), "has 4 elements for 5 tokens"},
      {"too many types", types({1, 1, 1, 1, 1, 1}), "has 6 elements for 5 tokens"},
      {"type 0", types({1, 1, 0, 1, 1}), "token 2 has the unknown type 0"},
      {"type 7", types({1, 1, 1, 1, 7}), "token 4 has the unknown type 7"},
      {"types are floats",
       [](GgufBuilder& b) {
         b.array<float>("tokenizer.ggml.token_type", test::kF32, {1, 1, 1, 1, 1});
       },
       "is of type array of f32, expected array of integers"},
      {"pre is a number", [](GgufBuilder& b) { b.number<std::uint8_t>("tokenizer.ggml.pre", test::kU8, 1); },
       "\"tokenizer.ggml.pre\" is of type u8"},
      {"add_bos is a number",
       [](GgufBuilder& b) { b.number<std::uint8_t>("tokenizer.ggml.add_bos_token", test::kU8, 1); },
       "expected boolean"},
  };
  for (const Case& test : cases) {
    SCOPED_TRACE(test.name);
    GgufBuilder builder = vocabulary();
    test.edit(builder);
    const test::Bytes bytes = builder.build();
    expect_error(
        ErrorCode::format, [&] { read(bytes); }, "vocab", "tokenizer.ggml.", test.message);
  }
}

TEST(GgufTokenizer, MissingParts) {
  const auto expect = [](const GgufBuilder& builder, const char* message) {
    const test::Bytes bytes = builder.build();
    expect_error(
        ErrorCode::format, [&] { read(bytes); }, "vocab", message);
  };
  GgufBuilder builder;
  expect(builder, "\"tokenizer.ggml.model\" is missing");
  builder.string("tokenizer.ggml.model", "gpt2");
  expect(builder, "tokenizer.ggml.tokens is missing or empty");
  GgufBuilder empty = builder;
  empty.strings("tokenizer.ggml.tokens", {});
  expect(empty, "tokenizer.ggml.tokens is missing or empty");
  builder.strings("tokenizer.ggml.tokens", {"a"});
  expect(builder, "tokenizer.ggml.merges is missing");
  GgufBuilder numbers;
  numbers.string("tokenizer.ggml.model", "gpt2").array<std::int32_t>("tokenizer.ggml.tokens", test::kI32, {1});
  expect(numbers, "expected array of strings");
}

TEST(GgufTokenizer, TheTemplateMustBeUtf8) {
  GgufBuilder builder = vocabulary();
  builder.string("tokenizer.chat_template", "{{ \xff }}");
  const test::Bytes bytes = builder.build();
  const GgufFile file(bytes, "vocab");
  expect_error(
      ErrorCode::format, [&] { static_cast<void>(read_chat_template(file.metadata())); }, "chat_template", "not UTF-8");
}

}  // namespace
}  // namespace nb::io
