// known_keys.cpp: what a file may say about a model, and what is refused by key and value.
#include "model/known_keys.h"

#include <gtest/gtest.h>

#include <functional>
#include <memory>

#include "io/expect_error.h"
#include "io/gguf_builder.h"
#include "io/gguf_file.h"

namespace nb::model {
namespace {

using io::test::GgufBuilder;

void review(const std::function<void(GgufBuilder&)>& fill, const std::string& architecture = "qwen2") {
  GgufBuilder builder;
  builder.string("general.architecture", architecture);
  fill(builder);
  const io::test::Bytes bytes = builder.build();
  const io::GgufFile file(bytes, "some.gguf");
  refuse_unknown_keys(file.metadata(), architecture);
}

TEST(KnownKeys, NeutralValuesAndOtherNamespacesAreFine) {
  EXPECT_NO_THROW(review([](GgufBuilder& b) {
    b.number<std::uint32_t>("qwen2.block_count", io::test::kU32, 7);
    b.number<std::uint32_t>("qwen2.expert_count", io::test::kU32, 0);
    b.number<float>("qwen2.logit_scale", io::test::kF32, 1.0f);
    b.number<float>("qwen2.attn_logit_softcapping", io::test::kF32, 0.0f);
    b.number<std::uint8_t>("qwen2.use_parallel_residual", io::test::kBool, 0);
    b.number<std::uint8_t>("qwen2.attention.causal", io::test::kBool, 1);
    b.string("qwen2.hidden_act", "silu");
    b.string("qwen2.hidden_activation", "swish");
    b.number<float>("qwen2.attention.layer_norm_epsilon", io::test::kF32, 1e-5f);
    b.string("qwen2.tensor_data_layout", "Meta AI original pth");
    b.number<std::uint32_t>("llama.expert_count", io::test::kU32, 8);  // of another architecture
    b.number<std::uint32_t>("qwen2moe.expert_count", io::test::kU32, 8);
    b.string("tokenizer.ggml.model", "gpt2");
  }));
}

TEST(KnownKeys, RefusesByKeyAndValue) {
  const auto refuses = [](const std::function<void(GgufBuilder&)>& fill, const char* key, const char* value,
                          const char* meaning) {
    io::test::expect_error(
        ErrorCode::unsupported, [&] { review(fill); }, "some.gguf", key, value, meaning);
  };
  const auto number = [&](const std::string& key, std::uint32_t value, const char* meaning) {
    refuses([&](GgufBuilder& b) { b.number<std::uint32_t>("qwen2." + key, io::test::kU32, value); },
            ("qwen2." + key).c_str(), ("= " + std::to_string(value)).c_str(), meaning);
  };
  const auto real = [&](const std::string& key, float value, const char* text, const char* meaning) {
    refuses([&](GgufBuilder& b) { b.number<float>("qwen2." + key, io::test::kF32, value); }, ("qwen2." + key).c_str(),
            text, meaning);
  };
  const auto flag = [&](const std::string& key, bool value, const char* meaning) {
    refuses([&](GgufBuilder& b) { b.number<std::uint8_t>("qwen2." + key, io::test::kBool, value ? 1 : 0); },
            ("qwen2." + key).c_str(), value ? "= true" : "= false", meaning);
  };
  number("expert_count", 8, "mixture-of-experts");
  number("expert_used_count", 2, "mixture-of-experts");
  number("nextn_predict_layers", 1, "several tokens");
  number("pooling_type", 3, "embedding model");
  number("attention.sliding_window_pattern", 6, "differ between layers");
  number("attention.shared_kv_layers", 2, "share keys");
  number("attention.temperature_length", 8192, "temperature");
  number("full_attention_interval", 4, "differ in attention");
  number("no_rope_layer_interval", 4, "without rotation");
  number("rope.dimension_sections", 16, "sections");
  real("attention.max_alibi_bias", 8.0f, "= 8", "ALiBi");
  real("attention.clamp_kqv", 2.5f, "= 2.5", "clamping");
  real("attention.scale", 0.125f, "= 0.125", "scale of attention");
  real("attn_logit_softcapping", 50.0f, "= 50", "soft-capping");
  real("final_logit_softcapping", 30.0f, "= 30", "soft-capping");
  real("logit_scale", 0.5f, "= 0.5", "logits");
  real("residual_scale", 0.22f, "= 0.22", "residual");
  real("embedding_scale", 12.0f, "= 12", "embedding");
  real("rope.scaling.yarn_log_multiplier", 0.1f, "= 0.1", "YaRN");
  real("rope.scaling.yarn_ext_factor", 0.5f, "= 0.5", "YaRN");
  flag("attention.causal", false, "later tokens");
  flag("use_parallel_residual", true, "side by side");
  refuses([](GgufBuilder& b) { b.string("qwen2.hidden_act", "gelu"); }, "qwen2.hidden_act", "\"gelu\"", "activation");
  refuses([](GgufBuilder& b) { b.string("qwen2.hidden_act", "silu\" \"swish"); }, "qwen2.hidden_act", "silu", "activ");
  refuses([](GgufBuilder& b) { b.string("qwen2.tensor_data_layout", "other"); }, "qwen2.tensor_data_layout", "other",
          "layout");
  refuses(
      [](GgufBuilder& b) {
        b.array<std::uint32_t>("qwen2.expert_count", io::test::kU32, {0, 8});
      },
      "qwen2.expert_count", "[0, 8]", "mixture-of-experts");
}

// A key that nobody has reviewed may change the result.
TEST(KnownKeys, RefusesKeysItDoesNotKnow) {
  io::test::expect_error(
      ErrorCode::unsupported,
      [] { review([](GgufBuilder& b) { b.number<float>("qwen2.attention.new_idea", io::test::kF32, 2.0f); }); },
      "qwen2.attention.new_idea", "= 2", "does not know");
}

}  // namespace
}  // namespace nb::model
