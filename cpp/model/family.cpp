#include "model/family.h"

#include "base/error.h"

namespace nb::model {
namespace {

const Family* const kFamilies[] = {&kLlamaFamily};

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

ModelConfig read_common_facts(const io::ModelSource& source, const std::string& architecture) {
  const io::Metadata& file = source.metadata();
  const auto key = [&](const char* fact) { return architecture + "." + fact; };
  const auto fact = [&](const char* name) {
    const std::uint64_t value = file.u64(key(name));
    NB_CHECK(value < (1u << 30), format, "key ", key(name), " is ", value, ", too large");
    return static_cast<int>(value);
  };
  ModelConfig config;
  config.architecture = architecture;
  config.name = std::string(file.string("general.name", ""));
  config.num_layers = fact("block_count");
  config.hidden_size = fact("embedding_length");
  config.num_heads = fact("attention.head_count");
  config.num_kv_heads = file.has(key("attention.head_count_kv")) ? fact("attention.head_count_kv") : config.num_heads;
  config.intermediate_size = fact("feed_forward_length");
  config.max_position_embeddings = fact("context_length");
  config.rms_norm_eps = file.f32(key("attention.layer_norm_rms_epsilon"));
  config.rope_theta = static_cast<double>(file.f32(key("rope.freq_base"), 10000.0f));
  NB_CHECK(config.num_heads > 0, format, "key ", key("attention.head_count"), " is 0");
  config.head_dim =
      file.has(key("attention.key_length")) ? fact("attention.key_length") : config.hidden_size / config.num_heads;
  if (file.has(key("rope.dimension_count"))) {
    NB_CHECK(fact("rope.dimension_count") == config.head_dim, unsupported, "rotation of ", fact("rope.dimension_count"),
             " of ", config.head_dim, " head dimensions is not offered");
  }
  return config;
}

}  // namespace nb::model
