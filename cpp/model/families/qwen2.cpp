// Qwen2 and Qwen2.5: a Llama with a bias on q, k and v (none on the output projection), tied or not.
//
//   q, k, v bias    always; a file without them is refused as damaged
//   RoPE scaling    none, or yarn for contexts beyond 32768 positions
//   sliding window  attention.sliding_window, for all layers alike. Checkpoints name a window and switch it off
//                   (use_sliding_window); converters then write no key. One that starts at a certain layer is refused.
//
// Rows stand as in Hugging Face checkpoints, in GGUF files too. Qwen2-MoE and Qwen2-VL have names of their own.
#include "model/family.h"

namespace nb::model {
namespace {

ModelConfig read_config(const io::ModelSource& source) {
  ModelConfig config = read_common_facts(source, "qwen2");
  config.qkv_bias = true;
  config.qk_norm = false;
  return config;
}

}  // namespace

const Family kQwen2Family = {.architecture = "qwen2", .names = {}, .read_config = read_config};

}  // namespace nb::model
