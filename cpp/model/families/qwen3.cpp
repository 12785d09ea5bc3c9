// Qwen3 (dense): every query and key head is normalised before rotation, and head_dim stands on its own.
//
//   q, k norm       always, one weight of head_dim for all heads of a layer; a file without them is refused as damaged
//   q, k, v bias    none in the published models; read by presence (attention_bias)
//   head_dim        attention.key_length, 128 also where hidden / heads is less, so that q is wider than hidden
//   RoPE scaling    none, or yarn for contexts beyond 32768 positions
//
// Rows stand as in Hugging Face checkpoints, in GGUF files too. Qwen3-MoE and Qwen3-VL have names of their own.
#include "model/family.h"

namespace nb::model {
namespace {

ModelConfig read_config(const io::ModelSource& source) {
  ModelConfig config = read_common_facts(source, "qwen3");
  config.qk_norm = true;
  return config;
}

}  // namespace

const Family kQwen3Family = {.architecture = "qwen3", .names = {}, .read_config = read_config};

}  // namespace nb::model
