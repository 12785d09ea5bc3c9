// The table of model families: how each spells its facts and its tensor names.
//
// A family only reads; control flow lives in the decoder, which sees facts. Adding a family of a known shape is one
// file under families/ and one row in family.cpp. Safe from any thread.
#pragma once

#include <string>
#include <vector>

#include "io/model_source.h"
#include "model/config.h"

namespace nb::model {

/// Tensor names of a model; "{}" stands for the layer index. Empty means the family has no such tensor.
struct TensorNames {
  const char* embedding = "token_embd.weight";
  const char* final_norm = "output_norm.weight";
  const char* head = "output.weight";  ///< absent from the file when tied
  const char* attention_norm = "blk.{}.attn_norm.weight";
  const char* q = "blk.{}.attn_q.weight";
  const char* k = "blk.{}.attn_k.weight";
  const char* v = "blk.{}.attn_v.weight";
  const char* attention_out = "blk.{}.attn_output.weight";
  const char* ffn_norm = "blk.{}.ffn_norm.weight";
  const char* gate = "blk.{}.ffn_gate.weight";
  const char* up = "blk.{}.ffn_up.weight";
  const char* down = "blk.{}.ffn_down.weight";
  // By the facts qkv_bias and qk_norm.
  const char* q_bias = "blk.{}.attn_q.bias";
  const char* k_bias = "blk.{}.attn_k.bias";
  const char* v_bias = "blk.{}.attn_v.bias";
  const char* q_norm = "blk.{}.attn_q_norm.weight";
  const char* k_norm = "blk.{}.attn_k_norm.weight";
  /// f32[head_dim / 2]: divisors of the frequencies, GGUF's spelling of the llama3 scaling.
  const char* rope_divisors = "rope_freqs.weight";
};

struct Family {
  const char* architecture;  ///< value of general.architecture
  TensorNames names;
  /// Reads every fact from the file; throws unsupported for facts the decoder has no branch for.
  ModelConfig (*read_config)(const io::ModelSource& source);
};

/// Throws unsupported naming the architecture and the ones there are.
const Family& find_family(const std::string& architecture);

/// Architectures that can be loaded.
std::vector<std::string> known_architectures();

/// The facts every dense decoder shares, from keys "<architecture>.<fact>"; refuses every key that is not read and
/// changes the result (known_keys.h). qkv_bias and qk_norm follow from the tensors of layer 0; a family that always has
/// them, or never, says so itself.
ModelConfig read_common_facts(const io::ModelSource& source, const std::string& architecture);

/// Name of a layer's tensor from its pattern in TensorNames.
std::string layer_name(const char* pattern, int layer);

extern const Family kLlamaFamily;
extern const Family kMistralFamily;
extern const Family kQwen2Family;
extern const Family kQwen3Family;

}  // namespace nb::model
