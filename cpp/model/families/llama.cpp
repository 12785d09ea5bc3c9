// Llama-shaped models: Llama-2, TinyLlama, Llama-3, 3.1 and 3.2, SmolLM2, and Mistral as GGUF files spell it.
//
//   q, k, v without bias (a checkpoint with attention_bias has them: read by presence), no norm of q and k
//   RoPE scaling    none, linear, yarn; llama3 by its key (.braid) or as the tensor rope_freqs.weight (GGUF)
//   sliding window  attention.sliding_window, for all layers alike
//   head            output.weight, or tied to the embedding if the file has none
//
// GGUF files of this architecture, and of no other here, store Q and K rows (and their biases) with the two halves of
// each rotary head interleaved; .braid files keep the order of Hugging Face checkpoints.
#include "model/family.h"

namespace nb::model {
namespace {

ModelConfig read_config(const io::ModelSource& source) {
  ModelConfig config = read_common_facts(source, "llama");
  config.interleaved_qk_rows = source.kind() == io::FileKind::gguf;
  config.qk_norm = false;
  return config;
}

}  // namespace

const Family kLlamaFamily = {.architecture = "llama", .names = {}, .read_config = read_config};

}  // namespace nb::model
