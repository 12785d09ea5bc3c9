#include "model/known_keys.h"

#include <string_view>

#include "base/error.h"
#include "text/unicode.h"

namespace nb::model {
namespace {

struct KeyRule {
  std::string_view key;      // behind "<architecture>."
  std::string_view neutral;  // values with which it says nothing, as Metadata::describe spells them, one space between
  std::string_view meaning;  // of other values; empty: every value is fine
};

constexpr KeyRule kRules[] = {
    // Read by read_common_facts.
    {"block_count", "", ""},
    {"context_length", "", ""},
    {"embedding_length", "", ""},
    {"feed_forward_length", "", ""},
    {"attention.head_count", "", ""},
    {"attention.head_count_kv", "", ""},
    {"attention.key_length", "", ""},
    {"attention.value_length", "", ""},
    {"attention.layer_norm_rms_epsilon", "", ""},
    {"attention.sliding_window", "", ""},
    {"rope.dimension_count", "", ""},
    {"rope.freq_base", "", ""},
    {"rope.scale_linear", "", ""},
    {"rope.scaling.type", "", ""},
    {"rope.scaling.factor", "", ""},
    {"rope.scaling.original_context_length", "", ""},
    {"rope.scaling.low_freq_factor", "", ""},
    {"rope.scaling.high_freq_factor", "", ""},
    {"rope.scaling.attn_factor", "", ""},
    {"rope.scaling.yarn_attn_factor", "", ""},
    {"rope.scaling.yarn_beta_fast", "", ""},
    {"rope.scaling.yarn_beta_slow", "", ""},
    {"rope.scaling.truncate", "", ""},
    // Without effect: the embedding says how many rows the vocabulary has; whether a scaling was fine-tuned is history.
    {"vocab_size", "", ""},
    {"rope.scaling.finetuned", "", ""},
    {"attention.layer_norm_epsilon", "", ""},  // of another normalisation, which these architectures do not have
    // Says in words what the architecture says already: Q and K rows with interleaved pairs.
    {"tensor_data_layout", "\"Meta AI original pth\"", "this layout of tensors"},
    // The shape of the network.
    {"hidden_act", "\"silu\" \"swish\"", "this activation"},
    {"hidden_activation", "\"silu\" \"swish\"", "this activation"},
    {"use_parallel_residual", "false", "attention and feed-forward side by side"},
    {"expert_count", "0", "mixture-of-experts"},
    {"expert_used_count", "0", "mixture-of-experts"},
    {"expert_shared_count", "0", "mixture-of-experts"},
    {"nextn_predict_layers", "0", "prediction of several tokens"},
    {"pooling_type", "0", "an embedding model"},
    {"attention.causal", "true", "attention to later tokens"},
    {"swin_norm", "false", "this normalisation"},
    // Numbers that enter the arithmetic; llama.cpp takes 0 for "none".
    {"attention.max_alibi_bias", "0", "ALiBi"},
    {"attention.clamp_kqv", "0", "clamping of Q, K and V"},
    {"attention.scale", "0", "a scale of attention scores of its own"},
    {"attention.output_scale", "0 1", "a scale of the attention output"},
    {"attention.temperature_length", "0", "attention temperature by position"},
    {"attention.temperature_scale", "0", "attention temperature by position"},
    {"attn_logit_softcapping", "0", "soft-capping of attention scores"},
    {"final_logit_softcapping", "0", "soft-capping of logits"},
    {"logit_scale", "0 1", "a scale of the logits"},
    {"residual_scale", "0 1", "a scale of the residual stream"},
    {"embedding_scale", "0 1", "a scale of the embedding"},
    // Layers that differ from each other.
    {"attention.sliding_window_pattern", "", "windows that differ between layers"},
    {"attention.shared_kv_layers", "0", "layers that share keys and values"},
    {"full_attention_interval", "0 1", "layers that differ in attention"},
    {"leading_dense_block_count", "0", "layers that differ in shape"},
    {"no_rope_layer_interval", "0", "layers without rotation"},
    // Rotation.
    {"rope.dimension_sections", "", "rotation by sections"},
    {"rope.scaling.alpha", "0", "this RoPE scaling"},
    {"rope.scaling.yarn_log_multiplier", "0", "YaRN with a logarithmic multiplier of its own"},
    {"rope.scaling.yarn_ext_factor", "1 -1", "YaRN with partial extrapolation"},
};

const KeyRule* find_rule(std::string_view key) {
  for (const KeyRule& rule : kRules) {
    if (rule.key == key) return &rule;
  }
  return nullptr;
}

bool is_neutral(std::string_view value, std::string_view neutral) {
  // A list of few words; a text value in it is in quotes and may have spaces inside.
  for (std::size_t at = neutral.find(value); at != std::string_view::npos; at = neutral.find(value, at + 1)) {
    const std::size_t end = at + value.size();
    if ((at == 0 || neutral[at - 1] == ' ') && (end == neutral.size() || neutral[end] == ' ')) return !value.empty();
  }
  return false;
}

}  // namespace

void refuse_unknown_keys(const io::Metadata& file, const std::string& architecture) {
  const std::string prefix = architecture + ".";
  for (const auto& [key, value] : file.entries()) {
    if (!key.starts_with(prefix)) continue;
    const KeyRule* rule = find_rule(key.substr(prefix.size()));
    const std::string text = file.describe(value);
    NB_CHECK(rule != nullptr, unsupported, file.path(), ": key ", text::in_quotes(key), " = ", text,
             " says something about the model that nanobraid does not know");
    if (rule->meaning.empty() || is_neutral(text, rule->neutral)) continue;
    fail(ErrorCode::unsupported, file.path(), ": key ", key, " = ", text, ": ", rule->meaning, " is not offered");
  }
}

}  // namespace nb::model
