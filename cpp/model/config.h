// Facts about one model: everything the decoder may depend on. Facts select, names do not.
//
// Filled by a family from a file's metadata (family.h); immutable afterwards. Safe from any thread.
#pragma once

#include <cstdint>
#include <string>

#include "model/rope.h"

namespace nb::model {

struct ModelConfig {
  std::string architecture;  ///< as the file spells it; for messages only
  std::string name;          ///< as the file spells it; for messages only
  int num_layers = 0;
  int hidden_size = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int intermediate_size = 0;
  int vocab_size = 0;
  int max_position_embeddings = 0;
  float rms_norm_eps = 0.0f;
  RopeFacts rope;
  int sliding_window = 0;  ///< a token sees itself and the sliding_window - 1 before it; 0 = all before it
  bool tie_word_embeddings = false;
  bool qkv_bias = false;
  bool qk_norm = false;
  /// The file stores Q and K rows with rotary pairs interleaved (GGUF of the llama architecture).
  bool interleaved_qk_rows = false;

  int q_size() const { return num_heads * head_dim; }
  int kv_size() const { return num_kv_heads * head_dim; }
};

/// Throws format naming the fact unless every fact is positive and consistent (heads divide, dims fit).
void validate(const ModelConfig& config);

}  // namespace nb::model
