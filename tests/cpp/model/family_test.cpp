// family.cpp and families/*.cpp: which facts each family takes from a file, and what is refused by name.
#include "model/family.h"

#include <gtest/gtest.h>

#include "io/expect_error.h"
#include "io/gguf_source.h"
#include "model/loader.h"
#include "model/naive_llama.h"
#include "model/read_config.h"

namespace nb::model {
namespace {

using io::test::expect_error;
using io::test::GgufBuilder;

NaiveLlama naive_of(const std::string& architecture) {
  NaiveLlama naive;
  naive.architecture = architecture;
  naive.bias = architecture == "qwen2";
  naive.qk_norm = architecture == "qwen3";
  return naive;
}

ModelConfig config_of(NaiveLlama naive) {
  if (naive.order.empty()) naive.fill();
  const io::test::Bytes bytes = naive.gguf();
  return read_config(*io::open_gguf(std::make_shared<const io::GgufFile>(bytes, "tiny.gguf")));
}

// The facts of a file of `architecture` with further keys; "{}" in keys stands for the architecture.
template <class Fill>
ModelConfig config_with(const std::string& architecture, const Fill& fill) {
  NaiveLlama naive = naive_of(architecture);
  naive.more_keys = fill;
  return config_of(naive);
}

TEST(Families, TakeTheirFactsFromTheFile) {
  for (const char* architecture : {"llama", "mistral", "qwen2", "qwen3"}) {
    SCOPED_TRACE(architecture);
    NaiveLlama naive = naive_of(architecture);
    naive.window = 77;
    naive.kv_heads = 1;
    const ModelConfig config = config_of(naive);
    EXPECT_EQ(config.architecture, architecture);
    EXPECT_EQ(config.sliding_window, 77);
    EXPECT_EQ(config.num_kv_heads, 1);
    EXPECT_EQ(config.head_dim, 16);  // not hidden / heads, which is 12
    EXPECT_EQ(config.qkv_bias, naive.bias);
    EXPECT_EQ(config.qk_norm, naive.qk_norm);
    EXPECT_EQ(config.interleaved_qk_rows, naive.architecture == "llama");
    EXPECT_EQ(config.rope.scaling, RopeScaling::none);
    EXPECT_EQ(config_of(naive_of(architecture)).sliding_window, 0);
  }
}

TEST(Families, ReadBiasByPresence) {
  for (const char* architecture : {"llama", "qwen3"}) {
    NaiveLlama naive = naive_of(architecture);
    EXPECT_FALSE(config_of(naive).qkv_bias);
    naive.bias = true;
    EXPECT_TRUE(config_of(naive).qkv_bias);
  }
}

TEST(Families, ReadRopeScaling) {
  const ModelConfig linear = config_with("llama", [](GgufBuilder& b) {
    b.string("llama.rope.scaling.type", "linear");
    b.number<float>("llama.rope.scaling.factor", io::test::kF32, 2.5f);
  });
  EXPECT_EQ(linear.rope.scaling, RopeScaling::linear);
  EXPECT_EQ(linear.rope.factor, 2.5);
  for (const char* key : {"llama.rope.scaling.factor", "llama.rope.scale_linear"}) {
    const ModelConfig old = config_with("llama", [&](GgufBuilder& b) { b.number<float>(key, io::test::kF32, 4.0f); });
    EXPECT_EQ(old.rope.scaling, RopeScaling::linear) << key;
    EXPECT_EQ(old.rope.factor, 4.0) << key;
  }

  const ModelConfig llama3 = config_with("llama", [](GgufBuilder& b) {
    b.string("llama.rope.scaling.type", "llama3");
    b.number<float>("llama.rope.scaling.factor", io::test::kF32, 8.0f);
    b.number<std::uint32_t>("llama.rope.scaling.original_context_length", io::test::kU32, 64);
    b.number<float>("llama.rope.scaling.low_freq_factor", io::test::kF32, 1.5f);
    b.number<float>("llama.rope.scaling.high_freq_factor", io::test::kF32, 5.0f);
  });
  EXPECT_EQ(llama3.rope.scaling, RopeScaling::llama3);
  EXPECT_EQ(llama3.rope.original_context, 64);
  EXPECT_EQ(llama3.rope.low_freq_factor, 1.5);
  EXPECT_EQ(llama3.rope.high_freq_factor, 5.0);

  const auto yarn = [](GgufBuilder& b) {
    b.string("qwen2.rope.scaling.type", "yarn");
    b.number<float>("qwen2.rope.scaling.factor", io::test::kF32, 4.0f);
  };
  const ModelConfig plain = config_with("qwen2", yarn);
  EXPECT_EQ(plain.rope.scaling, RopeScaling::yarn);
  EXPECT_EQ(plain.rope.original_context, 600);  // context_length, where the file does not say
  EXPECT_EQ(plain.rope.beta_fast, 32.0);
  EXPECT_EQ(plain.rope.beta_slow, 1.0);
  EXPECT_TRUE(plain.rope.truncate);
  EXPECT_FALSE(plain.rope.magnitude.has_value());
  const ModelConfig full = config_with("qwen2", [&](GgufBuilder& b) {
    yarn(b);
    b.number<std::uint32_t>("qwen2.rope.scaling.original_context_length", io::test::kU32, 50);
    b.number<float>("qwen2.rope.scaling.yarn_beta_fast", io::test::kF32, 16.0f);
    b.number<float>("qwen2.rope.scaling.yarn_beta_slow", io::test::kF32, 2.0f);
    b.number<std::uint8_t>("qwen2.rope.scaling.truncate", io::test::kBool, 0);
    b.number<float>("qwen2.rope.scaling.yarn_attn_factor", io::test::kF32, 0.75f);
  });
  EXPECT_EQ(full.rope.original_context, 50);
  EXPECT_EQ(full.rope.beta_fast, 16.0);
  EXPECT_EQ(full.rope.beta_slow, 2.0);
  EXPECT_FALSE(full.rope.truncate);
  EXPECT_EQ(full.rope.magnitude, 0.75);
  expect_error(
      ErrorCode::unsupported,
      [&] {
        config_with("qwen2", [&](GgufBuilder& b) {
          yarn(b);
          b.number<float>("qwen2.rope.scaling.attn_factor", io::test::kF32, 0.75f);
        });
      },
      "qwen2.rope.scaling.attn_factor", "0.75");

  NaiveLlama divided = naive_of("llama");
  divided.divisors = {1, 1, 1, 2, 4, 8, 8, 8};
  EXPECT_EQ(config_of(divided).rope.divisors, divided.divisors);
  divided.divisors = {1, 1, 1};
  expect_error(
      ErrorCode::format, [&] { config_of(divided); }, "3 frequency divisors for 8 pairs");
}

// The same contents as if they stood in a braid file.
class AsBraid final : public io::ModelSource {
 public:
  explicit AsBraid(std::shared_ptr<const io::ModelSource> source) : source_(std::move(source)) {}
  io::FileKind kind() const override { return io::FileKind::braid; }
  std::uint32_t version() const override { return 1; }
  std::uint64_t file_bytes() const override { return source_->file_bytes(); }
  const io::Metadata& metadata() const override { return source_->metadata(); }
  const std::vector<io::TensorInfo>& tensors() const override { return source_->tensors(); }
  const io::TensorInfo* find(std::string_view name) const override { return source_->find(name); }
  void read(const io::TensorInfo& tensor, std::uint64_t offset, std::span<std::byte> out) const override {
    source_->read(tensor, offset, out);
  }

 private:
  std::shared_ptr<const io::ModelSource> source_;
};

TEST(Families, BraidFilesDifferInRowOrderAndAttentionFactor) {
  NaiveLlama naive = naive_of("llama");
  naive.more_keys = [](GgufBuilder& b) {
    b.string("llama.rope.scaling.type", "yarn");
    b.number<float>("llama.rope.scaling.factor", io::test::kF32, 4.0f);
    b.number<float>("llama.rope.scaling.attn_factor", io::test::kF32, 0.75f);
  };
  naive.fill();
  const io::test::Bytes bytes = naive.gguf();
  const auto source = io::open_gguf(std::make_shared<const io::GgufFile>(bytes, "tiny.braid"));
  expect_error(
      ErrorCode::unsupported, [&] { read_config(*source); }, "llama.rope.scaling.attn_factor");
  const ModelConfig config = read_config(AsBraid(source));
  EXPECT_FALSE(config.interleaved_qk_rows);
  EXPECT_EQ(config.rope.magnitude, 0.75);
  EXPECT_EQ(rope_magnitude(config.rope), 0.75);
}

TEST(Families, RefuseOtherRopeScalings) {
  for (const char* type : {"longrope", "dynamic", "su", ""}) {
    expect_error(
        ErrorCode::unsupported,
        [&] { config_with("qwen3", [&](GgufBuilder& b) { b.string("qwen3.rope.scaling.type", type); }); },
        "qwen3.rope.scaling.type", type, "llama3");
  }
}

TEST(Families, RefuseArraysWhereAllLayersMustBeAlike) {
  for (const char* key : {"attention.head_count", "attention.head_count_kv", "feed_forward_length"}) {
    const std::string full = std::string("llama.") + key;
    GgufBuilder builder;
    builder.string("general.architecture", "llama");
    for (const char* other : {"block_count", "embedding_length", "context_length", "attention.head_count",
                              "attention.head_count_kv", "feed_forward_length"}) {
      if (std::string(other) != key) {
        builder.number<std::uint32_t>(std::string("llama.") + other, io::test::kU32, 4);
      }
    }
    builder.array<std::uint32_t>(full, io::test::kU32, {4, 2});
    builder.number<float>("llama.attention.layer_norm_rms_epsilon", io::test::kF32, 1e-5f);
    const io::test::Bytes bytes = builder.build();
    expect_error(
        ErrorCode::unsupported,
        [&] { read_config(*io::open_gguf(std::make_shared<const io::GgufFile>(bytes, "mixed.gguf"))); }, "mixed.gguf",
        full, "[4, 2]");
  }
}

TEST(Families, RefusePartialRotationAndOtherValueSizes) {
  for (const char* key : {"llama.rope.dimension_count", "llama.attention.value_length"}) {
    expect_error(
        ErrorCode::unsupported,
        [&] { config_with("llama", [&](GgufBuilder& b) { b.number<std::uint32_t>(key, io::test::kU32, 8); }); }, key,
        "= 8", "16");
    EXPECT_NO_THROW(config_with("llama", [&](GgufBuilder& b) { b.number<std::uint32_t>(key, io::test::kU32, 16); }));
  }
}

TEST(Families, RefuseUnreviewedKeys) {
  expect_error(
      ErrorCode::unsupported,
      [] { config_with("mistral", [](GgufBuilder& b) { b.number<float>("mistral.x", io::test::kF32, 1.0f); }); },
      "mistral.x");
}

// A tensor that the decoder has no use for is a part of the model that would be left out.
TEST(Families, RefuseTensorsNobodyReads) {
  const auto refuses = [](const std::string& architecture, const std::string& name) {
    NaiveLlama naive = naive_of(architecture);
    naive.fill();
    naive.add(name, 1, 48, 1.0);
    expect_error(
        ErrorCode::unsupported, [&] { config_of(naive); }, name, architecture);
  };
  refuses("llama", "blk.0.attn_output.bias");
  refuses("llama", "blk.1.ffn_up.bias");
  refuses("llama", "blk.1.attn_q_norm.weight");
  refuses("mistral", "blk.0.attn_q.bias");
  refuses("qwen2", "blk.0.attn_q_norm.weight");
  refuses("qwen3", "blk.0.ffn_gate_inp.weight");
  refuses("qwen3", "blk.2.attn_norm.weight");  // there are two layers
  refuses("llama", "blk.00.attn_norm.weight");
  refuses("llama", "position_embd.weight");
  refuses("llama", "blk.-0.attn_norm.weight");
  NaiveLlama old = naive_of("llama");
  old.fill();
  old.add("blk.0.attn_rot_embd.weight", 1, 8, 1.0);
  EXPECT_NO_THROW(config_of(old));
}

TEST(Families, NameTensorsThatAreMissing) {
  const auto misses = [](const std::string& architecture, const std::string& name) {
    NaiveLlama naive = naive_of(architecture);
    naive.fill();
    std::erase(naive.order, name);
    const io::test::ScratchDir scratch;
    const std::string path = scratch.write("x.gguf", naive.gguf());
    expect_error(
        ErrorCode::format, [&] { load_model(path, {.backend = "reference"}); }, name);
  };
  misses("qwen2", "blk.0.attn_q.bias");
  misses("qwen2", "blk.1.attn_v.bias");
  misses("qwen3", "blk.0.attn_q_norm.weight");
  misses("qwen3", "blk.1.attn_k_norm.weight");
}

TEST(Families, AreListed) {
  EXPECT_EQ(known_architectures(), (std::vector<std::string>{"llama", "mistral", "qwen2", "qwen3"}));
  EXPECT_EQ(std::string(find_family("qwen3").architecture), "qwen3");
  for (const char* other : {"gemma2", "phi3", "qwen2moe", "qwen3moe", "mistral3", "Llama", ""}) {
    expect_error(
        ErrorCode::unsupported, [&] { find_family(other); }, other, "llama, mistral, qwen2, qwen3");
  }
}

}  // namespace
}  // namespace nb::model
