#include "model/config.h"

#include <cmath>

#include "base/error.h"

namespace nb::model {
namespace {

// Larger than any model this engine could hold, small enough that products of two facts fit 64 bits.
constexpr int kLargestFact = 1 << 24;

void check_fact(int value, const char* fact) {
  NB_CHECK(value > 0 && value <= kLargestFact, format, "model fact ", fact, " is ", value, ", outside [1, ",
           kLargestFact, "]");
}

}  // namespace

void validate(const ModelConfig& config) {
  check_fact(config.num_layers, "num_layers");
  check_fact(config.hidden_size, "hidden_size");
  check_fact(config.num_heads, "num_heads");
  check_fact(config.num_kv_heads, "num_kv_heads");
  check_fact(config.head_dim, "head_dim");
  check_fact(config.intermediate_size, "intermediate_size");
  check_fact(config.vocab_size, "vocab_size");
  check_fact(config.max_position_embeddings, "max_position_embeddings");
  NB_CHECK(config.num_heads % config.num_kv_heads == 0, format, "model facts: ", config.num_heads,
           " query heads cannot share ", config.num_kv_heads, " KV heads");
  NB_CHECK(config.head_dim % 2 == 0, format, "model fact head_dim is ", config.head_dim, ", rotation needs pairs");
  NB_CHECK(std::isfinite(config.rms_norm_eps) && config.rms_norm_eps >= 0.0f && config.rms_norm_eps < 1.0f, format,
           "model fact rms_norm_eps is ", config.rms_norm_eps);
  // The rotation table has a row per position; a file can claim any number of them.
  constexpr std::int64_t kMostAngles = std::int64_t{1} << 28;
  NB_CHECK(std::int64_t{config.max_position_embeddings} * config.head_dim <= kMostAngles, unsupported, "a context of ",
           config.max_position_embeddings, " positions with heads of ", config.head_dim,
           " is not offered: its rotation table would take more than 1 GiB");
  NB_CHECK(config.sliding_window >= 0, format, "model fact sliding_window is ", config.sliding_window);
  validate(config.rope, config.head_dim);
}

}  // namespace nb::model
