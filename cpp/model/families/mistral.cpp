// Mistral: a Llama whose tokens see a window of the text before them.
//
//   q, k, v without bias, no norm of q and k
//   sliding window  attention.sliding_window, for all layers alike; absent in the versions that have none
//   head_dim        attention.key_length (Mistral-Nemo: other than hidden / heads)
//
// Exported files say "mistral"; GGUF converters write "llama" instead, with interleaved rows. Rows under this name
// always have the order of Hugging Face checkpoints.
#include "model/family.h"

namespace nb::model {
namespace {

ModelConfig read_config(const io::ModelSource& source) {
  ModelConfig config = read_common_facts(source, "mistral");
  config.qkv_bias = config.qk_norm = false;
  return config;
}

}  // namespace

const Family kMistralFamily = {.architecture = "mistral", .names = {}, .read_config = read_config};

}  // namespace nb::model
