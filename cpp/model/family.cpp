#include "model/family.h"

#include <optional>
#include <span>

#include "base/error.h"
#include "model/known_keys.h"
#include "text/unicode.h"

namespace nb::model {
namespace {

const Family* const kFamilies[] = {&kLlamaFamily, &kMistralFamily, &kQwen2Family, &kQwen3Family};

// Reads keys "<architecture>.<fact>".
class FactReader {
 public:
  FactReader(const io::Metadata& file, const std::string& architecture) : file_(file), prefix_(architecture + ".") {}

  std::string key(const char* fact) const { return prefix_ + fact; }
  bool has(const char* fact) const { return file_.has(key(fact)); }

  /// Without a default the key must be there. One number for all layers: an array is refused.
  int integer(const char* fact, std::optional<std::uint64_t> missing = std::nullopt) const {
    refuse_array(fact);
    const std::uint64_t value = file_.u64(key(fact), missing);
    NB_CHECK(value < (1u << 30), format, file_.path(), ": key ", key(fact), " is ", value, ", too large");
    return static_cast<int>(value);
  }
  double real(const char* fact, std::optional<float> missing = std::nullopt) const {
    refuse_array(fact);
    return static_cast<double>(file_.f32(key(fact), missing));
  }
  bool boolean(const char* fact, bool missing) const { return file_.boolean(key(fact), missing); }
  std::string text(const char* fact, const char* missing) const {
    return std::string(file_.string(key(fact), missing));
  }

 private:
  void refuse_array(const char* fact) const {
    const io::MetadataValue* value = file_.find(key(fact));
    NB_CHECK(value == nullptr || value->type != io::ValueType::array, unsupported, file_.path(), ": key ", key(fact),
             " = ", file_.describe(*value), ": layers that differ from each other are not offered");
  }

  const io::Metadata& file_;
  std::string prefix_;
};

// GGUF files without a type and with a factor mean linear scaling, which once was the only one.
RopeScaling read_scaling(const FactReader& read) {
  const bool has_factor = read.has("rope.scaling.factor") || read.has("rope.scale_linear");
  const std::string type = read.text("rope.scaling.type", has_factor ? "linear" : "none");
  for (const RopeScaling known : {RopeScaling::none, RopeScaling::linear, RopeScaling::llama3, RopeScaling::yarn}) {
    if (type == to_string(known)) return known;
  }
  fail(ErrorCode::unsupported, "key ", read.key("rope.scaling.type"), " = ", text::in_quotes(type),
       ": this RoPE scaling is not offered; there are none, linear, llama3 and yarn");
}

std::vector<float> read_divisors(const io::ModelSource& source) {
  const io::TensorInfo* tensor = source.find(TensorNames().rope_divisors);
  if (tensor == nullptr) return {};
  NB_CHECK(tensor->shape.size() == 1 && tensor->format == quant::Format::f32 && tensor->shape[0] < (1 << 16), format,
           source.path(), ": tensor ", tensor->name, " is not a short vector of f32");
  std::vector<float> divisors(static_cast<std::size_t>(tensor->shape[0]));
  source.read(*tensor, 0, std::as_writable_bytes(std::span(divisors)));
  return divisors;
}

RopeFacts read_rope_facts(const io::ModelSource& source, const FactReader& read) {
  RopeFacts facts;
  facts.theta = read.real("rope.freq_base", 10000.0f);
  facts.scaling = read_scaling(read);
  facts.divisors = read_divisors(source);
  if (facts.scaling == RopeScaling::none) return facts;
  facts.factor = read.real(read.has("rope.scale_linear") ? "rope.scale_linear" : "rope.scaling.factor");
  if (facts.scaling == RopeScaling::llama3) {
    facts.original_context = read.integer("rope.scaling.original_context_length");
    facts.low_freq_factor = read.real("rope.scaling.low_freq_factor");
    facts.high_freq_factor = read.real("rope.scaling.high_freq_factor");
  }
  if (facts.scaling == RopeScaling::yarn) {
    facts.original_context = read.has("rope.scaling.original_context_length")
                                 ? read.integer("rope.scaling.original_context_length")
                                 : read.integer("context_length");
    facts.beta_fast = read.real("rope.scaling.yarn_beta_fast", 32.0f);
    facts.beta_slow = read.real("rope.scaling.yarn_beta_slow", 1.0f);
    facts.truncate = read.boolean("rope.scaling.truncate", true);
    // A braid file's attn_factor is the magnitude itself. In GGUF files it multiplies YaRN's own; converters write a
    // checkpoint's magnitude as yarn_attn_factor.
    const char* const key = "rope.scaling.attn_factor";
    NB_CHECK(!read.has(key) || source.kind() != io::FileKind::gguf, unsupported, source.path(), ": key ", read.key(key),
             " = ", read.real(key), " with YaRN in a GGUF file is not offered");
    for (const char* magnitude : {key, "rope.scaling.yarn_attn_factor"}) {
      if (read.has(magnitude)) facts.magnitude = read.real(magnitude);
    }
  }
  return facts;
}

}  // namespace

std::vector<std::string> known_architectures() {
  std::vector<std::string> names;
  for (const Family* family : kFamilies) names.emplace_back(family->architecture);
  return names;
}

const Family& find_family(const std::string& architecture) {
  std::string known;
  for (const Family* family : kFamilies) {
    if (architecture == family->architecture) return *family;
    known += (known.empty() ? "" : ", ") + std::string(family->architecture);
  }
  fail(ErrorCode::unsupported, "model architecture '", architecture, "' is not offered; there are: ", known);
}

std::string layer_name(const char* pattern, int layer) {
  std::string name = pattern;
  return name.replace(name.find("{}"), 2, std::to_string(layer));
}

ModelConfig read_common_facts(const io::ModelSource& source, const std::string& architecture) {
  const io::Metadata& file = source.metadata();
  refuse_unknown_keys(file, architecture);
  const FactReader read(file, architecture);
  const TensorNames names;
  ModelConfig config;
  config.architecture = architecture;
  config.name = std::string(file.string("general.name", ""));
  config.num_layers = read.integer("block_count");
  config.hidden_size = read.integer("embedding_length");
  config.num_heads = read.integer("attention.head_count");
  NB_CHECK(config.num_heads > 0, format, source.path(), ": key ", read.key("attention.head_count"), " is 0");
  config.num_kv_heads = read.integer("attention.head_count_kv", static_cast<std::uint64_t>(config.num_heads));
  config.head_dim =
      read.integer("attention.key_length", static_cast<std::uint64_t>(config.hidden_size / config.num_heads));
  config.intermediate_size = read.integer("feed_forward_length");
  config.max_position_embeddings = read.integer("context_length");
  config.rms_norm_eps = static_cast<float>(read.real("attention.layer_norm_rms_epsilon"));
  config.sliding_window = read.integer("attention.sliding_window", 0);
  config.rope = read_rope_facts(source, read);
  config.qkv_bias = source.find(layer_name(names.q_bias, 0)) != nullptr;
  config.qk_norm = source.find(layer_name(names.q_norm, 0)) != nullptr;
  for (const char* size : {"attention.value_length", "rope.dimension_count"}) {
    const int value = read.integer(size, static_cast<std::uint64_t>(config.head_dim));
    NB_CHECK(value == config.head_dim, unsupported, source.path(), ": key ", read.key(size), " = ", value,
             ", other than the ", config.head_dim, " dimensions of a key, is not offered");
  }
  return config;
}

}  // namespace nb::model
