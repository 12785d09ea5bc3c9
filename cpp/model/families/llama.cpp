// Llama-shaped models as GGUF files spell them: Llama-2, TinyLlama, SmolLM2 and others that say "llama".
#include "base/error.h"
#include "model/family.h"

namespace nb::model {
namespace {

ModelConfig read_config(const io::ModelSource& source) {
  ModelConfig config = read_common_facts(source, "llama");
  const io::Metadata& file = source.metadata();
  config.interleaved_qk_rows = source.kind() == io::FileKind::gguf;
  NB_CHECK(file.u64("llama.expert_count", 0) == 0, unsupported, "mixture-of-experts models are not offered (",
           file.u64("llama.expert_count", 0), " experts)");
  NB_CHECK(file.string("llama.rope.scaling.type", "none") == "none", unsupported, "RoPE scaling '",
           file.string("llama.rope.scaling.type", "none"), "' is not offered");
  NB_CHECK(source.find("rope_freqs.weight") == nullptr, unsupported,
           "RoPE frequency factors (tensor rope_freqs.weight) are not offered");
  return config;
}

}  // namespace

const Family kLlamaFamily = {.architecture = "llama", .names = {}, .read_config = read_config};

}  // namespace nb::model
