#include "model/read_config.h"

#include <charconv>
#include <set>
#include <string>
#include <string_view>

#include "base/error.h"
#include "io/tensor_rows.h"
#include "model/family.h"
#include "text/unicode.h"

namespace nb::model {
namespace {

// "blk.17.attn_q.weight" -> "blk.{}.attn_q.weight" if there is a layer 17; other names as they are.
std::string pattern_of(const std::string& name, int num_layers) {
  constexpr std::string_view kPrefix = "blk.";
  if (!name.starts_with(kPrefix)) return name;
  const char* const begin = name.data() + kPrefix.size();
  int layer = -1;
  const char* const end = std::from_chars(begin, name.data() + name.size(), layer).ptr;
  if (layer < 0 || layer >= num_layers || std::string(begin, end) != std::to_string(layer)) return name;
  return std::string(kPrefix) + "{}" + std::string(end, name.data() + name.size());
}

// A tensor nobody reads would be a part of the model that is silently left out.
void refuse_unused_tensors(const ModelConfig& config, const TensorNames& names, const io::ModelSource& source) {
  std::set<std::string> used = {
      names.embedding, names.final_norm, names.head,          names.attention_norm, names.q,
      names.k,         names.v,          names.attention_out, names.ffn_norm,       names.gate,
      names.up,        names.down,       names.rope_divisors};
  for (const char* matrix :
       {names.q, names.k, names.v, names.attention_out, names.gate, names.up, names.down, names.head}) {
    used.insert(io::order_name(matrix));
  }
  if (config.qkv_bias) used.insert({names.q_bias, names.k_bias, names.v_bias});
  if (config.qk_norm) used.insert({names.q_norm, names.k_norm});
  used.insert("blk.{}.attn_rot_embd.weight");  // old files: the frequencies once more, which follow from the facts
  for (const io::TensorInfo& tensor : source.tensors()) {
    NB_CHECK(used.contains(pattern_of(tensor.name, config.num_layers)), unsupported, source.path(), ": tensor ",
             text::in_quotes(tensor.name), " is no part of a ", config.architecture, " model of ", config.num_layers,
             " layers as nanobraid knows it");
  }
}

}  // namespace

ModelConfig read_config(const io::ModelSource& source) {
  const Family& family = find_family(std::string(source.metadata().string("general.architecture")));
  ModelConfig config = family.read_config(source);
  const io::TensorInfo* embedding = source.find(family.names.embedding);
  NB_CHECK(embedding != nullptr, format, "the model file has no tensor ", family.names.embedding);
  NB_CHECK(embedding->shape.size() == 2 && embedding->shape[0] < (1 << 24), format, "tensor ", family.names.embedding,
           " is not a matrix of vocabulary rows");
  config.vocab_size = static_cast<int>(embedding->shape[0]);
  config.tie_word_embeddings = source.find(family.names.head) == nullptr;
  validate(config);
  refuse_unused_tensors(config, family.names, source);
  return config;
}

}  // namespace nb::model
