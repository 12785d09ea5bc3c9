// read_config.cpp and config.cpp: what is read, and what is refused by name.
#include "model/read_config.h"

#include <gtest/gtest.h>

#include "io/expect_error.h"
#include "io/gguf_source.h"
#include "model/naive_llama.h"

namespace nb::model {
namespace {

using io::test::expect_error;
using io::test::GgufBuilder;

// Loads a file whose metadata are the tiny model's, changed by `change`, and whose tensors are right.
template <class Change>
ModelConfig config_with(const Change& change) {
  const NaiveLlama naive = tiny_llama();
  GgufBuilder builder;
  naive.describe(builder);
  change(builder);
  for (const std::string& name : naive.order) {
    builder.tensor(
        {.name = name, .dims = naive.dims.at(name), .type = 0, .data_bytes = naive.tensors.at(name).size() * 4});
  }
  const io::test::Bytes bytes = builder.build();
  return read_config(*io::open_gguf(std::make_shared<const io::GgufFile>(bytes, "changed")));
}

TEST(ReadConfig, ReadsEveryFact) {
  const NaiveLlama naive = tiny_llama();
  const io::test::Bytes bytes = naive.gguf();
  const ModelConfig config = read_config(*io::open_gguf(std::make_shared<const io::GgufFile>(bytes, "tiny")));
  EXPECT_EQ(config.architecture, "llama");
  EXPECT_EQ(config.num_layers, 2);
  EXPECT_EQ(config.hidden_size, 48);
  EXPECT_EQ(config.num_heads, 4);
  EXPECT_EQ(config.num_kv_heads, 2);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.intermediate_size, 80);
  EXPECT_EQ(config.vocab_size, 70);
  EXPECT_EQ(config.max_position_embeddings, 600);
  EXPECT_FLOAT_EQ(config.rms_norm_eps, 1e-5f);
  EXPECT_EQ(config.rope.theta, 5000.0);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_EQ(config.q_size(), 64);
  EXPECT_EQ(config.kv_size(), 32);
}

TEST(ReadConfig, RefusesWhatTheDecoderHasNoBranchFor) {
  expect_error(
      ErrorCode::unsupported,
      [] { config_with([](GgufBuilder& b) { b.number<std::uint32_t>("llama.expert_count", io::test::kU32, 8); }); },
      "mixture-of-experts", "8");
  expect_error(
      ErrorCode::unsupported,
      [] { config_with([](GgufBuilder& b) { b.string("llama.rope.scaling.type", "longrope"); }); }, "longrope");
  expect_error(
      ErrorCode::unsupported,
      [] {
        config_with([](GgufBuilder& b) { b.number<std::uint32_t>("llama.rope.dimension_count", io::test::kU32, 8); });
      },
      "llama.rope.dimension_count = 8", "16");
  EXPECT_NO_THROW(config_with([](GgufBuilder& b) { b.string("llama.rope.scaling.type", "none"); }));
}

TEST(ReadConfig, RefusesUnknownArchitecturesByName) {
  GgufBuilder builder;
  builder.string("general.architecture", "mamba");
  const io::test::Bytes bytes = builder.build();
  expect_error(
      ErrorCode::unsupported,
      [&] { read_config(*io::open_gguf(std::make_shared<const io::GgufFile>(bytes, "other"))); }, "mamba", "llama");
}

TEST(ReadConfig, NamesMissingKeys) {
  GgufBuilder builder;
  builder.string("general.architecture", "llama");
  const io::test::Bytes bytes = builder.build();
  expect_error(
      ErrorCode::format, [&] { read_config(*io::open_gguf(std::make_shared<const io::GgufFile>(bytes, "bare"))); },
      "llama.block_count");
}

TEST(Validate, RefusesInconsistentFacts) {
  const NaiveLlama naive = tiny_llama();
  const io::test::Bytes bytes = naive.gguf();
  const ModelConfig good = read_config(*io::open_gguf(std::make_shared<const io::GgufFile>(bytes, "tiny")));
  const auto refuses = [&](auto change, const char* fact) {
    ModelConfig config = good;
    change(config);
    expect_error(
        ErrorCode::format, [&] { validate(config); }, fact);
  };
  refuses([](ModelConfig& c) { c.num_layers = 0; }, "num_layers");
  refuses([](ModelConfig& c) { c.vocab_size = 1 << 30; }, "vocab_size");
  refuses([](ModelConfig& c) { c.num_kv_heads = 3; }, "3 KV heads");
  refuses([](ModelConfig& c) { c.head_dim = 15; }, "head_dim");
  refuses([](ModelConfig& c) { c.sliding_window = -1; }, "sliding_window");
  refuses([](ModelConfig& c) { c.rms_norm_eps = -1.0f; }, "rms_norm_eps");
  refuses([](ModelConfig& c) { c.rope.theta = 0.0; }, "rope_theta");
  ModelConfig endless = good;
  endless.max_position_embeddings = 1 << 24, endless.head_dim = 128;
  expect_error(
      ErrorCode::unsupported, [&] { validate(endless); }, "16777216 positions", "128");
}

}  // namespace
}  // namespace nb::model
